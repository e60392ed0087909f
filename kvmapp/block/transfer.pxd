from libc.stdint cimport uint32_t, uint64_t

from kvmapp.abi.posix cimport pthread_mutex_t
from kvmapp.block.backend cimport BlockRequest

# What a host's descriptor can do was learnt from its refusals; nothing is tried twice.
cdef enum FileLack:
    LACKS_DISCARD = 1                # and punching holes
    LACKS_ZERO_RANGE = 2
    LACKS_NOWAIT_READ = 4
    LACKS_NOWAIT_WRITE = 8

# A host's file or block device. Shared by all threads that work on it; what changes does so one way only.
cdef struct HostFile:
    int fd
    bint is_device
    bint ignore_flush                # cache=unsafe
    bint write_through               # every write is on stable storage when it is done
    bint discard                     # freed blocks are given back
    uint32_t alignment               # of memory, offset and length: 1 unless the descriptor is O_DIRECT
    uint64_t size                    # bytes of the disk
    uint64_t end                     # bytes that the file has; from there to `size` (less than a sector) are zeroes
    uint32_t lacks                   # FileLack
    pthread_mutex_t rewriting        # held by whoever changes part of a block and so writes the rest of it anew
    pthread_mutex_t flushing         # held by the flush that asks the kernel
    uint32_t flushes                 # atomic: how many have begun
    int flush_error                  # -errno of the first flush that failed: what it lost stays lost, so all later ones fail

cdef int perform(HostFile* file, BlockRequest* request) noexcept nogil
cdef bint try_at_once(HostFile* file, BlockRequest* request) noexcept nogil
cdef bint is_copy(HostFile* file, BlockRequest* request) noexcept nogil
cdef bint needs_sync(HostFile* file, BlockRequest* request) noexcept nogil
cdef bint is_misaligned(HostFile* file, BlockRequest* request) noexcept nogil
cdef void advance(BlockRequest* request, uint64_t count) noexcept nogil
cdef void note_write(HostFile* file, BlockRequest* request) noexcept nogil
cdef int flush(HostFile* file) noexcept nogil
