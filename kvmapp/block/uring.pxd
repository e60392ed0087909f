from libc.stdint cimport uint32_t

from kvmapp.abi.io_uring cimport io_uring, io_uring_cqe
from kvmapp.block.backend cimport BlockRequest
from kvmapp.block.file cimport ChannelEvent, FileChannel


cdef class UringChannel(FileChannel):
    cdef io_uring ring
    cdef bint has_ring
    cdef ChannelEvent ring_event
    cdef uint32_t room               # completions that the ring holds
    cdef uint32_t in_ring

    cdef int open_ring(self, bint polled) except -1
    cdef void take(self, io_uring_cqe* cqe) noexcept nogil
