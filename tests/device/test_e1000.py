"""The 82540EM as a driver uses it, over a socket pair that plays the tap: both ways, offloads, filters, a guest that breaks rules."""
import copy
import socket
import struct
import time

import pytest

from kvmapp.hw.e1000 import E1000
from kvmapp.layout import GSI_INTX, PCI_ECAM_BASE
from kvmapp.net.backend import FrameDescriptor
from tests.device.virtio_driver import Guest, until

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

    def __init__(self, guest, offloads=False, link=True):
        ours, self.host = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.host.settimeout(20)
        self.guest = guest
        self.card = E1000("net0", guest.memory, FrameDescriptor(fd=ours.detach(), offloads=offloads), MAC, link=link)
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


@pytest.fixture
def guest():
    with Guest() as guest:
        yield guest


@pytest.fixture
def rig(guest):
    rig = Rig(guest)
    rig.start()
    return rig


def frame(to=OTHER, size=60, kind=0x88B5, fill=None):
    return (to + MAC + struct.pack(">H", kind) + (fill or bytes(i & 255 for i in range(size))))[:size]


def total(data):
    words = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while words >> 16:
        words = (words & 0xFFFF) + (words >> 16)
    return words


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


# ---- the chip

def test_who_it_is(rig):
    assert rig.guest.mmio.read(rig.config, 4) == 0x100E8086
    assert rig.get(STATUS) == 0x83
    assert rig.get(RAL) == int.from_bytes(MAC[:4], "little")
    assert rig.get(RAL + 4) == 1 << 31 | int.from_bytes(MAC[4:], "little")


def test_the_eeprom_by_its_wires_and_by_eerd(rig):
    words = [rig.rom(address) for address in range(64)]
    assert struct.pack("<3H", *words[:3]) == MAC
    assert sum(words) & 0xFFFF == 0xBABA
    for address in (0, 1, 0x3F):
        rig.put(EERD, address << 8 | 1)
        assert rig.get(EERD) == words[address] << 16 | address << 8 | 0x10


def test_the_phy(rig):
    assert (rig.phy(2), rig.phy(3)) == (0x0141, 0x0C20)
    assert rig.phy(1) & 0x24 == 0x24
    assert rig.phy(17) & 0xEC00 == 0xAC00
    assert rig.phy(1, phy=2) is None, "only one"
    rig.get(ICR)
    rig.phy(0, 0x1940)
    assert rig.get(ICR) == LSC
    assert not rig.get(STATUS) & 2 and not rig.phy(1) & 4
    rig.phy(0, 0x1340)
    assert rig.get(STATUS) & 2 and rig.phy(0) == 0x1140
    rig.put(MDIC, 1 << 29 | 2 << 26 | 1 << 21)
    assert rig.get(ICR) == LSC | MDAC


def test_registers_through_ports(rig):
    rig.guest.pio.write(rig.ports, 4, RX + HIGH)
    rig.guest.pio.write(rig.ports + 4, 4, 5)
    assert rig.get(RX + HIGH) == rig.guest.pio.read(rig.ports + 4, 4) == 5
    rig.guest.pio.write(rig.ports, 4, CTRL)
    rig.guest.pio.write(rig.ports + 4, 4, rig.get(CTRL) | RST)
    assert (rig.get(RX + HIGH), rig.get(RCTL), rig.get(CTRL) & RST) == (0, 0, 0)


def test_the_interrupt_is_a_level_that_icr_takes_down(rig):
    rig.put(ICS, LSC)
    assert not rig.irq()
    rig.put(IMS, LSC | RXT0)
    assert rig.irq() and rig.get(ICS) == 0
    assert rig.get(ICR) == LSC and not rig.irq() and rig.get(ICR) == 0
    rig.put(ICS, LSC)
    rig.put(IMC, LSC)
    assert not rig.irq() and rig.get(IMS) == RXT0
    rig.put(IMS, LSC)
    rig.put(ICR, LSC)
    assert not rig.irq()


def test_interrupts_keep_the_distance_that_itr_asks_for(rig):
    rig.put(IMS, LSC)
    rig.put(ITR, 0xFFFF)                                 # 16.8 ms
    rig.put(ICS, LSC)
    assert rig.irq()
    started = time.monotonic()
    rig.get(ICR)
    rig.put(ICS, LSC)
    assert not rig.irq() or time.monotonic() - started > 0.016
    until(rig.irq)
    assert time.monotonic() - started > 0.01


def test_the_cable(rig):
    rig.put(IMS, LSC)
    rig.card.set_link(False)
    assert rig.irq() and rig.get(ICR) == LSC and not rig.get(STATUS) & 2 and not rig.card.link
    rig.send(frame())
    rig.arrives(frame(MAC))
    rig.settle()
    assert rig.card.stats()["tx_drop"] == 1 and rig.card.stats()["rx_packets"] == 0
    rig.card.set_link(True)
    assert rig.get(STATUS) & 2 and rig.received()[0][:60] == frame(MAC)
    rig.put(CTRL, rig.get(CTRL) & ~SLU)
    assert not rig.get(STATUS) & 2


# ---- out

def test_a_frame_goes_out_and_is_told(rig):
    rig.put(IMS, TXDW)
    rig.send(frame())
    assert rig.sent() == frame()
    until(rig.irq)
    assert rig.get(ICR) & TXDW and rig.descriptor(TX, 0)[2] & DD and rig.get(TX + HEAD) == 1
    assert (rig.get(GPTC), rig.get(GPTC)) == (1, 0), "read clears"
    assert (rig.get(TOTL), rig.get(TOTL), rig.get(TOTH), rig.get(TOTL)) == (64, 64, 0, 0)
    assert rig.card.stats()["tx_bytes"] == 60


def test_frames_in_pieces_round_and_round(rig):
    for number in range(3 * RING):
        data = frame(size=100 + number)
        rig.send(data[:1], data[1:20], b"", data[20:])
        assert rig.sent() == data


def test_a_legacy_sum(rig):
    data = tcp_frame(b"hello", length=25)
    rig.send(data, lower=RS | IC | (34 + 16) << 16, upper=34 << 8)
    out = rig.sent()
    assert total(out[26:34] + struct.pack(">HH", 6, 25) + out[34:]) == 0xFFFF


@pytest.mark.parametrize("size", [0, 1, 5, 1000])
def test_sums_of_data_descriptors(rig, size):
    data = tcp_frame(bytes(range(256)) * 4, length=20 + size)[:54 + size]
    rig.send(data[:30], data[30:], lower=DATA | RS, upper=IP_SUM | TCP_SUM, first=context())
    check_tcp(rig.sent())


@pytest.mark.parametrize("version", [4, 6])
def test_large_frames_are_cut(rig, version):
    payload, headers = bytes(i * 7 & 255 for i in range(4001)), 54 if version == 4 else 74
    data = tcp_frame(payload, version=version, flags=0x99)
    rig.send(data[:headers], data[headers:2000], data[2000:], lower=DATA | TSE | RS, upper=IP_SUM * (version == 4) | TCP_SUM,
             first=context(1001, version, headers, TSE, len(payload)))
    seen = b""
    for number in range(4):
        out = rig.sent()
        check_tcp(out, version)
        assert struct.unpack(">I", out[headers - 16:headers - 12])[0] == 1000 + len(seen)
        assert out[headers - 7] == {0: 0x90, 3: 0x19}.get(number, 0x10), "CWR first, FIN and PSH last"
        if version == 4:
            assert struct.unpack(">H", out[18:20])[0] == 7 + number
        seen += out[headers:]
    assert seen == payload
    until(lambda: rig.get(TX + HEAD) == 4)
    assert rig.get(TSCTC) == 1


@pytest.mark.parametrize("version", [4, 6])
def test_large_frames_go_to_a_tap_whole(guest, version):
    rig = Rig(guest, offloads=True)
    rig.start()
    headers = 54 if version == 4 else 74
    data = tcp_frame(bytes(4000), version=version)
    rig.send(data, lower=DATA | TSE, upper=IP_SUM * (version == 4) | TCP_SUM, first=context(1000, version, headers, TSE, 4000))
    header = struct.pack("<BBHHHHH", 1, 1 if version == 4 else 4, headers, 1000, headers - 20, 16, 0)
    out = rig.sent(header)
    assert out[headers:] == bytes(4000)
    assert out[:headers - 4] == tcp_frame(b"", version=version, length=4020)[:headers - 4] or total(out[14:34]) == 0xFFFF
    assert out[headers - 4:headers - 2] == tcp_frame(b"", version=version, length=4020)[headers - 4:headers - 2], "the seed has the length"
    rig.send(tcp_frame(b"abc", length=23), lower=DATA, upper=TCP_SUM, first=context())
    assert rig.sent(struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 16, 0)) == tcp_frame(b"abc", length=23)


def test_tags_come_and_go(rig):
    rig.put(CTRL, rig.get(CTRL) | VME)
    rig.send(frame(), lower=RS | VLE, upper=0x2005 << 16)
    assert rig.sent() == frame()[:12] + b"\x81\0\x20\x05" + frame()[12:]
    tagged = MAC + OTHER + b"\x81\0\x60\x07" + frame(size=80)[12:]
    rig.arrives(tagged)
    data, status, tag = rig.received()
    assert data[:-4] == tagged[:12] + tagged[16:] and status & TAGGED and tag == 0x6007
    rig.put(RCTL, ENABLED | UNICAST | VLANS)
    rig.arrives(tagged)
    rig.settle()
    rig.put(VFTA, 1 << 7)
    rig.arrives(tagged[:-1])
    assert rig.received()[0][:-4] == (tagged[:12] + tagged[16:])[:-1], "the first one was not for us"


# ---- in

def test_a_frame_comes_in(rig):
    rig.put(IMS, RXT0)
    rig.arrives(frame(MAC))
    data, status, _ = rig.received()
    assert data == frame(MAC) + bytes(4) and status == DD | END | NO_SUMS
    until(rig.irq)
    assert rig.get(ICR) & RXT0 and rig.get(GPRC) == 1
    assert (rig.get(TORL), rig.get(TORH)) == (64, 0)
    rig.put(RCTL, ENABLED | UNICAST | NO_CRC)
    rig.put(RXCSUM, 0x300)
    rig.arrives(frame(MAC, 40), header=b"\2" + bytes(11))
    data, status, _ = rig.received()
    assert data == frame(MAC, 40) + bytes(20) and status == DD | END | TCP_GOOD, "padded, and its sum is known to be right"


def test_long_frames_take_several_buffers(rig):
    rig.put(RCTL, ENABLED | UNICAST | LONG)
    rig.arrives(frame(MAC, 9000, fill=bytes(9000)))
    assert rig.received()[0] == frame(MAC, 9000, fill=bytes(9000)) + bytes(4) and rig.seen == 5
    rig.put(RCTL, ENABLED | UNICAST)
    rig.arrives(frame(MAC, 1519, fill=bytes(2000)))
    rig.arrives(frame(MAC, 1518, fill=bytes(2000)))
    assert len(rig.received()[0]) == 1522, "the longer one was dropped"
    assert rig.card.stats()["rx_drop"] == 1


@pytest.mark.parametrize("control, to, wanted", [
    (0, MAC, True), (0, OTHER, False), (UNICAST, OTHER, True), (0, GROUP, False), (GROUPS, GROUP, True), (UNICAST, GROUP, False),
    (0, BROADCAST, False), (TO_ALL, BROADCAST, True), (TO_ALL, GROUP, False)])
def test_filters(guest, control, to, wanted):
    rig = Rig(guest)
    rig.start(control)
    rig.arrives(frame(to))
    rig.arrives(frame(MAC, 61))
    assert rig.received()[0][:-4] == (frame(to) if wanted else frame(MAC, 61))


@pytest.mark.parametrize("offset, shift", [(0, 4), (1, 3), (2, 2), (3, 0)])
def test_the_table_of_groups(guest, offset, shift):
    rig = Rig(guest)
    rig.start(offset << 12)
    number = (GROUP[4] >> shift | GROUP[5] << (8 - shift)) & 0xFFF
    rig.put(MTA + 4 * (number >> 5), 1 << (number & 31))
    rig.arrives(frame(GROUP))
    assert rig.received()[0][:-4] == frame(GROUP)


def test_a_second_address(guest):
    rig = Rig(guest)
    rig.start(0)
    rig.put(RAL + 8, int.from_bytes(OTHER[:4], "little"))
    rig.put(RAL + 12, int.from_bytes(OTHER[4:], "little") | 1 << 31)
    rig.arrives(frame(OTHER))
    assert rig.received()[0][:-4] == frame(OTHER)


def test_a_guest_that_takes_nothing_stops_the_reading(rig):
    for number in range(RING + 20):
        rig.arrives(frame(MAC, 60 + number))
    until(lambda: rig.get(RX + HEAD) == RING - 1)
    rig.settle()
    assert rig.card.stats()["rx_packets"] == RING - 1 and rig.get(ICR) & RXDMT0
    before = rig.card.stats()
    rig.settle()
    assert rig.card.stats() == before, "what waits is not read and dropped"
    for number in range(RING + 20):
        assert len(rig.received()[0]) == 64 + number


def test_a_frame_that_finds_too_little_room_is_dropped(rig):
    rig.put(RCTL, ENABLED | UNICAST | LONG)
    rig.put(RX + TAIL, 2)
    rig.arrives(frame(MAC, 9000, fill=bytes(9000)))
    rig.arrives(frame(MAC))
    assert rig.received()[0][:-4] == frame(MAC)
    assert rig.get(MPC) == 1 and rig.get(ICR) & RXO


# ---- life

def test_saved_in_the_middle_of_a_frame(guest, rig):
    place = guest.allocate(64)
    guest.memory.write(place, frame()[:20])
    rig.describe(TX, 0, place, 20 | RS)                  # not its end
    rig.put(TX + TAIL, 1)
    until(lambda: rig.get(TX + HEAD) == 1)
    rig.put(IMS, LSC)
    rig.put(ICS, LSC)
    rig.card.pause()
    guest.thread.pause()
    state = copy.deepcopy(rig.card.save())
    rig.card.reset()
    assert not rig.irq()
    guest.host.assign_resources()
    guest.thread.resume()
    rig.card.restore(state)
    assert rig.card.save() == state and rig.irq()
    rig.card.resume()
    rig.send(frame()[20:])
    assert rig.sent() == frame()
    rig.arrives(frame(MAC))
    assert rig.received()[0][:-4] == frame(MAC)


def test_paused_it_does_nothing_and_then_goes_on(rig):
    rig.card.pause()
    rig.send(frame())
    rig.arrives(frame(MAC))
    rig.settle()
    assert rig.get(TX + HEAD) == 0 and not rig.descriptor(RX, 0)[2]
    rig.card.resume()
    assert rig.sent() == frame() and rig.received()[0][:-4] == frame(MAC)


# ---- guests that break rules

def test_rings_that_are_none(rig):
    for ring in (RX, TX):
        for register, value, good in ((LOW, 31 << 20, rig.rings[ring]), (HIGH, 0xFFFFFFFF, 0), (LENGTH, 0, 16 * RING),
                                      (LENGTH, 0xFFF80, 16 * RING), (HEAD, 0xFFFF, None), (HEAD, RING, None)):
            good = rig.get(ring + register) if good is None else good
            rig.put(ring + register, value)
            if register == LOW:
                rig.put(ring + LENGTH, 0xFFF80)      # from RAM's last MiB to beyond its end
            rig.put(ring + TAIL, 3)
            rig.arrives(frame(MAC))
            rig.settle()
            rig.put(ring + register, good)
            rig.put(ring + LENGTH, 16 * RING)
    alive(rig)


def alive(rig):
    """After a reset and a start, frames flow both ways."""
    rig.put(CTRL, rig.get(CTRL) | RST)
    rig.settle()
    rig.host.setblocking(False)
    try:
        while True:
            rig.host.recv(1 << 17)
    except BlockingIOError:
        rig.host.settimeout(20)
    rig.seen = 0
    rig.start(0)
    rig.send(frame())
    assert rig.sent() == frame()
    rig.arrives(frame(MAC, 77))
    while rig.received()[0][:-4] != frame(MAC, 77):
        pass


@pytest.mark.parametrize("ring", [RX, TX])
@pytest.mark.parametrize("tail", [RING, 0xFFFF])
def test_a_tail_behind_the_end(rig, ring, tail):
    rig.put(ring + TAIL, tail)
    rig.arrives(frame(MAC))
    rig.settle()
    assert rig.get(ring + HEAD) == 0
    alive(rig)


def test_frames_from_nowhere_and_of_nothing(rig):
    for part in ((1 << 40, 60), (2**64 - 1, 60), ((32 << 20) - 30, 60), (1 << 20, 0), (1 << 20, 13), (1 << 20, 0xFFFF)):
        rig.send(part, frame()[:0])
    rig.settle()
    assert rig.card.stats()["tx_packets"] == 0 and rig.card.stats()["tx_drop"] == 6
    assert all(rig.descriptor(TX, index)[2] & DD for index in range(12)), "they are done all the same"
    rig.send(frame())
    assert rig.sent() == frame()


def test_a_chain_without_an_end(rig):
    for _ in range(20):
        for index in range(RING):
            rig.describe(TX, index, 1 << 20, 0xFFFFF | DATA | TSE)
        rig.put(TX + TAIL, (rig.get(TX + HEAD) + RING - 1) % RING)
        rig.settle()
    until(lambda: rig.get(TX + HEAD) == rig.get(TX + TAIL))
    rig.send(frame())                                    # its end, and all of it is dropped
    rig.send(frame(size=99))
    assert rig.sent() == frame(size=99)


@pytest.mark.parametrize("mss, header, start", [
    (0, 54, 34), (1000, 0, 34), (1000, 255, 34), (1000, 53, 34), (1000, 54, 250), (1000, 54, 14)])
def test_segmentation_that_makes_no_sense(rig, mss, header, start):
    words = bytearray(context(mss, 4, header, TSE, 100))
    words[4] = start
    rig.send(tcp_frame(bytes(100)), lower=DATA | TSE, upper=IP_SUM | TCP_SUM, first=bytes(words))
    rig.settle()
    assert rig.card.stats()["tx_drop"] == 1
    rig.send(frame())
    assert rig.sent() == frame()


@pytest.mark.parametrize("start, place, end", [(255, 255, 0xFFFF), (34, 255, 0), (50, 20, 3), (34, 59, 0)])
def test_sums_that_make_no_sense(rig, start, place, end):
    words = struct.pack("<BBHBBHIBBH", start, place, end, start, place, end, EXTENDED, 0, 0, 0)
    rig.send(frame(), lower=DATA, upper=IP_SUM | TCP_SUM, first=words)
    assert rig.sent() == frame()


def test_receive_buffers_outside_of_ram(rig):
    for index in range(4):
        rig.describe(RX, index, (1 << 40, 2**64 - 1, (32 << 20) - 8, 0xFEE00000)[index])
        rig.arrives(frame(MAC))
    until(lambda: rig.get(RX + HEAD) == 4)
    assert all(rig.descriptor(RX, index)[2] & ERROR for index in range(4))
    rig.seen = 4
    rig.arrives(frame(MAC))
    assert rig.received()[0][:-4] == frame(MAC)


def test_nothing_moves_without_bus_mastering(rig):
    rig.guest.mmio.write(rig.config + 4, 2, 3)
    rig.send(frame())
    rig.arrives(frame(MAC))
    rig.settle()
    assert rig.get(TX + HEAD) == rig.get(RX + HEAD) == 0
    rig.guest.mmio.write(rig.config + 4, 2, 7)
    assert rig.sent() == frame() and rig.received()[0][:-4] == frame(MAC)
