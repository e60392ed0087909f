"""Ethernet frames as an honest or a hostile guest would send them, by RFCs 826, 791, 768, 8200, 4861; and who sees them."""
import ipaddress
import struct
import sys

from tests.checksums import checksum

BROADCAST = "ff:ff:ff:ff:ff:ff"
WATCHER = """
import socket
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
s.bind(("eth0", 0))
print("ready", flush=True)
while True:
    frame, place = s.recvfrom(65536)
    if place[2] != 4:
        print(frame.hex(), flush=True)
"""


def mac(text):
    return bytes.fromhex(text.replace(":", ""))


def ip(text):
    return ipaddress.ip_address(text).packed


def ethernet(source, kind, payload, to=BROADCAST, tag=None):
    tagged = struct.pack(">HH", 0x8100, tag) if tag is not None else b""
    return (mac(to) + mac(source) + tagged + struct.pack(">H", kind) + payload).ljust(60, b"\0")


def arp(source, sender, address, operation=1, target="192.168.122.77", **more):
    payload = struct.pack(">HHBBH", 1, 0x0800, 6, 4, operation) + mac(sender) + ip(address) + bytes(6) + ip(target)
    return ethernet(source, 0x0806, payload, **more)


def udp4(source, address, ports=(9, 9), to="255.255.255.255", payload=b"", fragment=0, **more):
    datagram = struct.pack(">HHHH", *ports, 8 + len(payload), 0) + payload
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(datagram), 1, fragment, 64, 17, 0) + ip(address) + ip(to)
    header = header[:10] + struct.pack(">H", checksum(header)) + header[12:]
    return ethernet(source, 0x0800, header + datagram, **more)


def dhcp(source, address="0.0.0.0", ports=(68, 67), chaddr=None, kind=1, **more):
    """RFCs 2131 and 2132; kind 1 asks who lends, 3 asks for an address, 7 gives one back."""
    fixed = struct.pack(">BBBBIHH16s", 1, 1, 6, 0, 1, 0, 0, bytes(16)) + mac(chaddr or source).ljust(16, b"\0")
    return udp4(source, address, ports, payload=fixed + bytes(192) + b"\x63\x82\x53\x63" + bytes((53, 1, kind, 255)), **more)


def ipv6(source, address, next_header, payload, to="ff02::1", **more):
    header = struct.pack(">IHBB", 6 << 28, len(payload), next_header, 255) + ip(address) + ip(to)
    return ethernet(source, 0x86DD, header + payload, to="33:33:00:00:00:01", **more)


def icmp6(source, address, kind, body, to="ff02::1"):
    message = struct.pack(">BBH", kind, 0, 0) + body
    whole = ip(address) + ip(to) + struct.pack(">II", len(message), 58) + message
    return ipv6(source, address, 58, message[:2] + struct.pack(">H", checksum(whole)) + message[4:], to)


def neighbour(source, address, kind, target):
    """kind 135 asks who has `target`, 136 says that we have it."""
    return icmp6(source, address, kind, struct.pack(">I", 0) + ip(target))


class Watcher:
    """Sees every frame that comes to eth0 of a namespace."""

    def __init__(self, namespace):
        self.process = namespace.popen(sys.executable, "-c", WATCHER)
        assert self.process.stdout.readline() == "ready\n"

    def until(self, last):
        """What came, up to the frame `last`, all of it bare."""
        seen: list[bytes] = []
        while not seen or seen[-1] != bare(last):
            seen.append(bare(bytes.fromhex(self.process.stdout.readline())))
        return seen[:-1]


def bare(frame):
    """Without the padding, which br_netfilter takes off where it is at work."""
    return frame.rstrip(b"\0")
