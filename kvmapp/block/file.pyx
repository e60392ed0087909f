"""A channel into a host's file or block device that needs nothing of the kernel but preadv and pwritev: the thread engine.

What lies in the page cache is read and written at once in the channel's own thread where the kernel can tell (RWF_NOWAIT, Linux
4.14), and so is a write to the page cache that is alone: it is a copy, cheaper than waking a thread, and holds up nobody. The rest
goes to a pool of threads. The io_uring engine is this one with a ring before the pool.
"""
from kvmapp.abi.epoll cimport EPOLLIN
from kvmapp.abi.posix cimport POLLIN, poll, pollfd
from kvmapp.block.backend cimport block_now, block_push
from kvmapp.block.transfer cimport is_copy, perform, try_at_once

cdef enum:
    SLOW_COPY = 10000000             # ns
    WARY_FOR = 200000000


cdef class ChannelEvent(EventSource):
    """A descriptor of the host's that tells the channel's thread to go on."""

    def __cinit__(self):
        self.can_look = True

    cdef void ready(self, uint32_t events) noexcept nogil:
        self.channel.commit()

    cdef bint look(self) noexcept nogil:
        if not self.channel.has_done():
            return False
        self.channel.commit()
        return True


cdef class FileChannel(BlockChannel):

    cdef int attach(self, BlockBackend disk, HostFile* file, object thread) except -1:
        """Binds the new channel to its disk's file and its thread (None: the caller)."""
        self.disk = disk
        self.file = file
        self.workers = Workers()
        self.workers.file = file
        self.thread = thread
        self.workers_event = ChannelEvent()
        self.workers_event.channel = self
        self.workers_event.fd = self.workers.event
        if thread is not None:
            thread.add(self.workers_event, EPOLLIN)
        return 0

    @property
    def engine(self):
        return "threads"

    cdef void accept(self, BlockRequest* request) noexcept nogil:
        block_push(&self.queued, request)

    cdef void start(self) noexcept nogil:
        """As many as there is room for, in the order in which they came."""
        cdef BlockRequest* request
        cdef BlockRequest* after
        while self.queued.first != NULL:
            request = self.queued.first
            after = request.next
            if not self.place(request):
                break
            self.queued.first = after
            if after == NULL:
                self.queued.last = NULL
        self.launch()

    cdef bint place(self, BlockRequest* request) noexcept nogil:
        """Takes a request out of the queue and gives it to the host; False, and it stays, when there is no room now."""
        if try_at_once(self.file, request):
            self.finish(request, 0)
        elif not self.copy_alone(request):
            self.give_workers(request)
        return True

    cdef bint copy_alone(self, BlockRequest* request) noexcept nogil:
        """Does a write to the page cache here and now, when no other request is there and the host is not slow at it."""
        if self.in_flight > 1 or request.began < self.wary_until or not is_copy(self.file, request):
            return False
        self.finish(request, perform(self.file, request))
        if block_now() - request.began > SLOW_COPY:
            self.wary_until = request.began + WARY_FOR
        return True

    cdef void give_workers(self, BlockRequest* request) noexcept nogil:
        self.with_workers += 1
        self.workers.push(request)

    cdef void launch(self) noexcept nogil:
        """What was placed goes off, as one batch."""
        self.workers.commit()

    cdef void collect(self) noexcept nogil:
        cdef BlockRequest* request
        cdef BlockRequest* after
        if self.with_workers == 0:
            return
        request = self.workers.take_done()
        while request != NULL:
            after = request.next
            self.with_workers -= 1
            self.finish(request, request.result)
            request = after

    cdef bint has_done(self) noexcept nogil:
        return self.with_workers != 0 and self.workers.done.first != NULL       # read without its lock: `collect` looks again

    cdef void wait(self) noexcept nogil:
        cdef pollfd event
        event.fd = self.workers.event
        event.events = POLLIN
        poll(&event, 1, -1)

    cdef void release(self) noexcept:
        if self.thread is not None:
            self.thread.remove(self.workers_event)
        self.workers_event.channel = None
        self.workers.stop()
