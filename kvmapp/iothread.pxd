from libc.stdint cimport int64_t, uint32_t, uint64_t

from kvmapp.abi.posix cimport pthread_cond_t, pthread_mutex_t, pthread_t


cdef int64_t monotonic_ns() noexcept nogil


cdef class EventSource:
    cdef int fd
    cdef readonly IoThread thread

    cdef void ready(self, uint32_t events) noexcept nogil
    cdef int watch(self, uint32_t events) noexcept nogil


cdef class Doorbell(EventSource):
    cdef void rung(self) noexcept nogil
    cdef void press(self) noexcept nogil


cdef class Timer(EventSource):
    cdef void expired(self) noexcept nogil
    cdef void arm(self, int64_t deadline, int64_t period) noexcept nogil
    cdef void cancel(self) noexcept nogil


cdef class IoThread:
    cdef readonly str name
    cdef int epoll
    cdef int wake
    cdef bint stopping
    cdef bint pausing
    cdef bint parked
    cdef pthread_mutex_t lock
    cdef pthread_cond_t changed
    cdef set sources
    cdef pthread_t thread_id
    cdef bint started                # thread_id is to be joined
    cdef readonly int native         # the kernel's number of the thread, 0 before it runs
    cdef char title[16]

    cdef void run(self) noexcept nogil
    cdef void loop(self) noexcept nogil
    cdef bint park(self) noexcept nogil
    cdef void drain_wake(self) noexcept nogil
