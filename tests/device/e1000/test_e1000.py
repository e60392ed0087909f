"""The 82540EM as a driver uses it, over a socket pair that plays the tap: both ways, offloads, filters, saved state."""
import copy
import socket
import struct
import time

import pytest

from kvmapp.net.backend import FrameDescriptor
from kvmapp.net.tap import Tap
from tests.checksums import total
from tests.device.e1000.driver import (
    BROADCAST,
    CTRL,
    DATA,
    DD,
    EERD,
    ENABLED,
    END,
    GPRC,
    GPTC,
    GROUP,
    GROUPS,
    HEAD,
    HEADER,
    HIGH,
    IC,
    ICR,
    ICS,
    IMC,
    IMS,
    IP_SUM,
    ITR,
    LONG,
    LSC,
    MAC,
    MDAC,
    MDIC,
    MPC,
    MTA,
    NO_CRC,
    NO_SUMS,
    OTHER,
    RAL,
    RCTL,
    RING,
    RS,
    RST,
    RX,
    RXCSUM,
    RXDMT0,
    RXO,
    RXT0,
    SLU,
    STATUS,
    TAGGED,
    TAIL,
    TCP_GOOD,
    TCP_SUM,
    TO_ALL,
    TORH,
    TORL,
    TOTH,
    TOTL,
    TSCTC,
    TSE,
    TX,
    TXDW,
    UNICAST,
    VFTA,
    VLANS,
    VLE,
    VME,
    Rig,
    check_tcp,
    context,
    frame,
    tcp_frame,
)
from tests.device.idling import until_idle
from tests.device.taps import end_without_another, host_side, own_tap
from tests.waiting import until

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
    started = time.monotonic()
    rig.put(ICS, LSC)
    assert rig.irq()
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


@pytest.fixture
def tap():
    """A tap of our own, and what the host sees of IP there."""
    with own_tap() as name:
        backend = Tap(name)
        with host_side(name, 0x0800) as host:
            yield backend, host


@pytest.mark.parametrize("size", [1, 1000, 1001, 60000])
def test_the_hosts_kernel_takes_large_frames(guest, tap, size):
    backend, host = tap
    rig = Rig(guest, backend=backend)
    rig.start()
    rig.send(tcp_frame(bytes(size)), lower=DATA | TSE, upper=IP_SUM | TCP_SUM, first=context(1000, 4, 54, TSE, size))
    out = host.recv(1 << 17)
    assert len(out) == 54 + size and total(out[14:34]) == 0xFFFF
    rig.settle()
    assert rig.card.stats()["tx_drop"] == 0
    host.send(frame(MAC, kind=0x0800))
    while rig.received()[0][:-4] != frame(MAC, kind=0x0800):
        pass                                             # the host's own chatter comes too


def test_another_end_that_went_away_is_no_busy_loop(rig):
    rig.host.close()
    rig.send(frame())
    until(lambda: rig.card.stats()["tx_drop"] == 1)
    rig.settle()
    until_idle("io")


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


def test_a_frame_that_the_host_cannot_hand_over_is_not_the_last(guest, log):
    ours, here, there = end_without_another()
    rig = Rig(guest, backend=FrameDescriptor(fd=ours.detach()))
    rig.start()
    rig.send(frame())                                    # to a port that is nobody's: an error of the next receive
    until(lambda: "no frames from the host" in log())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.bind(there)
        host.sendto(bytes(HEADER) + frame(MAC), here)
        assert rig.received()[0][:len(frame(MAC))] == frame(MAC)
