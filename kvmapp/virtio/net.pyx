"""virtio-net (VIRTIO 1.2, 5.1): one receive and one transmit queue over a NetBackend.

Frames go straight between guest memory and the backend: a transmit chain is written as it stands, its header in front; receive
buffers are taken from the ring ahead of frames, a frame is read into as many as it needs, and their chains are given back. When the
driver has no room left the reader sleeps (the host queues and then drops) until it is kicked. The frame's header is judged by the
host's kernel. Left out: the control queue (promiscuous mode and filters: every frame is passed), several queue pairs, RSS.
"""
from libc.string cimport memcpy, memmove

from kvmapp.abi.epoll cimport EPOLLET, EPOLLIN
from kvmapp.abi.posix cimport EAGAIN, pthread_mutex_lock, pthread_mutex_unlock
from kvmapp.abi.tun cimport (TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_UFO, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM,
                             VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
                             VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
                             VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP)
from kvmapp.abi.virtio cimport VIRTIO_F_VERSION_1, VIRTIO_ID_NET
from kvmapp.net.backend cimport LARGEST_FRAME, LEGACY_HEADER, NET_HEADER
from kvmapp.virtio.virtqueue cimport QUEUE_SIZE_MAX, chain_allocate, chain_free

cdef enum:
    RX = 0
    TX = 1
    QUEUE_SIZE = 256
    BATCH = 128                      # frames in a round, then others have their turn
    ETHERNET_HEADER = 14
    VLAN_TAG = 4
    DEFAULT_MTU = 1500
    NUM_BUFFERS = 10                 # offset in the header

    NEEDS_GUEST_CSUM = (1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6 | 1 << VIRTIO_NET_F_GUEST_ECN |
                        1 << VIRTIO_NET_F_GUEST_UFO)
    NEEDS_CSUM = (1 << VIRTIO_NET_F_HOST_TSO4 | 1 << VIRTIO_NET_F_HOST_TSO6 | 1 << VIRTIO_NET_F_HOST_ECN | 1 << VIRTIO_NET_F_HOST_UFO)


cdef class FrameReader(EventSource):
    """The backend's descriptor, waited on by the receive queue's I/O thread."""

    def __cinit__(self, VirtioNet device not None):
        self.device = device
        self.fd = device.backend.fd

    cdef void ready(self, uint32_t events) noexcept nogil:
        self.device.frames_ready()


cdef class VirtioNet(VirtioDevice):
    """A card with the address `mac` (6 bytes); `mtu` is told to the driver unless it is 0, `link` is whether its cable is in."""

    def __cinit__(self, str name not None, memory, NetBackend backend not None, bytes mac not None, *, uint16_t mtu=0,
                  bint link=True):
        if len(mac) != sizeof(self.net_config.mac):
            raise ValueError(f"{name}: a MAC address has 6 bytes, not {len(mac)}")
        self.device_id = VIRTIO_ID_NET
        self.backend = backend
        memcpy(self.net_config.mac, <const char*>mac, sizeof(self.net_config.mac))
        self.net_config.status = VIRTIO_NET_S_LINK_UP if link else 0
        self.net_config.max_virtqueue_pairs = 1
        self.net_config.mtu = mtu
        self.header = NET_HEADER
        self.config = &self.net_config
        self.config_size = sizeof(self.net_config)
        for feature in (VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_F_MRG_RXBUF):
            self.offer(feature)
        if mtu:
            self.offer(VIRTIO_NET_F_MTU)
        if backend.has_offloads:
            for feature in (VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN,
                            VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_ECN):
                self.offer(feature)
        if backend.has_ufo:
            self.offer(VIRTIO_NET_F_HOST_UFO)
            self.offer(VIRTIO_NET_F_GUEST_UFO)
        self.receiver = self.add_queue(QUEUE_SIZE)
        self.add_queue(QUEUE_SIZE)
        chain_allocate(&self.chain, QUEUE_SIZE_MAX)
        self.reader = FrameReader(self)

    def __dealloc__(self):
        chain_free(&self.chain)

    def run_on(self, thread, queues=None):
        """As VirtioDevice.run_on; frames arrive in the receive queue's thread."""
        VirtioDevice.run_on(self, thread, queues)
        if queues is None or RX in queues:
            if self.reader.thread is not None:
                self.reader.thread.remove(self.reader)
            if self.reader.fd >= 0:
                thread.add(self.reader, EPOLLET)

    def close(self):
        VirtioDevice.close(self)
        if self.reader.thread is not None:
            self.reader.thread.remove(self.reader)
        self.backend.close()

    @property
    def link(self):
        """Whether the cable is plugged in."""
        return bool(self.net_config.status & VIRTIO_NET_S_LINK_UP)

    def set_link(self, bint up):
        """Plugs the cable in or out; the driver is told."""
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.net_config.status = VIRTIO_NET_S_LINK_UP if up else 0
            self.notify_config()
            pthread_mutex_unlock(&self.lock)
        self.receiver.doorbell.press()

    def stats(self):
        """{counter: value} since the start, from the host's view: rx is what the guest received."""
        return {"rx_packets": self.rx_packets, "rx_bytes": self.rx_bytes, "rx_drop": self.rx_dropped,
                "tx_packets": self.tx_packets, "tx_bytes": self.tx_bytes, "tx_drop": self.tx_dropped}

    def save_device(self):
        return {"version": self.state_version, "mac": (<char*>self.net_config.mac)[:6], "link": self.link}

    def check_device(self, reader):
        checked = reader.data("mac", 6, 6), reader.flag("link")
        reader.done()
        return checked

    def restore_device(self, checked):
        cdef bytes mac
        mac, up = checked
        memcpy(self.net_config.mac, <const char*>mac, 6)
        self.net_config.status = VIRTIO_NET_S_LINK_UP if up else 0

    cdef bint accepts(self, uint64_t features) noexcept nogil:
        """The dependencies of 5.1.3.1."""
        if features & NEEDS_GUEST_CSUM and not features >> VIRTIO_NET_F_GUEST_CSUM & 1:
            return False
        return not features & NEEDS_CSUM or features >> VIRTIO_NET_F_CSUM & 1

    cdef void activate(self) noexcept nogil:
        cdef uint32_t flags = 0
        cdef uint64_t mtu = self.net_config.mtu if self.has(VIRTIO_NET_F_MTU) else DEFAULT_MTU
        flags |= TUN_F_CSUM if self.has(VIRTIO_NET_F_GUEST_CSUM) else 0
        flags |= TUN_F_TSO4 if self.has(VIRTIO_NET_F_GUEST_TSO4) else 0
        flags |= TUN_F_TSO6 if self.has(VIRTIO_NET_F_GUEST_TSO6) else 0
        flags |= TUN_F_TSO_ECN if self.has(VIRTIO_NET_F_GUEST_ECN) else 0
        flags |= TUN_F_UFO if self.has(VIRTIO_NET_F_GUEST_UFO) else 0
        self.mergeable = self.has(VIRTIO_NET_F_MRG_RXBUF)
        self.header = NET_HEADER if self.mergeable or self.has(VIRTIO_F_VERSION_1) else LEGACY_HEADER
        self.frame_room = self.header + (LARGEST_FRAME if self.features & NEEDS_GUEST_CSUM else mtu + ETHERNET_HEADER + VLAN_TAG)
        if self.backend.set_header(self.header) < 0 or self.backend.set_offloads(flags) < 0:
            self.complain(b"the host refuses these offloads", flags)

    cdef void deactivate(self) noexcept nogil:
        self.backend.set_offloads(0)

    cdef void drain(self, Virtqueue queue) noexcept nogil:
        """Receive buffers wait in our hands between two frames: they go back to the ring."""
        if queue.index == RX:
            pthread_mutex_lock(&queue.lock)
            self.unpost(queue)
            pthread_mutex_unlock(&queue.lock)

    cdef void kicked(self, Virtqueue queue) noexcept nogil:
        if queue.index == RX:
            self.receive(queue)
        else:
            self.transmit(queue)
        self.notify_used(queue)

    # ---- receive

    cdef void frames_ready(self) noexcept nogil:
        """The backend has frames; in the receive queue's I/O thread."""
        pthread_mutex_lock(&self.receiver.lock)
        if self.receiver.live:
            self.receive(self.receiver)
            self.notify_used(self.receiver)
        else:
            self.watch_frames(False)
        pthread_mutex_unlock(&self.receiver.lock)

    cdef void receive(self, Virtqueue queue) noexcept nogil:
        """Frames into posted buffers, until there are no more of the one or the other."""
        cdef ssize_t length
        cdef uint32_t done = 0
        while done < BATCH:
            if not self.net_config.status & VIRTIO_NET_S_LINK_UP or not self.post(queue):
                self.watch_frames(False)
                return
            # What does not fit spills over here, and shows that the frame was larger than the room.
            self.vectors[self.vector_count].iov_base = self.overflow
            self.vectors[self.vector_count].iov_len = sizeof(self.overflow)
            length = self.backend.receive(self.vectors, self.vector_count + 1)
            if length < 0:
                if length != -EAGAIN:
                    self.complain(b"no frames from the host, error", -length)
                self.watch_frames(length == -EAGAIN)
                return
            if length <= self.header or <uint64_t>length > self.room:
                self.rx_dropped += 1
            else:
                self.deliver(queue, length)
            done += 1
        queue.doorbell.press()

    cdef bint post(self, Virtqueue queue) noexcept nogil:
        """Takes buffers from the ring until the largest frame has room; False when the driver must give more first."""
        cdef uint32_t most = POSTED_MOST if self.mergeable else 1
        cdef int got
        while self.room < self.frame_room and self.posted < most:
            got = queue.pop(&self.chain)
            if got < 0:
                return False
            if got == 0:
                # Nothing more to have now: a VLAN tag's four bytes may lack, or the whole ring is smaller than a large frame.
                return self.room + VLAN_TAG >= self.frame_room or self.posted == queue.size
            if self.chain.readable_count or self.chain.writable_bytes <= self.header:
                queue.fail(b"receive buffer has a readable part, or no room for a header", self.chain.writable_bytes)
                return False
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
        return self.posted > 0

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
        cdef uint32_t done = 0
        while done < BATCH:
            if queue.pop(&self.chain) != 1:
                return
            self.send(&self.chain)
            queue.push(&self.chain, 0)
            done += 1
        queue.doorbell.press()

    cdef void send(self, Chain* chain) noexcept nogil:
        """One frame; what the host does not take is dropped, as on a wire."""
        cdef uint64_t length = chain.readable_bytes
        if length < self.header + ETHERNET_HEADER or length > self.header + LARGEST_FRAME:
            self.complain(b"frame of impossible length", length)
            self.tx_dropped += 1
        elif not self.net_config.status & VIRTIO_NET_S_LINK_UP or self.backend.send(chain.readable, chain.readable_count) < 0:
            self.tx_dropped += 1
        else:
            self.tx_packets += 1
            self.tx_bytes += length - self.header
