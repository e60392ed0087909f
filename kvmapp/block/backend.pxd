from libc.stdint cimport uint32_t, uint64_t

from kvmapp.abi.posix cimport iovec
from kvmapp.iothread cimport IoThread

cpdef enum BlockOperation:
    BLOCK_READ = 0
    BLOCK_WRITE = 1
    BLOCK_FLUSH = 2                  # what was written and done before this came is on stable storage when it is done
    BLOCK_DISCARD = 3                # the bytes are not needed; what they read as afterwards is anyone's guess
    BLOCK_WRITE_ZEROES = 4

cdef enum:
    BLOCK_OPERATIONS = 5
    BLOCK_SECTOR = 512               # offsets, lengths and sizes are multiples of it

cpdef enum BlockFlag:
    BLOCK_FUA = 1                    # WRITE and WRITE_ZEROES: on stable storage when done
    BLOCK_MAY_UNMAP = 2              # WRITE_ZEROES: a hole will do

# One request, the submitter's memory. From `submit` until it comes back through `completed` it belongs to the channel.
cdef struct BlockRequest:
    uint32_t operation               # BlockOperation
    uint32_t flags                   # BlockFlag
    uint64_t offset                  # bytes
    uint64_t length                  # bytes; 0 for FLUSH
    iovec* vector                    # READ, WRITE: memory of `length` bytes in all; the channel uses the array up
    uint32_t vector_count
    int result                       # 0 or -errno, when it is back
    uint64_t moved                   # the channel's: bytes done so far
    uint64_t began                   # the channel's: when it was submitted, ns of CLOCK_MONOTONIC
    BlockRequest* next               # the list it stands in, whoever holds it

cdef struct BlockQueue:
    BlockRequest* first
    BlockRequest* last

cdef struct BlockCounters:
    uint64_t requests
    uint64_t bytes
    uint64_t errors
    uint64_t nanoseconds


cdef uint64_t block_now() noexcept nogil                     # ns of CLOCK_MONOTONIC


cdef inline void block_push(BlockQueue* queue, BlockRequest* request) noexcept nogil:
    request.next = NULL
    if queue.last == NULL:
        queue.first = request
    else:
        queue.last.next = request
    queue.last = request


cdef inline BlockRequest* block_pop(BlockQueue* queue) noexcept nogil:
    cdef BlockRequest* request = queue.first
    if request != NULL:
        queue.first = request.next
        if queue.first == NULL:
            queue.last = NULL
    return request


cdef inline BlockRequest* block_take_all(BlockQueue* queue) noexcept nogil:
    cdef BlockRequest* first = queue.first
    queue.first = queue.last = NULL
    return first


cdef class BlockClient:
    cdef void completed(self, BlockRequest* requests) noexcept nogil


cdef class BlockBackend:
    cdef readonly str name
    cdef readonly uint64_t size
    cdef readonly bint read_only
    cdef readonly bint write_cache
    cdef readonly uint32_t physical_block
    cdef readonly uint32_t discard_granularity
    cdef readonly bint closed
    cdef list channels

    cdef BlockChannel make_channel(self, IoThread thread)


cdef class BlockChannel:
    cdef readonly BlockBackend disk
    cdef readonly IoThread thread
    cdef readonly uint32_t in_flight
    cdef readonly bint closed
    cdef BlockClient client
    cdef bint committing
    cdef BlockQueue finished
    cdef BlockCounters counters[BLOCK_OPERATIONS]

    cdef void submit(self, BlockRequest* request) noexcept nogil
    cdef void resubmit(self, BlockRequest* request) noexcept nogil
    cdef void commit(self) noexcept nogil
    cdef void accept(self, BlockRequest* request) noexcept nogil
    cdef void start(self) noexcept nogil
    cdef void collect(self) noexcept nogil
    cdef bint has_done(self) noexcept nogil
    cdef void wait(self) noexcept nogil
    cdef void release(self) noexcept
    cdef void finish(self, BlockRequest* request, int result) noexcept nogil
    cdef void deliver(self) noexcept nogil
    cdef void settle(self) noexcept nogil
