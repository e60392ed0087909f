"""A load on a disk without Python in the loop: a number of requests always in flight, for a while. Compiled by bench/block.py."""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from kvmapp.abi.posix cimport CLOCK_MONOTONIC, clock_gettime, iovec, timespec
from kvmapp.block.backend cimport BlockBackend, BlockChannel, BlockClient, BlockRequest

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void** memory, size_t alignment, size_t size)


cdef uint64_t now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return <uint64_t>time.tv_sec * 1000000000 + time.tv_nsec


cdef class Load(BlockClient):
    """`depth` requests of `block` bytes, each at a random place or (sequential) behind the one before."""
    cdef BlockChannel channel
    cdef BlockRequest* requests
    cdef iovec* vectors
    cdef char* memory
    cdef uint32_t operation, block, depth
    cdef uint64_t blocks, place, seed, end
    cdef bint sequential
    cdef readonly uint64_t done
    cdef readonly uint64_t failed

    def __cinit__(self, BlockBackend disk not None, uint32_t operation, uint32_t block, uint32_t depth, bint sequential):
        self.operation, self.block, self.depth, self.sequential = operation, block, depth, sequential
        self.blocks = disk.size // block
        self.seed = 88172645463325252
        self.requests = <BlockRequest*>calloc(depth, sizeof(BlockRequest))
        self.vectors = <iovec*>calloc(depth, sizeof(iovec))
        if self.requests == NULL or self.vectors == NULL or posix_memalign(<void**>&self.memory, 4096, block * depth):
            raise MemoryError
        memset(self.memory, 1, block * depth)        # untouched, it were one page of zeroes all over
        self.channel = disk.open_channel(None, self)

    def __dealloc__(self):
        free(self.requests)
        free(self.vectors)
        free(self.memory)

    @property
    def engine(self):
        return self.channel.engine

    def run(self, uint64_t duration):
        """Keeps the disk busy for so many nanoseconds; how long it really took."""
        cdef uint64_t start = now()
        cdef uint32_t i
        self.done = self.failed = 0
        with nogil:
            self.end = start + duration
            for i in range(self.depth):
                self.send(i)
            self.channel.settle()
        return now() - start

    def close(self):
        self.channel.close()

    cdef void send(self, uint32_t i) noexcept nogil:
        cdef BlockRequest* request = &self.requests[i]
        if self.sequential:
            self.place = (self.place + 1) % self.blocks
        else:
            self.seed ^= self.seed << 13
            self.seed ^= self.seed >> 7
            self.seed ^= self.seed << 17
            self.place = self.seed % self.blocks
        self.vectors[i].iov_base = self.memory + <uint64_t>i * self.block
        self.vectors[i].iov_len = self.block
        request.operation = self.operation
        request.offset = self.place * self.block
        request.length = self.block
        request.vector = &self.vectors[i]
        request.vector_count = 1
        self.channel.submit(request)

    cdef void completed(self, BlockRequest* requests) noexcept nogil:
        cdef BlockRequest* after
        cdef bint more = now() < self.end
        while requests != NULL:
            after = requests.next
            self.done += 1
            self.failed += requests.result != 0
            if more:
                self.send(<uint32_t>(requests - self.requests))
            requests = after
