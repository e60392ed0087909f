from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    MAX_REGIONS = 8

cdef struct Region:
    uint64_t gpa
    uint64_t size                    # bytes
    uint8_t* hva


cdef class GuestMemory:
    cdef Region regions[MAX_REGIONS]
    cdef int count
    cdef bint mergeable
    cdef bint huge_pages             # transparent ones
    cdef uint64_t page               # bytes of a page of hugetlbfs; 0: plain memory
    cdef bint prealloc
    cdef bint locked
    cdef bint from_file              # parts of it are a saved state's file, mapped privately

    cdef uint8_t* translate(self, uint64_t gpa, uint64_t length) noexcept nogil
    cdef int discard(self, uint8_t* hva, uint64_t length) noexcept nogil
    cdef int load(self, uint64_t gpa, void* target, uint64_t length) noexcept nogil
    cdef int store(self, uint64_t gpa, const void* source, uint64_t length) noexcept nogil
    cdef uint8_t* _require(self, uint64_t gpa, uint64_t length) except NULL
    cdef int _map(self, uint64_t gpa, uint64_t size) except -1
    cdef int _place(self, Region* region) except -1
