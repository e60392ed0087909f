"""The network card over a socket pair that plays the tap: frames both ways, buffers of every cut, drivers that run dry or break rules."""
import socket
import struct

import pytest

from kvmapp.errors import HostError
from kvmapp.net.backend import FrameDescriptor
from kvmapp.net.tap import Tap
from kvmapp.virtio.net import VirtioNet
from tests.device.idling import until_idle
from tests.device.taps import end_without_another, host_side, own_tap
from tests.device.virtio_driver import F_EVENT_IDX, F_INDIRECT, F_VERSION_1, Guest
from tests.waiting import until

MAC = bytes.fromhex("5254007f0dcb")
HEADER = 12
MRG_RXBUF = 1 << 15
RX, TX = 0, 1
ETHERTYPE = 0x88B5                                     # for local experiments (IEEE 802)


@pytest.fixture(params=("pci", "legacy", "mmio", "packed"))
def guest(request):
    with Guest(wiring=request.param) as guest:
        yield guest


class Wire:
    """The card and its other end."""

    def __init__(self, guest, **options):
        ours, self.host = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.host.settimeout(20)
        self.card = VirtioNet("net0", guest.memory, FrameDescriptor(fd=ours.detach()), MAC)
        self.driver = guest.drive(self.card, **options)
        self.rx, self.tx, *_ = self.driver.queues

    def arrives(self, frame: bytes) -> None:
        self.host.send(bytes(HEADER) + frame)

    def sent(self) -> bytes:
        data = self.host.recv(1 << 17)
        assert data[:HEADER] == bytes(HEADER)
        return data[HEADER:]


@pytest.fixture
def wire(guest):
    return Wire(guest)


def frame_of(number: int, size: int = 60) -> bytes:
    return struct.pack(">I", number) + bytes(size - 4)


def test_a_frame_goes_out_as_it_stands(wire):
    wire.tx.post(readable=[bytes(HEADER) + frame_of(1)])
    wire.tx.kick()
    assert wire.sent() == frame_of(1)
    assert wire.tx.wait()[0].written == 0
    assert wire.card.stats()["tx_packets"] == 1
    assert wire.card.stats()["tx_bytes"] == 60


def test_a_frame_that_the_host_cannot_hand_over_is_not_the_last(guest, log):
    """Nobody at the other end's UDP port is an error of the next receive; a tap gives one for a frame that it cannot describe."""
    ours, here, there = end_without_another()
    driver = guest.drive(VirtioNet("net0", guest.memory, FrameDescriptor(fd=ours.detach()), MAC))
    rx, tx, *_ = driver.queues
    for _ in range(2):
        rx.post(writable=[HEADER + 1518])
    rx.kick()
    tx.post(readable=[bytes(HEADER) + frame_of(1)])
    tx.kick()
    until(lambda: "no frames from the host" in log())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.bind(there)
        host.sendto(bytes(HEADER) + frame_of(2), here)
        assert rx.wait()[0].data[HEADER:] == frame_of(2)


@pytest.mark.parametrize("cut", [[1] * 72, [12, 60], [10, 2, 14, 46], [72]])
def test_a_frame_may_be_cut_anywhere(wire, cut):
    data, parts, start = bytes(HEADER) + frame_of(7), [], 0
    for length in cut:
        parts.append(data[start:start + length])
        start += length
    wire.tx.post(readable=parts, indirect=wire.tx.indirect and len(parts) > 3)
    wire.tx.kick()
    assert wire.sent() == frame_of(7)


@pytest.mark.parametrize("without", [0, F_EVENT_IDX, F_INDIRECT])
def test_many_frames_keep_their_order_both_ways(guest, without):
    wire = Wire(guest, without=without)
    for first in range(0, 400, 40):
        for number in range(first, first + 40):
            wire.tx.post(readable=[bytes(HEADER), frame_of(number)])
            wire.rx.post(writable=[2048])
        wire.tx.kick()
        wire.rx.kick()
        for number in range(first, first + 40):
            assert wire.sent() == frame_of(number)
            wire.arrives(frame_of(number))
        assert len(wire.tx.wait(40)) == 40
        received = wire.rx.wait(40)
        assert [done.data[HEADER:HEADER + 4] for done in received] == [struct.pack(">I", n) for n in range(first, first + 40)]
        assert all(done.written == HEADER + 60 for done in received)


@pytest.mark.parametrize("cut", [[2048], [12, 1514], [1] * 12 + [1514], [11, 1, 100, 1900], [4, 7, 2, 2000]])
def test_a_received_frame_fills_buffers_of_any_cut(wire, cut):
    wire.rx.post(writable=cut, indirect=True)
    wire.rx.kick()
    wire.arrives(frame_of(3, 100))
    [done] = wire.rx.wait()
    assert done.written == HEADER + 100
    assert done.data[:HEADER + 100] == bytes(10) + b"\x01\0" + frame_of(3, 100)


def test_a_driver_that_minces_its_buffers_is_served_within_what_one_read_takes(wire):
    for _ in range(5):
        wire.rx.post(writable=[1] * 256, indirect=True)
    wire.rx.kick()
    wire.arrives(frame_of(4, 100))
    [done] = wire.rx.wait()
    assert done.data[HEADER:HEADER + 100] == frame_of(4, 100)


def test_a_large_frame_takes_several_buffers_and_says_how_many(guest):
    wire = Wire(guest)
    for _ in range(8):
        wire.rx.post(writable=[500])
    wire.rx.kick()
    wire.arrives(frame_of(9, 1400))
    done = wire.rx.wait(3)
    assert [each.written for each in done] == [500, 500, HEADER + 1400 - 1000]
    assert done[0].data[10:12] == b"\x03\0"
    assert b"".join(each.data for each in done)[HEADER:HEADER + 1400] == frame_of(9, 1400)


def test_a_frame_waits_until_the_driver_has_room(wire):
    for number in range(5):
        wire.arrives(frame_of(number))
    assert not wire.driver.interrupted(1)
    wire.rx.post(writable=[2048])
    wire.rx.kick(force=True)
    assert wire.rx.wait()[0].data[HEADER:HEADER + 4] == struct.pack(">I", 0)
    for _ in range(4):
        wire.rx.post(writable=[2048])
    wire.rx.kick(force=True)
    assert [done.data[HEADER + 3] for done in wire.rx.wait(4)] == [1, 2, 3, 4]
    assert wire.card.stats()["rx_drop"] == 0


def test_without_mergeable_buffers_a_frame_too_large_is_dropped(guest):
    wire = Wire(guest, without=MRG_RXBUF)
    wire.rx.post(writable=[1000])
    wire.rx.post(writable=[1000])
    wire.rx.kick()
    wire.arrives(frame_of(1, 1400))
    wire.arrives(frame_of(2, 200))
    [done] = wire.rx.wait()
    assert done.data[HEADER:HEADER + 4] == struct.pack(">I", 2)
    assert wire.card.stats()["rx_drop"] == 1


def test_an_idle_host_costs_nothing_while_the_driver_has_no_room(wire):
    """The descriptor stays readable; a level-triggered wait would turn round for ever."""
    wire.arrives(frame_of(1))
    until_idle("io")


@pytest.mark.parametrize("length", [1, 11, 12, 25])
def test_a_frame_shorter_than_its_headers_is_dropped(wire, length, capfd):
    wire.tx.post(readable=[bytes(length)])
    wire.tx.post(readable=[bytes(HEADER) + frame_of(5)])
    wire.tx.kick()
    assert wire.sent() == frame_of(5)
    assert len(wire.tx.wait(2)) == 2
    assert wire.card.stats()["tx_drop"] == 1
    assert "net0: guest error: frame of impossible length" in capfd.readouterr().err


def test_a_frame_longer_than_any_is_dropped(guest):
    wire = Wire(guest)
    wire.tx.post(readable=[bytes(70000)])
    wire.tx.post(readable=[bytes(HEADER) + frame_of(5)])
    wire.tx.kick()
    assert wire.sent() == frame_of(5)
    assert wire.card.stats()["tx_drop"] == 1


@pytest.mark.parametrize(("readable", "writable"), [([b"x" * 2000], []), ([b"x"], [2000]), ([], [12]), ([], [3])])
def test_receive_buffers_that_are_none_break_the_queue(wire, readable, writable):
    wire.rx.post(readable=readable, writable=writable)
    wire.rx.kick()
    wire.driver.await_needs_reset()
    wire.driver.start()
    again = wire.driver.queues[RX]
    again.post(writable=[2048])
    again.kick()
    wire.arrives(frame_of(6))
    assert again.wait()[0].data[HEADER + 3] == 6


def test_a_card_with_a_broken_queue_is_saved_and_restored(wire):
    wire.rx.post(readable=[b"x"])
    wire.rx.kick()
    wire.driver.await_needs_reset()
    wire.driver.card.pause()
    state = wire.driver.card.save()
    wire.driver.card.restore(state)
    assert wire.driver.card.save() == state


def test_a_reset_gives_posted_buffers_back(wire):
    for _ in range(20):
        wire.rx.post(writable=[2048])
    wire.rx.kick()
    wire.arrives(frame_of(1))
    wire.rx.wait()
    wire.driver.set_status(0)
    wire.arrives(frame_of(2))
    wire.driver.start()
    queue = wire.driver.queues[RX]
    queue.post(writable=[2048])
    queue.kick()
    assert queue.wait()[0].data[HEADER + 3] == 2


def test_a_paused_card_keeps_frames_and_its_state(guest):
    wire = Wire(guest)
    for _ in range(10):
        wire.rx.post(writable=[2048])
    wire.rx.kick()
    wire.arrives(frame_of(1))
    assert wire.rx.wait()[0].data[HEADER + 3] == 1
    wire.driver.card.pause()
    state = wire.driver.card.save()
    wire.arrives(frame_of(2))
    wire.driver.card.restore(state)
    assert wire.driver.card.save() == state
    wire.driver.card.resume()
    assert wire.rx.wait()[0].data[HEADER + 3] == 2


def test_link_down_is_told_and_nothing_passes(wire):
    assert wire.driver.config(6, 2) == 1
    wire.card.set_link(False)
    wire.driver.await_vector(0)
    assert wire.driver.config(6, 2) == 0
    wire.rx.post(writable=[2048])
    wire.rx.kick(force=True)
    wire.arrives(frame_of(1))
    wire.tx.post(readable=[bytes(HEADER) + frame_of(2)])
    wire.tx.kick()
    wire.tx.wait()
    assert wire.card.stats()["tx_drop"] == 1
    wire.card.set_link(True)
    assert wire.rx.wait()[0].data[HEADER + 3] == 1


def test_a_card_may_start_with_its_cable_out(guest):
    ours, host = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    card = VirtioNet("net0", guest.memory, FrameDescriptor(fd=ours.detach()), MAC, link=False)
    driver = guest.drive(card)
    assert driver.config(6, 2) == 0
    host.send(bytes(HEADER) + frame_of(1))
    driver.queues[RX].post(writable=[2048])
    driver.queues[RX].kick(force=True)
    guest.settle()
    assert not driver.queues[RX].collect()
    card.set_link(True)
    assert driver.queues[RX].wait()[0].data[HEADER + 3] == 1


def test_the_address_stands_in_config_space(wire):
    assert bytes(wire.driver.config(i, 1) for i in range(6)) == MAC


@pytest.mark.parametrize("guest", ["pci", "mmio"], indirect=True)
@pytest.mark.parametrize("feature", [7, 8, 9, 10, 11, 12, 13, 14])
def test_offloads_without_checksums_are_refused(guest, feature):
    ours, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    driver = guest.plug(VirtioNet("net0", guest.memory, FrameDescriptor(fd=ours.detach(), offloads=True), MAC))
    assert driver.offered() >> feature & 1
    with pytest.raises(AssertionError, match="refused"):
        driver.negotiate(F_VERSION_1 | 1 << feature)
    driver.negotiate(F_VERSION_1 | 1 << feature | 1 << 0 | 1 << 1)


def test_a_64_kib_frame_passes_when_offloads_are_agreed_on(guest):
    ours, host = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    driver = guest.drive(VirtioNet("net0", guest.memory, FrameDescriptor(fd=ours.detach(), offloads=True), MAC))
    rx, tx, *_ = driver.queues
    for _ in range(60):
        rx.post(writable=[1536])
    rx.kick()
    frame = frame_of(1, 65000)
    host.send(bytes(HEADER) + frame)
    received = rx.wait(43)
    assert b"".join(done.data[:done.written] for done in received)[HEADER:] == frame
    tx.post(readable=[bytes(HEADER), frame[:30000], frame[30000:]])
    tx.kick()
    assert host.recv(1 << 17) == bytes(HEADER) + frame


def test_a_backend_that_went_away_is_no_busy_loop(guest):
    wire = Wire(guest)
    wire.rx.post(writable=[2048])
    wire.rx.kick()
    wire.host.close()
    wire.tx.post(readable=[bytes(HEADER) + frame_of(1)])
    wire.tx.kick()
    wire.tx.wait()
    assert wire.card.stats()["tx_drop"] == 1


@pytest.mark.parametrize(("name", "words"), [("tap-none", "Cannot use tap 'tap-none': No such device"), ("lo", "Cannot use tap 'lo'")])
def test_a_tap_that_cannot_be_used_is_named(name, words):
    with pytest.raises(HostError, match=words) as refusal:
        Tap(name)
    assert refusal.value.hint


@pytest.fixture
def tap():
    """A tap of our own and a raw socket on the host's side of it."""
    with own_tap() as name:
        backend = Tap(name)
        with host_side(name, ETHERTYPE) as host:
            yield backend, host


def test_a_tap_carries_frames_both_ways(guest, tap):
    backend, host = tap
    driver = guest.drive(VirtioNet("net0", guest.memory, backend, MAC))
    rx, tx, *_ = driver.queues
    for _ in range(60):
        rx.post(writable=[2048])
    rx.kick()
    frame = MAC + bytes(6) + ETHERTYPE.to_bytes(2, "big") + b"hello".ljust(50, b".")
    tx.post(readable=[bytes(HEADER), frame])
    tx.kick()
    assert host.recv(2048) == frame
    host.send(frame)
    frames = []
    while frame not in frames:                         # the host's own chatter (IPv6 neighbour discovery) comes too
        frames += [done.data[HEADER:done.written] for done in rx.wait()]


def test_a_tap_in_use_is_named(tap):
    backend, _ = tap
    with pytest.raises(HostError, match=f"Cannot use tap '{backend.name}': Device or resource busy"):
        Tap(backend.name)


def test_a_descriptor_that_is_no_tap_is_refused():
    ours, _ = socket.socketpair()
    with pytest.raises(HostError, match="is not an attached tap"):
        Tap(fd=ours.detach())
