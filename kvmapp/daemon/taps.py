"""Taps of running domains: made here as root, put into their bridge, handed to the domain process as open descriptors.

Documentation/networking/tuntap.rst, netdevice(7) and linux/if_bridge.h. A tap is not persistent: it goes when the last descriptor
does, so a domain that dies in whatever way leaves no vnetN behind. What else is at its port is for ports.py.
"""
from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct

from kvmapp.cardfiles import file_name, open_vhost
from kvmapp.errors import HostError, NameInUse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.config import InterfaceConfig

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE, IFF_TUN_EXCL = 0x0002, 0x1000, 0x4000, 0x0100, 0x8000
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCGIFMTU, SIOCSIFMTU, SIOCSIFHWADDR, SIOCGIFINDEX = 0x8913, 0x8914, 0x8921, 0x8922, 0x8924, 0x8933
SIOCBRADDIF = 0x89A2
IFF_UP = 1
ARPHRD_ETHER = 1
IFREQ = 40                              # sizeof(struct ifreq)


class Tap:
    """An open tap. `made`: it is ours and goes with its descriptors, of which there is one a queue; `vhost` are as many open
    /dev/vhost-net, or none."""
    __slots__ = ("fds", "made", "name", "vhost")

    def __init__(self, name: str, fds: list[int], made: bool):
        self.name, self.fds, self.made = name, fds, made
        self.vhost: list[int] = []

    def files(self, index: int) -> dict[str, int]:
        """The descriptors under the names by which the domain process asks for them."""
        return {file_name(kind, index, pair): fd for kind, fds in (("interface", self.fds), ("vhost", self.vhost))
                for pair, fd in enumerate(fds)}

    def close(self) -> None:
        for fd in (*self.fds, *self.vhost):
            os.close(fd)


def open_tap(interface: InterfaceConfig, bridge: str | None = None) -> Tap | None:
    """The host's side of a card, ready for traffic; None where it has no descriptor (type user). `bridge`: of its network."""
    if interface.type == "user":
        return None
    tap = existing_tap(interface) if interface.type == "tap" else bridged_tap(interface, bridge)
    try:
        tap.vhost = open_vhost(interface)
    except HostError:
        tap.close()
        raise
    return tap


def bridged_tap(interface: InterfaceConfig, bridge: str | None) -> Tap:
    bridge = bridge or interface.source or ""
    check_bridge(interface.heading, bridge)
    tap = make_tap(interface)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
            set_address(control, tap.name, host_mac(interface.mac))
            set_mtu(control, tap.name, interface.mtu or mtu_of(control, bridge))
            quiet_ipv6(tap.name)
            join_bridge(control, tap.name, bridge)
            set_up(control, tap.name)
    except OSError as error:
        tap.close()
        raise HostError(f"Cannot put {interface.heading}'s tap '{tap.name}' into bridge '{bridge}': {error.strerror}") from None
    return tap


def make_tap(interface: InterfaceConfig) -> Tap:
    """vnetN, the first number that is free, unless the domain's file names it."""
    wanted = interface.target or "vnet%d"
    several = IFF_MULTI_QUEUE if interface.queues > 1 else 0
    try:
        tap = attach_queues(wanted, several | (IFF_TUN_EXCL if interface.target else 0), several, interface.queues)
    except OSError as error:
        if interface.target and os.path.exists(f"/sys/class/net/{wanted}"):
            raise NameInUse(f"Cannot make {interface.heading}'s tap '{wanted}': there is a device of this name",
                            "leave target out, or write type = tap to use what is there") from None
        raise HostError(f"Cannot make a tap for {interface.heading}: {error.strerror}",
                        "the daemon must run as root" if isinstance(error, PermissionError) else None) from None
    tap.made = True
    return tap


def attach_queues(name: str, first: int, others: int, count: int) -> Tap:
    """Opens the queues of one tap, with these flags. Raises OSError or HostError, and then none is open."""
    tap = Tap(name, [], False)
    try:
        for number in range(count):
            tap.fds.append(open_tun())
            tap.name = attach(tap.fds[-1], tap.name, others if number else first)
    except (OSError, HostError):
        tap.close()
        raise
    return tap


def existing_tap(interface: InterfaceConfig) -> Tap:
    """Type tap: made by somebody else, and left as it is."""
    name = interface.target or ""
    if not os.path.exists(f"/sys/class/net/{name}"):            # TUNSETIFF would make one
        raise HostError(f"Cannot use tap '{name}' for {interface.heading}: there is no such device",
                        f"make it: ip tuntap add {name} mode tap vnet_hdr; ip link set {name} up")
    error: OSError | None = None
    for flags in (IFF_MULTI_QUEUE,) if interface.queues > 1 else (0, IFF_MULTI_QUEUE):
        try:
            return attach_queues(name, flags, flags, interface.queues)
        except OSError as failure:
            error = error or failure
    assert error
    hint = "another guest or program has it open" if error.errno == errno.EBUSY else "it is no tap"
    if interface.queues > 1:
        hint = "for several queues it has to be made with multi_queue"
    raise HostError(f"Cannot use tap '{name}' for {interface.heading}: {error.strerror}", hint) from None


def open_tun() -> int:
    try:
        return os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise HostError(f"Cannot open /dev/net/tun: {error.strerror}", "modprobe tun, and run the daemon as root") from None


def attach(fd: int, name: str, flags: int) -> str:
    flags |= IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    answer = fcntl.ioctl(fd, TUNSETIFF, request(name, struct.pack("H", flags)))
    return answer[:16].rstrip(b"\0").decode(errors="surrogateescape")


def request(name: str, rest: bytes = b"") -> bytes:
    """struct ifreq."""
    return (os.fsencode(name)[:15].ljust(16, b"\0") + rest).ljust(IFREQ, b"\0")


def host_mac(mac: str) -> str:
    """The guest's address with FE first: so a bridge, which takes the lowest of its ports' addresses, never takes this one."""
    return "fe" + mac[2:]


def set_address(control: socket.socket, name: str, mac: str) -> None:
    fcntl.ioctl(control, SIOCSIFHWADDR, request(name, struct.pack("H", ARPHRD_ETHER) + bytes.fromhex(mac.replace(":", ""))))


def mtu_of(control: socket.socket, name: str) -> int:
    return struct.unpack_from("i", fcntl.ioctl(control, SIOCGIFMTU, request(name)), 16)[0]


def set_mtu(control: socket.socket, name: str, mtu: int) -> None:
    fcntl.ioctl(control, SIOCSIFMTU, request(name, struct.pack("i", mtu)))


def quiet_ipv6(name: str) -> None:
    """The host does not speak on this port; without this it would send router solicitations into the guest."""
    try:
        with open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "w") as switch:
            switch.write("1")
    except OSError:
        pass                            # no IPv6 here, or /proc/sys is read-only


def join_bridge(control: socket.socket, name: str, bridge: str) -> None:
    index = struct.unpack_from("i", fcntl.ioctl(control, SIOCGIFINDEX, request(name)), 16)[0]
    fcntl.ioctl(control, SIOCBRADDIF, request(bridge, struct.pack("i", index)))


def set_up(control: socket.socket, name: str) -> None:
    flags = struct.unpack_from("H", fcntl.ioctl(control, SIOCGIFFLAGS, request(name)), 16)[0]
    fcntl.ioctl(control, SIOCSIFFLAGS, request(name, struct.pack("H", flags | IFF_UP)))


def bridges() -> list[str]:
    """Every bridge of the host."""
    import netifaces
    return sorted(name for name in netifaces.interfaces() if is_bridge(name))


def is_bridge(name: str) -> bool:
    return bool(name) and "/" not in name and os.path.isdir(f"/sys/class/net/{name}/bridge")


def check_bridge(heading: str, name: str) -> None:
    if is_bridge(name):
        return
    there = bridges()
    hint = (f"bridges here: {', '.join(there)}; " if there else "there are no bridges here; ") + \
        f"to make one: ip link add {name} type bridge && ip link set {name} up"
    what = "that device is no bridge" if os.path.exists(f"/sys/class/net/{name}") else "there is no such bridge"
    raise HostError(f"Cannot connect {heading} to bridge '{name}': {what}", hint)
