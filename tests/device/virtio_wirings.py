"""The other ways in which a driver reaches a virtio device, behind the names of virtio_driver.Driver: tests of a device take them all.

    @pytest.fixture(params=ALL)
    def guest(request):
        with Guest(wiring=request.param) as guest:
            ...
"""
import select
from collections.abc import Callable
from typing import Any

from kvmapp.layout import VIRTIO_MMIO_BASE
from kvmapp.virtio.mmio import VirtioMmio
from kvmapp.virtio.pci import VirtioPci
from kvmapp.virtio.transitional import TransitionalPci
from tests.device.virtio_driver import ACKNOWLEDGE, DRIVER, DRIVER_OK, Driver, Guest
from tests.device.virtio_packed import PackedQueue
from tests.waiting import TIMEOUT

PAGE = 4096
QUEUES_MOST = 64                                         # what a driver asks for when nothing tells it to stop
NOBODY_ANSWERS = 0xFFFF                                  # what is read from ports that no device has

# (port offset, width) of the legacy interface
LEGACY = {
    "device_feature": (0, 4), "driver_feature": (4, 4), "queue_page": (8, 4), "queue_size": (12, 2), "queue_select": (14, 2),
    "queue_notify": (16, 2), "device_status": (18, 1), "isr": (19, 1), "config_msix_vector": (20, 2), "queue_msix_vector": (22, 2),
}


class LegacyDriver(Driver):
    """virtio 0.9.5: the ports of BAR 0, one page number a ring, no FEATURES_OK."""

    def get(self, field: str) -> int:
        offset, width = LEGACY[field]
        return self.guest.pio.read(self.ports + offset, width)

    def put(self, field: str, value: int) -> None:
        offset, width = LEGACY[field]
        self.guest.pio.write(self.ports + offset, width, value)

    def attach(self) -> None:
        super().attach()
        self.ports = self.peek(0x10, 4) & ~3

    def registers(self) -> tuple:
        return self.guest.pio, self.ports, list(LEGACY.values())

    @property
    def with_msix(self) -> bool:
        return self.peek(self.msix + 2, 2) & 0x8000 != 0

    @property
    def config_ports(self) -> int:
        return self.ports + (24 if self.with_msix else 20)

    def config(self, offset: int, size: int) -> int:
        return self.guest.pio.read(self.config_ports + offset, size)

    def put_config(self, offset: int, size: int, value: int) -> None:
        self.guest.pio.write(self.config_ports + offset, size, value)

    def generation(self) -> int:
        """There is none; a driver compares what it loads."""
        return int.from_bytes(bytes(self.config(offset, 1) for offset in range(8)), "little")

    def offered(self) -> int:
        return self.get("device_feature")

    def want(self, features: int) -> None:
        self.put("driver_feature", features & 0xFFFF_FFFF)

    def negotiate(self, features: int | None = None, without: int = 0) -> int:
        for status in (0, ACKNOWLEDGE, DRIVER):
            self.set_status(status)
        self.features = (self.offered() if features is None else features) & ~without & 0xFFFF_FFFF
        self.want(self.features)
        return self.features

    def start(self, features: int | None = None, without: int = 0, msix: bool = True, size: int = 0) -> None:
        """The ring's size is the device's choice."""
        super().start(features, without, msix)
        assert self.status == ACKNOWLEDGE | DRIVER | DRIVER_OK

    def queue_count(self) -> int:
        for count in range(QUEUES_MOST):
            self.put("queue_select", count)
            size = self.get("queue_size")
            if size == NOBODY_ANSWERS:                  # and not so many queues of so many descriptors
                raise KeyError("no card there")
            if size == 0:
                return count
        return QUEUES_MOST

    def allocate_rings(self, size: int) -> tuple[int, int, int]:
        avail = 16 * size
        used = (avail + 6 + 2 * size + PAGE - 1) & ~(PAGE - 1)
        base = self.guest.allocate(used + 6 + 8 * size, PAGE)
        return base, base + avail, base + used

    def install(self, queue, vector: int) -> None:
        self.put("queue_select", queue.index)
        assert self.get("queue_page") == 0
        self.put("queue_page", queue.desc // PAGE)
        assert self.get("queue_page") == queue.desc // PAGE
        if self.with_msix:
            self.put("queue_msix_vector", vector)
            assert self.get("queue_msix_vector") == vector

    def reset_queue(self, queue) -> None:
        self.put("queue_select", queue.index)
        self.put("queue_page", 0)
        assert self.get("queue_page") == 0

    def ring(self, queue) -> None:
        self.put("queue_notify", queue.index)

    def isr(self) -> int:
        return self.get("isr")


# offset of each 32-bit register of virtio-mmio; "queue_size" is another one for loads (QueueNumMax) than for stores
MMIO = {
    "magic": 0, "version": 4, "device_id": 8, "device_feature": 0x10, "device_feature_select": 0x14, "driver_feature": 0x20,
    "driver_feature_select": 0x24, "page_size": 0x28, "queue_select": 0x30, "queue_size_max": 0x34, "queue_size": 0x38,
    "queue_align": 0x3C, "queue_page": 0x40, "queue_enable": 0x44, "queue_notify": 0x50, "isr": 0x60, "isr_acknowledge": 0x64,
    "device_status": 0x70, "queue_desc": 0x80, "queue_desc_high": 0x84, "queue_driver": 0x90, "queue_driver_high": 0x94,
    "queue_device": 0xA0, "queue_device_high": 0xA4, "queue_reset": 0xC0, "config_generation": 0xFC,
}


class MmioDriver(Driver):
    """virtio-mmio, version 2. Every cause has the one interrupt line; the status register parts them again."""
    version = 2

    def attach(self) -> None:
        self.causes = self.msix = 0
        assert (self.get("magic"), self.get("version"), self.get("device_id")) == (0x74726976, self.version, self.device.device_id)

    def registers(self) -> tuple:
        return self.guest.mmio, self.slot, [(offset, 4) for offset in MMIO.values()]

    def get(self, field: str) -> int:
        return self.guest.mmio.read(self.slot + MMIO["queue_size_max" if field == "queue_size" else field], 4)

    def put(self, field: str, value: int) -> None:
        self.guest.mmio.write(self.slot + MMIO[field], 4, value)

    def config(self, offset: int, size: int) -> int:
        return self.guest.mmio.read(self.slot + 0x100 + offset, size)

    def put_config(self, offset: int, size: int, value: int) -> None:
        self.guest.mmio.write(self.slot + 0x100 + offset, size, value)

    def start(self, features: int | None = None, without: int = 0, msix: bool = False, size: int = 0) -> None:
        super().start(features, without, False, size)

    queue_count = LegacyDriver.queue_count

    def install(self, queue, vector: int) -> None:
        self.put("queue_select", queue.index)
        assert self.get("queue_enable") == 0
        self.put("queue_size", queue.size)
        for field, address in (("queue_desc", queue.desc), ("queue_driver", queue.avail), ("queue_device", queue.used)):
            self.put(field, address & 0xFFFF_FFFF)
            self.put(field + "_high", address >> 32)
        self.put("queue_enable", 1)
        assert self.get("queue_enable") == 1

    def ring(self, queue) -> None:
        self.put("queue_notify", queue.index)

    def await_vector(self, *vectors: int) -> None:
        """Waits for a cause: vector 0 is the config space, the others are queues."""
        wanted = sum({2 if vector == 0 else 1 for vector in vectors})
        while not self.causes & wanted:
            ready = select.select([self.card.interrupt_line.fd], [], [], TIMEOUT)[0]
            assert ready, f"no interrupt in {TIMEOUT} s (status {self.status:#x})"
            self.interrupted(0)
        self.causes &= ~wanted

    def interrupted(self, vector: int) -> bool:
        came = self.card.interrupt_line.taken() > 0
        causes = self.get("isr") if came else 0
        self.put("isr_acknowledge", causes)
        self.causes |= causes
        return bool(causes & (2 if vector == 0 else 1))

    def isr(self) -> int:
        return self.get("isr")


class LegacyMmioDriver(MmioDriver):
    """virtio-mmio, version 1: page numbers, and no FEATURES_OK."""
    version = 1
    want, negotiate, generation = LegacyDriver.want, LegacyDriver.negotiate, LegacyDriver.generation
    reset_queue, allocate_rings = LegacyDriver.reset_queue, LegacyDriver.allocate_rings

    def attach(self) -> None:
        super().attach()
        self.put("page_size", PAGE)                      # as Linux does: once, before it resets the device

    def start(self, features: int | None = None, without: int = 0, msix: bool = False, size: int = 0) -> None:
        self.put("page_size", PAGE)                      # a machine's reset took it back
        super().start(features, without, msix, size)

    def offered(self) -> int:
        self.put("device_feature_select", 0)
        return self.get("device_feature")

    def install(self, queue, vector: int) -> None:
        self.put("queue_select", queue.index)
        assert self.get("queue_page") == 0
        self.put("queue_size", queue.size)
        self.put("queue_align", PAGE)
        self.put("queue_page", queue.desc // PAGE)
        assert self.get("queue_page") == queue.desc // PAGE


def legacy(guest: Guest, device) -> Driver:
    return guest.insert(TransitionalPci(device, guest.interrupts, modern=False), LegacyDriver)


def transitional(guest: Guest, device) -> Driver:
    """A transitional card in the hands of a modern driver."""
    return guest.insert(TransitionalPci(device, guest.interrupts), Driver)


def packed(guest: Guest, device) -> Driver:
    device.offer_packed()
    driver = guest.insert(VirtioPci(device, guest.interrupts), Driver)
    driver.queue_kind = PackedQueue
    return driver


def mmio(guest: Guest, device, driver: type[MmioDriver] = MmioDriver) -> Driver:
    window = VirtioMmio(device, guest.interrupts.pulse(5), legacy=driver.version == 1)
    base = VIRTIO_MMIO_BASE + PAGE * len(guest.cards)
    guest.cards.append(window)
    window.enter(guest.mmio, base)
    device.run_on(guest.thread)
    window.resume()
    return driver(guest, base, window)


def legacy_mmio(guest: Guest, device) -> Driver:
    return mmio(guest, device, LegacyMmioDriver)


WIRINGS: dict[str, Callable[[Guest, Any], Driver]] = {"legacy": legacy, "transitional": transitional, "mmio": mmio,
                                                         "legacy-mmio": legacy_mmio, "packed": packed}
ALL = ("pci", *WIRINGS)
SPLIT = tuple(kind for kind in ALL if kind != "packed")
