"""User mode as a guest's card sees it: frames made by hand go in, libslirp's answers come out."""
import contextlib
import os
import resource
import socket
import struct
import threading

import pytest

from kvmapp.errors import HostError
from kvmapp.net.user import UserNet
from kvmapp.values import Forward
from kvmapp.virtio.net import VirtioNet
from tests.checksums import checksum
from tests.device.e1000.driver import TO_ALL, UNICAST, Rig
from tests.device.virtio_driver import Guest

MAC = bytes.fromhex("5254007f0dcb")
EVERYBODY = b"\xff" * 6
HEADER = bytes(12)
GUEST, ROUTER = "10.0.2.15", "10.0.2.2"
ARP, IPV4 = 0x0806, 0x0800
ICMP, TCP, UDP = 1, 6, 17


class Wire:
    """A card in user mode; `say` sends a frame, `hear` gives the first of those that come which is what is looked for."""

    def __init__(self, guest, forwards=None):
        self.guest = guest
        self.net = UserNet(forwards=forwards)
        self.card = VirtioNet("net0", guest.memory, self.net, MAC)
        self.rx, self.tx, *_ = guest.drive(self.card).queues
        self.come = []
        for _ in range(32):
            self.rx.post(writable=[2048])
        self.rx.kick()

    def say(self, target, kind, payload):
        self.put(target + MAC + struct.pack(">H", kind) + payload)

    def put(self, frame):
        self.tx.post(readable=[HEADER + frame])
        self.tx.kick()
        self.tx.wait()

    def hear(self, wanted):
        while True:
            while not self.come:
                for one in self.rx.wait():
                    self.come.append(one.data[len(HEADER):])
                    self.rx.post(writable=[2048])
                self.rx.kick()
            frame = self.come.pop(0)
            found = wanted(frame[12:14] == struct.pack(">H", IPV4), frame[14:])
            if found is not None:
                return found


def ip_packet(protocol, source, target, payload):
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0, socket.inet_aton(source),
                       socket.inet_aton(target))
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + payload


def udp(source_port, target_port, payload):
    return struct.pack(">HHHH", source_port, target_port, 8 + len(payload), 0) + payload


def arp(operation, sender, target, target_mac=bytes(6)):
    return struct.pack(">HHBBH6s4s6s4s", 1, IPV4, 6, 4, operation, MAC, socket.inet_aton(sender), target_mac, socket.inet_aton(target))


@pytest.fixture
def plug():
    with contextlib.ExitStack() as stack:
        def plug_one(forwards=None):
            wire = Wire(stack.enter_context(Guest()), forwards)
            stack.callback(wire.card.close)
            return wire
        yield plug_one


def test_dhcp_offers_an_address(plug):
    wire = plug()
    request = struct.pack(">BBBBIHH", 1, 1, 6, 0, 0x1234, 0, 0x8000) + bytes(16) + MAC + bytes(202) + b"\x63\x82\x53\x63\x35\x01\x01\xff"
    wire.say(EVERYBODY, IPV4, ip_packet(UDP, "0.0.0.0", "255.255.255.255", udp(68, 67, request.ljust(300, b"\0"))))
    offer = wire.hear(lambda is_ip, packet: packet[28:] if is_ip and packet[9] == UDP and packet[20:22] == b"\0\x43" else None)
    assert offer[0] == 2 and offer[16:20] == socket.inet_aton(GUEST)
    assert b"\x03\x04" + socket.inet_aton(ROUTER) in offer and b"\x06\x04" + socket.inet_aton("10.0.2.3") in offer


def test_the_router_answers_arp_and_ping(plug):
    wire = plug()
    wire.say(EVERYBODY, ARP, arp(1, GUEST, ROUTER))
    router = wire.hear(lambda is_ip, packet: packet[8:14] if not is_ip and packet[6:8] == b"\0\x02" else None)
    echo = struct.pack(">BBHHH", 8, 0, 0, 7, 1) + b"hello"
    echo = echo[:2] + struct.pack(">H", checksum(echo)) + echo[4:]
    wire.say(router, IPV4, ip_packet(ICMP, GUEST, ROUTER, echo))
    assert wire.hear(lambda is_ip, packet: packet[20:] if is_ip and packet[9] == ICMP else None)[4:] == echo[4:]


def test_the_hosts_loopback_is_out_of_reach(plug):
    wire = plug()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as private:
        private.bind(("", 0))
        private.settimeout(0)
        port = private.getsockname()[1]
        wire.say(EVERYBODY, ARP, arp(1, GUEST, ROUTER))
        router = wire.hear(lambda is_ip, packet: packet[8:14] if not is_ip else None)
        for target in (ROUTER, "127.0.0.1", "127.9.9.9", "0.0.0.0", "255.255.255.255"):
            wire.say(router, IPV4, ip_packet(UDP, GUEST, target, udp(1000, port, b"let me in")))
        echo = struct.pack(">BBHHH", 8, 0, 0xF7FC, 3, 0)        # answered after what came before it
        wire.say(router, IPV4, ip_packet(ICMP, GUEST, ROUTER, echo))
        wire.hear(lambda is_ip, packet: True if is_ip and packet[9] == ICMP and packet[20] == 0 else None)
        with pytest.raises(BlockingIOError):
            private.recv(100)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def test_a_forward_knocks_at_the_guest(plug):
    port = free_port()
    wire = plug([f"tcp:{port}:22"])
    caller = socket.socket()
    knocking = threading.Thread(target=lambda: caller.connect_ex(("127.0.0.1", port)))
    knocking.start()
    with caller:
        wire.hear(lambda is_ip, packet: True if not is_ip and packet[24:28] == socket.inet_aton(GUEST) else None)
        wire.say(EVERYBODY, ARP, arp(2, GUEST, ROUTER, bytes.fromhex("525400000202")[:6]))
        knock = wire.hear(lambda is_ip, packet: packet if is_ip and packet[9] == TCP else None)
    knocking.join()
    assert knock[16:20] == socket.inet_aton(GUEST) and struct.unpack(">H", knock[22:24]) == (22,) and knock[33] == 0x02     # SYN


def tcp(target, ports, sequence, acknowledged, flags, payload=b"", urgent=0):
    head = struct.pack(">HHIIBBHHH", *ports, sequence, acknowledged, 5 << 4, flags, 8192, 0, urgent)
    pseudo = socket.inet_aton(GUEST) + socket.inet_aton(target) + struct.pack(">BBH", 0, TCP, len(head) + len(payload))
    return head[:16] + struct.pack(">H", checksum(pseudo + head + payload)) + head[18:] + payload


def test_urgent_data_is_plain_data(plug):
    """An old libslirp sends as many bytes out of band as the guest says, of its own memory behind what the guest sent."""
    port = free_port()
    wire = plug([f"tcp:{port}:22"])
    caller = socket.socket()
    caller.settimeout(60)
    knocking = threading.Thread(target=lambda: caller.connect(("127.0.0.1", port)))
    knocking.start()
    with caller:
        wire.hear(lambda is_ip, packet: True if not is_ip and packet[24:28] == socket.inet_aton(GUEST) else None)
        wire.say(EVERYBODY, ARP, arp(2, GUEST, ROUTER, bytes.fromhex("525400000202")))
        knock = wire.hear(lambda is_ip, packet: packet if is_ip and packet[9] == TCP else None)
        source, ports = socket.inet_ntoa(knock[12:16]), struct.unpack(">HH", knock[20:24])[::-1]
        sequence, = struct.unpack(">I", knock[24:28])
        for number, flags, payload, urgent in ((1000, 0x12, b"", 0), (1001, 0x38, b"a", 2048), (1002, 0x38, b"b\0", 1),
                                                   (1004, 0x18, b"c", 0)):
            segment = tcp(source, ports, number, sequence + 1, flags, payload, urgent)
            wire.say(bytes.fromhex("52550a000202"), IPV4, ip_packet(TCP, GUEST, source, segment))
        knocking.join()
        assert b"".join(iter(lambda: caller.recv(1), b"c")) == b"ab\0"


def test_fragments_that_make_no_packet_have_a_limit(plug):
    """libslirp keeps each of them, a whole buffer for eight bytes, for half a minute."""
    wire = plug()
    for number in range(16384 + 100):
        fragment = bytearray(ip_packet(UDP, GUEST, "192.0.2.1", bytes(8)))
        fragment[4:8] = struct.pack(">HH", number % 60000, 0x2000 | 8)
        fragment[10:12] = bytes(2)
        fragment[10:12] = struct.pack(">H", checksum(fragment[:20]))
        wire.say(EVERYBODY, IPV4, bytes(fragment))
    assert wire.card.stats()["tx_drop"] == 100


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_tcp_in_fragments_goes_nowhere(plug, protocol):
    """Its header might be cut in two; other protocols' may."""
    wire = plug()
    first = bytearray(ip_packet(protocol, GUEST, ROUTER, bytes(64)))
    first[6:8] = struct.pack(">H", 0x2000)
    for _ in range(3):
        wire.say(EVERYBODY, IPV4, bytes(first))
    assert wire.card.stats()["tx_drop"] == (3 if protocol == TCP else 0)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostError, match=f"Cannot forward tcp port {port} of 127.0.0.1 to the guest: Address already in use"):
            UserNet(forwards=[f"tcp:{port}:22"])


def test_malformed_frames_and_a_guest_that_takes_none_end_nothing(plug):
    wire = plug()
    for length in (0, 1, 13, 14, 20, 33, 34, 41, 60, 1514):
        wire.put(bytes(length))
        wire.say(EVERYBODY, IPV4, b"\x4f" + b"\xff" * length)
        wire.say(EVERYBODY, ARP, b"\xff" * length)
    for _ in range(2000):                                   # more answers than there are buffers and room
        wire.say(EVERYBODY, ARP, arp(1, GUEST, ROUTER))
    wire.say(EVERYBODY, ARP, arp(1, GUEST, "10.0.2.3"))
    assert wire.hear(lambda is_ip, packet: True if not is_ip and packet[14:18] == socket.inet_aton(ROUTER) else None)


def test_an_e1000_is_served_too():
    with Guest() as guest:
        net = UserNet()
        rig = Rig(guest, backend=net)
        rig.start(receive=TO_ALL)
        rig.send(EVERYBODY + MAC + struct.pack(">H", ARP) + arp(1, GUEST, ROUTER))
        answer = rig.received()[0]
        assert answer[12:14] == b"\x08\x06" and answer[28:32] == socket.inet_aton(ROUTER)
        rig.card.close()
        assert guest.thread.waiter is None


def test_a_datagram_that_waits_for_the_guests_address_goes_when_it_is_known():
    """An e1000's answer is looked at once; a virtio queue is always looked at again, which would hide what is missing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with Guest() as guest:
        rig = Rig(guest, backend=UserNet(forwards=[f"udp:{port}:7"]))
        rig.start(receive=TO_ALL | UNICAST)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as caller:
            caller.sendto(b"hello", ("127.0.0.1", port))
            question = rig.received()[0]
            assert question[12:14] == b"\x08\x06" and question[38:42] == socket.inet_aton(GUEST)
            guest.settle()                              # what comes now is the last that wakes the thread
            rig.send(EVERYBODY + MAC + struct.pack(">H", ARP) + arp(2, GUEST, ROUTER, question[6:12]))
            datagram = rig.received()[0]
        assert datagram[12:14] == b"\x08\x00" and datagram[23] == UDP and b"hello" in datagram
        rig.card.close()


def test_frames_that_a_guest_leaves_lying_have_a_limit_and_come_in_order(plug):
    wire = plug()
    wire.say(EVERYBODY, ARP, arp(1, GUEST, ROUTER))
    router = wire.hear(lambda is_ip, packet: packet[8:14] if not is_ip and packet[6:8] == b"\0\x02" else None)

    def ping(number):
        echo = struct.pack(">BBHHH", 8, 0, 0, 7, number) + bytes(1400)
        wire.say(router, IPV4, ip_packet(ICMP, GUEST, ROUTER, echo[:2] + struct.pack(">H", checksum(echo)) + echo[4:]))

    def answer(is_ip, packet):
        return struct.unpack(">H", packet[26:28])[0] if is_ip and packet[9] == ICMP and packet[20] == 0 else None
    for number in range(4000):                              # 5.7 MB, of which 4 MiB are kept
        ping(number)
    kept = (4 << 20) // (4 + 14 + 28 + 1400)
    heard = [wire.hear(answer) for _ in range(kept)]
    assert heard == list(range(kept))
    ping(5000)
    assert next(number for number in iter(lambda: wire.hear(answer), None) if number >= 4000) == 5000


def test_frames_that_a_guest_leaves_lying_never_go_beyond_their_store(plug):
    """Not even when so little room is left that not even a frame's length fits in."""
    wire = plug()
    wire.say(EVERYBODY, ARP, arp(1, GUEST, ROUTER))
    router = wire.hear(lambda is_ip, packet: packet[8:14] if not is_ip and packet[6:8] == b"\0\x02" else None)

    def ping(number, length):
        echo = struct.pack(">BBHHH", 8, 0, 0, 7, number) + bytes(length)
        wire.say(router, IPV4, ip_packet(ICMP, GUEST, ROUTER, echo[:2] + struct.pack(">H", checksum(echo)) + echo[4:]))

    def answer(is_ip, packet):
        return struct.unpack(">H", packet[26:28])[0] if is_ip and packet[9] == ICMP and packet[20] == 0 else None
    around = 4 + 14 + 28                                    # of what is kept of each: its length, and the headers
    kept, room = divmod(4 << 20, around + 1400)
    for number in range(kept + 50):                         # more than the card's buffers and the store take
        ping(number, 1400)
    ping(10_000, room - around - 2)                         # 2 bytes are left
    ping(20_000, 0)
    heard = []
    while 10_000 not in heard:
        heard.append(wire.hear(answer))
    ping(30_000, 0)
    assert wire.hear(answer) == 30_000


@pytest.fixture
def few_descriptors():
    """This process may open few files, while the test makes a card."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_NOFILE, before)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_guest_does_not_take_every_descriptor_of_its_process(plug, few_descriptors):
    """The control socket could accept nobody any more. What goes on already goes on, a server behind a forward too."""
    port = free_port()
    wire = plug([f"udp:{port}:7"])
    few_descriptors()
    most, before = 64, len(os.listdir("/proc/self/fd"))
    assert wire.net.waiter.sockets_most == most
    wire.say(EVERYBODY, ARP, arp(1, GUEST, ROUTER))
    router = wire.hear(lambda is_ip, packet: packet[8:14] if not is_ip else None)

    def passes(protocol, payload, mark=0, source=GUEST):
        """Whether libslirp had the packet; to TEST-NET-1, where nobody is (RFC 5737)."""
        packet = bytearray(ip_packet(protocol, source, "192.0.2.1", payload))
        packet[6:8] = mark.to_bytes(2, "big")
        packet[10:12] = bytes(2)
        packet[10:12] = struct.pack(">H", checksum(bytes(packet[:20])))
        dropped = wire.card.stats()["tx_drop"]
        wire.say(router, IPV4, bytes(packet))
        return wire.card.stats()["tx_drop"] == dropped

    passed = [passes(UDP, udp(number, 9, b"x")) for number in range(1000, 1000 + 2 * most)]
    assert len(os.listdir("/proc/self/fd")) <= before + most
    assert passed == [True] * (most - 1) + [False] * (most + 1)      # the forward has one of them
    assert passes(UDP, udp(1000, 10, b"x")) and passes(UDP, udp(1000 + most - 2, 10, b"x"))
    assert passes(UDP, udp(7, 1000, b"the answer of a server"))
    assert not passes(UDP, udp(7, 1000, b"x"), source="10.0.2.16")

    def tcp(flags):
        return struct.pack(">HHIIBBHHH", 1000, 80, 1, 0, 0x50, flags, 1000, 0, 0)
    echo = struct.pack(">BBHHH", 8, 0, 0xF7FC, 3, 0)
    fragments = 0x2000, 0x0001
    assert not passes(TCP, tcp(2)) and not passes(ICMP, echo)
    assert not any(passes(protocol, payload, mark) for mark in fragments
                   for protocol, payload in ((UDP, udp(1000, 9, b"x")), (TCP, tcp(16)), (ICMP, echo)))
    assert passes(TCP, tcp(16)) and passes(TCP, tcp(18)) and passes(ICMP, b"\0" + echo[1:])
    echo = echo[:2] + struct.pack(">H", checksum(echo[:2] + bytes(2) + echo[4:])) + echo[4:]
    wire.say(router, IPV4, ip_packet(ICMP, GUEST, ROUTER, echo))     # who answers to that needs no socket
    wire.hear(lambda is_ip, packet: True if is_ip and packet[9] == ICMP and packet[20] == 0 else None)
    assert len(os.listdir("/proc/self/fd")) <= before + most


def test_sockets_that_are_closed_make_room(plug, few_descriptors):
    """A connection that nobody takes is over at once, as often as the guest begins one."""
    wire = plug()
    few_descriptors()
    wire.say(EVERYBODY, ARP, arp(1, GUEST, ROUTER))
    router = wire.hear(lambda is_ip, packet: packet[8:14] if not is_ip else None)
    for number in range(300):
        syn = struct.pack(">HHIIBBHHH", 1000 + number, 1, 1, 0, 0x50, 2, 1000, 0, 0)
        pseudo = socket.inet_aton(GUEST) + socket.inet_aton(ROUTER) + struct.pack(">BBH", 0, TCP, len(syn))
        syn = syn[:16] + struct.pack(">H", checksum(pseudo + syn)) + syn[18:]
        wire.say(router, IPV4, ip_packet(TCP, GUEST, ROUTER, syn))
        wire.hear(lambda is_ip, packet: True if is_ip and packet[9] == ICMP and packet[20] == 3 else None)     # unreachable
    assert wire.card.stats()["tx_drop"] == 0


def test_closing_gives_its_ports_back_and_ends_the_waiting(plug):
    port = free_port()
    wire = plug([f"tcp:{port}:22"])
    thread = wire.guest.thread
    assert thread.waiter is wire.net.waiter is not None
    for _ in range(2):
        wire.card.close()
        assert thread.waiter is None
        socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize("text", ["", "tcp", "tcp:22", "tcp:a:22", "sctp:1:2", "tcp:0:22", "tcp:70000:22", "tcp:::1:22:22",
                                  "tcp:1.2.3:1:2"])
def test_forwards_that_are_none(text):
    with pytest.raises(ValueError, match="tcp or udp, an IPv4 address"):
        Forward().parse(text)
