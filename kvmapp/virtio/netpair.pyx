"""One pair of a network card's queues, receive and transmit, over a NetBackend of its own (VIRTIO 1.2, 5.1.6).

Frames go straight between guest memory and the backend: a transmit chain is written as it stands, its header in front; receive
buffers are taken from the ring ahead of frames, a frame is read into as many as it needs, and their chains are given back. When the
driver has no room left the reader sleeps (the host queues and then drops) until it is kicked. A frame that the room left is too small
for is kept aside until there is more, but never for long: a driver may wait for frames before it gives more. The frame's header is
judged by the host's kernel. With a VhostNet the kernel does all this instead, as long as the queues run and the cable is in.
"""
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove

from kvmapp.abi.epoll cimport EPOLLET, EPOLLIN
from kvmapp.abi.posix cimport EAGAIN, pthread_mutex_lock, pthread_mutex_unlock
from kvmapp.abi.tun cimport EBADFD
from kvmapp.iothread cimport monotonic_ns
from kvmapp.net.backend cimport LARGEST_FRAME, NET_HEADER
from kvmapp.virtio.virtqueue cimport QUEUE_SIZE_MAX, chain_allocate, chain_free

cdef enum:
    RX = 0                           # of the pair
    TX = 1
    BATCH = 128                      # frames in a round, then others have their turn
    SHOWN = 64                       # ... and so many the driver sees at once: it works on them while we do the next
    ETHERNET_HEADER = 14
    NUM_BUFFERS = 10                 # offset in the header
    SPILL = LARGEST_FRAME + NET_HEADER
    PATIENCE = 100000000             # ns that a kept frame waits: less than TCP does before it sends again

    # What `post` has to say.
    OVER = 0                         # no frame now: the next round comes by itself, or by a kick
    SHORT = 1                        # these are all that the driver has given
    ENOUGH = 2                       # so many are wanted, or one read takes


cdef class FrameReader(EventSource):
    """The backend's descriptor, waited on by the receive queue's I/O thread."""

    def __cinit__(self, QueuePair pair not None):
        self.pair = pair
        self.fd = pair.backend.fd

    cdef void ready(self, uint32_t events) noexcept nogil:
        self.pair.frames_ready()


cdef class Patience(Timer):
    """A kept frame has waited long enough."""

    def __cinit__(self, QueuePair pair not None):
        self.pair = pair

    cdef void expired(self) noexcept nogil:
        self.pair.patience_ends()


cdef class QueuePair:
    """`receiver` and `transmitter` belong to `device`, whose log it complains in."""

    def __cinit__(self, VirtioDevice device not None, NetBackend backend not None, Virtqueue receiver not None,
                  Virtqueue transmitter not None):
        self.device, self.backend, self.receiver, self.transmitter = device, backend, receiver, transmitter
        self.header = NET_HEADER
        chain_allocate(&self.chain, QUEUE_SIZE_MAX)
        chain_allocate(&self.outgoing, QUEUE_SIZE_MAX)
        self.spill = <uint8_t*>malloc(SPILL + 1)         # its pages are not there before they are used
        if self.spill == NULL:
            raise MemoryError
        self.reader = FrameReader(self)
        self.patience = Patience(self)
        self.patience_ns = PATIENCE

    def __dealloc__(self):
        free(self.spill)
        chain_free(&self.chain)
        chain_free(&self.outgoing)

    def use_vhost(self, int fd):
        """From now on the host's kernel works on the queues, by the open /dev/vhost-net `fd`. Raises HostError."""
        self.vhost = VhostNet(self.device, [self.receiver, self.transmitter], fd)

    def run_on(self, IoThread thread not None):
        """Frames, and what vhost has to say, arrive in this thread."""
        self.leave_thread()
        if self.reader.fd >= 0:
            thread.add(self.reader, EPOLLET)
            thread.add(self.patience)
        if self.backend.waiter is not None:
            self.backend.answers = True
            thread.wait_by(self.backend.waiter, self.reader)
        if self.vhost is not None:
            for source in (*self.vhost.calls, *self.vhost.faults):
                thread.add(source)

    def leave_thread(self):
        """When this returns nothing of the pair is served any more."""
        if self.backend.waiter is not None and self.reader.thread is not None:
            self.reader.thread.wait_by(None)
        for source in (self.reader, self.patience, *(() if self.vhost is None else (*self.vhost.calls, *self.vhost.faults))):
            if (<EventSource>source).thread is not None:
                (<EventSource>source).thread.remove(source)

    def close(self):
        self.leave_thread()
        if self.vhost is not None:
            self.vhost.close()
        self.backend.close()

    cdef int settle(self, uint64_t features, uint32_t offloads, bint mergeable, uint32_t header, uint64_t frame_room) noexcept nogil:
        """What the driver agreed to; 0, or -errno of a host that does not go along."""
        cdef int result
        self.mergeable = mergeable
        self.header = header
        self.frame_room = frame_room
        result = self.backend.set_header(header)
        if result == 0:
            result = self.backend.set_offloads(offloads)
        if result == 0 and self.vhost is not None:
            result = self.vhost.settle(features)
        return result

    cdef void begin(self, Virtqueue queue) noexcept nogil:
        """The queue has just become live: hands it to vhost where there is one."""
        cdef int result
        if self.vhost is None or not self.link or queue.packed:      # the kernel's vhost-net knows split rings only
            return
        pthread_mutex_lock(&queue.lock)
        if queue.live:
            if queue is self.receiver:
                self.unpost(queue)
                self.watch_frames(False)
            result = self.vhost.begin(TX if queue is self.transmitter else RX, queue, self.backend.fd)
            if result < 0:
                self.device.report_host(b"vhost refuses a queue, which goes on without it", queue.index, -result)
        pthread_mutex_unlock(&queue.lock)

    cdef void drain(self, Virtqueue queue) noexcept nogil:
        """The queue stops: vhost gives it back, and receive buffers that wait in our hands go back to the ring."""
        pthread_mutex_lock(&queue.lock)
        if self.vhost is not None:
            self.vhost.end(TX if queue is self.transmitter else RX, queue)
        if queue is self.receiver:
            self.unpost(queue)
        pthread_mutex_unlock(&queue.lock)

    cdef void aim(self) noexcept nogil:
        """The driver changed where its interrupts go."""
        if self.vhost is not None:
            self.aim_queue(RX, self.receiver)
            self.aim_queue(TX, self.transmitter)

    cdef void aim_queue(self, uint32_t index, Virtqueue queue) noexcept nogil:
        pthread_mutex_lock(&queue.lock)
        if self.vhost.running[index]:
            self.vhost.aim(index, self.device.transport.interrupt_fd(queue.index))
        pthread_mutex_unlock(&queue.lock)

    cdef void kicked(self, Virtqueue queue) noexcept nogil:
        if queue is self.receiver:
            self.receive(queue)
        else:
            self.transmit(queue)

    # ---- receive

    cdef void frames_ready(self) noexcept nogil:
        """The backend has frames; in the receive queue's I/O thread."""
        pthread_mutex_lock(&self.receiver.lock)
        if self.receiver.live:
            self.receive(self.receiver)
            self.device.notify_used(self.receiver)
        else:
            self.watch_frames(False)
        pthread_mutex_unlock(&self.receiver.lock)

    cdef void receive(self, Virtqueue queue) noexcept nogil:
        """Frames into posted buffers, until there are no more of the one or the other."""
        cdef ssize_t length
        cdef uint64_t held
        cdef uint32_t done = 0
        while done < BATCH:
            if not self.link or (self.kept and not self.settle_kept(queue)) or self.post(queue, self.frame_room) == OVER:
                self.watch_frames(False)
                return
            # What does not fit spills over here, at its place in the frame. The last byte is that of a frame larger than any.
            held = min(self.room, <uint64_t>SPILL)
            self.vectors[self.vector_count].iov_base = self.spill + held
            self.vectors[self.vector_count].iov_len = SPILL + 1 - held
            length = self.backend.receive(self.vectors, self.vector_count + 1)
            if length < 0:
                if length != -EAGAIN and length != -EBADFD:      # the latter: a queue of the tap's that is not used now
                    self.device.complain(b"no frames from the host, error", -length)
                self.watch_frames(length != -EBADFD)     # an error is that of one frame, lost as on a wire: the next one may be good
                return
            if length <= self.header:
                self.rx_dropped += 1
            elif <uint64_t>length <= self.room:
                self.deliver(queue, length)
            elif self.mergeable and length <= SPILL:
                self.keep(length)
            else:
                self.rx_dropped += 1
            done += 1
            if done % SHOWN == 0:
                self.device.notify_used(queue)
        queue.doorbell.press()

    cdef int post(self, Virtqueue queue, uint64_t wanted) noexcept nogil:
        """Takes buffers from the ring until `wanted` bytes have room."""
        cdef uint32_t most = POSTED_MOST if self.mergeable else 1
        cdef int got
        while self.room < wanted and self.posted < most:
            got = queue.pop(&self.chain)
            if got < 0:
                return OVER
            if got == 0:
                return SHORT if self.posted and not queue.waits() else OVER
            if self.chain.readable_count or self.chain.writable_bytes <= self.header:
                queue.unpop(&self.chain)         # nobody holds it: a saved ring of packed descriptors has none under way
                queue.fail(b"receive buffer has a readable part, or no room for a header", self.chain.writable_bytes)
                return OVER
            if self.vector_count + self.chain.writable_count > POSTED_VECTORS:
                queue.unpop(&self.chain)
                break
            memcpy(&self.vectors[self.vector_count], self.chain.writable, self.chain.writable_count * sizeof(iovec))
            self.posts[self.posted].head = self.chain.head
            self.posts[self.posted].vectors = self.chain.writable_count
            self.posts[self.posted].size = self.chain.writable_bytes
            self.vector_count += self.chain.writable_count
            self.room += self.chain.writable_bytes
            self.posted += 1
        return ENOUGH if self.posted else OVER

    cdef void keep(self, uint64_t length) noexcept nogil:
        """The frame just read has `length` bytes, more than the room: what lies in the buffers goes before what spilled over."""
        cdef uint64_t done = 0
        cdef uint32_t i
        for i in range(self.vector_count):
            memcpy(self.spill + done, self.vectors[i].iov_base, self.vectors[i].iov_len)
            done += self.vectors[i].iov_len
        self.kept = length
        self.patience.arm(monotonic_ns() + self.patience_ns, 0)

    cdef bint settle_kept(self, Virtqueue queue) noexcept nogil:
        """Delivers the kept frame, or gives it up; False: it waits for more buffers, and all others behind it."""
        cdef uint64_t done = 0, step
        cdef uint32_t i = 0
        cdef int answer = self.post(queue, self.kept)
        if answer == OVER:
            return False
        if self.room < self.kept:
            # Linux gives more when less than half of its ring is left, and not before.
            if answer == SHORT and 2 * self.vector_count < queue.size:
                return False
            self.drop_kept()
            return True
        while done < self.kept:
            step = min(self.kept - done, <uint64_t>self.vectors[i].iov_len)
            memcpy(self.vectors[i].iov_base, self.spill + done, step)
            done += step
            i += 1
        self.deliver(queue, self.kept)
        self.kept = 0
        return True

    cdef void drop_kept(self) noexcept nogil:
        if self.kept:
            self.kept = 0
            self.rx_dropped += 1

    cdef void patience_ends(self) noexcept nogil:
        """In the receive queue's I/O thread: smaller frames may pass, after which a driver with a rule of its own gives buffers again."""
        pthread_mutex_lock(&self.receiver.lock)
        if self.kept and self.receiver.live:
            self.drop_kept()
            self.receive(self.receiver)
            self.device.notify_used(self.receiver)
        pthread_mutex_unlock(&self.receiver.lock)

    cdef void deliver(self, Virtqueue queue, uint64_t length) noexcept nogil:
        """Gives back the posted chains that a frame of `length` bytes filled."""
        cdef uint32_t chains = 0, vectors = 0
        cdef uint64_t left = length, written
        while left:
            written = min(left, self.posts[chains].size)
            self.chain.head = self.posts[chains].head
            queue.push(&self.chain, <uint32_t>written)
            left -= written
            self.room -= self.posts[chains].size
            vectors += self.posts[chains].vectors
            chains += 1
        self.mark_buffers(chains)
        self.posted -= chains
        self.vector_count -= vectors
        memmove(&self.posts[0], &self.posts[chains], self.posted * sizeof(Posted))
        memmove(&self.vectors[0], &self.vectors[vectors], self.vector_count * sizeof(iovec))
        self.rx_packets += 1
        self.rx_bytes += length - self.header

    cdef void mark_buffers(self, uint16_t count) noexcept nogil:
        """num_buffers of the header in the first vectors, however the driver cut them; a legacy header has none."""
        cdef uint8_t* bytes_of_count = <uint8_t*>&count
        if self.header < NET_HEADER:
            return
        cdef uint64_t start = 0
        cdef uint32_t i = 0, offset = NUM_BUFFERS
        while offset < NUM_BUFFERS + sizeof(count):
            while offset - start >= self.vectors[i].iov_len:
                start += self.vectors[i].iov_len
                i += 1
            (<uint8_t*>self.vectors[i].iov_base)[offset - start] = bytes_of_count[offset - NUM_BUFFERS]
            offset += 1

    cdef void unpost(self, Virtqueue queue) noexcept nogil:
        """Whoever works on the queue next finds it as the driver left it; a kept frame is lost, as on a wire."""
        self.drop_kept()
        while self.posted:
            queue.unpop(&self.chain)
            self.posted -= 1
        self.vector_count = 0
        self.room = 0

    cdef void watch_frames(self, bint wanted) noexcept nogil:
        """Unwanted frames leave the descriptor ready: edge-triggered, without EPOLLIN, it stays quiet."""
        if wanted != self.watching:
            self.watching = wanted
            self.reader.watch(EPOLLIN if wanted else EPOLLET)

    # ---- transmit

    cdef void transmit(self, Virtqueue queue) noexcept nogil:
        """Frames, and then one more look: a driver that sends many adds some meanwhile, and need not kick for each of them."""
        cdef uint32_t done = 0
        while done == 0 or done < BATCH and queue.waits():
            if queue.pop(&self.outgoing) != 1:
                return
            self.send(&self.outgoing)
            queue.push(&self.outgoing, 0)
            done += 1
            if done % SHOWN == 0:
                self.device.notify_used(queue)
        queue.doorbell.press()

    cdef void send(self, Chain* chain) noexcept nogil:
        """One frame; what the host does not take is dropped, as on a wire."""
        cdef uint64_t length = chain.readable_bytes
        if length < self.header + ETHERNET_HEADER or length > self.header + LARGEST_FRAME:
            self.device.complain(b"frame of impossible length", length)
            self.tx_dropped += 1
        elif not self.link or self.backend.send(chain.readable, chain.readable_count) < 0:
            self.tx_dropped += 1
        else:
            self.tx_packets += 1
            self.tx_bytes += length - self.header
