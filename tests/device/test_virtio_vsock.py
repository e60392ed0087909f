"""The vsock device between a driver played here and programs at UNIX sockets."""
import os
import socket
import struct

import pytest

from kvmapp.errors import HostError
from kvmapp.state import StateError
from kvmapp.virtio.vsock import VirtioVsock
from tests.descriptors import nothing_left
from tests.device.talkers import vsock_packet
from tests.device.virtio_driver import Guest
from tests.waiting import TIMEOUT, until

RX, TX, EVENT = 0, 1, 2
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
NO_RECEIVE, NO_SEND = 1, 2
CID, WINDOW = 5, 65536


class Packet:
    def __init__(self, data):
        (self.src_cid, self.dst_cid, self.src_port, self.dst_port, self.len, self.type, self.op, self.flags, self.window,
         self.taken) = struct.unpack("<QQIIIHHIII", data[:44])
        self.data = data[44:44 + self.len]


class Rig:
    """A guest with receive buffers, and the host's folder."""

    def __init__(self, guest, folder, buffers=32, size=4096):
        self.guest, self.path, self.size = guest, str(folder / "v"), size
        self.device = VirtioVsock("vsock", guest.memory, CID, self.path)
        self.driver = guest.drive(self.device)
        self.queues = self.driver.queues
        for _ in range(buffers):
            self.queues[RX].post(writable=[size])
        self.queues[RX].kick()
        self.waiting: list[Packet] = []

    def listen(self, port):
        server = socket.socket(socket.AF_UNIX)
        server.bind(f"{self.path}_{port}")
        server.listen(8)
        server.settimeout(TIMEOUT)
        return server

    def send(self, operation, guest_port, host_port, data=b"", **more):
        self.queues[TX].post(readable=[vsock_packet(operation, guest_port, host_port, data, **more)])
        self.queues[TX].kick()
        assert self.queues[TX].wait()[0].written == 0

    def receive(self):
        """The next packet; its buffer is posted again."""
        while not self.waiting:
            for done in self.queues[RX].wait():
                assert len(done.data) >= done.written >= 44
                self.waiting.append(Packet(done.data[:done.written]))
                self.queues[RX].post(writable=[self.size])
            self.queues[RX].kick()
        packet = self.waiting.pop(0)
        assert (packet.src_cid, packet.dst_cid, packet.type) == (2, CID, 1)
        return packet

    def expect(self, operation, host_port, guest_port):
        packet = self.receive()
        assert (packet.op, packet.src_port, packet.dst_port) == (operation, host_port, guest_port)
        return packet

    def connect(self, server, guest_port=1000, host_port=7, **more):
        """From the guest; the host's end."""
        self.send(REQUEST, guest_port, host_port, **more)
        self.expect(RESPONSE, host_port, guest_port)
        end = server.accept()[0]
        end.settimeout(TIMEOUT)
        return end

    def call(self, guest_port=80, words=b""):
        """From the host: the socket, and the port that it was given."""
        end = socket.socket(socket.AF_UNIX)
        end.settimeout(TIMEOUT)
        end.connect(self.path)
        end.send(b"CONNECT %d\n" % guest_port + words)
        request = self.receive()
        assert (request.op, request.dst_port) == (REQUEST, guest_port)
        return end, request.src_port

    def answer(self, end, host_port, guest_port=80, **more):
        self.send(RESPONSE, guest_port, host_port, **more)
        assert end.recv(64) == b"OK %d\n" % host_port


@pytest.fixture
def rig(tmp_path):
    with Guest() as guest:
        yield Rig(guest, tmp_path)


@pytest.fixture
def server(rig):
    with rig.listen(7) as server:
        yield server


def exactly(end, count):
    data = b""
    while len(data) < count:
        piece = end.recv(count - len(data))
        assert piece, f"the end after {len(data)} of {count} bytes"
        data += piece
    return data


def test_the_config_space_has_the_cid(rig):
    assert rig.driver.config(0, 8) == CID


def test_a_guest_connects_to_a_program_of_the_host(rig, server):
    with rig.connect(server) as end:
        rig.send(RW, 1000, 7, b"from the guest")
        assert end.recv(64) == b"from the guest"
        end.send(b"from the host")
        assert rig.expect(RW, 7, 1000).data == b"from the host"


@pytest.mark.parametrize("port", [8, 0, 2**32 - 1])
def test_nobody_listens(rig, port):
    rig.send(REQUEST, 1000, port)
    rig.expect(RST, port, 1000)


def test_a_program_of_the_host_connects_to_the_guest(rig):
    end, host_port = rig.call(words=b"early")
    with end:
        rig.answer(end, host_port)
        assert rig.expect(RW, host_port, 80).data == b"early"
        rig.send(RW, 80, host_port, b"hello")
        assert end.recv(64) == b"hello"


def test_the_guest_refuses(rig):
    end, host_port = rig.call()
    with end:
        rig.send(RST, 80, host_port)
        assert end.recv(64) == b""


@pytest.mark.parametrize("line", [b"CONNECT\n", b"CONNECT x\n", b"CONNECT 4294967296\n", b"connect 5\n", b"CONNECT 5", b"\n",
                                  b"GET / HTTP/1.1\n", b"CONNECT -1\n", b"CONNECT " + b"1" * 40])
def test_a_program_that_says_something_else_is_hung_up_on(rig, line):
    with socket.socket(socket.AF_UNIX) as end:
        end.settimeout(TIMEOUT)
        end.connect(rig.path)
        end.send(line)
        if b"\n" not in line and len(line) < 32:
            end.shutdown(socket.SHUT_WR)
            assert rig.device.stats()["connections"] <= 1
            return
        try:
            assert end.recv(64) == b""
        except ConnectionResetError:             # what it said was not read to its end
            pass


def test_a_greeting_may_come_in_pieces(rig):
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(rig.path)
        for piece in (b"CON", b"NECT 8", b"0\n"):
            end.send(piece)
            rig.guest.settle()
        assert rig.receive().dst_port == 80


def test_many_connections_with_much_data_both_ways(rig, server):
    ends = [rig.connect(server, 1000 + i) for i in range(20)]
    for i, end in enumerate(ends):
        end.send(bytes([i]) * 5000)
        rig.send(RW, 1000 + i, 7, bytes([i]) * 3000)
    got = dict.fromkeys(range(20), b"")
    while sum(map(len, got.values())) < 20 * 5000:
        packet = rig.receive()
        assert packet.op == RW
        got[packet.dst_port - 1000] += packet.data
    for i, end in enumerate(ends):
        assert got[i] == bytes([i]) * 5000 and exactly(end, 3000) == bytes([i]) * 3000
        end.close()


def test_more_connections_than_there_is_room_for_are_refused(rig, server):
    server.listen(300)
    for i in range(256):
        rig.send(REQUEST, i, 7)
        rig.expect(RESPONSE, 7, i)
    rig.send(REQUEST, 256, 7)
    rig.expect(RST, 7, 256)
    rig.send(RST, 0, 7)
    rig.send(REQUEST, 256, 7)
    rig.expect(RESPONSE, 7, 256)


@pytest.mark.parametrize("by", ["host", "guest"])
def test_who_finds_no_descriptor_left_waits_for_one(rig, server, by):
    """The listener tells of each caller once only."""
    first = rig.connect(server)
    second = socket.socket(socket.AF_UNIX)
    with nothing_left():
        second.connect(rig.path)
        second.sendall(b"CONNECT 80\n")
        first.sendall(b"one")
        assert rig.expect(RW, 7, 1000).data == b"one"
        if by == "guest":                                # whose end frees one
            rig.send(RST, 1000, 7)
    if by == "host":
        first.sendall(b"two")
    came = [rig.receive() for _ in range(2 if by == "host" else 1)]
    assert {(packet.op, packet.dst_port) for packet in came} == ({(RW, 1000), (REQUEST, 80)} if by == "host" else {(REQUEST, 80)})
    for one in first, second:
        one.close()


def test_the_guest_is_sent_no_more_than_it_has_room_for(rig, server):
    with rig.connect(server, window=100) as end:
        end.send(bytes(range(250)))
        assert len(rig.expect(RW, 7, 1000).data) == 100
        rig.guest.settle()
        assert not rig.queues[RX].collect()
        rig.send(CREDIT_UPDATE, 1000, 7, window=100, taken=60)
        assert rig.expect(RW, 7, 1000).data == bytes(range(100, 160))
        rig.send(CREDIT_UPDATE, 1000, 7, window=100, taken=2**31)        # nonsense: no credit
        rig.guest.settle()
        assert not rig.queues[RX].collect()
        rig.send(CREDIT_UPDATE, 1000, 7, window=1000, taken=160)
        assert rig.expect(RW, 7, 1000).data == bytes(range(160, 250))


def test_a_program_that_does_not_read_makes_the_guest_wait_and_loses_nothing(rig, server):
    """The guest sends until its credit is used up; then the program reads it all."""
    with rig.connect(server) as end:
        sent, taken = 0, 0
        piece = bytes(range(256)) * 16
        while sent - taken < WINDOW:
            rig.send(RW, 1000, 7, piece)
            sent += len(piece)
            rig.send(CREDIT_REQUEST, 1000, 7)
            while (packet := rig.expect(CREDIT_UPDATE, 7, 1000)).taken < taken:
                pass
            taken = packet.taken
            assert packet.window == WINDOW
        assert exactly(end, sent) == piece * (sent // len(piece))
        until(lambda: rig.receive().taken == sent)


def test_more_than_the_window_ends_the_connection(rig, server):
    with rig.connect(server):
        for _ in range(200):
            rig.send(RW, 1000, 7, bytes(4000))
            if not rig.device.stats()["connections"]:
                break
        until(lambda: rig.receive().op == RST)
        assert rig.device.stats() == {"connections": 0}


def test_each_direction_ends_by_itself(rig, server):
    with rig.connect(server) as end:
        rig.send(RW, 1000, 7, b"last words")
        rig.send(SHUTDOWN, 1000, 7, flags=NO_SEND)
        assert exactly(end, 10) == b"last words" and end.recv(1) == b""
        end.send(b"and mine")
        assert rig.expect(RW, 7, 1000).data == b"and mine"
        end.shutdown(socket.SHUT_WR)
        assert rig.expect(SHUTDOWN, 7, 1000).flags & NO_SEND
        rig.send(SHUTDOWN, 1000, 7, flags=NO_SEND | NO_RECEIVE)
        rig.expect(RST, 7, 1000)
    assert rig.device.stats() == {"connections": 0}


def test_a_program_that_goes_is_told_to_the_guest(rig, server):
    end = rig.connect(server)
    end.send(b"bye")
    end.close()
    assert rig.expect(RW, 7, 1000).data == b"bye"
    assert rig.expect(SHUTDOWN, 7, 1000).flags & NO_SEND
    rig.send(RST, 1000, 7)
    assert rig.device.stats() == {"connections": 0}


@pytest.mark.parametrize("change", [
    {"kind": 2}, {"operation": RW}, {"operation": RESPONSE}, {"operation": SHUTDOWN}, {"operation": CREDIT_UPDATE}, {"operation": 99},
])
def test_a_packet_of_no_connection_is_answered_by_a_reset(rig, change):
    rig.send(**{"operation": REQUEST, "guest_port": 1000, "host_port": 7, **change})
    rig.expect(RST, 7, 1000)


@pytest.mark.parametrize("operation", [REQUEST, RESPONSE, 99])
def test_a_packet_that_an_open_connection_does_not_take_ends_it(rig, server, operation):
    with rig.connect(server) as end:
        rig.send(operation, 1000, 7)
        rig.expect(RST, 7, 1000)
        assert end.recv(1) == b""


@pytest.mark.parametrize("packet", [
    b"", b"x" * 43, vsock_packet(REQUEST, 1, 7, cid=6), vsock_packet(REQUEST, 1, 7, to=3), vsock_packet(REQUEST, 1, 7, to=1 << 40),
    vsock_packet(RW, 1, 7, length=1), vsock_packet(RW, 1, 7, length=2**32 - 1),
])
def test_a_packet_that_makes_no_sense_is_dropped(rig, packet):
    rig.queues[TX].post(readable=[packet] if packet else [], writable=[] if packet else [1])
    rig.queues[TX].kick()
    rig.queues[TX].wait()
    rig.guest.settle()
    assert not rig.queues[RX].collect() and rig.device.stats() == {"connections": 0}


def test_resets_without_buffers_for_them_are_bounded(tmp_path):
    with Guest() as guest:
        rig = Rig(guest, tmp_path, buffers=0)
        for port in range(200):
            rig.send(RW, port, 7)
        for _ in range(100):
            rig.queues[RX].post(writable=[64])
        rig.queues[RX].kick()
        rig.guest.settle()
        assert len(rig.queues[RX].collect()) == 64


def test_a_buffer_without_room_is_given_back_empty(tmp_path):
    with Guest() as guest:
        rig = Rig(guest, tmp_path, buffers=0)
        rig.queues[RX].post(writable=[44])
        rig.queues[RX].post(writable=[45])
        rig.queues[RX].kick()
        rig.send(RW, 1, 7)
        until(lambda: rig.queues[RX].word(rig.queues[RX].used + 2) == 2)
        assert [done.written for done in rig.queues[RX].collect()] == [0, 44]


def test_a_reset_by_the_guest_ends_every_connection(rig, server):
    with rig.connect(server) as end:
        rig.driver.set_status(0)
        assert end.recv(1) == b"" and rig.device.stats() == {"connections": 0}


def test_without_a_driver_nobody_is_kept_waiting(tmp_path):
    with Guest() as guest, socket.socket(socket.AF_UNIX) as end:
        guest.plug(VirtioVsock("vsock", guest.memory, CID, str(tmp_path / "v")))
        end.settimeout(TIMEOUT)
        end.connect(str(tmp_path / "v"))
        assert end.recv(1) == b""


def test_a_restored_guest_is_told_that_its_connections_are_gone(rig, server):
    with rig.connect(server) as end:
        card = rig.driver.card
        card.pause()
        state = card.save()
        card.restore(state)
        assert end.recv(1) == b"" and card.save() == state
        card.resume()
        rig.queues[EVENT].post(writable=[4])
        rig.queues[EVENT].kick(force=True)
        [event] = rig.queues[EVENT].wait()
        assert event.data == bytes(4) and event.written == 4
        rig.connect(server, 2000).close()


def test_a_pause_keeps_connections(rig, server):
    with rig.connect(server) as end:
        rig.driver.card.pause()
        end.send(b"meanwhile")
        rig.driver.card.resume()
        assert rig.expect(RW, 7, 1000).data == b"meanwhile"


@pytest.mark.parametrize("change", [{"cid": 6}, {"cid": 1 << 32}, {"cid": "5"}, {"x": 1}])
def test_a_state_of_another_device_is_refused(rig, change):
    rig.driver.card.pause()
    state = rig.driver.card.save()
    device = {**state["virtio"]["device"], **change}
    with pytest.raises(StateError, match="vsock"):
        rig.driver.card.restore({**state, "virtio": {**state["virtio"], "device": device}})


def test_the_socket_goes_with_the_device_and_a_dead_one_is_replaced(tmp_path):
    path = tmp_path / "v"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with Guest() as guest:
        device = VirtioVsock("vsock", guest.memory, CID, str(path))
        with pytest.raises(HostError, match="Address already in use"):
            VirtioVsock("other", guest.memory, CID, str(path))
        device.close()
        assert not os.path.exists(path)
        path.write_text("a file of somebody's")
        with pytest.raises(HostError, match="Address already in use"):
            VirtioVsock("vsock", guest.memory, CID, str(path))
        assert path.read_text()


@pytest.mark.parametrize(("path", "words"), [("/nonexistent/v", "No such file"), ("/" + "x" * 96, "more than 96 bytes")])
def test_a_path_that_cannot_be_used(path, words):
    with Guest() as guest, pytest.raises(HostError, match=words):
        VirtioVsock("vsock", guest.memory, CID, path)
