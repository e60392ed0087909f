from libc.stdint cimport uint32_t, uint64_t

from kvmapp.block.backend cimport BlockBackend, BlockChannel, BlockQueue, BlockRequest
from kvmapp.block.transfer cimport HostFile
from kvmapp.block.workers cimport Workers
from kvmapp.iothread cimport EventSource


cdef class ChannelEvent(EventSource):
    cdef BlockChannel channel


cdef class FileChannel(BlockChannel):
    cdef HostFile* file
    cdef Workers workers
    cdef ChannelEvent workers_event
    cdef BlockQueue queued           # not yet the host's
    cdef uint32_t with_workers       # those that threads carry
    cdef uint64_t wary_until         # the host lets writers to its page cache wait: threads shall do it

    cdef int attach(self, BlockBackend disk, HostFile* file, object thread) except -1
    cdef bint place(self, BlockRequest* request) noexcept nogil
    cdef bint copy_alone(self, BlockRequest* request) noexcept nogil
    cdef void give_workers(self, BlockRequest* request) noexcept nogil
    cdef void launch(self) noexcept nogil
