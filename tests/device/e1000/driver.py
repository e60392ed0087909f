"""A driver of the 82540EM in Python, and the frames that it sends: registers by the bus, rings and buffers in guest memory.

    rig = Rig(guest)
    rig.start()
    rig.send(frame()); assert rig.sent() == frame()
    rig.arrives(frame(MAC)); data, status, tag = rig.received()
"""
import socket
import struct

from kvmapp.hw.e1000 import E1000
from kvmapp.layout import GSI_INTX, PCI_ECAM_BASE
from kvmapp.net.backend import FrameDescriptor
from tests.checksums import total
from tests.waiting import until

MAC = bytes.fromhex("5254007f0dcb")
OTHER = bytes.fromhex("525400000001")
GROUP = bytes.fromhex("01005e7f0001")
BROADCAST = b"\xff" * 6
SLOT, HEADER, RING = 1, 12, 16
CTRL, STATUS, EECD, EERD, MDIC, ICR, ITR, ICS, IMS, IMC, RCTL, TCTL = 0, 8, 0x10, 0x14, 0x20, 0xC0, 0xC4, 0xC8, 0xD0, 0xD8, 0x100, 0x400
RX, TX, MTA, RAL, VFTA, RXCSUM = 0x2800, 0x3800, 0x5200, 0x5400, 0x5600, 0x5000
LOW, HIGH, LENGTH, HEAD, TAIL = 0, 4, 8, 16, 24
MPC, GPRC, GPTC, TORL, TORH, TOTL, TOTH, TSCTC = 0x4010, 0x4074, 0x4080, 0x40C0, 0x40C4, 0x40C8, 0x40CC, 0x40F8
ENABLED, UNICAST, GROUPS, LONG, TO_ALL, VLANS, NO_CRC = 2, 8, 0x10, 0x20, 0x8000, 1 << 18, 1 << 26
TXDW, LSC, RXDMT0, RXO, RXT0, MDAC = 1, 4, 0x10, 0x40, 0x80, 0x200
SLU, RST, VME, PHY_RST = 0x40, 1 << 26, 1 << 30, 1 << 31
EOP, IC, RS, EXTENDED, VLE = 1 << 24, 4 << 24, 8 << 24, 0x20 << 24, 0x40 << 24
TSE, DATA, IP_SUM, TCP_SUM = 4 << 24, EXTENDED | 1 << 20, 0x100, 0x200
DD, END, NO_SUMS, TAGGED, TCP_GOOD, ERROR = 1, 2, 4, 8, 0x20, 0x8000


class Rig:
    """The card, its other end, and a driver."""

    def __init__(self, guest, offloads=False, backend=None):
        ours, self.host = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.host.settimeout(20)
        self.guest = guest
        self.card = E1000("net0", guest.memory, backend or FrameDescriptor(fd=ours.detach(), offloads=offloads), MAC)
        self.card.run_on(guest.thread)
        guest.cards.append(self.card)
        guest.host.attach(SLOT, self.card)
        guest.host.assign_resources()
        self.card.resume()
        self.config = PCI_ECAM_BASE + (SLOT << 15)
        guest.mmio.write(self.config + 4, 2, 7)
        self.bar, self.ports = (self.card.mapped_bars()[index] for index in (0, 1))
        self.rings = {RX: guest.allocate(16 * RING), TX: guest.allocate(16 * RING)}
        self.buffers = [guest.allocate(2048) for _ in range(RING)]
        self.seen = 0

    def get(self, register):
        return self.guest.mmio.read(self.bar + register, 4)

    def put(self, register, value):
        self.guest.mmio.write(self.bar + register, 4, value)

    def start(self, receive=UNICAST | GROUPS):
        for ring, place in self.rings.items():
            self.put(ring + LOW, place)
            self.put(ring + LENGTH, 16 * RING)
        for i, buffer in enumerate(self.buffers):
            self.describe(RX, i, buffer)
        self.put(RX + TAIL, RING - 1)
        self.put(RCTL, ENABLED | receive)
        self.put(TCTL, ENABLED)

    def describe(self, ring, index, address, lower=0, upper=0):
        self.guest.memory.write(self.rings[ring] + 16 * (index % RING), struct.pack("<QII", address, lower, upper))

    def descriptor(self, ring, index):
        return struct.unpack("<QII", self.guest.memory.read(self.rings[ring] + 16 * (index % RING), 16))

    def send(self, *parts, lower=RS, upper=0, first=None):
        """A frame of these parts (bytes, or an address and a length), behind a context descriptor perhaps."""
        tail = self.get(TX + TAIL)
        if first is not None:
            self.guest.memory.write(self.rings[TX] + 16 * tail, first)
            tail = (tail + 1) % RING
        for number, part in enumerate(parts):
            if isinstance(part, bytes):
                place = self.guest.allocate(max(len(part), 16))
                self.guest.memory.write(place, part)
                part = place, len(part)
            self.describe(TX, tail, part[0], part[1] | lower | (EOP if number == len(parts) - 1 else 0), upper)
            tail = (tail + 1) % RING
        self.put(TX + TAIL, tail)

    def sent(self, header=bytes(HEADER)):
        data = self.host.recv(1 << 17)
        assert data[:HEADER] == header
        return data[HEADER:]

    def arrives(self, frame, header=bytes(HEADER)):
        self.host.send(header + frame)

    def received(self):
        """The next frame that the card put into buffers, its last status, and its tag."""
        data = b""
        while True:
            until(lambda: self.descriptor(RX, self.seen)[2] & DD)
            address, lower, upper = self.descriptor(RX, self.seen)
            data += self.guest.memory.read(address, lower & 0xFFFF)
            self.describe(RX, self.seen, address)
            self.put(RX + TAIL, self.seen % RING)
            self.seen += 1
            if upper & END:
                return data, upper & 0xFFFF, upper >> 16

    def settle(self):
        self.guest.settle()

    def irq(self):
        return self.guest.interrupts.level(GSI_INTX[SLOT % 4])

    def phy(self, register, value=None, phy=1):
        self.put(MDIC, register << 16 | phy << 21 | (2 << 26 if value is None else 1 << 26 | value))
        answer = self.get(MDIC)
        assert answer >> 28 & 1
        return None if answer >> 30 & 1 else answer & 0xFFFF

    def rom(self, address):
        """A word by microwire."""
        def bit(value, pins=0x42):
            self.put(EECD, pins | 4 * value)
            self.put(EECD, pins | 4 * value | 1)
            data = self.get(EECD) >> 3 & 1
            self.put(EECD, pins | 4 * value)
            return data
        self.put(EECD, 0x40)
        assert self.get(EECD) & 0x180 == 0x180, "granted, and there"
        for place in range(2, -1, -1):
            bit(6 >> place & 1)
        for place in range(5, -1, -1):
            bit(address >> place & 1)
        word = sum(bit(0) << place for place in range(15, -1, -1))
        self.put(EECD, 0)
        return word


def frame(to=OTHER, size=60, kind=0x88B5, fill=None):
    return (to + MAC + struct.pack(">H", kind) + (fill or bytes(i & 255 for i in range(size))))[:size]


def tcp_frame(payload, *, seeded=True, length=0, version=4, identity=7, flags=0x19):
    """As a driver hands it over: no IP sum, and TCP's field holds the pseudo header's (of `length`)."""
    source, target = (bytes([10, 0, 0, 2]), bytes([10, 0, 0, 1])) if version == 4 else (bytes(15) + b"\2", bytes(15) + b"\1")
    seed = total(source + target + struct.pack(">HH", 6, length)) if seeded else 0
    tcp = struct.pack(">HHIIBBHHH", 1234, 80, 1000, 2000, 0x50, flags, 512, seed, 0)
    if version == 4:
        ip = struct.pack(">BBHHHBBH", 0x45, 0, length + 20 if length else 0, identity, 0, 64, 6, 0) + source + target
    else:
        ip = struct.pack(">IHBB", 6 << 28, length, 6, 64) + source + target
    return OTHER + MAC + (b"\x08\0" if version == 4 else b"\x86\xdd") + ip + tcp + payload


def context(mss=0, version=4, header=0, command=0, payload=0):
    start = 14 + (20 if version == 4 else 40)
    bits = EXTENDED | 1 << 24 | (2 << 24 if version == 4 else 0) | command | payload
    return struct.pack("<BBHBBHIBBH", 14, 24, start - 1, start, start + 16, 0, bits, 0, header, mss)


def check_tcp(data, version=4):
    """A frame's sums and lengths are right."""
    start = 14 + (20 if version == 4 else 40)
    if version == 4:
        assert total(data[14:34]) == 0xFFFF
        assert struct.unpack(">H", data[16:18])[0] == len(data) - 14
        addresses = data[26:34]
    else:
        assert struct.unpack(">H", data[18:20])[0] == len(data) - 54
        addresses = data[22:54]
    assert total(addresses + struct.pack(">HH", 6, len(data) - start) + data[start:]) == 0xFFFF
