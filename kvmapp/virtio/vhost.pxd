from libc.stdint cimport uint32_t, uint64_t

from kvmapp.abi.vhost cimport vhost_memory_region, vhost_vring_addr
from kvmapp.iothread cimport Doorbell
from kvmapp.memory cimport MAX_REGIONS, GuestMemory
from kvmapp.virtio.device cimport VirtioDevice
from kvmapp.virtio.virtqueue cimport Virtqueue

cdef enum:
    VHOST_QUEUES = 2                 # of one descriptor: receive and transmit

cdef struct MemoryTable:             # struct vhost_memory with its regions
    uint32_t nregions
    uint32_t padding
    vhost_memory_region regions[MAX_REGIONS]


cdef class VhostCall(Doorbell):
    cdef VirtioDevice device
    cdef Virtqueue queue


cdef class VhostFault(Doorbell):
    cdef VirtioDevice device
    cdef Virtqueue queue


cdef class VhostNet:
    cdef int fd
    cdef GuestMemory memory
    cdef VirtioDevice device
    cdef readonly uint64_t features
    cdef readonly tuple calls        # a VhostCall a queue, for interrupts that cannot go straight to KVM
    cdef readonly tuple faults
    cdef int notice_fds[VHOST_QUEUES]    # of `calls`
    cdef int fault_fds[VHOST_QUEUES]
    cdef int call_fds[VHOST_QUEUES]  # where the kernel's interrupts go now
    cdef bint running[VHOST_QUEUES]  # handed over; with the queue's lock

    cdef int tell_memory(self) except -1
    cdef int settle(self, uint64_t features) noexcept nogil
    cdef int begin(self, uint32_t index, Virtqueue queue, int tap) noexcept nogil
    cdef void end(self, uint32_t index, Virtqueue queue) noexcept nogil
    cdef int aim(self, uint32_t index, int vector) noexcept nogil
    cdef int give_file(self, unsigned long request, uint32_t index, int fd) noexcept nogil
    cdef int give_number(self, unsigned long request, uint32_t index, uint32_t number) noexcept nogil


cdef MemoryTable table_of(GuestMemory memory) noexcept nogil
cdef vhost_vring_addr place_of(Virtqueue queue, uint32_t index) noexcept nogil
