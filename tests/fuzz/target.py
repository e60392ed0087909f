"""From bytes to what a hostile guest and its world do to one device, and what must hold after it.

An input is a sequence of steps: a byte that says which, then what the step needs; bytes that are missing are zero. So every string
of bytes is an input, and a part of an input is one too. `Step` names them for the seeds (`seeds`).
"""
import copy
import ctypes
import enum
import struct

from kvmapp.layout import LOW_MEMORY_END, PCI_ECAM_BASE
from kvmapp.state import StateError
from tests.device.profiles import SLOT, Board, Profile
from tests.device.virtio_driver import INDIRECT, NEXT, WRITE

SIZE = LOW_MEMORY_END + (4 << 20)                # two memslots
AREA, AREA_SIZE = 1 << 20, 1 << 20               # where honest addresses point
STEPS_MOST = 48
QUEUES_MOST = 64
WIDTHS = (1, 2, 4, 8)
EDGES = (0, 0xFFF, LOW_MEMORY_END - 64, LOW_MEMORY_END, PCI_ECAM_BASE, (1 << 32) - 16, 1 << 32, (1 << 32) + (4 << 20) - 64,
         (1 << 32) + (4 << 20), 1 << 52, 2**64 - 4096, 2**64 - 1)
NUMBERS = (0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 2**31 - 1, 2**31,
           2**32 - 1, 2**32, 2**63, 2**64 - 1, 511, 512, 1024, 4096, 65537)
VALUES: tuple = (None, "", b"", True, {}, [], -1, 2**16, 2**32, 2**63, 2**64, -2**70, 1.5)


class Step(enum.IntEnum):
    LOAD = 0
    STORE = 1
    CONFIG = 2                                   # a store to PCI configuration space
    MEMORY = 3
    START = 4                                    # the driver's whole initialization
    POST = 5                                     # a chain, honest or not, and perhaps a kick
    KICK = 6
    SETTLE = 7
    WORLD = 8                                    # what comes from the host's side
    ROUND_TRIP = 9                               # pause, save, restore, resume
    CORRUPT = 10                                 # restore of a state with one thing wrong
    RESET = 11
    MSIX = 12
    RING = 13                                    # raw values into a ring's header and entries
    STATUS = 14                                  # virtio: one register of the common configuration


class Stream:
    def __init__(self, data: bytes):
        self.data, self.place = data, 0

    def more(self) -> bool:
        return self.place < len(self.data)

    def take(self, count: int) -> bytes:
        piece = self.data[self.place:self.place + count]
        self.place += count
        return piece.ljust(count, b"\0")

    def byte(self) -> int:
        return self.take(1)[0]

    def pick(self, choices):
        return choices[self.byte() % len(choices)]

    def number(self) -> int:
        """A small number in one byte, one of NUMBERS, or 2, 4 or 8 bytes as they are."""
        kind = self.byte()
        if kind < 0xA0:
            return kind
        if kind < 0xE0:
            return NUMBERS[kind & 31]
        return int.from_bytes(self.take((2, 4, 8, 8)[kind >> 3 & 3]), "little")

    def address(self) -> int:
        kind = self.byte()
        if kind < 0xC0:
            return AREA + int.from_bytes(self.take(2), "little") * 4
        if kind < 0xF0:
            return (EDGES[kind % len(EDGES)] + self.byte() - 128) % 2**64
        return self.number()


class Target:
    """One profile's device on a board, for many inputs one after the other."""

    def __init__(self, profile: Profile):
        self.board = Board(profile, SIZE)
        self.board.thread.resume()
        self.power_on = self.board.saved()
        self.kept = profile.kept
        self.resume()
        self.guards = [guard(self.board.memory, gpa, size) for gpa, size in self.board.memory.ranges]
        self.driver = self.board.drivers[0] if self.board.drivers else None

    def close(self) -> None:
        self.board.close()
        self.board.steps.close()
        for place, length in (pair for pairs in self.guards for pair in pairs):
            LIBC.munmap(place, length)

    def resume(self) -> None:
        self.board.thread.resume()
        self.board.device.resume()

    def run(self, data: bytes) -> None:
        """One input from power-on, then the promises: it settles, saves, comes back the same, and a reset mends it."""
        board, stream = self.board, Stream(data)
        board.free = AREA + AREA_SIZE
        for _ in range(STEPS_MOST):
            if not stream.more():
                break
            kind = stream.byte() % len(Step)
            if kind == Step.LOAD or self.driver is not None or kind in GENERAL:
                getattr(self, Step(kind).name.lower())(stream)
        self.settle(stream)
        self.round_trip(stream)
        self.reset(stream)
        assert board.device.restore(copy.deepcopy(self.power_on)) is None
        board.memory.clear()
        if self.driver:
            self.driver.queues = []
            board.host.assign_resources()

    # -- steps

    def load(self, stream: Stream) -> None:
        bus, base, size = stream.pick(self.board.windows())
        bus.read(base + (stream.number() - 8) % (size + 16), stream.pick(WIDTHS))

    def store(self, stream: Stream) -> None:
        bus, base, size = stream.pick(self.board.windows())
        bus.write(base + (stream.number() - 8) % (size + 16), stream.pick(WIDTHS), stream.number())

    def config(self, stream: Stream) -> None:
        self.board.mmio.write(PCI_ECAM_BASE + (SLOT << 15) + stream.number() % 4096, stream.pick(WIDTHS), stream.number())

    def memory(self, stream: Stream) -> None:
        """What a vCPU stores into RAM at any time."""
        data = stream.take(stream.byte() % 65)
        self.board.memory.write(AREA + stream.number() % (AREA_SIZE - 64), data)

    def start(self, stream: Stream) -> None:
        self.board.free = AREA + AREA_SIZE
        kind = stream.byte()
        try:
            if kind & 1:                         # firmware placed the card, whatever the guest did to it
                self.board.device.reset()
                self.board.host.assign_resources()
                self.resume()
            if self.driver.queue_count() > QUEUES_MOST:
                raise KeyError("no card there")
            self.driver.start(without=(kind >> 1 & 3) << 28, msix=not kind & 8, size=16)
        except (AssertionError, KeyError):       # the BAR is not where the driver thinks, or features are refused
            self.driver.queues = []

    def post(self, stream: Stream) -> None:
        """Up to eight buffers in a chain; the readable ones get bytes of the input."""
        shape = stream.byte()
        if not self.driver.queues:
            return
        queue = stream.pick(self.driver.queues)
        table, place = queue.desc, stream.byte() % queue.size
        head = place
        count = 1 + (shape & 7)
        if shape & 8:                            # an indirect table
            table = self.board.allocate(16 * 16)
            queue.describe(place, table, stream.number() & 0xFFFF_FFFF if shape & 0x80 else 16 * count, INDIRECT)
            place = 0
        for i in range(count):
            kind = stream.byte()
            address, flags, length = AREA + 0x8000 * i, kind & WRITE, stream.number()
            if not kind & WRITE and length <= 256:
                self.board.memory.write(address, stream.take(length))
            if kind & 0x40:
                address = stream.address()
            if i + 1 < count:
                flags |= NEXT
            link = stream.number() & 0xFFFF if kind & 0x20 else (place + i + 1) % 16
            if kind & 0x10:
                flags = stream.byte()
            queue.describe((place + i) % 16, address, length & 0xFFFF_FFFF, flags, link, table)
        queue.offer(head)
        if not shape & 0x40:
            queue.kick(force=True)

    def kick(self, stream: Stream) -> None:
        if self.driver.queues:
            stream.pick(self.driver.queues).kick(force=True)

    def ring(self, stream: Stream) -> None:
        if self.driver.queues:
            queue = stream.pick(self.driver.queues)
            start = (queue.desc, queue.avail, queue.used)[stream.byte() % 3]
            queue.put_word(start + 2 * (stream.byte() % 40), stream.number())

    def status(self, stream: Stream) -> None:
        """A register that sets the device up, wherever it is."""
        bus, base, fields = self.driver.registers()
        offset, width = stream.pick(fields)
        bus.write(base + offset, width, stream.number())

    def msix(self, stream: Stream) -> None:
        """The table, the pending bits, or the enable and mask bits."""
        where = stream.byte()
        if not self.driver.msix:
            return
        if where & 1:
            self.driver.poke(self.driver.msix + 2, 2, (where << 8) & 0xC000)
            return
        table = self.driver.peek(self.driver.msix + (8 if where & 2 else 4), 4)
        address = self.driver.bar(table & 7) + (table & ~7) + stream.number() % 4096
        width = stream.pick(WIDTHS)
        self.board.mmio.read(address, width)
        self.board.mmio.write(address, width, stream.number())

    def settle(self, stream: Stream) -> None:
        self.board.settle()

    def world(self, stream: Stream) -> None:
        if self.board.stimulus:
            length = stream.byte()
            self.board.stimulus(stream.take(length))

    def round_trip(self, stream: Stream) -> None:
        state = self.board.saved()
        self.board.device.restore(copy.deepcopy(state))
        again = self.board.device.save()
        assert again == state, f"comes back changed: {differences(state, again)}"
        self.resume()

    def corrupt(self, stream: Stream) -> None:
        """A state with one thing wrong is refused and nothing changes, or it is taken and saved the same again."""
        good = self.board.saved()
        bad = copy.deepcopy(good)
        spoil(bad, stream)
        try:
            self.board.device.restore(bad)
        except StateError:
            now = self.board.device.save()
            assert now == good, f"changed by a refused state: {differences(good, now)}"
        else:
            taken = self.board.device.save()
            self.board.device.restore(copy.deepcopy(taken))
            assert self.board.device.save() == taken, "a taken state does not come back"
        self.resume()

    def reset(self, stream: Stream) -> None:
        """In the middle of everything, as a guest's reset button does."""
        self.board.device.pause()
        self.board.reset()
        now = self.board.device.save()
        wrong = [path for path in differences(self.power_on, now) if not self.kept & set(path)]
        assert not wrong, f"not as at power-on after a reset: {wrong}"
        self.resume()


GENERAL = {Step.STORE, Step.MEMORY, Step.SETTLE, Step.WORLD, Step.ROUND_TRIP, Step.CORRUPT, Step.RESET, Step.CONFIG}


def differences(one, other, path=()) -> list[tuple]:
    """The paths at which two saved states differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [found for key in sorted({*one, *other}) for found in differences(one.get(key), other.get(key), (*path, key))]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [found for i, pair in enumerate(zip(one, other, strict=True)) for found in differences(*pair, (*path, i))]
    return [] if one == other and type(one) is type(other) else [path]


def spoil(state, stream: Stream) -> None:
    """One thing wrong somewhere."""
    container = state
    while True:
        keys = sorted(container) if isinstance(container, dict) else range(len(container))
        key = keys[stream.byte() % len(keys)]
        if not isinstance(container[key], (dict, list)) or not container[key] or stream.byte() > 0xE0:
            break
        container = container[key]
    value, kind = container[key], stream.byte() % 6
    if kind == 0:
        del container[key]
    elif kind == 1:
        container[key] = stream.pick(VALUES)
    elif kind == 2 and isinstance(container, dict):
        container["no such key"] = 0
    elif isinstance(value, bytes) and value:
        i = stream.number() % len(value)
        container[key] = value[:i] if kind == 3 else value[:i] + stream.take(1) + value[i + 1:]
    elif isinstance(value, bool):
        container[key] = not value
    else:
        container[key] = stream.number()


# -- pages around guest memory that nobody may touch

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
PAGE = 4096
PRIVATE_ANONYMOUS_FIXED_NOREPLACE = 0x02 | 0x20 | 0x100000


def guard(memory, gpa: int, size: int) -> list[tuple[int, int]]:
    """Unreadable pages on both sides of a region of guest memory, where the host has nothing else."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory.view(gpa, size)))
    taken = [(place, PAGE) for place in (start - PAGE, start + size)
             if LIBC.mmap(place, PAGE, 0, PRIVATE_ANONYMOUS_FIXED_NOREPLACE, -1, 0) == place]
    return taken


# -- where every device's fuzzing starts

def store(window: int, offset: int, width: int, value: int) -> bytes:
    return struct.pack("<BBBHBBQ", Step.STORE, window, 0xE0, offset + 8, WIDTHS.index(width), 0xF0, value)


def seeds(profile: Profile) -> list[bytes]:
    """Honest and less honest beginnings, for a profile without a corpus."""
    start = bytes([Step.START, 1])
    found = [start, bytes([Step.ROUND_TRIP]), bytes([Step.WORLD, 20]) + bytes(range(20))]
    found += [b"".join(store(0, offset, width, 0xFF >> offset % 8) for offset in range(0, 16, width)) for width in WIDTHS]
    for queue in range(3):
        for shape in (0, 1, 2, 8, 9):
            buffers = bytes([0, 16, *range(16)]) + bytes([WRITE, 64]) * (shape & 7)
            found.append(start + bytes([Step.POST, shape, queue, 0]) + buffers + bytes([Step.WORLD, 8]) + b"world..." +
                         bytes([Step.ROUND_TRIP, Step.RESET]))
    found.append(bytes([Step.CORRUPT, 1, 1, 1, 3, 5, Step.CORRUPT, 2, 0, 1, 4, 5]))
    return found
