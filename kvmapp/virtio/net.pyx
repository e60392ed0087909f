"""virtio-net (VIRTIO 1.2, 5.1): a network card of one or several pairs of queues (netpair.pyx) and a control queue.

The control queue sets the address and how many pairs are used. Receive modes, address and VLAN filters are accepted and filter nothing:
every frame is passed, as 5.1.6.5.1 allows. Left out: RSS and hash reports, announcements, offloads that change while the card runs.
"""
from libc.string cimport memcpy

from kvmapp.abi.posix cimport pthread_mutex_lock, pthread_mutex_unlock
from kvmapp.abi.tun cimport (TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_UFO, TUN_F_USO4, TUN_F_USO6,
                             VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA,
                             VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
                             VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4,
                             VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
                             VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
                             VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP)
from kvmapp.abi.virtio cimport VIRTIO_F_VERSION_1, VIRTIO_ID_NET
from kvmapp.net.backend cimport LARGEST_FRAME, LEGACY_HEADER, NET_HEADER, NetBackend
from kvmapp.virtio.netpair cimport QueuePair
from kvmapp.virtio.virtqueue cimport QUEUE_SIZE_MAX, chain_allocate, chain_free, chain_put, chain_take

import os

from kvmapp.state import StateError

cdef enum:
    QUEUE_SIZE = 256
    CONTROL_SIZE = 64
    QUEUES_A_PAIR = 2
    ETHERNET_HEADER = 14
    VLAN_TAG = 4
    DEFAULT_MTU = 1500
    ADDRESS = 6                      # bytes

    # Commands of the control queue (5.1.6.5) and its answers.
    CLASS_RX = 0
    CLASS_MAC = 1
    CLASS_VLAN = 2
    CLASS_MQ = 4
    RX_COMMANDS = 6
    MAC_TABLE_SET = 0
    MAC_ADDR_SET = 1
    VLAN_COMMANDS = 2
    VQ_PAIRS_SET = 0
    ANSWER_OK = 0
    ANSWER_ERROR = 1
    TABLE_MOST = 1 << 16             # bytes of an address table

# What works only on top of GUEST_CSUM, and of CSUM (5.1.3.1).
cdef uint64_t NEEDS_GUEST_CSUM = sum(<uint64_t>1 << feature for feature in (
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6))
cdef uint64_t NEEDS_CSUM = sum(<uint64_t>1 << feature for feature in (
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO))
cdef uint64_t NEEDS_CONTROL = sum(<uint64_t>1 << feature for feature in (
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_MAC_ADDR))

ALWAYS = (VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_CTRL_RX,
          VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_MAC_ADDR)
OFFLOADS = (VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_ECN)
UFO = (VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_GUEST_UFO)
USO = (VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6)


cdef class VirtioNet(VirtioDevice):
    """A card with the address `mac` (6 bytes); `mtu` is told to the driver unless it is 0, `link` is whether its cable is in.

    `backends` is a NetBackend, or a list of them, one a pair of queues. `vhost` are as many open /dev/vhost-net, or none;
    it takes them out of the list, and those that it leaves there after an error are still the caller's.
    """

    def __cinit__(self, str name not None, memory, backends not None, bytes mac not None, *, uint16_t mtu=0, bint link=True,
                  list vhost=None):
        if len(mac) != ADDRESS:
            raise ValueError(f"{name}: a MAC address has 6 bytes, not {len(mac)}")
        self.device_id = VIRTIO_ID_NET
        self.pairs = []
        memcpy(self.own_mac, <const char*>mac, ADDRESS)
        memcpy(self.net_config.mac, self.own_mac, ADDRESS)
        self.net_config.status = VIRTIO_NET_S_LINK_UP if link else 0
        self.net_config.mtu = mtu
        self.config = &self.net_config
        self.config_size = sizeof(self.net_config)
        self.pairs_used = 1
        for backend in backends if isinstance(backends, list) else [backends]:
            self.add_pair(backend, link)
        self.net_config.max_virtqueue_pairs = self.pair_count
        self.offer_features(mtu)
        self.add_queue(CONTROL_SIZE)
        chain_allocate(&self.chain, QUEUE_SIZE_MAX)
        if vhost:
            self.use_vhost(vhost)

    def __dealloc__(self):
        chain_free(&self.chain)

    def add_pair(self, NetBackend backend not None, bint link):
        if self.pair_count == MAX_PAIRS:
            raise ValueError(f"{self.name}: a card has at most {MAX_PAIRS} pairs of queues")
        pair = QueuePair(self, backend, self.add_queue(QUEUE_SIZE), self.add_queue(QUEUE_SIZE))
        (<QueuePair>pair).link = link
        self.pair_table[self.pair_count] = <PyObject*>pair
        self.pairs.append(pair)
        self.pair_count += 1

    def use_vhost(self, list fds not None):
        """One a pair, taken out of `fds`. Raises HostError, and then none of those that were taken is left open."""
        try:
            for pair in self.pairs:
                pair.use_vhost(fds.pop(0))
        except BaseException:
            for pair in self.pairs:
                if pair.vhost is not None:
                    pair.vhost.close()
            raise

    def offer_features(self, mtu):
        first = (<QueuePair>self.pairs[0]).backend
        features = list(ALWAYS)
        features += [VIRTIO_NET_F_MTU] if mtu else []
        features += [VIRTIO_NET_F_MQ] if self.pair_count > 1 else []
        features += OFFLOADS if first.has_offloads else ()
        features += UFO if first.has_ufo else ()
        features += USO if first.has_uso else ()
        for feature in features:
            self.offer(feature)

    def run_on(self, thread, queues=None):
        """As VirtioDevice.run_on; frames arrive in their receive queue's thread."""
        VirtioDevice.run_on(self, thread, queues)
        for number, pair in enumerate(self.pairs):
            if queues is None or QUEUES_A_PAIR * number in queues:
                pair.run_on(thread)

    def close(self):
        VirtioDevice.close(self)
        for pair in self.pairs:
            pair.close()

    @property
    def link(self):
        """Whether the cable is plugged in."""
        return bool(self.net_config.status & VIRTIO_NET_S_LINK_UP)

    def set_link(self, bint up):
        """Plugs the cable in or out; the driver is told. vhost's queues come back to us, where frames then end."""
        cdef uint32_t i
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.net_config.status = VIRTIO_NET_S_LINK_UP if up else 0
            for i in range(self.pair_count):
                (<QueuePair>self.pair_table[i]).link = up
            for i in range(QUEUES_A_PAIR * self.pair_count):
                self.stop(<Virtqueue>self.queue_table[i])
                self.start(<Virtqueue>self.queue_table[i])
            self.notify_config()
            pthread_mutex_unlock(&self.lock)

    def stats(self):
        """{counter: value} since the start, from the host's view: rx is what the guest received."""
        counters = dict.fromkeys(("rx_packets", "rx_bytes", "rx_drop", "tx_packets", "tx_bytes", "tx_drop"), 0)
        for pair in self.pairs:
            for key in counters:
                counters[key] += getattr(pair, key.replace("drop", "dropped"))
        first = <QueuePair>self.pairs[0]
        return counters if first.vhost is None else tap_counters(first.backend.name, counters)

    def save_device(self):
        return {"version": self.state_version, "mac": (<char*>self.net_config.mac)[:ADDRESS], "link": self.link,
                "pairs": self.pairs_used}

    def check_device(self, reader):
        checked = reader.data("mac", ADDRESS, ADDRESS), reader.flag("link"), reader.uint("pairs", self.pair_count)
        reader.done()
        if checked[2] < 1:
            raise StateError(f"{self.name}: 'pairs' is 0: a card has one at least")
        return checked

    def restore_device(self, checked):
        cdef bytes mac
        mac, up, self.pairs_used = checked
        memcpy(self.net_config.mac, <const char*>mac, ADDRESS)
        self.net_config.status = VIRTIO_NET_S_LINK_UP if up else 0
        for pair in self.pairs:
            (<QueuePair>pair).link = up

    cdef bint accepts(self, uint64_t features) noexcept nogil:
        """The dependencies of 5.1.3.1."""
        return not (features & NEEDS_GUEST_CSUM and not features >> VIRTIO_NET_F_GUEST_CSUM & 1 or
                    features & NEEDS_CSUM and not features >> VIRTIO_NET_F_CSUM & 1 or
                    features & NEEDS_CONTROL and not features >> VIRTIO_NET_F_CTRL_VQ & 1)

    cdef void activate(self) noexcept nogil:
        cdef uint64_t mtu = max(self.net_config.mtu, DEFAULT_MTU)    # what comes is the host's, whether the driver was told or not
        cdef bint mergeable = self.has(VIRTIO_NET_F_MRG_RXBUF)
        cdef uint32_t i, header = NET_HEADER if mergeable or self.has(VIRTIO_F_VERSION_1) else LEGACY_HEADER
        cdef uint64_t room = header + (LARGEST_FRAME if self.features & NEEDS_GUEST_CSUM else mtu + ETHERNET_HEADER + VLAN_TAG)
        for i in range(self.pair_count):
            if (<QueuePair>self.pair_table[i]).settle(self.features, self.offloads(), mergeable, header, room) < 0:
                self.complain(b"the host refuses these offloads", self.offloads())
        self.use_pairs(self.pairs_used)

    cdef uint32_t offloads(self) noexcept nogil:
        """What the tap may leave to the guest."""
        cdef uint32_t flags = TUN_F_CSUM if self.has(VIRTIO_NET_F_GUEST_CSUM) else 0
        flags |= TUN_F_TSO4 if self.has(VIRTIO_NET_F_GUEST_TSO4) else 0
        flags |= TUN_F_TSO6 if self.has(VIRTIO_NET_F_GUEST_TSO6) else 0
        flags |= TUN_F_TSO_ECN if self.has(VIRTIO_NET_F_GUEST_ECN) else 0
        flags |= TUN_F_UFO if self.has(VIRTIO_NET_F_GUEST_UFO) else 0
        # The kernel takes both kinds of USO or none.
        flags |= TUN_F_USO4 | TUN_F_USO6 if self.has(VIRTIO_NET_F_GUEST_USO4) and self.has(VIRTIO_NET_F_GUEST_USO6) else 0
        return flags

    cdef void deactivate(self) noexcept nogil:
        cdef uint32_t i
        for i in range(self.pair_count):
            (<QueuePair>self.pair_table[i]).backend.set_offloads(0)
        memcpy(self.net_config.mac, self.own_mac, ADDRESS)
        self.use_pairs(1)

    cdef void use_pairs(self, uint32_t count) noexcept nogil:
        """The host spreads frames over the first `count` backends."""
        cdef uint32_t i
        self.pairs_used = count
        for i in range(self.pair_count if self.pair_count > 1 else 0):
            (<QueuePair>self.pair_table[i]).backend.enable(i < count)
            (<Virtqueue>self.queue_table[QUEUES_A_PAIR * i]).doorbell.press()        # its reader may have given up

    # ---- queues

    cdef bint is_control(self, Virtqueue queue) noexcept nogil:
        """The control queue stands behind the pairs that the driver knows of (5.1.2)."""
        return queue.index == (QUEUES_A_PAIR * self.pair_count if self.has(VIRTIO_NET_F_MQ) else QUEUES_A_PAIR)

    cdef void start(self, Virtqueue queue) noexcept nogil:
        VirtioDevice.start(self, queue)
        if not self.is_control(queue) and queue.index < QUEUES_A_PAIR * self.pair_count:
            (<QueuePair>self.pair_table[queue.index // QUEUES_A_PAIR]).begin(queue)

    cdef void drain(self, Virtqueue queue) noexcept nogil:
        if queue.index < QUEUES_A_PAIR * self.pair_count:
            (<QueuePair>self.pair_table[queue.index // QUEUES_A_PAIR]).drain(queue)

    cdef void aim(self) noexcept nogil:
        cdef uint32_t i
        pthread_mutex_lock(&self.lock)
        for i in range(self.pair_count):
            (<QueuePair>self.pair_table[i]).aim()
        pthread_mutex_unlock(&self.lock)

    cdef void kicked(self, Virtqueue queue) noexcept nogil:
        if self.is_control(queue):
            self.control(queue)
        elif queue.index < QUEUES_A_PAIR * self.pair_count:
            (<QueuePair>self.pair_table[queue.index // QUEUES_A_PAIR]).kicked(queue)
        self.notify_used(queue)

    cdef void write_config(self, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil:
        """Legacy drivers store their address here (5.1.4.3)."""
        if self.legacy and offset + size <= ADDRESS:
            memcpy(&self.net_config.mac[offset], &value, size)
        else:
            VirtioDevice.write_config(self, offset, size, value)

    # ---- the control queue

    cdef void control(self, Virtqueue queue) noexcept nogil:
        cdef uint8_t answer
        while queue.pop(&self.chain) == 1:
            answer = ANSWER_OK if self.obey() else ANSWER_ERROR
            queue.push(&self.chain, <uint32_t>chain_put(&self.chain, &answer, 1))

    cdef bint obey(self) noexcept nogil:
        """One command; whether it is one and was carried out."""
        cdef uint8_t words[2]
        cdef uint16_t number = 0
        if chain_take(&self.chain, words, 2) != 2:
            return False
        if words[0] == CLASS_RX:
            return words[1] < RX_COMMANDS and self.has(VIRTIO_NET_F_CTRL_RX) and chain_take(&self.chain, NULL, 1) == 1
        if words[0] == CLASS_MAC:
            return self.obey_mac(words[1])
        if words[0] == CLASS_VLAN:
            return words[1] < VLAN_COMMANDS and self.has(VIRTIO_NET_F_CTRL_VLAN) and chain_take(&self.chain, &number, 2) == 2
        if words[0] != CLASS_MQ or words[1] != VQ_PAIRS_SET or not self.has(VIRTIO_NET_F_MQ):
            return False
        if chain_take(&self.chain, &number, 2) != 2 or number < 1 or number > self.pair_count:
            return False
        self.use_pairs(number)
        return True

    cdef bint obey_mac(self, uint8_t command) noexcept nogil:
        cdef uint8_t address[ADDRESS]
        if command == MAC_TABLE_SET and self.has(VIRTIO_NET_F_CTRL_RX):
            return self.skip_table() and self.skip_table()           # unicast, then multicast
        if command != MAC_ADDR_SET or not self.has(VIRTIO_NET_F_CTRL_MAC_ADDR):
            return False
        if chain_take(&self.chain, address, ADDRESS) != ADDRESS:
            return False
        memcpy(self.net_config.mac, address, ADDRESS)
        return True

    cdef bint skip_table(self) noexcept nogil:
        """A count and as many addresses."""
        cdef uint32_t count = 0
        cdef uint64_t size
        if chain_take(&self.chain, &count, 4) != 4:
            return False
        size = <uint64_t>count * ADDRESS
        return size <= TABLE_MOST and chain_take(&self.chain, NULL, size) == size


def tap_counters(name, counters):
    """What the host counted at a tap whose frames pass us by: its received ones are those that the guest sent."""
    for ours, theirs in (("rx", "tx"), ("tx", "rx")):
        for key, file in (("packets", "packets"), ("bytes", "bytes"), ("drop", "dropped")):
            try:
                with open(os.path.join("/sys/class/net", name, "statistics", f"{theirs}_{file}")) as value:
                    counters[f"{ours}_{key}"] = int(value.read())
            except OSError:
                pass                     # the tap is in another namespace: what we counted ourselves stands
    return counters
