"""The host's bridges, addresses and routes, by ip(8) and /proc/sys/net, and the programs that networks stand on.

ip-link(8), ip-address(8), Documentation/networking/ip-sysctl.rst. Everything here blocks: networks.py calls it in threads. Left
out: STP (only taps are ports of our bridges, so there are no loops) and turning the host's forwarding off again, which others may
have come to need.
"""
from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import time

from kvmapp.daemon.taps import is_bridge, join_bridge, set_up
from kvmapp.errors import HostError, NameInUse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.hostconfig import NetworkConfig

SEARCH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
PATIENCE = 30.0                         # seconds for one command; they take milliseconds
PACKAGES = {"ip": "iproute2 (CentOS: iproute)", "bridge": "iproute2 (CentOS: iproute)", "tc": "iproute2 (CentOS: iproute-tc)",
            "dnsmasq": "dnsmasq-base (CentOS: dnsmasq)", "nft": "nftables"}
LIBVIRT_NETWORKS = "/etc/libvirt/qemu/networks"
SIOCGIFHWADDR = 0x8927
log = logging.getLogger("kvmapp")
turn = -1                               # a locked file that each program has open as long as it runs


def find_program(name: str) -> str | None:
    return shutil.which(name, path=SEARCH)


def want_program(name: str, what_for: str) -> str:
    path = find_program(name)
    if path is None:
        raise HostError(f"Cannot {what_for}: the program '{name}' is not installed", f"install {PACKAGES.get(name, name)}")
    return path


def take_turn(path: str) -> None:
    """A killed daemon's programs work on to their end, and what they change then nobody would take away again: returns when they have
    ended. Raises OSError.
    """
    global turn
    turn = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    begun, told = time.monotonic(), False
    while not try_lock(turn):
        if not told:
            log.warning("waiting for programs that an earlier daemon left at work")
            told = True
        if time.monotonic() - begun > PATIENCE:
            log.error("they have not ended after %.0f s: going on", PATIENCE)
            break
        time.sleep(0.02)


def try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def run(words: list[str], what_for: str, text: str | None = None) -> str:
    """A program's output. Raises HostError with what it said. Nothing of our own environment reaches it."""
    path = want_program(words[0], what_for)
    kept = (turn,) if turn >= 0 and words[0] != "dnsmasq" else ()           # dnsmasq stays, and is found by its files
    try:
        done = subprocess.run([path, *words[1:]], input=text, capture_output=True, text=True, errors="replace", timeout=PATIENCE,
                              env={"PATH": SEARCH, "LC_ALL": "C"}, check=False, cwd="/", pass_fds=kept)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"Cannot {what_for}: {words[0]}: {error}") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[:500] or f"status {done.returncode}"
        raise HostError(f"Cannot {what_for}: {words[0]}: {said}", None if os.geteuid() == 0 else "the daemon must run as root")
    return done.stdout


def ask(words: list[str], what_for: str) -> list[dict]:
    """What `ip`, `bridge` or `tc` lists. An old one knows no -json, or heeds it for some of its lists only."""
    try:
        return json.loads(run([words[0], "-json", *words[1:]], what_for) or "[]")
    except ValueError:
        said = "it printed no JSON"
    except HostError as error:
        if "-json" not in error.message:
            raise
        said = "it knows no -json"
    raise HostError(f"Cannot {what_for}: {words[0]}: {said}", "install iproute2 4.16 or newer")


# Bridges.

def make_bridge(live: NetworkConfig) -> None:
    """The network's bridge, up, with the host's addresses. A device of this name is somebody else's."""
    bridge = live.bridge or ""
    if exists(bridge):
        raise NameInUse(f"Cannot make bridge '{bridge}' of network '{live.name}': there is a device of this name",
                        "leave bridge out of the network's file and a free name is taken: "
                        f"kvmappctl net-edit {live.name}")
    what = f"make bridge '{bridge}'"
    run(["ip", "link", "add", "name", bridge, "address", live.mac, "type", "bridge", "stp_state", "0", "forward_delay", "0"], what)
    if live.mtu is not None:
        run(["ip", "link", "set", "dev", bridge, "mtu", str(live.mtu)], what)
    write_sysctl(f"ipv6/conf/{bridge}/accept_ra", "0")
    write_sysctl(f"ipv6/conf/{bridge}/disable_ipv6", "0" if live.ipv6 else "1")
    if live.ipv4:
        run(["ip", "-4", "address", "add", live.ipv4.address, "brd", "+", "dev", bridge], what)
    if live.ipv6:                       # nodad: it must be there before the first port is
        run(["ip", "-6", "address", "add", live.ipv6.address, "dev", bridge, "nodad"], what)
    run(["ip", "link", "set", "dev", bridge, "up"], what)
    if live.mode in ("nat", "route", "open"):
        forward_packets(live)


def remove_bridge(bridge: str, mac: str) -> None:
    """Takes it away if it is still the one that we made."""
    if is_bridge(bridge) and mac_of(bridge) == mac:
        run(["ip", "link", "delete", "dev", bridge, "type", "bridge"], f"remove bridge '{bridge}'")


def add_port(bridge: str, tap: str) -> None:
    """Puts a running guest's tap into a bridge that was made anew."""
    if exists(tap):
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
                join_bridge(control, tap, bridge)
                set_up(control, tap)
        except OSError as error:
            raise HostError(f"Cannot put tap '{tap}' into bridge '{bridge}': {error.strerror}") from None


def exists(device: str) -> bool:
    return os.path.exists(f"/sys/class/net/{device}")


def mac_of(device: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        try:
            answer = fcntl.ioctl(control, SIOCGIFHWADDR, os.fsencode(device)[:15].ljust(40, b"\0"))
        except OSError:
            return ""
    return answer[18:24].hex(":")


def free_bridge(taken: set[str]) -> str:
    """virbrN, the first that no device, none of our networks and no network of a libvirt has."""
    taken = taken | libvirt_bridges()
    return next(name for number in range(10_000) if (name := f"virbr{number}") not in taken and not exists(name))


def libvirt_bridges(folder: str = LIBVIRT_NETWORKS) -> set[str]:
    """The names in a libvirt's files, though its networks may not run now."""
    found: set[str] = set()
    try:
        files = [name for name in os.listdir(folder) if name.endswith(".xml")]
    except OSError:
        return found
    for name in files:
        try:
            with open(os.path.join(folder, name), errors="replace") as file:
                found.update(re.findall(r"<bridge\b[^>]*\bname=['\"]([^'\"]+)['\"]", file.read(1 << 16)))
        except OSError:
            continue
    return found


# Routes and forwarding.

def check_ranges(live: NetworkConfig) -> None:
    """Refuses a range that the host reaches by another way already, and names both."""
    from kvmapp.hostconfig import subnets
    for family, subnet in subnets(live).items():
        for route in routes(subnet.version):
            if route["dev"] != live.bridge and clash(subnet.network, route):
                raise HostError(f"Cannot start network '{live.name}': its range {subnet.network} clashes with the host's route "
                                f"{route['dst']} dev {route['dev']}", hint_for_range(live.name, family, subnet.version))


def routes(version: int) -> list[dict]:
    """The host's routes but the default one, each with `dst`, `dev` and perhaps `gateway`."""
    from ipaddress import ip_network
    found = []
    for route in ask(["ip", f"-{version}", "route", "show"], "look at the host's routes"):
        try:
            found.append({**route, "dst": ip_network(route["dst"]), "dev": route.get("dev", "?")})
        except (KeyError, ValueError):
            continue                    # default, or of a type that leads nowhere
    return [route for route in found if route["dst"].prefixlen]


def clash(network, route: dict) -> bool:
    """A wider route through a gateway (a VPN's 10.0.0.0/8) gives way to a narrower one; nothing else does."""
    there = route["dst"]
    return network.overlaps(there) and ("gateway" not in route or there.prefixlen >= network.prefixlen)


def hint_for_range(name: str, family: str, version: int) -> str:
    change = f"change [{family}] by: kvmappctl net-edit {name}"
    if version == 6:
        return change
    from ipaddress import ip_network
    taken = [route["dst"] for route in routes(4)]
    free = next((number for number in range(122, 255)
                 if not any(ip_network(f"192.168.{number}.0/24").overlaps(one) for one in taken)), None)
    return change if free is None else f"192.168.{free}.1/24 is free; {change}"


def forward_packets(live: NetworkConfig) -> None:
    if live.ipv4:
        write_sysctl("ipv4/ip_forward", "1")
    if live.ipv6 and read_sysctl("ipv6/conf/all/forwarding") == "0":
        # A forwarding host ignores router advertisements, by which it may have its own way out: 2 says to heed them all the same.
        for device in os.listdir("/proc/sys/net/ipv6/conf"):
            if read_sysctl(f"ipv6/conf/{device}/accept_ra") == "1":
                write_sysctl(f"ipv6/conf/{device}/accept_ra", "2")
        write_sysctl("ipv6/conf/all/forwarding", "1")


def read_sysctl(name: str) -> str:
    try:
        with open(f"/proc/sys/net/{name}") as file:
            return file.read().strip()
    except OSError:
        return ""


def write_sysctl(name: str, value: str) -> None:
    """What is so already is not written (/proc/sys may be read-only); a host without IPv6 has nothing to write to."""
    path = f"/proc/sys/net/{name}"
    if not os.path.exists(path) or read_sysctl(name) == value:
        return
    try:
        with open(path, "w") as file:
            file.write(value)
    except OSError as error:
        raise HostError(f"Cannot set {path} to {value}: {error.strerror}") from None


# Who is there.

def neighbours() -> list[tuple[str, str]]:
    """(MAC, address) of everybody that the host has spoken with of late."""
    return [(entry["lladdr"], entry["dst"]) for entry in ask(["ip", "neighbour", "show"], "look at the host's neighbours")
            if "lladdr" in entry and not {"FAILED", "INCOMPLETE"} & set(entry.get("state", ()))]


def check_port_free(protocol: str, listen: str | None, port: int, forward: str, network: str) -> None:
    """A forward takes its port away from whatever listens there: so nothing may."""
    for family, everywhere in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        if listen is not None and (":" in listen) != (family == socket.AF_INET6):
            continue
        try:
            with socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM) as probe:
                if protocol == "tcp":
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((listen or everywhere, port))
        except OSError as error:
            if error.errno == 98:       # EADDRINUSE; an address that is not here yet may come
                raise HostError(f"Cannot forward {protocol} port {port} ([forward {forward}] of network '{network}'): a program of "
                                "this host listens there", f"see who: ss -lnp 'sport = {port}'; or choose another port") from None
