"""Guest memory: mappings that KVM shows to the guest as RAM, and the one checked way from gpa to hva.

Every address that comes out of the guest enters the host's address space through `translate`, which answers only for a range
that lies wholly inside one region. A restored guest's memory is its file, mapped privately: a page is read when it is first
touched, and never written back. Memory is private to this process, unless another one is to work on it too (vhost-user): then
each region is a memfd, whose pages KSM cannot merge, whose transparent huge pages depend on /sys/kernel/mm/transparent_hugepage/
shmem_enabled, and over which no saved file can be mapped. Left out: regions that come and go (memory hotplug).
"""
from cpython.buffer cimport PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.string cimport memcmp, memcpy, memset

from kvmapp.abi.posix cimport (MADV_DONTDUMP, MADV_DONTNEED, MADV_HUGEPAGE, MADV_MERGEABLE, MADV_REMOVE, MAP_ANONYMOUS, MAP_FAILED,
                               MAP_FIXED, MAP_HUGETLB, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, bind_memory,
                               close, errno, madvise, mlock, mmap, munmap)

import os

from kvmapp.errors import HostError
from kvmapp.layout import HIGH_MEMORY_BASE, LOW_MEMORY_END

cdef enum:
    PAGE_SIZE = 4096
    MAP_HUGE_SHIFT = 26                                # mmap(2), memfd_create(2): log2 of the page size goes there
    MFD_CLOEXEC = 1
    MFD_HUGETLB = 4


class GuestAddressError(ValueError):
    """A guest-physical range that is not wholly RAM."""


cdef class GuestMemory:
    """The guest's RAM, `size` bytes (a multiple of 4 KiB), split around the PCI hole.

    The mappings live until the object dies; every thread that touches guest memory holds a reference to it.
    """

    def __cinit__(self, uint64_t size, *, bint mergeable=False, bint huge_pages=True, uint64_t page=0, bint prealloc=False,
                  bint locked=False, int policy=0, nodes=(), bint shared=False):
        """Maps the memory. `mergeable`: for KSM; `huge_pages`: transparent ones; `page`: bytes of the pages of hugetlbfs to take;
        `prealloc`: all of it now; `locked`: never swapped; `policy` (mbind(2)): from these NUMA nodes; `shared`: another process may
        map it (`Region.fd`). Raises ValueError for an odd size, HostError where the host refuses.
        """
        self.policy, self.shared = policy, shared
        for node in nodes:
            self.nodes[<unsigned int>node // 64 % NODE_WORDS] |= <uint64_t>1 << (<unsigned int>node % 64)
        self.page, self.prealloc, self.locked = page, prealloc, locked
        self.mergeable, self.huge_pages = mergeable, huge_pages
        if size == 0 or size % PAGE_SIZE:
            raise ValueError(f"guest memory must be a multiple of {PAGE_SIZE} bytes, not {size}")
        if page and (size % page or LOW_MEMORY_END % page):
            raise HostError(f"{size >> 10} KiB of guest memory are not made of pages of {page >> 10} KiB",
                            "make the domain's memory a multiple of that, or take hugepages away")
        cdef uint64_t low = min(size, LOW_MEMORY_END)
        self._map(0, low)
        if size > low:
            self._map(HIGH_MEMORY_BASE, size - low)

    def __dealloc__(self):
        cdef int i
        for i in range(self.count):
            munmap(self.regions[i].hva, self.regions[i].size)
            if self.regions[i].fd >= 0:
                close(self.regions[i].fd)

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

    def write(self, uint64_t gpa, data not None):
        """Copies `data` (bytes or the like) into guest RAM. Raises GuestAddressError."""
        cdef bytes content = data if type(data) is bytes else bytes(memoryview(data))
        cdef uint8_t* target = self._require(gpa, len(content))
        memcpy(target, <const char*>content, len(content))

    @property
    def is_pageable(self):
        """Whether a file can be mapped over any of its pages."""
        return not (self.is_kept() or self.shared)

    @property
    def is_shared(self):
        """Whether another process can map it."""
        return bool(self.shared)

    def clear(self):
        """Gives every page back to the host, or clears those that are kept: the guest reads zeroes, as after a power cycle. Raises
        HostError."""
        cdef int i
        for i in range(self.count):
            if self.is_kept():
                memset(self.regions[i].hva, 0, self.regions[i].size)
            elif self.shared:
                if madvise(self.regions[i].hva, self.regions[i].size, MADV_REMOVE) < 0:
                    memset(self.regions[i].hva, 0, self.regions[i].size)
            elif self.from_file:                         # DONTNEED would bring the file's contents back
                self._place(&self.regions[i])
            else:
                madvise(self.regions[i].hva, self.regions[i].size, MADV_DONTNEED)
        self.from_file = False

    def runs(self, uint64_t granule):
        """[(gpa, length)] of what is not zero, ascending, in units of `granule` bytes (a power of two from 4096 on)."""
        found = []
        cdef uint64_t start, end
        cdef Region* region
        cdef int i
        for i in range(self.count):
            region = &self.regions[i]
            start = end = 0
            while end < region.size:
                with nogil:
                    start = end
                    while start < region.size and is_zero(region.hva + start, min(granule, region.size - start)):
                        start += granule
                    end = start
                    while end < region.size and not is_zero(region.hva + end, min(granule, region.size - end)):
                        end += granule
                    end = min(end, region.size)
                if start < end:
                    found.append((region.gpa + start, end - start))
        return found

    def map_file(self, int fd, uint64_t gpa, uint64_t length, uint64_t offset):
        """Makes [gpa, gpa + length) show these bytes of the file; all of it in whole pages. Raises GuestAddressError, HostError."""
        cdef uint8_t* target = self._require(gpa, length)
        if (gpa | length | offset) % PAGE_SIZE:
            raise ValueError(f"{gpa:#x}+{length:#x} from {offset:#x} is not made of pages")
        if mmap(target, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, offset) == MAP_FAILED:
            raise HostError(f"Cannot map {length >> 10} KiB of saved memory: {os.strerror(errno)}",
                            "see ulimit -v and vm.max_map_count")
        madvise(target, length, MADV_DONTDUMP)
        if self.mergeable:
            madvise(target, length, MADV_MERGEABLE)
        self._bind(target, length)                       # of the pages that the guest writes; those of the file are the page cache's
        self.from_file = True

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
        until it writes. 0, or -errno where the host cannot. Memory that is kept stays: parts of huge pages cannot be given back, on
        some kernels the whole page goes with them, and another guest may take its place."""
        cdef uint64_t first = (<uint64_t>hva + PAGE_SIZE - 1) & ~<uint64_t>(PAGE_SIZE - 1)
        cdef uint64_t end = (<uint64_t>hva + length) & ~<uint64_t>(PAGE_SIZE - 1)
        if end <= first or self.is_kept():
            return 0
        return 0 if madvise(<void*>first, end - first, MADV_REMOVE if self.shared else MADV_DONTNEED) == 0 else -errno

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

    cdef bint is_kept(self) noexcept nogil:
        """Whether pages stay the host's to hold even when the guest does not need them."""
        return self.page != 0 or self.prealloc or self.locked

    cdef int _map(self, uint64_t gpa, uint64_t size) except -1:
        cdef Region* region = &self.regions[self.count]
        region.gpa, region.size, region.hva, region.fd = gpa, size, NULL, -1
        if self.shared:
            region.fd = self._file(size)
        try:
            self._place(region)
        except BaseException:
            if region.fd >= 0:
                close(region.fd)
            raise
        self.count += 1
        return 0

    cdef int _file(self, uint64_t size) except -1:
        """A memfd of `size` bytes (memfd_create(2))."""
        flags = MFD_CLOEXEC
        if self.page:
            flags |= MFD_HUGETLB | ((<object>self.page).bit_length() - 1) << MAP_HUGE_SHIFT
        fd, why = -1, "the C library has no memfd_create"
        try:
            if hasattr(os, "memfd_create"):
                fd = os.memfd_create("guest-memory", flags)
                os.ftruncate(fd, size)
                return fd
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            why = error.strerror
        raise HostError(f"Cannot make {size >> 20} MiB of guest memory that a file server can share: {why}",
                        "memfd_create(2) wants Linux 3.17, and 4.14 for huge pages")

    cdef int _place(self, Region* region) except -1:
        """Maps fresh zeroes for the region, in the place of what it had."""
        cdef int flags = (MAP_SHARED if region.fd >= 0 else MAP_PRIVATE | MAP_ANONYMOUS) | (MAP_FIXED if region.hva != NULL else 0)
        if self.page:                                  # not MAP_NORESERVE: a pool that is too small is to be noticed here
            flags |= MAP_HUGETLB | ((<object>self.page).bit_length() - 1) << MAP_HUGE_SHIFT if region.fd < 0 else 0
        else:
            flags |= MAP_NORESERVE
        cdef void* hva = mmap(region.hva, region.size, PROT_READ | PROT_WRITE, flags, region.fd, 0)
        if hva == MAP_FAILED and self.page:
            raise HostError(f"Cannot allocate {region.size >> 20} MiB of guest memory in huge pages of {self.page >> 10} KiB: "
                            f"{os.strerror(errno)}",
                            f"echo N > /sys/kernel/mm/hugepages/hugepages-{self.page >> 10}kB/nr_hugepages makes N of them")
        if hva == MAP_FAILED:
            raise HostError(f"Cannot allocate {region.size >> 20} MiB of guest memory: {os.strerror(errno)}",
                            hint="lower the domain's memory, or see ulimit -v and vm.overcommit_memory")
        region.hva = <uint8_t*>hva
        self._bind(hva, region.size)                     # before anything is touched
        # Advice only: a kernel without the feature refuses, and the guest runs all the same.
        madvise(hva, region.size, MADV_DONTDUMP)
        if self.huge_pages:
            madvise(hva, region.size, MADV_HUGEPAGE)
        if self.mergeable:
            madvise(hva, region.size, MADV_MERGEABLE)
        if self.locked and mlock(hva, region.size) < 0:
            raise HostError(f"Cannot lock {region.size >> 20} MiB of guest memory: {os.strerror(errno)}",
                            "raise the limit (ulimit -l, LimitMEMLOCK=), or take locked away")
        if self.prealloc:
            touch(region.hva, region.size)
        return 0

    cdef int _bind(self, void* hva, uint64_t length) except -1:
        """Which NUMA nodes the pages come from that are not there yet. The kernel takes one bit less than it is told of."""
        if self.policy and bind_memory(hva, length, self.policy, self.nodes, NODE_WORDS * 64 + 1) < 0:
            raise HostError(f"Cannot bind {length >> 20} MiB of guest memory to its NUMA nodes: {os.strerror(errno)}",
                            "take [numatune] away where the host's kernel is without NUMA, or forbids mbind")
        return 0


cdef void touch(volatile uint8_t* data, uint64_t size) noexcept:
    """Makes the host give every page of fresh memory now."""
    cdef uint64_t at = 0
    with nogil:
        while at < size:
            data[at] = 0
            at += PAGE_SIZE


cdef bint is_zero(const uint8_t* data, uint64_t size) noexcept nogil:
    """`size` is 1 or more. Each byte equals the one before it, and the first is zero."""
    return data[0] == 0 and memcmp(data, data + 1, size - 1) == 0
