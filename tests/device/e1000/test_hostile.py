"""The 82540EM and guests that break rules: rings, addresses, lengths and offloads of no sense. It goes on, or a reset mends it."""
import struct

import pytest

from tests.device.e1000.driver import (
    CTRL,
    DATA,
    DD,
    ERROR,
    EXTENDED,
    HEAD,
    HIGH,
    IP_SUM,
    LENGTH,
    LOW,
    MAC,
    RING,
    RST,
    RX,
    TAIL,
    TCP_SUM,
    TSE,
    TX,
    context,
    frame,
    tcp_frame,
)
from tests.waiting import until


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
