"""How the contract test builds each kind of device and brings it out of its power-on state: one profile a kind.

    @profile(Port92)
    def port92(board):
        device = Port92("port92", Power())
        board.pio.map(0x92, 1, device)
        yield device
        board.pio.write(0x92, 1, 0)

Up to the `yield` a fresh device is built and mapped; after it, it is disturbed through the buses: every value that it saves must
differ from power-on then. `still` names values (the last words of their paths) that no disturbance reaches so easily, `kept`
those that a reset does not take back. A device that the host's side talks to sets `board.stimulus`, by which the fuzzer
(tests/fuzz) does so.
"""
import contextlib
import os
import select
import socket
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from kvmapp.block.raw import RawDisk
from kvmapp.chardev import CharBackend
from kvmapp.devices import Power
from kvmapp.hw.acpi_pm import AcpiPm
from kvmapp.hw.cmos_rtc import CmosRtc
from kvmapp.hw.debug_exit import DebugExit
from kvmapp.hw.debug_port import DebugPort
from kvmapp.hw.e1000 import E1000
from kvmapp.hw.e1000_chip import E1000Chip
from kvmapp.hw.i6300esb import I6300Esb
from kvmapp.hw.i8042 import I8042
from kvmapp.hw.ns16550 import Ns16550
from kvmapp.hw.pci import BarKind, PciFunction
from kvmapp.hw.pci_host import PciHost
from kvmapp.hw.pci_hotplug import PciHotplug
from kvmapp.hw.port92 import Port92
from kvmapp.hw.pvpanic import Pvpanic
from kvmapp.hw.reset_control import ResetControl
from kvmapp.layout import PCI_ECAM_BASE
from kvmapp.memory import GuestMemory
from kvmapp.net.backend import FrameDescriptor
from kvmapp.virtio.balloon import VirtioBalloon
from kvmapp.virtio.blk import VirtioBlk
from kvmapp.virtio.console import VirtioConsole
from kvmapp.virtio.device import VirtioDevice
from kvmapp.virtio.fs import VirtioFs
from kvmapp.virtio.mmio import VirtioMmio
from kvmapp.virtio.net import VirtioNet
from kvmapp.virtio.pci import VirtioPci
from kvmapp.virtio.rng import VirtioRng
from kvmapp.virtio.transitional import TransitionalPci
from kvmapp.virtio.vsock import VirtioVsock
from tests.device.talkers import fuse_request, talk, vsock_packet
from tests.device.vhost_user_backend import Backend
from tests.device.virtio_driver import Guest
from tests.waiting import TIMEOUT

SLOT = 1                                         # where the one card of a board is
DISK_SIZE = 1 << 20
VIRTIO_STILL = {"isr", "intx", "pending", "broken", "generation", "queue_select", "driver_feature_select", "legacy"}


@dataclass
class Profile:
    build: Callable
    kinds: tuple[type, ...]
    still: set[str]
    kept: set[str]

    @property
    def name(self) -> str:
        return self.build.__name__


PROFILES: list[Profile] = []


def profile(*kinds: type, still=(), kept=()):
    """Makes a generator function the profile of these kinds of device."""
    def add(build):
        PROFILES.append(Profile(build, kinds, {"version", *still}, set(kept)))
        return build
    return add


def store(bus, size, *stores):
    """Stores (address, value) after (address, value)."""
    for address, value in stores:
        bus.write(address, size, value)


def exchange(end: socket.socket, data: bytes) -> None:
    """Sends, and takes what is there, without waiting for either."""
    for step in (lambda: end.send(data), lambda: end.recv(65536)):
        with contextlib.suppress(BlockingIOError):
            step()


@profile(Ns16550)
def ns16550(board):
    backend = CharBackend("serial0", output_size=16)
    device = Ns16550("serial0", board.interrupts.line(4), backend)
    board.stimulus = lambda data: (backend.give(data), backend.take())
    board.pio.map(0x3F8, 8, device)
    yield device
    data, ier, fcr, lcr, mcr, scr = 0x3F8, 0x3F9, 0x3FA, 0x3FB, 0x3FC, 0x3FF
    store(board.pio, 1, (lcr, 0x80), (data, 1), (ier, 2), (lcr, 3), (scr, 0x5A), (fcr, 0x81), (ier, 0x0F))
    store(board.pio, 1, (mcr, 0x08), *[(data, byte) for byte in range(17)])      # one more than the backend takes
    store(board.pio, 1, (mcr, 0x18), *[(data, byte) for byte in range(17)])      # one more than the looped FIFO takes


@profile(CmosRtc, kept={"bytes", "offset", "seen"})
def cmos_rtc(board):
    device = CmosRtc("rtc", board.interrupts.line(8), board.thread, memory=board.memory.size)
    board.pio.map(0x70, 2, device)
    yield device
    for index, value in ((0x0B, 0x82), (0x09, 0x31), (0x40, 0x55), (0x0B, 0x32), (0x10, 1)):
        store(board.pio, 1, (0x70, index), (0x71, value))


@profile(I8042)
def i8042(board):
    device = I8042("i8042", board.interrupts.line(1), Power())
    board.pio.map(0x60, 1, device, 0)
    board.pio.map(0x64, 1, device, 4)
    yield device
    store(board.pio, 1, (0x64, 0xDD), (0x64, 0x60), (0x60, 0x25), (0x60, 0xF0), (0x60, 3))
    board.pio.read(0x60)
    store(board.pio, 1, (0x60, 0xED), (0x64, 0xAA), (0x64, 0x60))


@profile(Port92)
def port92(board):
    device = Port92("port92", Power())
    board.pio.map(0x92, 1, device)
    yield device
    store(board.pio, 1, (0x92, 0))


@profile(ResetControl)
def reset_control(board):
    device = ResetControl("reset", Power())
    board.pio.map(0xE9, 1, device)
    yield device
    store(board.pio, 1, (0xE9, 0x0A))


@profile(AcpiPm, still={"half_turns"}, kept={"ticks"})
def acpi_pm(board):
    device = AcpiPm("acpi", board.interrupts.line(9), Power(), board.thread)
    board.pio.map(0x600, 0x24, device)
    device.resume()
    board.stimulus = lambda data: device.raise_event(data[0] % 16) if data else device.press_power_button()
    yield device
    store(board.pio, 2, (0x602, 0x121), (0x604, 0x1C02), (0x622, 0x55AA))
    device.press_power_button()
    device.raise_event(7)


@profile(PciHotplug)
def pci_hotplug(board):
    acpi = AcpiPm("acpi", board.interrupts.line(9), Power(), board.thread)
    device = PciHotplug("pci-hotplug", acpi)
    board.pio.map(0x640, 0xC, device)
    yield device
    device.insert(3)
    device.ask(4)
    device.ask(5)
    store(board.pio, 4, (0x648, 1 << 5))


@profile(DebugPort)
def debug_port(board):
    device = DebugPort("debug", CharBackend("debug"))
    board.pio.map(0x402, 1, device)
    yield device


@profile(DebugExit)
def debug_exit(board):
    device = DebugExit("debug-exit", Power())
    board.pio.map(0xF4, 4, device)
    yield device


@profile(PciHost, still={"intx"})
def pci_host(board):
    yield board.host
    store(board.pio, 4, (0xCF8, 0x8000_003C), (0xCFC, 7), (0xCF8, 0x8000_1804))


@profile(PciFunction)
def pci_function(board):
    device = PciFunction()
    device.identify(0x1AF4, 0x1041, 0x020000, pin=1)
    device.add_bar(0, 0x40, BarKind.BAR_IO, 0x10000)
    device.add_bar(1, 0x2000, BarKind.BAR_MEM32)
    device.add_bar(2, 0x4000, BarKind.BAR_MEM64, 0x8000)
    device.add_capability(0x09, b"\x05\x01abc", b"\0\0\xff\0\0")
    capability = device.add_msix(3, 1, 0x1000, 0x1800, board.interrupts)
    board.host.attach(SLOT, device)
    board.host.assign_resources()
    yield device
    config = PCI_ECAM_BASE + (SLOT << 15)
    table = device.mapped_bars()[1] + 0x1000
    store(board.mmio, 4, (table, 0xFEE0_0000), (table + 8, 0x41), (table + 12, 0))
    store(board.mmio, 2, (config + capability + 2, 0x8000), (config + 0x3C, 5))
    device.send(1)
    device.drive(True)


@profile(Pvpanic)
def pvpanic(board):
    device = Pvpanic("panic", Power())
    board.pio.map(0x505, 1, device)
    yield device


@profile(I6300Esb, still={"intx", "asked", "timed_out", "pending"}, kept={"left", "timed_out"})
def i6300esb(board):
    device = I6300Esb("watchdog", Power(), board.thread)
    board.host.attach(SLOT, device)
    board.host.assign_resources()
    yield device
    config, bar = PCI_ECAM_BASE + (SLOT << 15), device.mapped_bars()[0]
    store(board.mmio, 4, (bar + 12, 0x80), (bar + 12, 0x86), (bar, 5), (bar + 12, 0x80), (bar + 12, 0x86), (bar + 4, 6))
    store(board.mmio, 4, (bar + 12, 0x80), (bar + 12, 0x86))
    store(board.mmio, 1, (config + 0x60, 3), (config + 0x68, 7))


@profile(E1000, E1000Chip, still={"intx", "pending"}, kept={"link"})
def e1000(board):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    theirs.setblocking(False)
    device = E1000("net0", board.memory, FrameDescriptor(fd=ours.detach()), b"RTVXYZ")
    device.run_on(board.thread)
    board.cards.append(device)
    board.host.attach(SLOT, device)
    board.host.assign_resources()
    device.resume()

    def stimulus(data):
        exchange(theirs, bytes(12) + data)
        device.set_link(data[:1] != b"\xFF")

    board.stimulus = stimulus
    yield device
    config, bar, ports = PCI_ECAM_BASE + (SLOT << 15), *(device.mapped_bars()[index] for index in (0, 1))
    store(board.mmio, 1, (config + 4, 7), (config + 0x3C, 5))
    store(board.pio, 4, (ports, 0x2820), (ports + 4, 7))
    ring, data = 1 << 20, 2 << 20
    board.memory.write(ring, struct.pack("<QIIQII", 7, 0x2400_0000, 0x7777_7777, data, 60 | 0x2410_0000, 0x300))
    store(board.mmio, 4, (bar + 0x3800, ring), (bar + 0x3808, 128), (bar + 0x400, 2), (bar + 0x20, 0x0424_0000 | 1 << 21 | 9))
    store(board.mmio, 4, (bar + 0x10, 2), (bar + 0x10, 7), (bar + 0x10, 6))
    store(board.mmio, 4, *[(bar + 0x10, pins) for bit in (1, 0, 0, 0, 0, 1, 1, 0) for pins in (2 | 4 * bit, 3 | 4 * bit)])
    store(board.mmio, 4, *[(bar + 0x10, pins) for _ in range(5) for pins in (2, 3)])
    store(board.mmio, 4, (bar + 0x3818, 2))
    board.settle()
    device.set_link(False)
    theirs.close()


@profile(VirtioRng, VirtioPci, VirtioDevice, still=VIRTIO_STILL)
def virtio_rng(board):
    driver = board.plug(VirtioRng("rng0", board.memory))
    yield driver.card
    driver.start(size=16)
    driver.queues[0].post(writable=[8])
    driver.queues[0].kick()
    driver.queues[0].wait()


@profile(TransitionalPci, still=VIRTIO_STILL - {"legacy"} | {"device_feature_select", "size"})
def virtio_rng_legacy(board):
    board.wiring = "legacy"
    driver = board.plug(VirtioRng("rng0", board.memory))
    yield driver.card
    driver.start()
    driver.queues[0].post(writable=[8])
    driver.queues[0].kick()
    driver.queues[0].wait()


@profile(still=VIRTIO_STILL)
def virtio_rng_packed(board):
    board.wiring = "packed"
    driver = board.plug(VirtioRng("rng0", board.memory))
    yield driver.card
    driver.start(size=15)
    driver.queues[0].post(writable=[8])
    driver.queues[0].kick()
    driver.queues[0].wait()


@profile(VirtioMmio, still=VIRTIO_STILL | {"registers", "unseen"})
def virtio_rng_mmio(board):
    board.wiring = "mmio"
    driver = board.plug(VirtioRng("rng0", board.memory))
    yield driver.card
    driver.start(size=16)
    driver.put("page_size", 4096)
    driver.put("queue_align", 4096)
    driver.queues[0].post(writable=[8])
    driver.queues[0].kick()
    driver.queues[0].wait()


@profile(still=VIRTIO_STILL | {"registers", "unseen", "device_feature_select", "generation"})
def virtio_rng_legacy_mmio(board):
    board.wiring = "legacy-mmio"
    driver = board.plug(VirtioRng("rng0", board.memory))
    driver.put("page_size", 0)                   # as at power-on: a driver stores it when it finds the device
    yield driver.card
    driver.start(size=16)
    driver.queues[0].post(writable=[8])
    driver.queues[0].kick()
    driver.queues[0].wait()


@profile(VirtioConsole, still=VIRTIO_STILL - {"generation"} | {"last_avail", "next_used"}, kept={"cols", "rows"})
def virtio_console(board):
    backend = CharBackend("hvc0", output_size=16)
    device = VirtioConsole("hvc0", board.memory, backend)
    driver = board.plug(device)
    board.stimulus = lambda data: (backend.give(data), backend.take(), device.resize(len(data), 7))
    yield driver.card
    driver.start(size=16)
    driver.queues[1].post(readable=[bytes(20)])
    driver.queues[1].kick()
    assert select.select([backend.fd], [], [], TIMEOUT)[0]       # the thread has sent what there is room for
    device.resize(132, 50)
    driver.await_vector(0)


@profile(VirtioBalloon, still=VIRTIO_STILL - {"generation"}, kept={"num_pages"})
def virtio_balloon(board):
    device = VirtioBalloon("balloon0", board.memory)
    driver = board.plug(device)
    board.stimulus = lambda data: (device.inflate_to(len(data) << 12), device.poll_statistics(), device.statistics())
    yield driver.card
    driver.start(size=16)
    device.inflate_to(8 << 20)
    driver.await_vector(0)
    driver.put_config(4, 4, 5)
    driver.queues[0].post(readable=[bytes(4)])
    driver.queues[0].kick()
    driver.queues[0].wait()


@profile(VirtioNet, still=VIRTIO_STILL - {"generation"}, kept={"link", "mac"})
def virtio_net(board):
    yield from network_card(board)


@profile(still=VIRTIO_STILL - {"generation"}, kept={"link", "mac"})
def virtio_net_packed(board):
    board.wiring = "packed"
    yield from network_card(board)


def network_card(board):
    """Two pairs of queues, and a control queue."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]
    device = VirtioNet("net0", board.memory, [FrameDescriptor(fd=ours.detach()) for ours, _ in pairs], bytes(6))
    driver = board.plug(device)
    for _, theirs in pairs:
        theirs.setblocking(False)
    board.stimulus = lambda data: exchange(pairs[0][1], data)
    yield driver.card
    driver.start(size=16)
    for number, (_, theirs) in enumerate(pairs):
        receiver, transmitter = driver.queues[2 * number:2 * number + 2]
        for _ in range(4):
            receiver.post(writable=[1600])
        receiver.kick()
        theirs.send(bytes(72))
        receiver.wait()
        transmitter.post(readable=[bytes(72)])
        transmitter.kick()
        transmitter.wait()
    for command in (b"\x04\0\x02\0", b"\x01\x01RTVXYZ"):
        driver.queues[4].post(readable=[command], writable=[1])
    driver.queues[4].kick()
    driver.queues[4].wait(2)
    device.set_link(False)
    driver.await_vector(0)
    for _, theirs in pairs:
        theirs.close()


@profile(VirtioBlk, still=VIRTIO_STILL | {"capacity"})
def virtio_blk(board):
    yield from disk_card(board, queues=1)


@profile(still=VIRTIO_STILL | {"capacity"})
def virtio_blk_packed(board):
    board.wiring = "packed"
    yield from disk_card(board, queues=2)


def disk_card(board, queues):
    with tempfile.NamedTemporaryFile() as image:
        image.truncate(DISK_SIZE)
        disk = RawDisk(os.open(image.name, os.O_RDWR | os.O_CLOEXEC), name="vda")
        device = VirtioBlk("vda", board.memory, disk, queues=queues)
        driver = board.plug(device)
        board.stimulus = lambda data: resize_and_back(board, device, data)
        yield driver.card
        driver.start(size=16)
        driver.put_config(32, 1, 0)
        for queue in driver.queues:
            queue.post(readable=[bytes(16)], writable=[512, 1])
            queue.kick()
            queue.wait()


def resize_and_back(board, device, data):
    """A disk of another size has other states, so it does not stay so."""
    for size in (512 * (1 + len(data)), DISK_SIZE):
        board.device.pause()
        board.thread.pause()
        device.resize(size, shrink=True)
        board.thread.resume()
        board.device.resume()
        board.settle()


@profile(VirtioVsock, still=VIRTIO_STILL | {"cid"})
def virtio_vsock(board):
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/vsock"
        server = socket.socket(socket.AF_UNIX)
        server.bind(f"{path}_7")
        server.listen(16)
        server.setblocking(False)
        with server, contextlib.ExitStack() as ends:
            driver = board.plug(VirtioVsock("vsock", board.memory, 5, path))
            board.stimulus = lambda data: talk(server, path, ends, data)
            yield driver.card
            driver.start(size=16)
            driver.queues[0].post(writable=[64])
            driver.queues[1].post(readable=[vsock_packet(1, 1234, 7)])
            driver.queues[1].kick()
            driver.queues[0].wait()
            driver.queues[2].post(writable=[4])


@profile(VirtioFs, still=VIRTIO_STILL | {"tag"})
def virtio_fs(board):
    board.memory = GuestMemory(board.memory.size, shared=True)
    with Backend() as backend:
        driver = board.plug(VirtioFs("fs0", board.memory, "share", backend.fd))
        yield driver.card
        driver.start(size=16)
        driver.queues[1].post(readable=[fuse_request(26)], writable=[80])
        driver.queues[1].kick()
        driver.queues[1].wait()


class Board(Guest):
    """One profile's device, built, on a machine of its own."""

    def __init__(self, which: Profile, size: int = 32 << 20):
        super().__init__(size)
        self.stimulus: Callable[[bytes], object] | None = None
        steps = which.build(self)
        self.device = next(steps)
        self.steps = steps

    def disturb(self) -> None:
        """Brings the device out of its power-on state."""
        assert next(self.steps, None) is None, "a profile yields once"

    def reset(self) -> None:
        """Resets the device, and does what firmware does after it."""
        self.device.reset()
        self.host.assign_resources()

    def saved(self) -> dict:
        """Pauses, saves."""
        self.device.pause()
        self.thread.pause()
        return self.device.save()

    def windows(self) -> list:
        """[(bus, base, size)] where the guest reaches the device, and the configuration space of the card if it is one."""
        found = [(bus, base, size) for bus in (self.pio, self.mmio) for base, size, name in bus.windows()
                 if name == self.device.name and size <= 1 << 20]
        return [*found, (self.mmio, PCI_ECAM_BASE + (SLOT << 15), 4096)]
