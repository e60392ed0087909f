from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    MAX_REGIONS = 8
    NODE_WORDS = 16                  # of 64 NUMA nodes each

cdef struct Region:
    uint64_t gpa
    uint64_t size                    # bytes
    uint8_t* hva
    int fd                           # its memfd, all of it from offset 0, where the memory is shared; else -1


cdef class GuestMemory:
    cdef Region regions[MAX_REGIONS]
    cdef int count
    cdef bint mergeable
    cdef bint huge_pages             # transparent ones
    cdef uint64_t page               # bytes of a page of hugetlbfs; 0: plain memory
    cdef bint prealloc
    cdef bint locked
    cdef int policy                  # of mbind(2); 0: wherever the host has memory
    cdef uint64_t nodes[NODE_WORDS]
    cdef bint shared
    cdef bint from_file              # parts of it are a saved state's file, mapped privately

    cdef uint8_t* translate(self, uint64_t gpa, uint64_t length) noexcept nogil
    cdef int discard(self, uint8_t* hva, uint64_t length) noexcept nogil
    cdef int load(self, uint64_t gpa, void* target, uint64_t length) noexcept nogil
    cdef int store(self, uint64_t gpa, const void* source, uint64_t length) noexcept nogil
    cdef bint is_kept(self) noexcept nogil
    cdef uint8_t* _require(self, uint64_t gpa, uint64_t length) except NULL
    cdef int _map(self, uint64_t gpa, uint64_t size) except -1
    cdef int _file(self, uint64_t size) except -1
    cdef int _place(self, Region* region) except -1
    cdef int _bind(self, void* hva, uint64_t length) except -1
