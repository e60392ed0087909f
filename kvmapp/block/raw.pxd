from libc.stdint cimport uint32_t, uint64_t

from kvmapp.block.backend cimport BlockBackend
from kvmapp.block.transfer cimport HostFile


cdef class RawDisk(BlockBackend):
    cdef HostFile file
    cdef readonly str path
    cdef readonly str io
    cdef readonly bint direct

    cdef uint64_t look_at_length(self) except 0
    cdef int take_length(self, uint64_t length) except -1
    cdef int find_alignment(self, uint32_t alignment) except -1
    cdef int check_end(self, uint64_t length) except -1
