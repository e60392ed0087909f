"""vhost-net: the host's kernel works on a pair of queues itself (linux/vhost.h, drivers/vhost of the kernel).

Kicks reach it through the queue's own doorbell, interrupts leave by the MSI-X vector's irqfd; where that is masked or MSI-X is off
they come by way of a VhostCall in the I/O thread. A queue that is taken back goes on in our own path from where the kernel stood: that is
how pause, save, link down and a driver's reset work, and how nothing here is state. What the kernel finds broken in a ring
makes the device ask for a reset. Left out: dirty logging (a migration takes the queues back), busy polling, IOTLB.
"""
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from kvmapp.abi.epoll cimport EPOLLET, EPOLLIN
from kvmapp.abi.posix cimport close, errno, ioctl, pthread_mutex_lock, pthread_mutex_unlock, read
from kvmapp.abi.vhost cimport (VHOST_GET_FEATURES, VHOST_GET_VRING_BASE, VHOST_NET_SET_BACKEND, VHOST_SET_FEATURES,
                               VHOST_SET_MEM_TABLE, VHOST_SET_OWNER, VHOST_SET_VRING_ADDR, VHOST_SET_VRING_BASE,
                               VHOST_SET_VRING_CALL, VHOST_SET_VRING_ERR, VHOST_SET_VRING_KICK, VHOST_SET_VRING_NUM,
                               vhost_vring_addr, vhost_vring_file, vhost_vring_state)
from kvmapp.abi.virtio cimport VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC

import os

from kvmapp.errors import HostError

cdef enum:
    NO_BACKEND = -1
    MRG_RXBUF = 15                   # VIRTIO_NET_F_MRG_RXBUF

# Feature bits that the kernel must know of; the others are between the driver, the device and the tap.
cdef uint64_t KERNEL_FEATURES = (<uint64_t>1 << VIRTIO_F_VERSION_1 | <uint64_t>1 << VIRTIO_RING_F_EVENT_IDX |
                                 <uint64_t>1 << VIRTIO_RING_F_INDIRECT_DESC | <uint64_t>1 << MRG_RXBUF)


cdef class VhostCall(Doorbell):
    """The kernel has used buffers of a queue whose interrupt it cannot raise itself."""

    def __cinit__(self, VirtioDevice device not None, Virtqueue queue not None):
        self.device, self.queue = device, queue

    cdef void rung(self) noexcept nogil:
        self.device.transport.queue_interrupt(self.queue.index)


cdef class VhostFault(Doorbell):
    """The kernel found a ring broken, or its memory gone."""

    def __cinit__(self, VirtioDevice device not None, Virtqueue queue not None):
        self.device, self.queue = device, queue

    cdef void rung(self) noexcept nogil:
        """Not of a queue that was reset meanwhile: who resets a device waits until its status is 0 (VIRTIO 1.2, 2.1.2)."""
        pthread_mutex_lock(&self.queue.lock)
        if self.queue.enabled:
            self.device.complain(b"vhost found a broken ring, queue", self.queue.index)
            self.device.need_reset()
        pthread_mutex_unlock(&self.queue.lock)


cdef class VhostNet:
    """`fd` is an open /dev/vhost-net, which then belongs to this object; `queues` are the pair that it may work on."""

    def __cinit__(self, VirtioDevice device not None, list queues not None, int fd):
        self.fd = fd
        self.device, self.memory = device, device.memory
        self.calls = tuple(VhostCall(device, queue) for queue in queues)
        self.faults = tuple(VhostFault(device, queue) for queue in queues)
        for i in range(VHOST_QUEUES):
            self.notice_fds[i] = (<Doorbell>self.calls[i]).fd
            self.fault_fds[i] = (<Doorbell>self.faults[i]).fd
            self.call_fds[i] = -1
        if ioctl(fd, VHOST_SET_OWNER) < 0:
            self.refuse("VHOST_SET_OWNER")
        if ioctl(fd, VHOST_GET_FEATURES, &self.features) < 0:
            self.refuse("VHOST_GET_FEATURES")
        if KERNEL_FEATURES & ~self.features:
            raise HostError(f"{device.name}: this host's vhost-net lacks features {KERNEL_FEATURES & ~self.features:#x}", "set vhost = no")
        self.tell_memory()

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    def close(self):
        """The kernel's thread ends; a second call does nothing."""
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    cdef int tell_memory(self) except -1:
        cdef MemoryTable table = table_of(self.memory)
        if ioctl(self.fd, VHOST_SET_MEM_TABLE, &table) < 0:
            self.refuse("VHOST_SET_MEM_TABLE")
        return 0

    def refuse(self, what):
        raise HostError(f"{self.device.name}: vhost-net cannot be used: {what}: {os.strerror(errno)}", "set vhost = no")

    cdef int settle(self, uint64_t features) noexcept nogil:
        """What the driver agreed to; 0 or -errno. No queue runs."""
        cdef uint64_t wanted = features & self.features & KERNEL_FEATURES
        return 0 if ioctl(self.fd, VHOST_SET_FEATURES, &wanted) == 0 else -errno

    cdef int begin(self, uint32_t index, Virtqueue queue, int tap) noexcept nogil:
        """Hands a live queue over, with its lock held; 0, or -errno and it is still ours. `tap` sends and receives its frames."""
        cdef vhost_vring_addr place = place_of(queue, index)
        cdef int result
        result = self.give_number(VHOST_SET_VRING_NUM, index, queue.size)
        if result == 0:
            result = self.give_number(VHOST_SET_VRING_BASE, index, queue.last_avail)
        if result == 0 and ioctl(self.fd, VHOST_SET_VRING_ADDR, &place) < 0:
            result = -errno
        if result == 0:
            result = self.give_file(VHOST_SET_VRING_ERR, index, self.fault_fds[index])
        if result == 0:
            result = self.aim(index, self.device.transport.interrupt_fd(queue.index))
        if result == 0:
            result = self.give_file(VHOST_SET_VRING_KICK, index, queue.doorbell.fd)
        if result == 0:
            result = self.give_file(VHOST_NET_SET_BACKEND, index, tap)
        if result == 0:
            self.running[index] = True
            queue.live = False
            queue.doorbell.watch(EPOLLET)        # its kicks are the kernel's now
            queue.doorbell.press()               # ... and what waits already
        return result

    cdef void end(self, uint32_t index, Virtqueue queue) noexcept nogil:
        """Takes the queue back, with its lock held: on return the kernel has let go of it, and it stands where the kernel got to."""
        cdef vhost_vring_state base
        cdef uint64_t count
        if not self.running[index]:
            return
        self.give_file(VHOST_NET_SET_BACKEND, index, NO_BACKEND)
        memset(&base, 0, sizeof(base))
        base.index = index
        if ioctl(self.fd, VHOST_GET_VRING_BASE, &base) < 0:
            base.num = queue.last_avail
        if not queue.take_over(<uint16_t>base.num):
            self.device.complain(b"more requests under way than the queue holds, queue", queue.index)
        queue.kicks_wanted = False
        self.give_file(VHOST_SET_VRING_KICK, index, -1)
        self.running[index] = False
        queue.doorbell.watch(EPOLLIN)
        read(self.fault_fds[index], &count, sizeof(count))       # a ring that is still broken later will be found so again
        if read(self.notice_fds[index], &count, sizeof(count)) == sizeof(count):
            self.device.transport.queue_interrupt(queue.index)

    cdef int aim(self, uint32_t index, int vector) noexcept nogil:
        """Where interrupts go: to the `vector`'s irqfd, or with -1 to the I/O thread; 0 or -errno."""
        cdef int fd = vector if vector >= 0 else self.notice_fds[index]
        cdef int result = 0
        if fd != self.call_fds[index]:
            result = self.give_file(VHOST_SET_VRING_CALL, index, fd)
            self.call_fds[index] = fd if result == 0 else -1
        return result

    cdef int give_file(self, unsigned long request, uint32_t index, int fd) noexcept nogil:
        cdef vhost_vring_file file
        file.index = index
        file.fd = fd
        return 0 if ioctl(self.fd, request, &file) == 0 else -errno

    cdef int give_number(self, unsigned long request, uint32_t index, uint32_t number) noexcept nogil:
        cdef vhost_vring_state state
        state.index = index
        state.num = number
        return 0 if ioctl(self.fd, request, &state) == 0 else -errno


cdef MemoryTable table_of(GuestMemory memory) noexcept nogil:
    """Where guest memory lies in this process, as the kernel wants to be told."""
    cdef MemoryTable table
    cdef int i
    memset(&table, 0, sizeof(table))
    table.nregions = memory.count
    for i in range(memory.count):
        table.regions[i].guest_phys_addr = memory.regions[i].gpa
        table.regions[i].memory_size = memory.regions[i].size
        table.regions[i].userspace_addr = <uint64_t>memory.regions[i].hva
    return table


cdef vhost_vring_addr place_of(Virtqueue queue, uint32_t index) noexcept nogil:
    """Where a ring lies in this process; `index` is its number on the other side."""
    cdef vhost_vring_addr place
    memset(&place, 0, sizeof(place))
    place.index = index
    place.desc_user_addr = <uint64_t>queue.desc
    place.avail_user_addr = <uint64_t>queue.avail
    place.used_user_addr = <uint64_t>queue.used
    return place
