from libc.stdint cimport uint8_t, uint32_t

from kvmapp.abi.posix cimport pollfd
from kvmapp.abi.slirp cimport Slirp
from kvmapp.net.backend cimport FrameDescriptor


cdef class UserNet(FrameDescriptor):
    cdef Slirp* slirp
    cdef int inner
    cdef int stop
    cdef bint congested
    cdef uint32_t header             # bytes before each frame, atomic
    cdef pollfd* polls
    cdef int poll_count
    cdef int poll_room
    cdef object runner
    cdef uint8_t frame[65536]

    cdef int forward(self, str text) except -1
    cdef void loop(self) noexcept nogil
    cdef bint take_frames(self) noexcept nogil
    cdef int watch(self, int fd, short events) noexcept nogil
    cdef ssize_t give(self, const void* data, size_t length) noexcept nogil
