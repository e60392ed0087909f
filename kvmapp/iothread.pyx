"""I/O threads: epoll loops without the GIL that call a device's event sources when their descriptors are ready.

A source belongs to one thread and is added and removed by the control thread only; what the guest does never adds or removes
one (a device ignores an event that its state does not want). Callbacks run with no lock held and take their Device's lock.
`pause` returns when the thread stands between two callbacks; `remove` when no callback of that source runs or will run.

A thread that polls looks for work by itself for a while before it sleeps: a wake-up by the kernel costs more than a request that comes at
once. How long is learnt from the sleeps: those that were short double it, up to `poll` ns, and a longer one ends it. Meanwhile the
sources' other sides need not wake it (`hush`).
"""
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.string cimport memset, strncpy

from kvmapp.abi.epoll cimport (EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, EPOLLIN, TFD_CLOEXEC, TFD_NONBLOCK,
                               TFD_TIMER_ABSTIME, epoll_create1, epoll_ctl, epoll_event, epoll_wait, itimerspec,
                               timerfd_create, timerfd_settime)
from kvmapp.abi.posix cimport (CLOCK_MONOTONIC, EFD_CLOEXEC, EFD_NONBLOCK, SIG_BLOCK, clock_gettime, close, cpu_relax, errno, eventfd,
                               own_thread_number, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_wait,
                               pthread_create, pthread_join, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
                               pthread_mutex_unlock,
                               pthread_setname_np, pthread_self, pthread_sigmask, read, sigfillset, sigset_t, timespec, write)

import os

from kvmapp.errors import HostError

cdef enum:
    BATCH = 32                       # events taken from the kernel at once
    POLL_FIRST = 4000                # ns; what polling begins with


cdef int64_t monotonic_ns() noexcept nogil:
    """Now, on the clock that timers are armed with."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef class EventSource:
    """A descriptor that an IoThread waits on; subclasses override `ready`. The descriptor's owner closes it, after `remove`."""

    def __cinit__(self, *args, **kwargs):
        self.fd = -1

    cdef void ready(self, uint32_t events) noexcept nogil:
        pass

    cdef bint look(self) noexcept nogil:
        """Does what there is to do, found without a system call; whether there was something. For threads that poll."""
        return False

    cdef void hush(self, bint quiet) noexcept nogil:
        """Whether the other side need not wake the thread for now. False: what came meanwhile is served before this returns."""

    cdef int watch(self, uint32_t events) noexcept nogil:
        """Changes which events (EPOLLIN, EPOLLOUT, EPOLLET, 0 for none) call `ready`; 0 or -errno."""
        cdef epoll_event event
        if self.thread is None:
            return 0
        event.events = events
        event.data.ptr = <void*>self
        return 0 if epoll_ctl(self.thread.epoll, EPOLL_CTL_MOD, self.fd, &event) == 0 else -errno


cdef class Doorbell(EventSource):
    """An eventfd of its own: `press` it from any thread (or bind it as an ioeventfd), and `rung` runs in the I/O thread."""

    def __cinit__(self, *args, **kwargs):
        self.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.fd < 0:
            raise OSError(errno, f"eventfd: {os.strerror(errno)}")

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    @property
    def fileno(self):
        return self.fd

    cdef void ready(self, uint32_t events) noexcept nogil:
        cdef uint64_t count
        if read(self.fd, &count, sizeof(count)) == sizeof(count):
            self.rung()

    cdef void rung(self) noexcept nogil:
        pass

    cdef void press(self) noexcept nogil:
        cdef uint64_t one = 1
        write(self.fd, &one, sizeof(one))


cdef class Timer(EventSource):
    """A timerfd on CLOCK_MONOTONIC; subclasses override `expired`, which runs in the I/O thread."""

    def __cinit__(self, *args, **kwargs):
        self.fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
        if self.fd < 0:
            raise OSError(errno, f"timerfd: {os.strerror(errno)}")

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    cdef void ready(self, uint32_t events) noexcept nogil:
        cdef uint64_t count
        if read(self.fd, &count, sizeof(count)) == sizeof(count):
            self.expired()

    cdef void expired(self) noexcept nogil:
        pass

    cdef void arm(self, int64_t deadline, int64_t period) noexcept nogil:
        """Expires at `deadline` (ns of CLOCK_MONOTONIC; at once when past), then every `period` ns unless that is 0."""
        cdef itimerspec setting
        if deadline < 1:
            deadline = 1                 # 0 would disarm
        setting.it_value.tv_sec = deadline // 1000000000
        setting.it_value.tv_nsec = deadline % 1000000000
        setting.it_interval.tv_sec = period // 1000000000
        setting.it_interval.tv_nsec = period % 1000000000
        timerfd_settime(self.fd, TFD_TIMER_ABSTIME, &setting, NULL)

    cdef void cancel(self) noexcept nogil:
        cdef itimerspec setting
        memset(&setting, 0, sizeof(setting))
        timerfd_settime(self.fd, 0, &setting, NULL)


cdef class Waiter:
    """A library with descriptors and timers of its own, which change with all that it does: it does the waiting for its thread.

    `wait` returns when `epoll`, the thread's descriptor, is readable or the library has done something. Meanwhile it may call `reader`,
    which takes what comes from it.
    """

    cdef void wait(self, int epoll) noexcept nogil:
        pass


cdef class IoThread:
    """One loop. Made paused; `resume` starts it. `close` ends it and lets go of all sources.

    `poll`: the longest time in ns that it looks for work by itself before it sleeps; 0: it sleeps at once.
    """

    def __cinit__(self, str name not None="io", *, int64_t poll=0):
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.changed, NULL)
        cdef bytes title = name.encode()[:sizeof(self.title) - 1]
        self.name = name
        strncpy(self.title, title, sizeof(self.title) - 1)
        self.sources = set()
        self.poll_most = poll
        self.pausing = True
        self.parked = True
        self.wake = -1
        self.epoll = epoll_create1(EPOLL_CLOEXEC)
        if self.epoll >= 0:
            self.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.epoll < 0 or self.wake < 0:
            raise OSError(errno, f"{name}: cannot make an event loop: {os.strerror(errno)}")
        cdef epoll_event event
        event.events = EPOLLIN
        event.data.ptr = NULL
        epoll_ctl(self.epoll, EPOLL_CTL_ADD, self.wake, &event)

    def __dealloc__(self):
        if self.epoll >= 0:
            close(self.epoll)
        if self.wake >= 0:
            close(self.wake)
        pthread_cond_destroy(&self.changed)
        pthread_mutex_destroy(&self.lock)

    def add(self, EventSource source not None, uint32_t events=EPOLLIN):
        """From now on `source.ready` runs in this thread. Raises OSError."""
        cdef epoll_event event
        event.events = events
        event.data.ptr = <void*>source
        self.sources.add(source)
        source.thread = self
        if epoll_ctl(self.epoll, EPOLL_CTL_ADD, source.fd, &event) < 0:
            code = errno
            self.sources.discard(source)
            source.thread = None
            raise OSError(code, f"{self.name}: cannot watch descriptor {source.fd}: {os.strerror(code)}")
        if self.poll_most and source.can_look:
            self.choose_looked_at()

    @property
    def polls(self):
        """Whether it looks for work before it sleeps."""
        return self.poll_most > 0

    def choose_looked_at(self):
        """Which sources it polls, after a change of `sources`."""
        was_running = not self.pausing
        self.pause()
        lookers = [source for source in self.sources if (<EventSource>source).can_look][:LOOKED_AT_MOST]
        for i, source in enumerate(lookers):
            self.looked_at[i] = <PyObject*>source
        self.looked_at_count = len(lookers)
        if was_running:
            self.resume()

    def remove(self, EventSource source not None):
        """When this returns no callback of `source` runs or will run. Not to be called with a device's lock held."""
        if source not in self.sources:
            return
        epoll_ctl(self.epoll, EPOLL_CTL_DEL, source.fd, NULL)
        was_running = not self.pausing
        self.pause()                     # a batch that still names the source is over after this
        self.sources.discard(source)
        self.choose_looked_at()
        source.thread = None
        if was_running:
            self.resume()

    def wait_by(self, Waiter waiter, EventSource reader=None):
        """From now on `waiter` does the waiting; None: nobody but the kernel, and no call of it runs or will run."""
        was_running = not self.pausing
        self.pause()
        if self.waiter is not None:
            self.waiter.reader = None
        self.waiter = waiter
        if waiter is not None:
            waiter.reader = reader
        if was_running:
            self.resume()

    def resume(self):
        """Starts or goes on. Raises HostError."""
        if self.stopping:
            return
        if not self.started:
            self.parked = False
            self.pausing = False
            Py_INCREF(self)              # the thread's
            result = pthread_create(&self.thread_id, NULL, io_thread, <void*>self)
            if result:
                Py_DECREF(self)
                self.parked = self.pausing = True
                raise HostError(f"Cannot start the thread {self.name}: {os.strerror(result)}", "see ulimit -u and pids.max")
            self.started = True
            return
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.pausing = False
            self.parked = False
            pthread_cond_broadcast(&self.changed)
            pthread_mutex_unlock(&self.lock)

    def pause(self):
        """Returns when the thread stands still between two callbacks."""
        cdef uint64_t one = 1
        if not self.started:
            return
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.pausing = True
            write(self.wake, &one, sizeof(one))
            pthread_cond_broadcast(&self.changed)
            while not self.parked and not self.stopping:
                pthread_cond_wait(&self.changed, &self.lock)
            pthread_mutex_unlock(&self.lock)

    def close(self):
        """Ends the thread; a second call does nothing."""
        cdef uint64_t one = 1
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.stopping = True
            self.pausing = False
            write(self.wake, &one, sizeof(one))
            pthread_cond_broadcast(&self.changed)
            pthread_mutex_unlock(&self.lock)
        if self.started:
            with nogil:
                pthread_join(self.thread_id, NULL)
            self.started = False
            Py_DECREF(self)
        for source in list(self.sources):
            epoll_ctl(self.epoll, EPOLL_CTL_DEL, (<EventSource>source).fd, NULL)
            (<EventSource>source).thread = None
        self.sources.clear()
        self.looked_at_count = 0

    cdef void run(self) noexcept nogil:
        """The thread's body: signals are for the control thread, so all are blocked here."""
        cdef sigset_t all_signals
        sigfillset(&all_signals)
        pthread_sigmask(SIG_BLOCK, &all_signals, NULL)
        pthread_setname_np(pthread_self(), self.title)
        self.native = own_thread_number()
        self.loop()

    cdef void loop(self) noexcept nogil:
        cdef epoll_event events[BATCH]
        cdef int64_t began
        cdef bint busy
        cdef int count, i
        while not self.stopping:
            if self.pausing and not self.park():
                break
            if self.waiter is not None:
                self.waiter.wait(self.epoll)
            busy = self.waiter is not None or (self.poll_now != 0 and self.search())
            began = 0 if busy or self.poll_most == 0 else monotonic_ns()
            count = epoll_wait(self.epoll, events, BATCH, 0 if busy else -1)
            if began:
                self.learn(monotonic_ns() - began)
                self.hush(self.poll_now != 0)
            for i in range(count):
                if events[i].data.ptr == NULL:
                    self.drain_wake()
                elif not self.stopping:
                    (<EventSource>events[i].data.ptr).ready(events[i].events)
        self.hush(False)

    cdef bint search(self) noexcept nogil:
        """Polls; whether work was found and done."""
        cdef int64_t end = monotonic_ns() + self.poll_now
        cdef bint found = False
        cdef uint32_t i
        while not found and not self.pausing and not self.stopping and monotonic_ns() < end:
            for i in range(self.looked_at_count):
                if (<EventSource>self.looked_at[i]).look():
                    found = True
            cpu_relax()
        if not found:
            self.hush(False)
        return found

    cdef void learn(self, int64_t slept) noexcept nogil:
        """What a sleep of `slept` ns tells: whether a little more of polling would have saved it, or all of it is in vain."""
        if slept > self.poll_most:
            self.poll_now = 0
        elif slept > self.poll_now:
            self.poll_now = min(max(2 * self.poll_now, <int64_t>POLL_FIRST), self.poll_most)

    cdef void hush(self, bint quiet) noexcept nogil:
        cdef uint32_t i
        if quiet != self.hushed:
            self.hushed = quiet
            for i in range(self.looked_at_count):
                (<EventSource>self.looked_at[i]).hush(quiet)

    cdef bint park(self) noexcept nogil:
        """Waits until `resume` or `close`; whether to go on."""
        self.hush(False)
        pthread_mutex_lock(&self.lock)
        while self.pausing and not self.stopping:
            if not self.parked:
                self.parked = True
                pthread_cond_broadcast(&self.changed)
            pthread_cond_wait(&self.changed, &self.lock)
        self.parked = False
        pthread_mutex_unlock(&self.lock)
        return not self.stopping

    cdef void drain_wake(self) noexcept nogil:
        cdef uint64_t count
        read(self.wake, &count, sizeof(count))


cdef void* io_thread(void* thread) noexcept nogil:
    (<IoThread>thread).run()
    return NULL
