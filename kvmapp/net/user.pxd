from libc.stdint cimport uint8_t, uint32_t

from kvmapp.abi.posix cimport iovec, pollfd
from kvmapp.abi.slirp cimport Slirp
from kvmapp.iothread cimport Waiter
from kvmapp.net.backend cimport NetBackend

cdef enum:
    FRAME_MOST = 65536


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
    cdef uint8_t frame[FRAME_MOST]   # the guest's, while libslirp has it

    cdef int forward(self, str text) except -1
    cdef void present(self, bint calls) noexcept nogil
    cdef int watch(self, int fd, short events) noexcept nogil
    cdef void give(self, const void* data, uint32_t length) noexcept nogil
    cdef ssize_t take(self, const iovec* vector, int count, uint32_t header) noexcept nogil


cdef class UserNet(NetBackend):
    cdef Router router
    cdef uint32_t header             # bytes before each frame, atomic
