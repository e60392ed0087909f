from libc.stdint cimport int64_t, uint32_t, uint64_t

from kvmapp.virtio.virtqueue cimport Chain

cdef enum:
    WINDOW = 65536                   # bytes of the guest's under way to a socket
    LINE_MOST = 32
    GREETING_WRONG = -1
    GREETING_UNFINISHED = -2

cdef enum ConnectionState:
    FREE
    GREETING                         # a program of the host has connected and said nothing yet
    ASKED                            # ... and the guest is asked whether it accepts
    OPEN
    DYING                            # the guest is to be told

cdef enum Wish:                      # what the guest is to be told, first things first
    TELL_RESET = 1
    TELL_REQUEST = 2
    TELL_RESPONSE = 4
    TELL_CREDIT = 8

cdef struct Connection:
    ConnectionState state
    int fd
    uint32_t host_port
    uint32_t guest_port
    uint32_t wishes
    bint readable                    # the socket may have bytes, or an end
    bint writable
    bint hung_up                     # the socket's other end is closed for both directions
    bint host_ended                  # the guest was told that no more bytes come
    bint guest_ended                 # the guest sends no more
    bint guest_deaf                  # the guest receives no more
    uint32_t guest_window            # buf_alloc and fwd_cnt of the guest
    uint32_t guest_taken
    uint32_t sent                    # bytes to the guest, ever
    uint32_t taken                   # bytes of the guest's that the socket took, ever
    uint32_t told                    # ... as the guest knows it
    uint32_t start                   # bytes that wait for the socket: kept[start .. start + count]
    uint32_t count
    unsigned char* kept              # WINDOW bytes, once there is need

cdef bint wants(Connection* connection) noexcept nogil
cdef uint32_t credit(Connection* connection) noexcept nogil
cdef void take_bytes(Connection* connection, Chain* chain, uint32_t length) noexcept nogil
cdef int64_t greeting(Connection* connection) noexcept nogil
cdef void flush(Connection* connection) noexcept nogil
cdef void settle(Connection* connection) noexcept nogil
cdef void kill(Connection* connection) noexcept nogil
cdef void end(Connection* connection) noexcept nogil
