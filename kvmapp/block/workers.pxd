from libc.stdint cimport uint32_t

from kvmapp.abi.posix cimport pthread_cond_t, pthread_mutex_t, pthread_t
from kvmapp.block.backend cimport BlockQueue, BlockRequest
from kvmapp.block.transfer cimport HostFile

cdef enum:
    WORKERS_MOST = 16


cdef class Workers:
    cdef readonly int event
    cdef HostFile* file
    cdef BlockQueue batch            # the channel's: pushed since the last `commit`
    cdef pthread_mutex_t lock        # for all that follows
    cdef pthread_cond_t work
    cdef BlockQueue todo
    cdef BlockQueue done
    cdef uint32_t waiting            # requests in todo that want a thread each
    cdef uint32_t copies             # and those that only fill the page cache, where they meet one lock
    cdef uint32_t idle               # threads that carry no request
    cdef uint32_t count
    cdef bint stopping
    cdef pthread_t threads[WORKERS_MOST]

    cdef void push(self, BlockRequest* request) noexcept nogil
    cdef void commit(self) noexcept nogil
    cdef BlockRequest* take_done(self) noexcept nogil
    cdef void stop(self) noexcept nogil
    cdef void work_on(self) noexcept nogil
    cdef uint32_t* kind(self, BlockRequest* request) noexcept nogil
    cdef void work_through(self) noexcept nogil
    cdef bint spawn(self) noexcept nogil
