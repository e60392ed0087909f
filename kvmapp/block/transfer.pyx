"""One request on a host's file, from beginning to end, by plain system calls that wait: what every engine falls back on.

Short transfers go on, EINTR tries again, the missing end of a file whose length is no multiple of 512 reads as zeroes, and what
O_DIRECT does not take (memory, offset or length off its alignment) goes through a buffer. A file that ends earlier than it did
when it was opened gives EIO: zeroes there would be invented data.

A write of less than a block of the host's writes the rest of the block anew. Two requests that do not overlap can meet in one
block only when both are such, so these take turns, over all channels (HostFile.rewriting).
"""
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from kvmapp.abi.blockdev cimport BLKDISCARD, RWF_NOWAIT, preadv2, pwritev2
from kvmapp.abi.posix cimport (EDQUOT, EINTR, EINVAL, EIO, ENODEV, ENOMEM, ENOSPC, ENOSYS, ENOTTY, EOPNOTSUPP, FALLOC_FL_KEEP_SIZE,
                               FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, atomic_load_u32, atomic_store_u32, errno, fallocate, fdatasync,
                               ioctl, pread, preadv, pthread_mutex_lock, pthread_mutex_unlock, pwrite, pwritev)
from kvmapp.block.backend cimport (BLOCK_DISCARD, BLOCK_FLUSH, BLOCK_FUA, BLOCK_MAY_UNMAP, BLOCK_READ, BLOCK_WRITE,
                                   BLOCK_WRITE_ZEROES)

from libc.stdint cimport uint8_t, uint32_t, uintptr_t

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void** memory, size_t alignment, size_t size)

cdef enum:
    VECTOR_MOST = 1024               # IOV_MAX
    BUFFER_SIZE = 1 << 20            # of the detour; a multiple of every alignment
    BUFFER_ALIGNMENT = 4096


cdef int perform(HostFile* file, BlockRequest* request) noexcept nogil:
    """Does what is left of the request; 0 or -errno."""
    cdef int result
    if request.operation == BLOCK_READ:
        return read_all(file, request)
    if request.operation == BLOCK_FLUSH:
        return flush(file)
    if request.operation == BLOCK_DISCARD:
        return discard(file, request)
    if request.operation == BLOCK_WRITE:
        result = write_all(file, request)
    else:
        result = write_zeroes(file, request)
    if result == 0 and needs_sync(file, request) and flush(file) < 0:
        result = -EIO                # whatever it was: to write this anew would not bring back what a failed flush lost
    return result


cdef bint try_at_once(HostFile* file, BlockRequest* request) noexcept nogil:
    """Does a read or write if the page cache can take it without waiting; whether all of it is done."""
    cdef ssize_t count
    cdef uint32_t lack = LACKS_NOWAIT_READ if request.operation == BLOCK_READ else LACKS_NOWAIT_WRITE
    if file.alignment > 1 or file.lacks & lack or needs_sync(file, request) or request.vector_count > VECTOR_MOST:
        return False
    if request.operation == BLOCK_READ:
        count = preadv2(file.fd, request.vector, request.vector_count, request.offset + request.moved, RWF_NOWAIT)
    elif request.operation == BLOCK_WRITE:
        count = pwritev2(file.fd, request.vector, request.vector_count, request.offset + request.moved, RWF_NOWAIT)
    else:
        return False
    if count > 0:
        advance(request, count)
        if request.operation == BLOCK_WRITE:
            note_write(file, request)
    elif count < 0 and is_refusal(-errno):
        file.lacks |= lack           # any other error comes back from the call that waits
    return request.moved == request.length


cdef bint is_copy(HostFile* file, BlockRequest* request) noexcept nogil:
    """Whether it only fills the page cache, as a rule without waiting for the disk."""
    return request.operation == BLOCK_WRITE and file.alignment == 1 and not needs_sync(file, request)


cdef bint needs_sync(HostFile* file, BlockRequest* request) noexcept nogil:
    """Whether the change that it makes shall be on stable storage when it is done."""
    return ((request.operation == BLOCK_WRITE or request.operation == BLOCK_WRITE_ZEROES) and not file.ignore_flush
            and (file.write_through or request.flags & BLOCK_FUA))


cdef bint is_misaligned(HostFile* file, BlockRequest* request) noexcept nogil:
    """Whether O_DIRECT would refuse what is left of the request."""
    cdef uint64_t bits = request.offset | request.length | request.moved
    cdef uint32_t i
    if file.alignment <= 1:
        return False
    for i in range(request.vector_count):
        bits |= <uintptr_t>request.vector[i].iov_base | request.vector[i].iov_len
    return bits & (file.alignment - 1) != 0


cdef void advance(BlockRequest* request, uint64_t count) noexcept nogil:
    """`count` bytes more are done."""
    request.moved += count
    while count and request.vector_count:
        if count < request.vector.iov_len:
            request.vector.iov_base = <uint8_t*>request.vector.iov_base + count
            request.vector.iov_len -= count
            return
        count -= request.vector.iov_len
        request.vector += 1
        request.vector_count -= 1


cdef void note_write(HostFile* file, BlockRequest* request) noexcept nogil:
    """A write to the last, incomplete sector completes it."""
    if request.offset + request.moved > file.end:
        file.end = file.size


cdef int read_all(HostFile* file, BlockRequest* request) noexcept nogil:
    cdef ssize_t count
    cdef uint64_t position
    while request.moved < request.length:
        position = request.offset + request.moved
        if position >= file.end:
            return copy_out(request, NULL, request.length - request.moved)
        if is_misaligned(file, request):
            return detour(file, request)
        count = preadv(file.fd, request.vector, min(request.vector_count, <uint32_t>VECTOR_MOST), position)
        if count < 0 and errno != EINTR:
            return -errno
        if count == 0:
            return -EIO
        if count > 0:
            advance(request, count)
    return 0


cdef int write_all(HostFile* file, BlockRequest* request) noexcept nogil:
    cdef ssize_t count
    while request.moved < request.length:
        if is_misaligned(file, request):
            return detour(file, request)
        count = pwritev(file.fd, request.vector, min(request.vector_count, <uint32_t>VECTOR_MOST),
                        request.offset + request.moved)
        if count < 0 and errno != EINTR:
            return -errno
        if count == 0:
            return -EIO
        if count > 0:
            advance(request, count)
            note_write(file, request)
    return 0


cdef int flush(HostFile* file) noexcept nogil:
    """The kernel tells one flush of lost writes, and then calls the pages clean: no other may say that all is well, neither one at the
    same time nor any later one. Past the page cache there are no such pages."""
    cdef int result
    cdef uint32_t before = atomic_load_u32(&file.flushes)
    if file.ignore_flush:
        return 0
    if file.alignment > 1:
        return sync_data(file)
    pthread_mutex_lock(&file.flushing)
    if file.flush_error == 0 and file.flushes == before:     # else one that began after us is over: it did for us, too
        atomic_store_u32(&file.flushes, file.flushes + 1)
        file.flush_error = sync_data(file)
    result = file.flush_error
    pthread_mutex_unlock(&file.flushing)
    return result


cdef int sync_data(HostFile* file) noexcept nogil:
    cdef int result = -EINTR
    while result == -EINTR:
        result = -errno if fdatasync(file.fd) < 0 else 0
    return result


cdef int discard(HostFile* file, BlockRequest* request) noexcept nogil:
    """A hint: a host that cannot do it is no error, nor one that wants room to note what is free."""
    cdef uint64_t[2] extent
    cdef int result
    if not file.discard or file.lacks & LACKS_DISCARD:
        return 0
    if file.is_device:
        extent[0] = request.offset
        extent[1] = request.length
        result = -errno if ioctl(file.fd, BLKDISCARD, extent) < 0 else 0
        if result == -EINVAL:
            return 0                 # less than a block of the device
    else:
        result = change_extent(file, request, FALLOC_FL_PUNCH_HOLE)
    if is_refusal(result):
        file.lacks |= LACKS_DISCARD
        return 0
    return 0 if wants_room(result) else result


cdef int write_zeroes(HostFile* file, BlockRequest* request) noexcept nogil:
    """By a hole where one will do, by unwritten extents, at last by writing."""
    cdef int result
    if request.flags & BLOCK_MAY_UNMAP and file.discard and not file.lacks & LACKS_DISCARD:
        result = change_extent(file, request, FALLOC_FL_PUNCH_HOLE)
        if not is_refusal(result) and not wants_room(result):
            return result
    if not file.lacks & LACKS_ZERO_RANGE:
        result = change_extent(file, request, FALLOC_FL_ZERO_RANGE)
        if not is_refusal(result) and not wants_room(result):
            return result
        if result != -EINVAL and not wants_room(result):     # which are about this extent only
            file.lacks |= LACKS_ZERO_RANGE
    return detour(file, request)


cdef int change_extent(HostFile* file, BlockRequest* request, int mode) noexcept nogil:
    cdef bint in_part = (request.offset | request.length) & (file.alignment - 1) != 0
    cdef int result = -EINTR
    if in_part:
        pthread_mutex_lock(&file.rewriting)
    while result == -EINTR:
        result = -errno if fallocate(file.fd, mode | FALLOC_FL_KEEP_SIZE, request.offset, request.length) < 0 else 0
    if in_part:
        pthread_mutex_unlock(&file.rewriting)
    return result


cdef bint wants_room(int result) noexcept nogil:
    return result == -ENOSPC or result == -EDQUOT


cdef bint is_refusal(int result) noexcept nogil:
    """Whether the host says that it cannot do such a thing, not that it failed."""
    return (result == -EOPNOTSUPP or result == -ENOSYS or result == -ENODEV or result == -ENOTTY or result == -EINVAL)


cdef int detour(HostFile* file, BlockRequest* request) noexcept nogil:
    """The rest of a read, write or write-zeroes through an aligned buffer."""
    cdef uint8_t* buffer = NULL
    cdef uint64_t mask = file.alignment - 1
    cdef uint64_t position, start, stop, take
    cdef int result = 0
    if posix_memalign(<void**>&buffer, BUFFER_ALIGNMENT, BUFFER_SIZE) != 0:
        return -ENOMEM
    while request.moved < request.length and result == 0:
        position = request.offset + request.moved
        start = position & ~mask
        take = min(request.length - request.moved, BUFFER_SIZE - (position - start))
        stop = (position + take + mask) & ~mask
        if request.operation == BLOCK_READ:
            result = fill(file, buffer, start, stop)
            if result == 0:
                result = copy_out(request, buffer + (position - start), take)
        elif start == position and stop == position + take:
            copy_in(request, buffer, take)
            result = pour(file, buffer, start, stop)
        else:
            pthread_mutex_lock(&file.rewriting)
            result = rewrite(file, request, buffer, position, take)
            pthread_mutex_unlock(&file.rewriting)
        if result == 0 and request.operation != BLOCK_READ:
            advance(request, take)
            note_write(file, request)
    free(buffer)
    return result


cdef int rewrite(HostFile* file, BlockRequest* request, uint8_t* buffer, uint64_t position, uint64_t take) noexcept nogil:
    """Writes the next `take` bytes of the request, at `position`, with what stands before and behind them in their blocks."""
    cdef uint64_t start = position & ~<uint64_t>(file.alignment - 1)
    cdef uint64_t stop = (position + take + file.alignment - 1) & ~<uint64_t>(file.alignment - 1)
    cdef int result = 0
    if start < position:
        result = fill(file, buffer, start, start + file.alignment)
    if result == 0 and stop > position + take:
        result = fill(file, buffer + (stop - file.alignment - start), stop - file.alignment, stop)
    if result == 0:
        copy_in(request, buffer + (position - start), take)
        result = pour(file, buffer, start, stop)
    return result


cdef int fill(HostFile* file, uint8_t* buffer, uint64_t start, uint64_t stop) noexcept nogil:
    """Reads [start, stop) of the file into the buffer."""
    cdef ssize_t count
    cdef uint64_t position = start
    while position < stop:
        if position >= file.end:
            memset(buffer + (position - start), 0, stop - position)
            return 0
        count = pread(file.fd, buffer + (position - start), stop - position, position)
        if count < 0 and errno != EINTR:
            return -errno
        if count == 0:
            return -EIO
        if count > 0:
            position += count
    return 0


cdef int pour(HostFile* file, const uint8_t* buffer, uint64_t start, uint64_t stop) noexcept nogil:
    """Writes the buffer to [start, stop) of the file."""
    cdef ssize_t count
    cdef uint64_t position = start
    while position < stop:
        count = pwrite(file.fd, buffer + (position - start), stop - position, position)
        if count < 0 and errno != EINTR:
            return -errno
        if count == 0:
            return -EIO
        if count > 0:
            position += count
    return 0


cdef int copy_out(BlockRequest* request, const uint8_t* data, uint64_t length) noexcept nogil:
    """The next `length` bytes of the request's memory become `data`, or zeroes for NULL."""
    cdef uint64_t take
    while length and request.vector_count:
        take = min(length, request.vector.iov_len)
        if data == NULL:
            memset(request.vector.iov_base, 0, take)
        else:
            memcpy(request.vector.iov_base, data, take)
            data += take
        advance(request, take)
        length -= take
        if take == 0:
            request.vector += 1
            request.vector_count -= 1
    return 0 if length == 0 else -EINVAL


cdef void copy_in(BlockRequest* request, uint8_t* data, uint64_t length) noexcept nogil:
    """`data` becomes the next `length` bytes of the request's memory, which are not done yet; zeroes for WRITE_ZEROES."""
    cdef uint64_t take
    cdef uint32_t i
    if request.operation == BLOCK_WRITE_ZEROES:
        memset(data, 0, length)
        return
    for i in range(request.vector_count):
        take = min(length, request.vector[i].iov_len)
        memcpy(data, request.vector[i].iov_base, take)
        data += take
        length -= take
