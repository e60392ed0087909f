from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t

from kvmapp.abi.posix cimport pthread_cond_t, pthread_mutex_t, pthread_t


cdef int64_t monotonic_ns() noexcept nogil


cdef enum:
    LOOKED_AT_MOST = 64              # sources of one thread that it polls


cdef class EventSource:
    cdef int fd
    cdef bint can_look               # it has `look`: set in __cinit__
    cdef readonly IoThread thread

    cdef void ready(self, uint32_t events) noexcept nogil
    cdef bint look(self) noexcept nogil
    cdef void hush(self, bint quiet) noexcept nogil
    cdef int watch(self, uint32_t events) noexcept nogil


cdef class Doorbell(EventSource):
    cdef void rung(self) noexcept nogil
    cdef void press(self) noexcept nogil


cdef class Timer(EventSource):
    cdef void expired(self) noexcept nogil
    cdef void arm(self, int64_t deadline, int64_t period) noexcept nogil
    cdef void cancel(self) noexcept nogil


cdef class Waiter:
    cdef EventSource reader

    cdef void wait(self, int epoll) noexcept nogil


cdef class IoThread:
    cdef readonly str name
    cdef readonly Waiter waiter
    cdef int epoll
    cdef int wake
    cdef bint stopping
    cdef bint pausing
    cdef bint parked
    cdef pthread_mutex_t lock
    cdef pthread_cond_t changed
    cdef set sources
    cdef PyObject* looked_at[LOOKED_AT_MOST]     # borrowed from `sources`
    cdef uint32_t looked_at_count
    cdef int64_t poll_most           # ns; 0: this thread does not poll
    cdef int64_t poll_now            # how long it pays at present
    cdef bint hushed
    cdef pthread_t thread_id
    cdef bint started                # thread_id is to be joined
    cdef readonly int native         # the kernel's number of the thread, 0 before it runs
    cdef char title[16]

    cdef void run(self) noexcept nogil
    cdef void loop(self) noexcept nogil
    cdef bint search(self) noexcept nogil
    cdef void learn(self, int64_t slept) noexcept nogil
    cdef void hush(self, bint quiet) noexcept nogil
    cdef bint park(self) noexcept nogil
    cdef void drain_wake(self) noexcept nogil
