from libc.stdint cimport uint32_t

from kvmapp.block.backend cimport BlockBackend
from kvmapp.block.transfer cimport HostFile


cdef class RawDisk(BlockBackend):
    cdef HostFile file
    cdef readonly str path
    cdef readonly str io
    cdef readonly bint direct

    cdef int measure(self) except -1
    cdef int find_alignment(self, uint32_t alignment) except -1
