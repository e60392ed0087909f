from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmapp.abi.posix cimport iovec, pollfd
from kvmapp.abi.slirp cimport Slirp
from kvmapp.iothread cimport Waiter
from kvmapp.net.backend cimport NetBackend

cdef enum:
    FRAME_MOST = 65536
    SOCKETS_MOST = 4096              # that libslirp may have open for one guest


cdef class Router(Waiter):
    cdef Slirp* slirp
    cdef int bell                    # an eventfd, readable while frames wait and nobody else has told the card
    cdef bint rung
    cdef pollfd* polls
    cdef int poll_count
    cdef int poll_room
    cdef uint8_t* store              # frames for the guest, each behind its length: from `first` to `end`
    cdef uint32_t first
    cdef uint32_t end
    cdef uint32_t kept               # frames in there
    cdef bint calls                  # the card's reader is called as frames come
    cdef bint fed                    # libslirp has had frames since the last wait
    cdef uint64_t flow               # of the frame that libslirp has, 0 when it has none
    cdef uint64_t flows[SOCKETS_MOST]        # of each of its sockets: what the frame was for which it was opened
    cdef int sockets[SOCKETS_MOST]   # ... and its descriptor
    cdef int socket_count
    cdef int polled                  # descriptors that libslirp had polled at the last wait
    cdef uint64_t fragments_since    # ns; since then libslirp has had so many fragments
    cdef uint32_t fragments
    cdef readonly int sockets_most   # with so many a frame that needs one more is dropped
    cdef uint8_t frame[FRAME_MOST]   # the guest's, while libslirp has it

    cdef int forward(self, str text) except -1
    cdef bint is_crowded(self) noexcept nogil
    cdef bint keeps_fragment(self) noexcept nogil
    cdef bint has_room(self, uint64_t flow) noexcept nogil
    cdef void opened(self, int fd) noexcept nogil
    cdef void closed(self, int fd) noexcept nogil
    cdef void present(self, bint calls) noexcept nogil
    cdef int watch(self, int fd, short events) noexcept nogil
    cdef void give(self, const void* data, uint32_t length) noexcept nogil
    cdef ssize_t take(self, const iovec* vector, int count, uint32_t header) noexcept nogil


cdef class UserNet(NetBackend):
    cdef Router router
    cdef uint32_t header             # bytes before each frame, atomic
