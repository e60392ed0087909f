"""The network card's control queue and its pairs of queues: commands that are carried out, and whatever else a driver may send."""
import os
import socket
import subprocess

import pytest

from kvmapp import netcards
from kvmapp.config import InterfaceConfig
from kvmapp.daemon.taps import open_tap
from kvmapp.errors import HostError
from kvmapp.net.backend import FrameDescriptor
from kvmapp.net.tap import Tap
from kvmapp.virtio.net import VirtioNet
from tests.device.taps import host_side, own_tap
from tests.device.test_virtio_net import ETHERTYPE, HEADER, MAC, frame_of
from tests.device.virtio_driver import F_VERSION_1

CTRL_VQ, CTRL_RX, CTRL_VLAN, CTRL_RX_EXTRA, MQ, CTRL_MAC_ADDR = (1 << bit for bit in (17, 18, 19, 20, 22, 23))
PROMISC, TABLE, ADDRESS, VLAN_ADD, PAIRS = b"\0\0", b"\x01\0", b"\x01\x01", b"\x02\0", b"\x04\0"
OK, ERROR = b"\0", b"\x01"


class Wire:
    """A card of several pairs and the other ends of their cables."""

    def __init__(self, guest, pairs=2, **options):
        sockets = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(pairs)]
        self.hosts = [host for _, host in sockets]
        for host in self.hosts:
            host.settimeout(20)
        self.card = VirtioNet("net0", guest.memory, [FrameDescriptor(fd=ours.detach()) for ours, _ in sockets], MAC)
        self.driver = guest.drive(self.card, **options)
        self.control = self.driver.queues[2 * pairs if options.get("without", 0) & MQ == 0 and pairs > 1 else 2]

    def command(self, data, cut=None, room=1):
        parts = [data] if cut is None else [data[:cut], data[cut:]]
        self.control.post(readable=parts, writable=[room] if room else [])
        self.control.kick()
        return self.control.wait()[0].data[:1]

    def mac(self):
        return bytes(self.driver.config(i, 1) for i in range(6))


def test_every_pair_carries_frames_of_its_own(guest):
    wire = Wire(guest, 3)
    assert wire.driver.config(8, 2) == 3
    assert wire.command(PAIRS + b"\x03\0") == OK
    for number, host in enumerate(wire.hosts):
        receiver, transmitter = wire.driver.queues[2 * number:2 * number + 2]
        receiver.post(writable=[2048])
        receiver.kick()
        host.send(bytes(HEADER) + frame_of(number))
        assert receiver.wait()[0].data[HEADER + 3] == number
        transmitter.post(readable=[bytes(HEADER) + frame_of(10 + number)])
        transmitter.kick()
        assert host.recv(2048)[HEADER + 3] == 10 + number
        transmitter.wait()
    assert wire.card.stats()["rx_packets"] == wire.card.stats()["tx_packets"] == 3


def test_one_pair_has_no_mq(guest):
    wire = Wire(guest, 1)
    assert not wire.driver.offered() & MQ
    assert wire.command(PAIRS + b"\x01\0") == ERROR


def test_without_mq_the_control_queue_stands_behind_the_first_pair(guest):
    wire = Wire(guest, 2, without=MQ)
    assert wire.command(PROMISC + b"\x01") == OK
    assert wire.command(PAIRS + b"\x02\0") == ERROR


@pytest.mark.parametrize("count", [0, 4, 0x100, 0xFFFF])
def test_pairs_that_are_not_there_are_refused(guest, count):
    wire = Wire(guest, 3)
    assert wire.command(PAIRS + b"\x02\0") == OK
    assert wire.command(PAIRS + count.to_bytes(2, "little")) == ERROR
    assert wire.card.pairs_used == 2


def test_the_address_is_set_and_a_reset_takes_it_back(guest):
    wire = Wire(guest)
    assert wire.command(ADDRESS + b"RTabcd") == OK
    assert wire.mac() == b"RTabcd"
    state = wire.driver.card.save()
    wire.driver.set_status(0)
    assert wire.mac() == MAC
    wire.driver.card.pause()
    wire.driver.card.restore(state)
    assert wire.mac() == b"RTabcd"


@pytest.mark.parametrize("command", [PROMISC + b"\0", b"\0\x05\x01", VLAN_ADD + b"\x05\0", b"\x02\x01\x05\0", TABLE + bytes(8),
                                     TABLE + b"\x01\0\0\0RTabcd" + b"\x02\0\0\0" + bytes(12)])
@pytest.mark.parametrize("cut", [None, 1, 2])
def test_filters_are_accepted_however_they_are_cut(guest, command, cut):
    assert Wire(guest).command(command, cut) == OK


@pytest.mark.parametrize("command", [
    b"\0", b"\x01", PROMISC, b"\0\x06\x01", b"\0\xff\x01", ADDRESS + b"RTabc", b"\x01\x02RTabcd", VLAN_ADD + b"\0", b"\x02\x02\0\0", PAIRS,
    PAIRS + b"\x01", b"\x04\x01\x01\0", b"\x03\0", b"\x05\0\0\0\0\0\0\0\0\0", b"\xff\xff", TABLE, TABLE + b"\x01\0\0\0RTabc",
    TABLE + b"\xff\xff\xff\xff" + bytes(100), TABLE + b"\x01\0\0\0RTabcd" + b"\xff\xff\xff\x7f"])
def test_what_is_no_command_is_answered_as_an_error(guest, command):
    wire = Wire(guest)
    assert wire.command(command) == ERROR
    assert wire.command(PROMISC + b"\x01") == OK


def test_a_command_without_room_for_the_answer_is_carried_out_all_the_same(guest):
    wire = Wire(guest)
    assert wire.command(ADDRESS + b"RTabcd", room=0) == b""
    assert wire.mac() == b"RTabcd"
    wire.control.post(writable=[16])
    wire.control.kick()
    assert wire.control.wait()[0].data == ERROR


@pytest.mark.parametrize("feature", [CTRL_RX, CTRL_VLAN, CTRL_RX_EXTRA, MQ, CTRL_MAC_ADDR])
def test_control_features_need_the_control_queue(guest, feature):
    sockets = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]
    driver = guest.plug(VirtioNet("net0", guest.memory, [FrameDescriptor(fd=ours.detach()) for ours, _ in sockets], MAC))
    with pytest.raises(AssertionError, match="refused"):
        driver.negotiate(F_VERSION_1 | feature)
    driver.negotiate(F_VERSION_1 | feature | CTRL_VQ)


@pytest.mark.parametrize(("without", "command"), [(CTRL_RX, PROMISC + b"\x01"), (CTRL_RX, TABLE + bytes(8)),
                                                  (CTRL_VLAN, VLAN_ADD + b"\0\0"),
                                                  (CTRL_MAC_ADDR, ADDRESS + b"RTabcd")])
def test_a_command_of_a_feature_that_was_not_agreed_on_is_refused(guest, without, command):
    assert Wire(guest, without=without).command(command) == ERROR


@pytest.fixture
def many_queues():
    """An existing tap of three queues, opened as the daemon does, and a raw socket on the host's side of it."""
    with own_tap("multi_queue") as name, host_side(name, ETHERTYPE) as host:
        yield InterfaceConfig(index=0, type="tap", target=name, mac="52:54:00:7f:0d:cb", queues=3, vhost="no"), host


def test_the_host_spreads_frames_over_the_pairs_in_use_only(guest, many_queues):
    interface, host = many_queues
    tap = open_tap(interface)
    assert list(tap.files(0)) == ["interface:0", "interface:0.1", "interface:0.2"]
    driver = guest.drive(VirtioNet("net0", guest.memory, [Tap(fd=fd) for fd in tap.fds], MAC), size=64)
    control = driver.queues[6]
    for used in (1, 3, 1):
        control.post(readable=[PAIRS + used.to_bytes(2, "little")], writable=[1])
        control.kick()
        assert control.wait()[0].data == OK
        for queue in driver.queues[0:6:2]:
            for _ in range(60 - len(queue.pending)):           # room for the largest frame, 32 of them, stays
                queue.post(writable=[2048])
            queue.kick()
        frames = [MAC + bytes(6) + ETHERTYPE.to_bytes(2, "big") + bytes([used, number]).ljust(50, b".") for number in range(20)]
        for frame in frames:
            host.send(frame)
        seen: list[bytes] = []
        while len(seen) < len(frames):
            for queue in driver.queues[0:2 * used:2]:
                seen += [done.data[HEADER:] for done in queue.collect() if done.data[HEADER:] in frames]
        assert sorted(seen) == frames


def test_a_tap_of_one_queue_is_no_tap_of_several(many_queues):
    interface, _ = many_queues
    name = f"{interface.target}x"
    subprocess.run(["ip", "tuntap", "add", name, "mode", "tap", "vnet_hdr"], check=True)
    try:
        with pytest.raises(HostError, match=f"Cannot use tap '{name}'") as refusal:
            open_tap(InterfaceConfig(index=0, type="tap", target=name, mac="52:54:00:7f:0d:cb", queues=2))
        assert "multi_queue" in refusal.value.hint
    finally:
        subprocess.run(["ip", "link", "delete", name], check=True)


def test_a_card_whose_vhost_is_refused_leaves_nothing_open(guest, monkeypatch):
    """What it was given for its later pairs would stay open for as long as the domain runs."""
    def open_ends(interface, files, backends):
        backends += [FrameDescriptor(fd=socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].detach()) for _ in range(3)]
    monkeypatch.setattr(netcards, "open_backends", open_ends)
    interface = InterfaceConfig(index=0, type="tap", target="t0", mac="52:54:00:7f:0d:cb", queues=3, vhost="yes")
    files = {name: os.open(os.devnull, os.O_RDWR) for name in ("vhost:0", "vhost:0.1", "vhost:0.2")}
    fds = list(files.values())
    with pytest.raises(HostError, match="net0: vhost-net cannot be used: VHOST_SET_OWNER"):
        netcards.make_device(interface, files, guest.memory)
    assert not files
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
