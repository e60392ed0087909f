"""The host's own network devices, and moving one into a bridge and out again without losing the connection that asks for it.

    bridging(device, bridge)    the steps as lines of ip(8)'s batch, and those that undo them
    unbridging(bridge)          the same for the way back

The bridge takes over the device's MAC address, MTU, addresses and routes, and whether it heeds router advertisements, so that peers and
sessions notice nothing but a moment. ip-address(8), ip-route(8), ip-link(8). What is changed here lasts until the host's next boot: the
files of distributions' network services are theirs. Left out: STP, wireless cards (their access points drop foreign MACs), rules of
policy routing, routes of several next hops (refused).
"""
from __future__ import annotations

import os
import re
from itertools import groupby

from kvmapp.daemon.hostnet import ask, exists, read_sysctl, run, write_sysctl
from kvmapp.daemon.taps import is_bridge
from kvmapp.errors import HostError, KvmappError, NameInUse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

NET = "/sys/class/net"
WORDS = (("src", "prefsrc"), ("metric", "metric"), ("table", "table"), ("pref", "pref"))        # of a route, and what ip's JSON calls them
METRICS = {"congestion": "congctl {}", "ecn": "features ecn", "rtt": "rtt {}ms", "rttvar": "rttvar {}ms", "rto_min": "rto_min {}ms"}
LIFETIME = re.compile(r" (?:valid_lft|preferred_lft|expires) \d+")


class Move:
    """`undo` is whole: it may be run after any number of `steps`, by `ip -force`. `before`: what `device` has then, as lines that make
    it.
    """
    __slots__ = ("before", "device", "steps", "undo", "warnings")

    def __init__(self, steps: list[str], undo: list[str], warnings: list[str], device: str, before: list[str]):
        self.steps, self.undo, self.warnings, self.device, self.before = steps, undo, warnings, device, before


# Looking.

def interfaces() -> list[dict]:
    """virsh's iface-list: what the host has without guests' taps."""
    found = []
    for link in ask(["ip", "address", "show"], "look at the host's network devices"):
        name = link.get("ifname", "")
        if name and not os.path.exists(f"{NET}/{name}/tun_flags"):
            found.append({"name": name, "mac": link.get("address"), "active": "UP" in link.get("flags", ()), "mtu": link.get("mtu"),
                          "type": "bridge" if is_bridge(name) else link.get("link_type", "ether"), "bridge": link.get("master"),
                          "ports": ports(name) if is_bridge(name) else [],
                          "addresses": [f"{one['local']}/{one['prefixlen']}" for one in link.get("addr_info", ()) if "local" in one]})
    return sorted(found, key=lambda one: one["name"])


def ports(bridge: str) -> list[str]:
    try:
        return sorted(os.listdir(f"{NET}/{bridge}/brif"))
    except OSError:
        return []


# Moving.

def bridging(device: str, bridge: str) -> Move:
    """Raises HostError, with virsh's words where it has any."""
    what = f"put '{device}' into bridge '{bridge}'"
    if not exists(device):
        raise HostError(f"Cannot {what}: there is no device '{device}'", "kvmappctl iface-list --all")
    if is_bridge(device):
        raise HostError(f"Existing device {device} is already a bridge", f"kvmappctl attach-interface DOMAIN bridge {device}")
    if exists(bridge):
        raise NameInUse(f"Network device {bridge} already exists",
                        f"to put {device} into it: ip link set {device} master {bridge}" if is_bridge(bridge) else "choose another name")
    if os.path.exists(f"{NET}/{device}/master"):
        raise HostError(f"Cannot {what}: '{device}' is in '{os.path.basename(os.readlink(f'{NET}/{device}/master'))}' already")
    if device == "lo" or os.path.exists(f"{NET}/{device}/tun_flags"):
        raise HostError(f"Cannot {what}: it is no card of the host")
    if os.path.exists(f"{NET}/{device}/wireless"):
        raise HostError(f"Cannot {what}: a wireless card cannot be a bridge's port", "a virtual network: kvmappctl net-start default")
    want_no_multipath(device, what)
    link = look(device)
    there, here = moving(link, device, bridge), moving(link, bridge, device)
    return Move([*making(link, bridge, device), f"link set dev {device} up", there[0], *forgetting(link, device),
                 f"link set dev {device} master {bridge}", *there[1:]],
                [f"link set dev {device} nomaster", f"link delete dev {bridge}", *here], warnings_of(link, device, bridge),
                device, lines_of(link, device))


def unbridging(bridge: str) -> tuple[str, Move]:
    """The device that was in it, and how it comes out."""
    if not is_bridge(bridge):
        raise HostError(f"Device {bridge} is not a bridge" if exists(bridge) else f"There is no device '{bridge}'",
                        "kvmappctl iface-list --all")
    there = ports(bridge)
    if len(there) != 1:
        words = "Multiple interfaces attached to bridge" if there else "No interface attached to bridge"
        raise HostError(f"{words} {bridge}" + (f": {', '.join(there)}" if there else ""),
                        "guests first: kvmappctl detach-interface" if any(os.path.exists(f"{NET}/{one}/tun_flags") for one in there)
                        else f"ip link delete {bridge}" if not there else None)
    want_no_multipath(bridge, f"take '{there[0]}' out of bridge '{bridge}'")
    device, link = there[0], look(bridge)
    back, undo = moving(link, bridge, device), moving(link, device, bridge)
    return device, Move(
        [back[0], f"link set dev {device} nomaster", f"link delete dev {bridge}", *advertisements(bridge, device), *back[1:]],
        [*advertisements(device, device), *making(link, bridge, bridge), undo[0], *forgetting(link, device),
         f"link set dev {device} master {bridge}", *undo[1:]],
        warnings_of(link, bridge, device), bridge, lines_of(link, bridge))


def making(link: dict, bridge: str, like: str) -> list[str]:
    """A bridge with the link's addresses: up when it is known whether it heeds advertisements, as the device `like` does."""
    return [f"link add name {bridge} address {link['address']} mtu {link['mtu']} type bridge {settings_of(like)}",
            *advertisements(like, bridge), f"link set dev {bridge} up"]


def settings_of(device: str) -> str:
    """STP and VLANs as a bridge has them; of what is none yet, as ours are."""
    values = {key: setting(device, key) for key in ("stp_state", "forward_delay", "vlan_filtering")}
    if values["stp_state"] in ("", "0"):
        values |= {"stp_state": "0", "forward_delay": "0"}
    return " ".join(f"{key} {value}" for key, value in values.items() if value and (key, value) != ("vlan_filtering", "0"))


def setting(bridge: str, key: str) -> str:
    try:
        with open(f"{NET}/{bridge}/bridge/{key}") as file:
            return file.read().strip()
    except OSError:
        return ""


def advertisements(source: str, target: str) -> list[str]:
    """Without them the routes that routers advertise run out."""
    value = read_sysctl(f"ipv6/conf/{source}/accept_ra")
    return [f"sysctl ipv6/conf/{target}/accept_ra {value}"] if value else []


def want_no_multipath(device: str, what: str) -> None:
    """Such a route is in no list of one device's routes, and goes with one of its devices' addresses."""
    for family in (4, 6):
        for route in ask(["ip", f"-{family}", "route", "show", "table", "all"], what):
            if any(hop.get("dev") == device for hop in route.get("nexthops", ())):
                raise HostError(f"Cannot {what}: the route to {route.get('dst')} has several next hops, one of them by {device}",
                                f"take that route away first, and make it again afterwards: ip -{family} route show {route.get('dst')}")


def look(device: str) -> dict:
    """Its link, addresses and routes."""
    what = f"look at '{device}'"
    link = ask(["ip", "address", "show", "dev", device], what)[0]
    routes = [{**route, "family": family} for family in (4, 6)
              for route in ask(["ip", f"-{family}", "route", "show", "table", "all", "dev", device], what)]
    link["routes"] = [route for route in routes if is_kept(route)]
    link["prefixes"] = [route["dst"] for route in routes if route.get("protocol") == "kernel" and "expires" in route]
    return link


def is_kept(route: dict) -> bool:
    """The kernel makes those of addresses by itself."""
    return route.get("protocol") not in ("kernel", "redirect") and route.get("table") != "local" and \
        route.get("type", "unicast") == "unicast" and not str(route.get("dst", "")).startswith(("ff00::", "fe80::"))


def moving(link: dict, source: str, target: str) -> list[str]:
    """Away from the one, then onto the other."""
    return [f"address flush dev {source} scope global", *lines_of(link, target)]


def forgetting(link: dict, source: str) -> list[str]:
    """IPv6 routes that do not go with the device's addresses: by a router's own address, and prefixes that run out by themselves."""
    advertised = any(route.get("protocol") == "ra" for route in link["routes"])
    return [*([f"-6 route flush proto ra dev {source}"] if advertised else []),
            *(f"-6 route flush exact {prefix} proto kernel dev {source}" for prefix in link["prefixes"])]


def lines_of(link: dict, device: str) -> list[str]:
    """Addresses, then narrower routes first, for gateways are found by them."""
    found = [address_line(one, device) for one in link.get("addr_info", ())
             if one.get("scope") == "global" and "local" in one and not one.get("temporary")]
    seen = set()
    for route in sorted(link["routes"], key=lambda route: ("gateway" in route, route.get("dst") == "default")):
        place = tuple(route.get(key) for key in ("family", "table", "dst", "metric"))
        found.append(f"route {'append' if place in seen else 'replace'} {route_line(route, device)}")
        seen.add(place)
    return found


def address_line(one: dict, device: str) -> str:
    peer = f" peer {one['address']}" if "address" in one else ""
    words = [f"address replace {one['local']}{peer}/{one['prefixlen']} dev {device}"]
    words += [f"brd {one['broadcast']}"] if "broadcast" in one else []
    words += ["nodad"] if one["family"] == "inet6" else []
    for key in ("valid", "preferred"):
        seconds = one.get(f"{key}_life_time", 0xFFFFFFFF)
        words += [f"{key}_lft {seconds}"] if seconds < 0xFFFFFFFF else []
    return " ".join(words)


def route_line(route: dict, device: str) -> str:
    words = ["::/0" if (route["family"], route["dst"]) == (6, "default") else route["dst"]]
    words += [f"via {route['gateway']}"] if "gateway" in route else []
    words += [f"via {route['via']['family']} {route['via']['host']}"] if "via" in route else []
    words.append(f"dev {device}")
    words += [f"{word} {route[key]}" for word, key in WORDS if route.get(key) is not None]
    words += ["onlink"] if "onlink" in route.get("flags", ()) else []
    words += [f"proto {route['protocol']}"] if route.get("protocol") not in (None, "boot") else []
    words += [f"expires {route['expires']}"] if "expires" in route else []
    words += [METRICS.get(key, f"{key} {{}}").format(value) for group in route.get("metrics", ()) for key, value in group.items()]
    return " ".join(words)


def missing(device: str, before: list[str]) -> list[str]:
    """Which of these addresses and routes the device has not; their lifetimes go on."""
    there = {timeless(line) for line in lines_of(look(device), device)}
    return [timeless(line) for line in before if timeless(line) not in there]


def timeless(line: str) -> str:
    return LIFETIME.sub("", line).replace("route append", "route replace")


def warnings_of(link: dict, device: str, target: str) -> list[str]:
    lent = [f"{one['local']}/{one['prefixlen']}" for one in link.get("addr_info", ())
            if one.get("dynamic") and one.get("family") == "inet"]
    return [f"{address} was lent by DHCP to {device}: a DHCP client must ask on {target} from now on" for address in lent]


def take(steps: Iterable[str], what: str, *, force: bool = False) -> None:
    """As few programs' work as can be, so that nothing comes in between: a flush of IPv6 routes wants one of its own, sysctl none."""
    for kind, lines in groupby(steps, lambda line: line.split()[0] if line.startswith(("sysctl ", "-6 ")) else ""):
        try:
            if kind == "sysctl":
                for line in lines:
                    write_sysctl(*line.split()[1:])
            else:
                words = ["ip", *([kind] if kind else []), *(["-force"] if force else []), "-batch", "-"]
                run(words, what, "".join(f"{line.removeprefix('-6 ')}\n" for line in lines))
        except KvmappError:
            if not force:
                raise
