"""Guest memory: anonymous mappings that KVM shows to the guest as RAM, and the one checked way from gpa to hva.

Every address that comes out of the guest enters the host's address space through `translate`, which answers only for a range
that lies wholly inside one region. What it leaves out: regions are placed once, at the start (no memory hotplug).
"""
from cpython.buffer cimport PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.string cimport memcpy

from kvmapp.abi.posix cimport (MADV_DONTDUMP, MADV_DONTNEED, MADV_HUGEPAGE, MADV_MERGEABLE, MAP_ANONYMOUS, MAP_FAILED,
                               MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, errno, madvise, mmap, munmap)

import os

from kvmapp.errors import HostError
from kvmapp.layout import HIGH_MEMORY_BASE, LOW_MEMORY_END

cdef enum:
    PAGE_SIZE = 4096


class GuestAddressError(ValueError):
    """A guest-physical range that is not wholly RAM."""


cdef class GuestMemory:
    """The guest's RAM, `size` bytes (a multiple of 4 KiB), split around the PCI hole.

    The mappings live until the object dies; every thread that touches guest memory holds a reference to it.
    """

    def __cinit__(self, uint64_t size, *, bint mergeable=False, bint huge_pages=True):
        """Maps the memory. Raises ValueError for an odd size, HostError where the host refuses."""
        self.count = 0
        if size == 0 or size % PAGE_SIZE:
            raise ValueError(f"guest memory must be a multiple of {PAGE_SIZE} bytes, not {size}")
        cdef uint64_t low = min(size, LOW_MEMORY_END)
        self._map(0, low, mergeable, huge_pages)
        if size > low:
            self._map(HIGH_MEMORY_BASE, size - low, mergeable, huge_pages)

    def __dealloc__(self):
        cdef int i
        for i in range(self.count):
            munmap(self.regions[i].hva, self.regions[i].size)

    @property
    def ranges(self):
        """[(gpa, size in bytes)] in ascending order."""
        return [(self.regions[i].gpa, self.regions[i].size) for i in range(self.count)]

    @property
    def size(self):
        """RAM in bytes."""
        return sum(size for _, size in self.ranges)

    def view(self, uint64_t gpa, uint64_t length):
        """A writable memoryview straight onto guest RAM; it must not outlive this object. Raises GuestAddressError."""
        return PyMemoryView_FromMemory(<char*>self._require(gpa, length), length, PyBUF_WRITE)

    def read(self, uint64_t gpa, uint64_t length):
        """`length` bytes of guest RAM. Raises GuestAddressError."""
        return (<char*>self._require(gpa, length))[:length]

    def write(self, uint64_t gpa, const uint8_t[::1] data not None):
        """Copies `data` into guest RAM. Raises GuestAddressError."""
        cdef uint8_t* target = self._require(gpa, data.shape[0])
        if data.shape[0]:
            memcpy(target, &data[0], data.shape[0])

    def clear(self):
        """Gives every page back to the host: the guest reads zeroes, as after a power cycle."""
        cdef int i
        for i in range(self.count):
            madvise(self.regions[i].hva, self.regions[i].size, MADV_DONTNEED)

    cdef uint8_t* translate(self, uint64_t gpa, uint64_t length) noexcept nogil:
        """The hva of [gpa, gpa + length), or NULL unless one region holds all of it. No sum here can wrap."""
        cdef Region* region
        cdef int i
        for i in range(self.count):
            region = &self.regions[i]
            if gpa >= region.gpa and gpa - region.gpa < region.size and length <= region.size - (gpa - region.gpa):
                return region.hva + (gpa - region.gpa)
        return NULL

    cdef int discard(self, uint8_t* hva, uint64_t length) noexcept nogil:
        """Gives the whole pages in this range (of an earlier `translate`) back to the host; what the guest reads there is void
        until it writes. 0, or -errno where the host cannot."""
        cdef uint64_t first = (<uint64_t>hva + PAGE_SIZE - 1) & ~<uint64_t>(PAGE_SIZE - 1)
        cdef uint64_t end = (<uint64_t>hva + length) & ~<uint64_t>(PAGE_SIZE - 1)
        if end <= first:
            return 0
        return 0 if madvise(<void*>first, end - first, MADV_DONTNEED) == 0 else -errno

    cdef int load(self, uint64_t gpa, void* target, uint64_t length) noexcept nogil:
        """Copies out of guest RAM; 0, or -1 when the range is not RAM."""
        cdef uint8_t* source = self.translate(gpa, length)
        if source == NULL:
            return -1
        memcpy(target, source, length)
        return 0

    cdef int store(self, uint64_t gpa, const void* source, uint64_t length) noexcept nogil:
        """Copies into guest RAM; 0, or -1 when the range is not RAM."""
        cdef uint8_t* target = self.translate(gpa, length)
        if target == NULL:
            return -1
        memcpy(target, source, length)
        return 0

    cdef uint8_t* _require(self, uint64_t gpa, uint64_t length) except NULL:
        cdef uint8_t* hva = self.translate(gpa, length)
        if hva == NULL:
            raise GuestAddressError(f"guest address {gpa:#x} (+{length:#x} bytes) is not in RAM")
        return hva

    cdef int _map(self, uint64_t gpa, uint64_t size, bint mergeable, bint huge_pages) except -1:
        cdef void* hva = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if hva == MAP_FAILED:
            raise HostError(f"Cannot allocate {size >> 20} MiB of guest memory: {os.strerror(errno)}",
                            hint="lower the domain's memory, or see ulimit -v and vm.overcommit_memory")
        # Advice only: a kernel without the feature refuses, and the guest runs all the same.
        madvise(hva, size, MADV_DONTDUMP)
        if huge_pages:
            madvise(hva, size, MADV_HUGEPAGE)
        if mergeable:
            madvise(hva, size, MADV_MERGEABLE)
        self.regions[self.count].gpa = gpa
        self.regions[self.count].size = size
        self.regions[self.count].hva = <uint8_t*>hva
        self.count += 1
        return 0
