"""vhost-user, the front end: another process works on a device's queues (QEMU's docs/interop/vhost-user.rst).

What vhost.pyx says to the kernel by ioctl is said here by messages over a stream socket. Kicks reach the back end through the queue's
own doorbell, interrupts leave by the MSI-X vector's irqfd; where that is masked, or MSI-X is off, by way of a VhostCall in the I/O
thread. The back end maps the guest's memory, which must be shared (memory.pyx).

The back end is not trusted to answer, to answer what was asked, or to stay. Nothing is waited for but the answers to the greeting and
to GET_VRING_BASE (a pause, a reset), and those no longer than `patience`. A back end that breaks the rules is `lost`: a line in the
log, the socket is shut, and the device has its queues back, for good. It keeps what memory it has mapped until it ends.
Left out: reconnecting, dirty logging, IOTLB, requests of the back end's own, queues in flight when it is lost, packed rings.
"""
from libc.stdint cimport uint16_t

from kvmapp.abi.epoll cimport EPOLLET, EPOLLIN, EPOLLRDHUP
from kvmapp.abi.posix cimport (EAGAIN, ECONNRESET, EINTR, EPROTO, ETIMEDOUT, POLLIN, atomic_load_u32, atomic_store_u32, close, errno,
                               poll, pollfd, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
                               pthread_mutex_unlock, read)
from kvmapp.abi.socket cimport MSG_DONTWAIT, SHUT_RDWR, recv, shutdown
from kvmapp.abi.vhost_user cimport (VHOST_USER_F_PROTOCOL_FEATURES, VHOST_USER_GET_FEATURES, VHOST_USER_GET_PROTOCOL_FEATURES,
                                    VHOST_USER_GET_QUEUE_NUM, VHOST_USER_GET_VRING_BASE, VHOST_USER_PROTOCOL_F_MQ,
                                    VHOST_USER_REGIONS, VHOST_USER_REPLY, VHOST_USER_SET_FEATURES, VHOST_USER_SET_MEM_TABLE,
                                    VHOST_USER_SET_OWNER, VHOST_USER_SET_PROTOCOL_FEATURES, VHOST_USER_SET_VRING_ADDR,
                                    VHOST_USER_SET_VRING_BASE, VHOST_USER_SET_VRING_CALL, VHOST_USER_SET_VRING_ENABLE,
                                    VHOST_USER_SET_VRING_ERR, VHOST_USER_SET_VRING_KICK, VHOST_USER_SET_VRING_NUM,
                                    VHOST_USER_VERSION, VHOST_USER_VERSION_MASK, send_with_fds)
from kvmapp.abi.vhost cimport vhost_vring_addr, vhost_vring_state
from kvmapp.abi.virtio cimport VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, ring_load_u16
from kvmapp.iothread cimport Doorbell, monotonic_ns
from kvmapp.virtio.vhost cimport MemoryTable, VhostCall, VhostFault, place_of, table_of

from kvmapp.errors import HostError

cdef struct Header:
    uint32_t request
    uint32_t flags
    uint32_t size                    # bytes that follow

# Feature bits that the back end must know of when the driver agrees to them.
cdef uint64_t RING_FEATURES = (<uint64_t>1 << VIRTIO_F_VERSION_1 | <uint64_t>1 << VIRTIO_RING_F_EVENT_IDX |
                               <uint64_t>1 << VIRTIO_RING_F_INDIRECT_DESC)

PATIENCE = 20.0                      # seconds: a stopping queue waits for requests that the host's disks are slow at


cdef class Hangup(EventSource):
    """The back end has closed its end of the socket."""

    def __cinit__(self, VhostUser channel not None):
        self.channel = channel
        self.fd = channel.fd

    cdef void ready(self, uint32_t events) noexcept nogil:
        self.channel.hung_up()


cdef class VhostUser:
    """`fd` is a stream socket with a back end behind it, which then belongs to this object, whatever happens; `patience` in seconds.

    Raises HostError for a back end that does not greet as the protocol wants, or cannot do what `device` needs.
    """

    def __cinit__(self, VirtioDevice device not None, int fd, double patience=PATIENCE):
        self.fd = fd
        pthread_mutex_init(&self.talk, NULL)
        self.device, self.memory = device, device.memory
        self.wait_for(patience)
        self.calls = tuple(VhostCall(device, queue) for queue in device.queues)
        self.faults = tuple(VhostFault(device, queue) for queue in device.queues)
        if len(device.queues) > VHOST_USER_QUEUES or device.memory.count > VHOST_USER_REGIONS:
            raise ValueError(f"{device.name}: too many queues, or regions of memory, for vhost-user")
        if not device.memory.is_shared:
            raise ValueError(f"{device.name}: vhost-user wants shared memory")
        for i in range(len(device.queues)):
            self.notice_fds[i] = (<Doorbell>self.calls[i]).fd
            self.fault_fds[i] = (<Doorbell>self.faults[i]).fd
            self.call_fds[i] = -1
        self.hangup = Hangup(self)
        self.greet(len(device.queues))

    def __dealloc__(self):
        pthread_mutex_destroy(&self.talk)
        if self.fd >= 0:
            close(self.fd)

    @property
    def features(self):
        """The back end's feature bits."""
        return self.offered

    @property
    def connected(self):
        """Whether there is still a back end."""
        return not self.is_lost()

    def wait_for(self, double seconds):
        """Another `patience` from now on."""
        self.patience = <int>(seconds * 1000)

    def run_on(self, thread):
        """What the back end has to say arrives in this thread."""
        self.leave_thread()
        for source in (*self.calls, *self.faults):
            thread.add(source)
        thread.add(self.hangup, EPOLLRDHUP | EPOLLET)

    def leave_thread(self):
        """When this returns nothing of the back end's is served any more."""
        for source in (*self.calls, *self.faults, self.hangup):
            if (<EventSource>source).thread is not None:
                (<EventSource>source).thread.remove(source)

    def close(self):
        """Hangs up, by which the back end ends; a second call does nothing."""
        self.leave_thread()
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1
        atomic_store_u32(&self.lost, True)

    def greet(self, uint64_t queues):
        cdef uint64_t protocol = 0, most = queues
        cdef bint ok
        with nogil:
            ok = self.ask_word(VHOST_USER_GET_FEATURES, &self.offered)
            if ok and self.offered >> VHOST_USER_F_PROTOCOL_FEATURES & 1:
                ok = self.ask_word(VHOST_USER_GET_PROTOCOL_FEATURES, &protocol)
                protocol &= <uint64_t>1 << VHOST_USER_PROTOCOL_F_MQ
                ok = ok and self.tell_word(VHOST_USER_SET_PROTOCOL_FEATURES, protocol)
                if ok and protocol:
                    ok = self.ask_word(VHOST_USER_GET_QUEUE_NUM, &most)
            ok = ok and self.tell(VHOST_USER_SET_OWNER, NULL, 0)
        if not ok:
            raise HostError(f"{self.device.name}: the file server does not speak vhost-user", "its own last words may tell why")
        if not self.offered >> VIRTIO_F_VERSION_1 & 1 or most < queues:
            raise HostError(f"{self.device.name}: the file server lacks VIRTIO 1.0, or has {most} queues where {queues} are needed",
                            "it serves another kind of device, or is too old")

    # ---- for the device

    cdef bint is_lost(self) noexcept nogil:
        return atomic_load_u32(&self.lost)

    cdef void settle(self, uint64_t features) noexcept nogil:
        """What the driver agreed to. No queue runs."""
        cdef uint64_t wanted = features & self.offered & RING_FEATURES
        wanted |= self.offered & <uint64_t>1 << VHOST_USER_F_PROTOCOL_FEATURES
        pthread_mutex_lock(&self.talk)
        if self.tell_word(VHOST_USER_SET_FEATURES, wanted):
            self.tell_memory()
        pthread_mutex_unlock(&self.talk)

    cdef void begin(self, Virtqueue queue) noexcept nogil:
        """Hands a live queue over, with its lock held; without a back end it stays live and ours."""
        cdef uint32_t index = queue.index
        cdef vhost_vring_addr place = place_of(queue, index)
        cdef bint ok
        pthread_mutex_lock(&self.talk)
        self.call_fds[index] = -1
        ok = (self.tell_number(VHOST_USER_SET_VRING_NUM, index, queue.size) and
              self.tell_number(VHOST_USER_SET_VRING_BASE, index, queue.last_avail) and
              self.tell(VHOST_USER_SET_VRING_ADDR, &place, sizeof(place)) and
              self.tell_file(VHOST_USER_SET_VRING_ERR, index, self.fault_fds[index]) and
              self.aim_at(index, self.device.transport.interrupt_fd(index)) and
              self.tell_file(VHOST_USER_SET_VRING_KICK, index, queue.doorbell.fd))
        if ok and self.offered >> VHOST_USER_F_PROTOCOL_FEATURES & 1:
            ok = self.tell_number(VHOST_USER_SET_VRING_ENABLE, index, 1)
        pthread_mutex_unlock(&self.talk)
        if ok:
            self.running[index] = True
            queue.live = False
            queue.doorbell.watch(EPOLLET)        # its kicks are the back end's now
        queue.doorbell.press()                   # ... and what waits already

    cdef bint works_on(self, Virtqueue queue) noexcept nogil:
        """Whether the queue is handed over; with no queue's lock held."""
        cdef bint running
        pthread_mutex_lock(&queue.lock)
        running = self.running[queue.index]
        pthread_mutex_unlock(&queue.lock)
        return running

    cdef void end(self, Virtqueue queue) noexcept nogil:
        """Takes the queue back, with its lock held: on return the back end has let go of it, or there is none any more."""
        if self.running[queue.index]:
            self.take_back(queue, self.ask_base(queue.index))

    cdef void aim(self, Virtqueue queue) noexcept nogil:
        """The driver may have changed where the queue's interrupts go; with the queue's lock held."""
        if self.running[queue.index] and not self.is_lost():
            pthread_mutex_lock(&self.talk)
            self.aim_at(queue.index, self.device.transport.interrupt_fd(queue.index))
            pthread_mutex_unlock(&self.talk)

    # ---- a back end that is lost

    cdef void hung_up(self) noexcept nogil:
        """There is no back end any more; in the I/O thread, with no lock held. The device serves its queues itself from now on."""
        cdef uint32_t i
        pthread_mutex_lock(&self.talk)
        self.lose(b"the file server has gone", 0, ECONNRESET)
        pthread_mutex_unlock(&self.talk)
        for i in range(self.device.queue_count):
            self.inherit(<Virtqueue>self.device.queue_table[i])

    cdef void inherit(self, Virtqueue queue) noexcept nogil:
        pthread_mutex_lock(&queue.lock)
        if self.running[queue.index]:
            self.take_back(queue, -1)
            queue.live = True
            queue.doorbell.press()
        pthread_mutex_unlock(&queue.lock)

    cdef void lose(self, const char* what, uint32_t request, int error) noexcept nogil:
        """With `talk` held. The hangup that follows reaches the I/O thread, which sees to the queues."""
        if not self.is_lost():
            atomic_store_u32(&self.lost, True)
            shutdown(self.fd, SHUT_RDWR)
            self.device.report_host(what, request, error)

    cdef void take_back(self, Virtqueue queue, int base) noexcept nogil:
        """The queue goes on from `base` in its available ring; without (-1), after all that was posted: what the back end had not yet
        answered stays unanswered until the driver resets the queue."""
        cdef uint64_t count
        if not queue.take_over(<uint16_t>base if base >= 0 else ring_load_u16(queue.avail + 2)):
            self.device.complain(b"more requests under way than the queue holds, queue", queue.index)
        queue.kicks_wanted = False
        self.running[queue.index] = False
        queue.doorbell.watch(EPOLLIN)
        read(self.fault_fds[queue.index], &count, sizeof(count))         # a ring that is still broken later will be found so again
        if read(self.notice_fds[queue.index], &count, sizeof(count)) == sizeof(count) or base < 0:
            self.device.transport.queue_interrupt(queue.index)

    # ---- messages, with `talk` held (but for `ask_base`)

    cdef int ask_base(self, uint32_t index) noexcept nogil:
        """Stops a queue: where the back end got to in its available ring, or -1."""
        cdef vhost_vring_state state
        cdef int base = -1
        pthread_mutex_lock(&self.talk)
        if (self.tell_number(VHOST_USER_GET_VRING_BASE, index, 0) and
                self.hear(VHOST_USER_GET_VRING_BASE, &state, sizeof(state))):
            base = <uint16_t>state.num
            if state.index != index:
                self.lose(b"the file server answers for another queue", index, EPROTO)
                base = -1
        pthread_mutex_unlock(&self.talk)
        return base

    cdef bint aim_at(self, uint32_t index, int vector) noexcept nogil:
        """Interrupts go to the `vector`'s irqfd, or with -1 to the I/O thread. A signal for the place before may come yet."""
        cdef int fd = vector if vector >= 0 else self.notice_fds[index]
        if fd == self.call_fds[index]:
            return True
        self.call_fds[index] = fd
        return self.tell_file(VHOST_USER_SET_VRING_CALL, index, fd)

    cdef bint tell_memory(self) noexcept nogil:
        """The kernel's table, whose padding is the offset in the region's file here: 0, too."""
        cdef MemoryTable table = table_of(self.memory)
        cdef int fds[VHOST_USER_REGIONS]
        cdef int i
        for i in range(self.memory.count):
            fds[i] = self.memory.regions[i].fd
        return self.tell(VHOST_USER_SET_MEM_TABLE, &table, 8 + self.memory.count * sizeof(table.regions[0]), fds, self.memory.count)

    cdef bint tell_file(self, uint32_t request, uint32_t index, int fd) noexcept nogil:
        cdef uint64_t word = index
        return self.tell(request, &word, sizeof(word), &fd, 1)

    cdef bint tell_number(self, uint32_t request, uint32_t index, uint32_t number) noexcept nogil:
        cdef vhost_vring_state state
        state.index, state.num = index, number
        return self.tell(request, &state, sizeof(state))

    cdef bint tell_word(self, uint32_t request, uint64_t word) noexcept nogil:
        return self.tell(request, &word, sizeof(word))

    cdef bint ask_word(self, uint32_t request, uint64_t* word) noexcept nogil:
        return self.tell(request, NULL, 0) and self.hear(request, word, sizeof(word[0]))

    cdef bint tell(self, uint32_t request, const void* body, uint32_t size, const int* fds=NULL, uint32_t count=0) noexcept nogil:
        """One message, without waiting; whether it went. A socket that is full belongs to a back end that does not read."""
        cdef Header header
        cdef ssize_t sent
        if self.is_lost():
            return False
        header.request, header.flags, header.size = request, VHOST_USER_VERSION, size
        sent = send_with_fds(self.fd, &header, sizeof(header), body, size, fds, count)
        if sent == <ssize_t>sizeof(header) + size:
            return True
        self.lose(b"the file server does not take a message, number", request, <int>-sent if sent < 0 else EAGAIN)
        return False

    cdef bint hear(self, uint32_t request, void* body, uint32_t size) noexcept nogil:
        """The answer to `request`, which has `size` bytes; whether it came, as the protocol wants it."""
        cdef Header header
        cdef int64_t deadline = monotonic_ns() + <int64_t>self.patience * 1000000
        cdef int error = self.receive(&header, sizeof(header), deadline)
        if error == 0 and (header.request != request or header.size != size or not header.flags & VHOST_USER_REPLY or
                           header.flags & VHOST_USER_VERSION_MASK != VHOST_USER_VERSION):
            error = EPROTO
        if error == 0:
            error = self.receive(body, size, deadline)
        if error:
            self.lose(b"the file server does not answer a message, number", request, error)
        return error == 0

    cdef int receive(self, void* target, size_t length, int64_t deadline) noexcept nogil:
        """Exactly `length` bytes; 0 or an errno. Descriptors that come along are dropped by the kernel."""
        cdef size_t done = 0
        cdef ssize_t got
        cdef int64_t left
        cdef pollfd wait
        while done < length:
            got = recv(self.fd, <char*>target + done, length - done, MSG_DONTWAIT)
            if got > 0:
                done += got
            elif got == 0:
                return ECONNRESET
            elif errno == EAGAIN:
                left = (deadline - monotonic_ns()) // 1000000
                if left <= 0:
                    return ETIMEDOUT
                wait.fd, wait.events = self.fd, POLLIN
                poll(&wait, 1, <int>left)
            elif errno != EINTR:
                return errno
        return 0
