"""What a disk is to whoever reads and writes it: a BlockBackend (the disk) and a BlockChannel (one thread's way into it).

    channel = disk.open_channel(thread, client)
    channel.submit(request) ...; channel.commit()      in `thread`, as often as there is work: nothing starts before `commit`
    client.completed(list of requests)             in `thread`, from within `commit` or when the host says so: once a batch

A format (qcow2) is a BlockBackend whose channels are clients of another backend's channels; a protocol (a file, an NBD server)
ends the chain. A new one overrides `make_channel`, and in its channel `accept`, `start`, `collect`, `wait` and `release`.

Invariants: a channel and the requests in it are touched by one thread only, its own, or by the control thread while that one
stands still; so channels have no locks. Requests may be done in any order. A request is checked here, once, for bounds.
"""
from kvmapp.abi.posix cimport CLOCK_MONOTONIC, EINVAL, ERANGE, EROFS, ESHUTDOWN, clock_gettime, timespec

OPERATION_NAMES = ("read", "write", "flush", "discard", "write_zeroes")


cdef uint64_t block_now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return <uint64_t>time.tv_sec * 1000000000 + time.tv_nsec


cdef class BlockClient:
    """Whoever submits requests."""

    cdef void completed(self, BlockRequest* requests) noexcept nogil:
        """These (linked by `next`) are done and the client's again. It may submit new ones at once; they are committed for it."""


cdef class BlockBackend:
    """A disk of `size` bytes.

    `write_cache`: a write that is done may be lost until a flush is done. `physical_block`: bytes that the host writes at
    once. `discard_granularity`: bytes, 0 where a discard does nothing.
    """

    def __cinit__(self, *args, **kwargs):
        self.channels = []
        self.physical_block = BLOCK_SECTOR

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def open_channel(self, IoThread thread, BlockClient client not None):
        """A new way in, of `thread`; with None the caller itself is that thread and uses `drain` to wait."""
        if self.closed:
            raise ValueError(f"{self.name}: closed")
        cdef BlockChannel channel = self.make_channel(thread)
        channel.client = client
        self.channels.append(channel)
        return channel

    cdef BlockChannel make_channel(self, IoThread thread):
        raise NotImplementedError(type(self).__name__)

    def resize(self, size=None, *, bint shrink=False):
        """Makes the disk `size` bytes, a multiple of 512; None: takes over the size that its file or device has by now, as it must be for
        a device. A file is cut shorter only with `shrink`. Waits for what is in flight (`drain`): nobody submits more meanwhile.
        Raises GuestImageError, HostError; then nothing has changed.
        """
        raise NotImplementedError(type(self).__name__)

    def drain(self):
        """Returns when nothing is in flight. Not called in a channel's thread, nor with a lock held that a client takes."""
        for channel in self.channels:
            channel.drain()

    def counters(self):
        """{operation: {requests, bytes, errors, nanoseconds}} since the disk was opened, all channels together."""
        sums = {name: dict.fromkeys(("requests", "bytes", "errors", "nanoseconds"), 0) for name in OPERATION_NAMES}
        for channel in self.channels:
            for name, counts in channel.counts().items():
                for key, value in counts.items():
                    sums[name][key] += value
        return sums

    def close(self):
        """Waits for what is in flight and gives everything back; a second call does nothing."""
        self.closed = True
        for channel in self.channels:
            channel.close()


cdef class BlockChannel:
    """One thread's way into a disk."""

    def drain(self):
        """As BlockBackend.drain, for this channel: its thread stands still meanwhile and the caller does its work."""
        cdef bint was_running = self.thread is not None and not self.thread.pausing
        if was_running:
            self.thread.pause()
        with nogil:
            self.settle()
        if was_running:
            self.thread.resume()

    def close(self):
        """Drains, then gives the channel's resources back; what is submitted afterwards fails with ESHUTDOWN."""
        if self.closed:
            return
        self.drain()
        self.closed = True
        self.release()

    def counts(self):
        """{operation: {requests, bytes, errors, nanoseconds}}."""
        return {name: self.counters[i] for i, name in enumerate(OPERATION_NAMES)}

    cdef void submit(self, BlockRequest* request) noexcept nogil:
        """Takes the request over. A bad one comes back through `completed` like any other: ERANGE when it does not lie on the
        disk in whole sectors, EROFS, EINVAL for an unknown operation, ESHUTDOWN after `close`."""
        request.moved = 0
        self.resubmit(request)

    cdef void resubmit(self, BlockRequest* request) noexcept nogil:
        """As `submit`, for what is left of a request that came back with an error."""
        cdef uint64_t size = self.disk.size
        self.in_flight += 1
        request.result = 0
        request.began = block_now()
        if self.closed:
            self.finish(request, -ESHUTDOWN)
        elif request.operation >= BLOCK_OPERATIONS:
            self.finish(request, -EINVAL)
        elif request.operation == BLOCK_FLUSH:
            self.accept(request)
        elif request.operation != BLOCK_READ and self.disk.read_only:
            self.finish(request, -EROFS)
        elif (request.offset | request.length) % BLOCK_SECTOR or request.offset > size or request.length > size - request.offset:
            self.finish(request, -ERANGE)
        elif request.length == 0:
            self.finish(request, 0)
        else:
            self.accept(request)

    cdef void commit(self) noexcept nogil:
        """Starts what was submitted, takes in what the host has done and delivers it, until there is no more to do now."""
        if self.committing:
            return                   # `completed` called: the loop below goes on with what it submitted
        self.committing = True
        while True:
            if not self.closed:
                self.start()
                self.collect()
            if self.finished.first == NULL:
                break
            self.deliver()
        self.committing = False

    cdef void accept(self, BlockRequest* request) noexcept nogil:
        """Queues a request that is in bounds and not empty."""

    cdef void start(self) noexcept nogil:
        """Hands the queued requests on: those that fit."""

    cdef void collect(self) noexcept nogil:
        """Calls `finish` for the requests that were done since; does not wait."""

    cdef bint has_done(self) noexcept nogil:
        """Whether `collect` would find something, told without a system call, for threads that poll."""
        return False

    cdef void wait(self) noexcept nogil:
        """Returns when `collect` may find something. Called only with requests in flight."""

    cdef void release(self) noexcept:
        """Gives resources back; nothing is in flight."""

    cdef void finish(self, BlockRequest* request, int result) noexcept nogil:
        cdef BlockCounters* counters
        request.result = result
        if request.operation < BLOCK_OPERATIONS:
            counters = &self.counters[request.operation]
            counters.requests += 1
            counters.nanoseconds += block_now() - request.began
            if result == 0:
                counters.bytes += request.length
            else:
                counters.errors += 1
        block_push(&self.finished, request)

    cdef void deliver(self) noexcept nogil:
        cdef BlockRequest* requests = block_take_all(&self.finished)
        cdef BlockRequest* request = requests
        while request != NULL:
            self.in_flight -= 1
            request = request.next
        self.client.completed(requests)

    cdef void settle(self) noexcept nogil:
        """Works until nothing is in flight."""
        self.commit()
        while self.in_flight:
            self.wait()
            self.commit()
