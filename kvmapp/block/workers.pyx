"""A pool of plain threads that carry block requests to their end, for hosts and requests that io_uring does not serve.

One channel owns it: `push`, `commit` and `take_done` are called by that channel's thread; `event` is readable when something is
done. Threads are made when there is more work than idle threads, up to WORKERS_MOST, and never touch Python.
"""
from libc.stdint cimport uint64_t

from kvmapp.abi.posix cimport (EFD_CLOEXEC, EFD_NONBLOCK, SIG_SETMASK, close, errno, eventfd, pthread_attr_destroy,
                               pthread_attr_init, pthread_attr_setstacksize, pthread_attr_t, pthread_cond_broadcast,
                               pthread_cond_destroy, pthread_cond_init, pthread_cond_signal, pthread_cond_wait, pthread_create,
                               pthread_join, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
                               pthread_mutex_unlock, pthread_self, pthread_setname_np, pthread_sigmask, read, sigfillset,
                               sigset_t, write)
from kvmapp.block.backend cimport block_pop, block_push, block_take_all
from kvmapp.block.transfer cimport is_copy, perform

import os

cdef enum:
    STACK_SIZE = 128 << 10
    COPIERS = 2                      # threads that write to the page cache at once


cdef void* worker(void* pool) noexcept nogil:
    pthread_setname_np(pthread_self(), b"disk worker")
    (<Workers>pool).work_on()
    return NULL


cdef class Workers:
    """Works on one host file (set `file` first)."""

    def __cinit__(self):
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.work, NULL)
        self.event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.event < 0:
            raise OSError(errno, f"eventfd: {os.strerror(errno)}")

    def __dealloc__(self):
        self.stop()
        if self.event >= 0:
            close(self.event)
        pthread_cond_destroy(&self.work)
        pthread_mutex_destroy(&self.lock)

    cdef void push(self, BlockRequest* request) noexcept nogil:
        """One more for the next `commit`."""
        block_push(&self.batch, request)

    cdef void commit(self) noexcept nogil:
        """Lets the threads at what was pushed."""
        cdef BlockRequest* request
        cdef uint32_t wanted, wakes
        if self.batch.first == NULL:
            return
        pthread_mutex_lock(&self.lock)
        while True:
            request = block_pop(&self.batch)
            if request == NULL:
                break
            block_push(&self.todo, request)
            self.kind(request)[0] += 1
        wanted = self.waiting + min(self.copies, <uint32_t>COPIERS)
        while wanted > self.idle and self.count < WORKERS_MOST and self.spawn():
            pass
        wakes = min(wanted, self.idle)
        while wakes:
            pthread_cond_signal(&self.work)
            wakes -= 1
        if self.count == 0:          # no thread is to be had (memory, a limit): the caller does the work itself
            self.idle += 1
            self.work_through()
            self.idle -= 1
        pthread_mutex_unlock(&self.lock)

    cdef BlockRequest* take_done(self) noexcept nogil:
        """The requests (linked by `next`) that were done since the last call, with their results."""
        cdef uint64_t events
        cdef BlockRequest* requests
        pthread_mutex_lock(&self.lock)
        requests = block_take_all(&self.done)
        if requests != NULL:
            read(self.event, &events, sizeof(events))
        pthread_mutex_unlock(&self.lock)
        return requests

    cdef void stop(self) noexcept nogil:
        """Ends the threads; nothing is in flight."""
        cdef uint32_t i
        pthread_mutex_lock(&self.lock)
        self.stopping = True
        pthread_cond_broadcast(&self.work)
        pthread_mutex_unlock(&self.lock)
        for i in range(self.count):
            pthread_join(self.threads[i], NULL)
        self.count = 0

    cdef void work_on(self) noexcept nogil:
        """A thread's life."""
        pthread_mutex_lock(&self.lock)
        while not self.stopping:
            self.work_through()
            if not self.stopping:
                pthread_cond_wait(&self.work, &self.lock)
        pthread_mutex_unlock(&self.lock)

    cdef uint32_t* kind(self, BlockRequest* request) noexcept nogil:
        """The counter that it is counted in."""
        return &self.copies if is_copy(self.file, request) else &self.waiting

    cdef void work_through(self) noexcept nogil:
        """Does what there is to do, with the lock held on entry and return only."""
        cdef BlockRequest* request
        cdef uint64_t one = 1
        cdef bint was_empty
        while self.todo.first != NULL:
            request = block_pop(&self.todo)
            self.kind(request)[0] -= 1
            self.idle -= 1
            pthread_mutex_unlock(&self.lock)
            request.result = perform(self.file, request)
            pthread_mutex_lock(&self.lock)
            self.idle += 1
            was_empty = self.done.first == NULL
            block_push(&self.done, request)
            if was_empty:
                write(self.event, &one, sizeof(one))

    cdef bint spawn(self) noexcept nogil:
        """Makes one more thread, deaf to signals; it counts as idle from now on. Whether the host let us."""
        cdef pthread_attr_t attributes
        cdef sigset_t every, before
        cdef int result
        pthread_attr_init(&attributes)
        pthread_attr_setstacksize(&attributes, STACK_SIZE)
        sigfillset(&every)
        pthread_sigmask(SIG_SETMASK, &every, &before)
        result = pthread_create(&self.threads[self.count], &attributes, worker, <void*>self)
        pthread_sigmask(SIG_SETMASK, &before, NULL)
        pthread_attr_destroy(&attributes)
        if result != 0:
            return False
        self.count += 1
        self.idle += 1
        return True
