"""The other ways in which a driver reaches a virtio device, behind the names of virtio_driver.Driver: tests of a device take them all.

    @pytest.fixture(params=ALL)
    def guest(request):
        with Guest(wiring=request.param) as guest:
            ...
"""
from kvmapp.virtio.transitional import TransitionalPci
from tests.device.virtio_driver import ACKNOWLEDGE, DRIVER, DRIVER_OK, Driver, Guest

PAGE = 4096

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
        self.with_msix = False

    def enable_msix(self) -> None:
        super().enable_msix()
        self.with_msix = True

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
        count = 0
        while True:
            self.put("queue_select", count)
            if self.get("queue_size") == 0:
                return count
            count += 1

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


def legacy(guest: Guest, device) -> Driver:
    return guest.insert(TransitionalPci(device, guest.interrupts, modern=False), LegacyDriver)


def transitional(guest: Guest, device) -> Driver:
    """A transitional card in the hands of a modern driver."""
    return guest.insert(TransitionalPci(device, guest.interrupts), Driver)


WIRINGS = {"legacy": legacy, "transitional": transitional}
ALL = ("pci", *WIRINGS)
