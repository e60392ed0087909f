# distutils: libraries = uring
"""A channel that carries reads, and past the page cache writes and flushes, by io_uring: one system call a batch, completions taken
from shared memory.

The ring is for the straight way. What it does only in part or refuses goes to FileChannel, where the whole of each request's meaning
lives. So do discards and zeroes, and all that changes the page cache or flushes it: most file systems would have the ring give them to
a thread of the kernel's, which costs more than one of ours; and of a write that is synchronous the ring would not tell which half failed.
"""
from libc.stdint cimport uint64_t
from libc.string cimport memset

from kvmapp.abi.blockdev cimport RWF_DSYNC
from kvmapp.abi.epoll cimport EPOLLIN
from kvmapp.abi.io_uring cimport (IORING_FSYNC_DATASYNC, IORING_OP_FSYNC, IORING_OP_READ, IORING_OP_READV, IORING_OP_WRITE,
                                  IORING_OP_WRITEV, IORING_SETUP_COOP_TASKRUN, IORING_SETUP_CQSIZE, IOSQE_FIXED_FILE, io_uring_cq_advance,
                                  io_uring_cq_ready, io_uring_cqe_get_data, io_uring_free_probe, io_uring_get_probe_ring, io_uring_get_sqe,
                                  io_uring_opcode_supported, io_uring_params, io_uring_peek_batch_cqe, io_uring_prep_fsync,
                                  io_uring_prep_read, io_uring_prep_readv, io_uring_prep_write, io_uring_prep_writev, io_uring_probe,
                                  io_uring_queue_exit, io_uring_queue_init_params, io_uring_register_files, io_uring_sq_ready,
                                  io_uring_sqe, io_uring_sqe_set_data, io_uring_submit)
from kvmapp.abi.posix cimport (EAGAIN, ECANCELED, EINTR, EINVAL, ENOSYS, EOPNOTSUPP, POLLIN, nanosleep, poll, pollfd, timespec)
from kvmapp.block.backend cimport BLOCK_FLUSH, BLOCK_READ, BLOCK_WRITE, BlockBackend
from kvmapp.block.transfer cimport HostFile, advance, is_misaligned, needs_sync, note_write

import os

cdef enum:
    SUBMISSIONS = 128                # the most that goes in one system call
    COMPLETIONS = 1024               # the most in flight
    VECTOR_MOST = 1024               # IOV_MAX
    LENGTH_MOST = 1 << 30            # the kernel stops a little below 2 GiB
    BATCH = 64                       # completions looked at in one go
    BREATH = 1000000                 # ns; how long to let the host recover when it has no memory for a request


cdef class UringChannel(FileChannel):

    def __dealloc__(self):
        if self.has_ring:
            io_uring_queue_exit(&self.ring)

    cdef int attach(self, BlockBackend disk, HostFile* file, object thread) except -1:
        """Raises OSError where the kernel has no io_uring, lacks an operation, or forbids it."""
        self.file = file
        self.open_ring(thread is not None and thread.polls)
        FileChannel.attach(self, disk, file, thread)
        self.ring_event = ChannelEvent()
        self.ring_event.channel = self
        self.ring_event.fd = self.ring.ring_fd
        if thread is not None:
            thread.add(self.ring_event, EPOLLIN)
        return 0

    cdef int open_ring(self, bint polled) except -1:
        """`polled`: the kernel shall show what is done at once, and not only when the thread next calls it."""
        cdef io_uring_params params
        cdef io_uring_probe* probe
        cdef int result, operation
        cdef bint whole = True
        memset(&params, 0, sizeof(params))
        params.flags = IORING_SETUP_CQSIZE | (0 if polled else IORING_SETUP_COOP_TASKRUN)
        params.cq_entries = COMPLETIONS
        result = io_uring_queue_init_params(SUBMISSIONS, &self.ring, &params)
        if result == -EINVAL:        # before Linux 5.19
            memset(&params, 0, sizeof(params))
            params.flags = IORING_SETUP_CQSIZE
            params.cq_entries = COMPLETIONS
            result = io_uring_queue_init_params(SUBMISSIONS, &self.ring, &params)
        if result < 0:
            raise OSError(-result, f"io_uring: {os.strerror(-result)}")
        self.has_ring = True
        self.room = params.cq_entries
        probe = io_uring_get_probe_ring(&self.ring)
        for operation in (IORING_OP_READ, IORING_OP_READV, IORING_OP_WRITE, IORING_OP_WRITEV, IORING_OP_FSYNC):
            whole = whole and probe != NULL and io_uring_opcode_supported(probe, operation)
        io_uring_free_probe(probe)
        if not whole:                # before Linux 5.6
            raise OSError(ENOSYS, "io_uring: the kernel's is too old")
        result = io_uring_register_files(&self.ring, &self.file.fd, 1)
        if result < 0:
            raise OSError(-result, f"io_uring: cannot register a file: {os.strerror(-result)}")
        return 0

    @property
    def engine(self):
        return "io_uring"

    cdef bint place(self, BlockRequest* request) noexcept nogil:
        cdef io_uring_sqe* sqe
        cdef uint64_t position = request.offset + request.moved
        if (request.operation > BLOCK_FLUSH or request.length > LENGTH_MOST or request.vector_count > VECTOR_MOST
                or is_misaligned(self.file, request) or request.operation != BLOCK_READ and self.file.alignment == 1):
            return FileChannel.place(self, request)
        if self.in_ring == self.room:
            return False
        sqe = io_uring_get_sqe(&self.ring)
        if sqe == NULL:
            io_uring_submit(&self.ring)
            sqe = io_uring_get_sqe(&self.ring)
            if sqe == NULL:
                return False
        if request.operation == BLOCK_FLUSH:
            io_uring_prep_fsync(sqe, 0, IORING_FSYNC_DATASYNC)
        elif request.operation == BLOCK_READ and request.vector_count == 1:
            io_uring_prep_read(sqe, 0, request.vector.iov_base, request.vector.iov_len, position)
        elif request.operation == BLOCK_READ:
            io_uring_prep_readv(sqe, 0, request.vector, request.vector_count, position)
        elif request.vector_count == 1:
            io_uring_prep_write(sqe, 0, request.vector.iov_base, request.vector.iov_len, position)
        else:
            io_uring_prep_writev(sqe, 0, request.vector, request.vector_count, position)
        if needs_sync(self.file, request):
            sqe.rw_flags = RWF_DSYNC
        sqe.flags |= IOSQE_FIXED_FILE
        io_uring_sqe_set_data(sqe, request)
        self.in_ring += 1
        return True

    cdef void launch(self) noexcept nogil:
        cdef timespec breath
        cdef int result
        FileChannel.launch(self)
        while io_uring_sq_ready(&self.ring):
            result = io_uring_submit(&self.ring)
            if result < 0 and result != -EINTR:
                # No memory for requests, or too many completions to take in: both pass.
                self.collect()
                breath.tv_sec = 0
                breath.tv_nsec = BREATH
                nanosleep(&breath, NULL)

    cdef void collect(self) noexcept nogil:
        cdef io_uring_cqe* cqes[BATCH]
        cdef unsigned int count, i
        FileChannel.collect(self)
        while self.in_ring:
            count = io_uring_peek_batch_cqe(&self.ring, cqes, BATCH)
            for i in range(count):
                self.take(cqes[i])
            io_uring_cq_advance(&self.ring, count)
            if count == 0:
                break
        self.workers.commit()

    cdef void take(self, io_uring_cqe* cqe) noexcept nogil:
        """One completion: done, failed, or left to the threads."""
        cdef BlockRequest* request = <BlockRequest*>io_uring_cqe_get_data(cqe)
        cdef int result = cqe.res
        self.in_ring -= 1
        if request.operation == BLOCK_FLUSH:
            if result == -EINTR or result == -EAGAIN or result == -ECANCELED:
                self.give_workers(request)
            else:
                self.finish(request, result)
            return
        if result > 0:
            advance(request, result)
            if request.operation == BLOCK_WRITE:
                note_write(self.file, request)
        if request.moved == request.length:
            self.finish(request, 0)
        elif (result >= 0 or result == -EINTR or result == -EAGAIN or result == -ECANCELED or result == -EOPNOTSUPP
              or result == -EINVAL):
            self.give_workers(request)
        else:
            self.finish(request, result)

    cdef bint has_done(self) noexcept nogil:
        return (self.in_ring != 0 and io_uring_cq_ready(&self.ring) != 0) or FileChannel.has_done(self)

    cdef void wait(self) noexcept nogil:
        cdef pollfd events[2]
        events[0].fd = self.ring.ring_fd
        events[0].events = POLLIN
        events[1].fd = self.workers.event
        events[1].events = POLLIN
        poll(events, 2, -1)

    cdef void release(self) noexcept:
        if self.thread is not None:
            self.thread.remove(self.ring_event)
        self.ring_event.channel = None
        FileChannel.release(self)
        io_uring_queue_exit(&self.ring)
        self.has_ring = False
