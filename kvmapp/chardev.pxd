from libc.stdint cimport uint8_t, uint32_t

from kvmapp.abi.posix cimport pthread_mutex_t

cdef struct Ring:
    uint8_t* data
    uint32_t size                    # bytes, a power of two
    uint32_t head                    # bytes ever put; wraps
    uint32_t tail                    # bytes ever got; wraps


cdef class CharUser:
    cdef void input_ready(self) noexcept nogil
    cdef void output_space(self) noexcept nogil


cdef class CharBackend:
    cdef readonly str name
    cdef readonly int fd
    cdef pthread_mutex_t lock
    cdef Ring output
    cdef Ring input
    cdef CharUser user
    cdef bint discarding
    cdef bint refused_output         # the device was told "full" and waits for output_space
    cdef bint refused_input          # the control thread was told "full" and waits for fd

    cdef uint32_t put(self, const uint8_t* data, uint32_t count) noexcept nogil
    cdef uint32_t get(self, uint8_t* data, uint32_t most) noexcept nogil
    cdef void ring_bell(self) noexcept nogil
