from libc.stdint cimport int64_t, uint32_t, uint64_t

from kvmapp.abi.posix cimport pthread_mutex_t
from kvmapp.iothread cimport EventSource
from kvmapp.memory cimport GuestMemory
from kvmapp.virtio.device cimport VirtioDevice
from kvmapp.virtio.virtqueue cimport Virtqueue

cdef enum:
    VHOST_USER_QUEUES = 8            # of one device


cdef class Hangup(EventSource):
    cdef VhostUser channel


cdef class VhostUser:
    cdef int fd
    cdef VirtioDevice device
    cdef GuestMemory memory
    cdef int patience                # ms
    cdef pthread_mutex_t talk        # one message and its answer at a time; after the queues' locks
    cdef uint32_t lost               # atomic: no back end any more
    cdef uint64_t offered            # the back end's feature bits
    cdef readonly Hangup hangup
    cdef readonly tuple calls        # a VhostCall a queue, for interrupts that cannot go straight to KVM
    cdef readonly tuple faults
    cdef int notice_fds[VHOST_USER_QUEUES]       # of `calls`
    cdef int fault_fds[VHOST_USER_QUEUES]
    cdef int call_fds[VHOST_USER_QUEUES]         # where the back end's interrupts go now
    cdef bint running[VHOST_USER_QUEUES]         # handed over; with the queue's lock

    # for the device
    cdef void settle(self, uint64_t features) noexcept nogil
    cdef void begin(self, Virtqueue queue) noexcept nogil
    cdef bint works_on(self, Virtqueue queue) noexcept nogil
    cdef void end(self, Virtqueue queue) noexcept nogil
    cdef void aim(self, Virtqueue queue) noexcept nogil
    cdef bint is_lost(self) noexcept nogil

    # within
    cdef void hung_up(self) noexcept nogil
    cdef void inherit(self, Virtqueue queue) noexcept nogil
    cdef void lose(self, const char* what, uint32_t request, int error) noexcept nogil
    cdef void take_back(self, Virtqueue queue, int base) noexcept nogil
    cdef int ask_base(self, uint32_t index) noexcept nogil
    cdef bint aim_at(self, uint32_t index, int vector) noexcept nogil
    cdef bint tell_memory(self) noexcept nogil
    cdef bint tell_file(self, uint32_t request, uint32_t index, int fd) noexcept nogil
    cdef bint tell_number(self, uint32_t request, uint32_t index, uint32_t number) noexcept nogil
    cdef bint tell_word(self, uint32_t request, uint64_t word) noexcept nogil
    cdef bint ask_word(self, uint32_t request, uint64_t* word) noexcept nogil
    cdef bint tell(self, uint32_t request, const void* body, uint32_t size, const int* fds=*, uint32_t count=*) noexcept nogil
    cdef bint hear(self, uint32_t request, void* body, uint32_t size) noexcept nogil
    cdef int receive(self, void* target, size_t length, int64_t deadline) noexcept nogil
