"""A guest without a CPU: RAM, buses, a PCI host, an I/O thread, and a virtio driver that works through them as a kernel does.

    with Guest() as guest:
        driver = guest.drive(VirtioRng("rng0", guest.memory))      # finds the card, negotiates, sets up the queues, DRIVER_OK
        queue = driver.queues[0]
        queue.post(writable=[64])
        queue.kick()
        [done] = queue.wait()                                     # by interrupt, with a timeout
        assert len(done.data) == done.written == 64

Rings are split rings (VIRTIO 1.2, 2.7) and cards modern PCI ones, unless `Guest(wiring=...)` names another of virtio_wirings.py.
Everything hostile is done by writing to `guest.memory` and to registers directly.
"""
import os
import select
import struct
import threading
from dataclasses import dataclass

from kvmapp.devices import Bus, Interrupts
from kvmapp.hw.pci_host import ECAM_OFFSET, PciHost
from kvmapp.iothread import Doorbell, IoThread
from kvmapp.layout import GSI_INTX, PCI_ECAM_BASE, PCI_ECAM_SIZE
from kvmapp.memory import GuestMemory
from kvmapp.virtio.pci import VirtioPci
from tests.waiting import TIMEOUT, until

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 0x40, 0x80
F_INDIRECT, F_EVENT_IDX, F_VERSION_1, F_RING_RESET = 1 << 28, 1 << 29, 1 << 32, 1 << 40
NEXT, WRITE, INDIRECT = 1, 2, 4
NO_VECTOR = 0xFFFF
MSI_ADDRESS = 0xFEE0_0000

turnstile = threading.Lock()             # for `barrier`

# (offset, width) in the common configuration structure
COMMON = {
    "device_feature_select": (0, 4), "device_feature": (4, 4), "driver_feature_select": (8, 4), "driver_feature": (12, 4),
    "config_msix_vector": (16, 2), "num_queues": (18, 2), "device_status": (20, 1), "config_generation": (21, 1),
    "queue_select": (22, 2), "queue_size": (24, 2), "queue_msix_vector": (26, 2), "queue_enable": (28, 2),
    "queue_notify_off": (30, 2), "queue_desc": (32, 4), "queue_desc_high": (36, 4), "queue_driver": (40, 4),
    "queue_driver_high": (44, 4), "queue_device": (48, 4), "queue_device_high": (52, 4), "queue_notify_data": (56, 2),
    "queue_reset": (58, 2),
}


@dataclass
class Completion:
    """A used buffer: which request, how many bytes the device says it wrote, and these bytes."""
    head: int
    written: int
    data: bytes


class Guest:
    """The machine around a driver: one of `size` bytes without KVM, or that of a core.Vm. `allocate` hands its memory out;
    everything is given back by `close` (or `with`). `wiring` is how devices are reached: one of virtio_wirings.WIRINGS; `poll` the I/O
    thread's, in ns; `held`: the host is to hold all of the memory."""

    def __init__(self, size: int = 32 << 20, vm=None, wiring: str = "pci", poll: int = 0, held: bool = False):
        self.wiring = wiring
        if vm is None:
            self.memory = GuestMemory(size, prealloc=held)
            self.pio, self.mmio, self.interrupts = Bus("pio"), Bus("mmio"), Interrupts()
        else:
            self.memory, self.pio, self.mmio, self.interrupts = vm.memory, vm.pio, vm.mmio, vm.interrupts
        self.host = PciHost("pci", self.pio, self.mmio, self.interrupts)
        self.pio.map(0xCF8, 8, self.host)
        self.mmio.map(PCI_ECAM_BASE, PCI_ECAM_SIZE, self.host, ECAM_OFFSET)
        self.thread = IoThread("io", poll=poll)
        self.thread.resume()
        self.sentinel = Doorbell()
        self.thread.add(self.sentinel)
        self.free = 1 << 20
        self.cards: list = []
        self.drivers: list[Driver] = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        for card in self.cards:
            card.close()
        self.thread.close()

    def allocate(self, size: int, align: int = 16) -> int:
        """The gpa of `size` zeroed bytes."""
        start = (self.free + align - 1) & ~(align - 1)
        self.free = start + size
        self.memory.write(start, bytes(size))
        return start

    def settle(self) -> None:
        """Returns when the I/O thread has served all kicks made before: it takes them in the order in which they came.

        But for the sentinel's own place in the kernel's list of what is ready, which is an old one when the thread has not been back in
        the kernel since the last time: then it is taken before the kicks, though with them, and a second one comes after them.
        """
        for _ in range(2):
            os.write(self.sentinel.fileno, (1).to_bytes(8, "little"))
            until(lambda: not select.select([self.sentinel.fileno], [], [], 0)[0])

    def plug(self, device) -> "Driver":
        """Puts the device on a card into the next slot, powers it up, and gives a driver that has only found its structures."""
        if self.wiring == "pci":
            driver = self.insert(VirtioPci(device, self.interrupts), Driver)
        else:
            from tests.device.virtio_wirings import WIRINGS
            driver = WIRINGS[self.wiring](self, device)
        self.drivers.append(driver)
        return driver

    def insert(self, card: VirtioPci, driver: "type[Driver]") -> "Driver":
        """Puts the card into the next slot and powers it up."""
        slot = len(self.cards) + 1
        self.cards.append(card)
        self.host.attach(slot, card)
        self.host.assign_resources()
        card.device.run_on(self.thread)
        card.resume()
        return driver(self, slot, card)

    def drive(self, device, **options) -> "Driver":
        """`plug`, then `Driver.start`."""
        driver = self.plug(device)
        driver.start(**options)
        return driver


class Driver:
    """A virtio-pci driver: capabilities found through configuration space, then registers through the BAR."""

    def __init__(self, guest: Guest, slot: int, card):
        self.guest, self.slot, self.card, self.device = guest, slot, card, card.device
        self.queues: list[Queue] = []
        self.queue_kind: type[Queue] = Queue
        self.features = 0
        self.attach()

    def attach(self) -> None:
        """Finds where the registers are."""
        self.msix = 0
        self.structures: dict[int, int] = {}
        self.windows = 0
        self.find_structures()

    # -- configuration space

    def peek(self, offset: int, size: int) -> int:
        return self.guest.mmio.read(PCI_ECAM_BASE + (self.slot << 15) + offset, size)

    def poke(self, offset: int, size: int, value: int) -> None:
        self.guest.mmio.write(PCI_ECAM_BASE + (self.slot << 15) + offset, size, value)

    def bar(self, index: int) -> int:
        return self.peek(0x10 + 4 * index, 4) & ~0xF

    def find_structures(self) -> None:
        offset = self.peek(0x34, 1)
        while offset:
            if self.peek(offset, 1) == 0x11:
                self.msix = offset
            elif self.peek(offset, 1) == 0x09:
                kind = self.peek(offset + 3, 1)
                if kind == 5:
                    self.windows = offset
                else:
                    self.structures[kind] = self.bar(self.peek(offset + 4, 1)) + self.peek(offset + 8, 4)
                if kind == 2:
                    self.notify_multiplier = self.peek(offset + 16, 4)
            offset = self.peek(offset + 1, 1)

    def enable_msix(self) -> None:
        """Every vector unmasked, with a message of its own."""
        table = self.peek(self.msix + 4, 4)
        address = self.bar(table & 7) + (table & ~7)
        for vector in range((self.peek(self.msix + 2, 2) & 0x7FF) + 1):
            for word, value in enumerate((MSI_ADDRESS, 0, 0x40 + vector, 0)):
                self.guest.mmio.write(address + 16 * vector + 4 * word, 4, value)
        self.poke(self.msix + 2, 2, 0x8000)

    # -- registers

    def get(self, field: str) -> int:
        offset, width = COMMON[field]
        return self.guest.mmio.read(self.structures[1] + offset, width)

    def put(self, field: str, value: int) -> None:
        offset, width = COMMON[field]
        self.guest.mmio.write(self.structures[1] + offset, width, value)

    def config(self, offset: int, size: int) -> int:
        """A load from the device's own config space."""
        return self.guest.mmio.read(self.structures[4] + offset, size)

    def put_config(self, offset: int, size: int, value: int) -> None:
        self.guest.mmio.write(self.structures[4] + offset, size, value)

    def generation(self) -> int:
        """Another one whenever the config space has changed."""
        return self.get("config_generation")

    @property
    def status(self) -> int:
        return self.get("device_status")

    def set_status(self, bits: int) -> None:
        """Adds status bits; 0 resets."""
        self.put("device_status", bits | self.status if bits else 0)

    def offered(self) -> int:
        value = 0
        for word in range(2):
            self.put("device_feature_select", word)
            value |= self.get("device_feature") << 32 * word
        return value

    def want(self, features: int) -> None:
        for word in range(2):
            self.put("driver_feature_select", word)
            self.put("driver_feature", features >> 32 * word & 0xFFFF_FFFF)

    # -- initialization (3.1.1)

    def negotiate(self, features: int | None = None, without: int = 0) -> int:
        """Up to FEATURES_OK, with all that is offered unless told; asserts that the device agrees."""
        self.set_status(0)
        self.set_status(ACKNOWLEDGE)
        self.set_status(DRIVER)
        self.features = (self.offered() if features is None else features) & ~without
        self.want(self.features)
        self.set_status(FEATURES_OK)
        assert self.status & FEATURES_OK, f"features {self.features:#x} refused"
        return self.features

    def start(self, features: int | None = None, without: int = 0, msix: bool = True, size: int = 0) -> None:
        """The whole initialization: all queues, of `size` descriptors (0: what the device offers), then DRIVER_OK."""
        self.negotiate(features, without)
        if msix:
            self.enable_msix()
            self.put("config_msix_vector", 0)
        self.queues = [self.queue_kind(self, index, size) for index in range(self.queue_count())]
        for queue in self.queues:
            queue.enable(vector=queue.index + 1 if msix else NO_VECTOR)
        self.set_status(DRIVER_OK)

    def registers(self) -> tuple:
        """(bus, base, [(offset, width)]) of the registers that set the device up."""
        return self.guest.mmio, self.structures[1], list(COMMON.values())

    def queue_count(self) -> int:
        return self.get("num_queues")

    def allocate_rings(self, size: int) -> tuple[int, int, int]:
        """Where descriptors, available and used ring of a split ring of this size may lie."""
        guest = self.guest
        return guest.allocate(16 * size), guest.allocate(6 + 2 * size, 4), guest.allocate(6 + 8 * size, 4)

    def install(self, queue: "Queue", vector: int) -> None:
        """Tells the device where the queue lies and lets it use it."""
        self.put("queue_select", queue.index)
        self.put("queue_size", queue.size)
        for field, address in (("queue_desc", queue.desc), ("queue_driver", queue.avail), ("queue_device", queue.used)):
            self.put(field, address & 0xFFFF_FFFF)
            self.put(field + "_high", address >> 32)
        self.put("queue_msix_vector", vector)
        assert self.get("queue_msix_vector") == vector
        self.put("queue_enable", 1)
        self.put("queue_select", queue.index)
        queue.notify = self.structures[2] + self.get("queue_notify_off") * self.notify_multiplier

    def reset_queue(self, queue: "Queue") -> None:
        """Takes one queue back from the device."""
        self.put("queue_select", queue.index)
        self.put("queue_reset", 1)
        assert self.get("queue_enable") == 0

    def ring(self, queue: "Queue") -> None:
        """Kicks."""
        self.guest.mmio.write(queue.notify, 2, queue.index)

    # -- interrupts

    def await_vector(self, *vectors: int) -> None:
        """Waits for any of these MSI-X vectors."""
        lines = [self.card.vectors[vector] for vector in vectors]
        ready = select.select([line.fd for line in lines], [], [], TIMEOUT)[0]
        assert ready, f"no interrupt on vector {vectors} in {TIMEOUT} s (status {self.status:#x})"
        for line in lines:
            line.taken()

    def interrupted(self, vector: int) -> bool:
        """Whether the vector came since it was last asked."""
        return self.card.vectors[vector].taken() > 0

    def await_pin(self, level: bool = True) -> None:
        """Waits for the INTx pin to stand at `level`; a pin is no descriptor that could be waited on."""
        until(lambda: self.guest.interrupts.level(GSI_INTX[self.slot % 4]) == level)

    def isr(self) -> int:
        return self.guest.mmio.read(self.structures[3], 1)

    def await_needs_reset(self) -> None:
        """Waits until the device says that it was broken, which it must tell by a config interrupt."""
        while not self.status & NEEDS_RESET:
            self.await_vector(0)


def barrier() -> None:
    """What is stored before can be seen by the device before anything behind is loaded: taking a lock does that on x86, nothing else here.

    Who tells the other side its wish, or of a request, and then looks whether it came too late, needs it (VIRTIO 1.2, 2.7.13.4.1).
    """
    with turnstile:
        pass


class Queue:
    """The driver's side of one split virtqueue."""

    def __init__(self, driver: Driver, index: int, size: int = 0):
        self.driver, self.index, self.memory = driver, index, driver.guest.memory
        driver.put("queue_select", index)
        self.size = size or driver.get("queue_size")
        self.notify = 0
        self.desc, self.avail, self.used = driver.allocate_rings(self.size)
        self.indirect = bool(driver.features & F_INDIRECT)
        self.event_idx = bool(driver.features & F_EVENT_IDX)
        self.next_avail = self.next_used = self.kicked = 0
        self.free = list(range(self.size))
        self.pending: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}

    def enable(self, vector: int = NO_VECTOR) -> None:
        self.driver.install(self, vector)

    # -- memory

    def word(self, address: int) -> int:
        return int.from_bytes(self.memory.read(address, 2), "little")

    def put_word(self, address: int, value: int) -> None:
        self.memory.write(address, (value & 0xFFFF).to_bytes(2, "little"))

    def describe(self, index: int, address: int, length: int, flags: int = 0, link: int = 0, table: int | None = None) -> None:
        """Writes one descriptor, of the queue's table unless told."""
        start = self.desc if table is None else table
        self.memory.write(start + 16 * index, struct.pack("<QIHH", address, length, flags, link))

    def offer(self, head: int) -> None:
        """Puts a chain's head into the available ring and moves its index."""
        self.put_word(self.avail + 4 + 2 * (self.next_avail % self.size), head)
        self.next_avail += 1
        self.put_word(self.avail + 2, self.next_avail)

    # -- requests

    def post(self, readable=(), writable=(), indirect: bool = False) -> int:
        """Posts one request of these bytes to read and lengths to be filled; its head. `kick` tells the device."""
        guest = self.driver.guest
        buffers = []
        for data in readable:
            address = guest.allocate(len(data), 1)
            self.memory.write(address, data)
            buffers.append((address, len(data), 0))
        buffers += [(guest.allocate(length, 1), length, WRITE) for length in writable]
        return self.post_buffers(buffers, indirect)

    def post_buffers(self, buffers: list[tuple[int, int, int]], indirect: bool = False) -> int:
        """Posts a request of (address, length, flags) buffers."""
        if indirect:
            table = self.driver.guest.allocate(16 * len(buffers))
            slots = [self.free.pop(0)]
            self.describe(slots[0], table, 16 * len(buffers), INDIRECT)
            chain = list(range(len(buffers)))
        else:
            table = self.desc
            slots = chain = [self.free.pop(0) for _ in buffers]
        for place, (address, length, flags) in enumerate(buffers):
            last = place == len(buffers) - 1
            self.describe(chain[place], address, length, flags | (0 if last else NEXT), 0 if last else chain[place + 1], table)
        self.pending[slots[0]] = slots, [(address, length) for address, length, flags in buffers if flags & WRITE]
        self.offer(slots[0])
        return slots[0]

    def kick(self, force: bool = False) -> bool:
        """Notifies the device when it asked for that (or `force`); whether it did."""
        old, self.kicked = self.kicked, self.next_avail
        barrier()
        if self.event_idx:
            event = self.word(self.used + 4 + 8 * self.size)
            wanted = (self.next_avail - event - 1) % 0x10000 < (self.next_avail - old) % 0x10000
        else:
            wanted = not self.word(self.used) & 1
        if wanted or force:
            self.driver.ring(self)
        return wanted

    def collect(self) -> list[Completion]:
        """What the device has used and we have not seen."""
        seen = []
        while self.next_used % 0x10000 != self.word(self.used + 2):
            entry = self.memory.read(self.used + 4 + 8 * (self.next_used % self.size), 8)
            head, written = struct.unpack("<II", entry)
            slots, writable = self.pending.pop(head)
            self.free += slots
            data = b"".join(self.memory.read(address, length) for address, length in writable)
            seen.append(Completion(head, written, data[:written]))
            self.next_used += 1
        return seen

    def wait(self, count: int = 1) -> list[Completion]:
        """Waits by interrupt until `count` requests are used (more may come)."""
        done = self.collect()
        while len(done) < count:
            if self.event_idx:
                self.put_word(self.avail + 4 + 2 * self.size, self.next_used)
                barrier()
                more = self.collect()
                if more:                             # the event index just set lies behind already
                    done += more
                    continue
            self.driver.await_vector(self.index + 1)
            done += self.collect()
        return done


def random_bytes(queue, length=64):
    """The entropy device fills one buffer, and not with zeroes."""
    queue.post(writable=[length])
    queue.kick()
    [done] = queue.wait()
    assert done.written == length and done.data != bytes(length)
