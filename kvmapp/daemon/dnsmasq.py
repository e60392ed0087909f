"""DHCP, router advertisements and DNS of one network: one dnsmasq(8) a network, its files, its life and its leases.

dnsmasq goes into the background by itself, so it outlives the daemon; the pid in its file, checked against the command line, finds
it again. Names: a guest is known by its domain's name, a [host] by its heading, whatever it calls itself. Left out: TFTP, DNSSEC.
"""
from __future__ import annotations

import os
import re
import select
import signal
import time
from contextlib import suppress
from functools import cache

from kvmapp.daemon.hostnet import run
from kvmapp.daemon.store import status_key
from kvmapp.errors import ConfigError, HostError
from kvmapp.values import DomainName

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmapp.daemon.store import Key
    from kvmapp.hostconfig import NetworkConfig

STOP_PATIENCE = 3.0                     # seconds between SIGTERM and SIGKILL
LOOK_AGAIN = 0.02                       # ... between two looks at a process that is to end
LEASES_LIMIT = 4 << 20
JUST_WRITTEN = 2.0                      # seconds in which a file may change once more under the same time stamp
NO_NAME = re.compile(r"\d+[smhdw]?|infinite|ignore")       # in dhcp-hostsfile: a lease's time, or whom to give none


class Files:
    """Where the dnsmasq of one network has its files: RUN for what ends with it, STATE for the leases."""
    __slots__ = ("config", "hosts", "leases", "lent", "names", "pid")

    def __init__(self, run_folder: str, state_folder: str, stem: str):
        self.config, self.pid, self.hosts, self.names, self.lent = (os.path.join(run_folder, f"{stem}.{kind}")
                                                                    for kind in ("dnsmasq", "pid", "hosts", "names", "lent"))
        self.leases = os.path.join(state_folder, f"{stem}.leases")

    def remove(self) -> None:
        for path in (self.config, self.pid, self.hosts, self.names, self.lent):
            with suppress(FileNotFoundError):
                os.unlink(path)


class Lease:
    """One line of dnsmasq's file; `expires` 0 is never."""
    __slots__ = ("address", "client", "expires", "mac", "name")

    def __init__(self, expires: float, mac: str | None, address: str, name: str | None, client: str | None):
        self.expires, self.mac, self.address, self.name, self.client = expires, mac, address, name, client

    def is_valid(self, now: float) -> bool:
        return not self.expires or self.expires >= now


def is_wanted(live: NetworkConfig) -> bool:
    """A network without DHCP, advertisements and DNS needs no dnsmasq."""
    return live.mode != "bridge" and (bool(live.ipv4 and live.ipv4.dhcp) or bool(live.ipv6) or bool(live.hosts)
                                      or bool(live.ipv4 and live.dns.enabled))


# Its files.

def config_text(live: NetworkConfig, files: Files) -> str:
    lines = [f"# Network {live.name}: made at each start from its file; do not edit.",
             f"pid-file={files.pid}", "bind-dynamic", "except-interface=lo", f"interface={live.bridge}", "no-hosts",
             f"addn-hosts={files.names}", *dns_lines(live)]
    ranges = dhcp4_lines(live) + dhcp6_lines(live)
    if ranges:
        lines += [f"dhcp-leasefile={files.leases}", f"dhcp-hostsfile={files.hosts}", f"dhcp-lease-max={lease_limit(live)}",
                  "dhcp-no-override", "dhcp-authoritative", "no-ping",      # no-ping: or an offer takes 3 s
                  *(["dhcp-ignore-clid"] if ignores_client_ids() else []), *ranges]
    return "\n".join(lines) + "\n"


@cache
def ignores_client_ids() -> bool:
    """By a neighbour's client identifier a guest would get that one's lease; its MAC address a filter can see (cardfilter.py). dnsmasq 2.81
    or newer.
    """
    try:
        return "dhcp-ignore-clid" in run(["dnsmasq", "--help"], "look at what dnsmasq knows")
    except HostError:
        return False


def lease_limit(live: NetworkConfig) -> int:
    from ipaddress import ip_address
    total = len(live.hosts)
    for part in (live.ipv4, live.ipv6):
        if part and part.dhcp:
            first, last = (int(ip_address(end)) for end in part.dhcp.split(" - "))
            total += last - first + 1
    return max(1, min(total, 65536))


def dns_lines(live: NetworkConfig) -> list[str]:
    if not live.dns.enabled:
        return ["port=0", *(f"dhcp-option=option{'6' if ':' in server else ''}:dns-server,{bracketed(server)}"
                            for server in live.dns.forwarders)]
    lines = ["domain-needed", f"local=/{live.domain or ''}/"]
    if live.domain:
        lines += [f"domain={live.domain}", "expand-hosts"]
    if live.dns.forwarders:
        lines += ["no-resolv", *(f"server={server}" for server in live.dns.forwarders)]
    elif live.mode == "isolated":
        lines.append("no-resolv")       # else it would be a way out for what guests put into names
    return lines


def bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def dhcp4_lines(live: NetworkConfig) -> list[str]:
    from ipaddress import ip_interface
    if not live.ipv4 or not (live.ipv4.dhcp or any(host.ipv4 for host in live.hosts)):
        return []
    network = ip_interface(live.ipv4.address).network
    ends = live.ipv4.dhcp.replace(" - ", ",") if live.ipv4.dhcp else f"{network.network_address},static"
    lines = [f"dhcp-range={ends},{network.netmask},{live.ipv4.lease}"]
    if live.mode == "isolated":
        lines.append("dhcp-option=option:router")       # without an address: there is no way out
    if live.mtu is not None:
        lines.append(f"dhcp-option=option:mtu,{live.mtu}")
    return lines


def dhcp6_lines(live: NetworkConfig) -> list[str]:
    """Guests learn of the prefix and of us by advertisements, with DHCP or without."""
    from ipaddress import ip_interface
    if not live.ipv6:
        return []
    network = ip_interface(live.ipv6.address).network
    lease = live.ipv4.lease if live.ipv4 else 3600
    if live.ipv6.dhcp:
        lines = [f"dhcp-range={live.ipv6.dhcp.replace(' - ', ',')},{network.prefixlen},{lease}"]
    elif any(host.ipv6 for host in live.hosts):
        lines = [f"dhcp-range={network.network_address},static,{network.prefixlen},{lease}"]
    else:
        lines = [f"dhcp-range={network.network_address},ra-only,{network.prefixlen}"]
    if live.mode == "isolated":
        lines.append(f"ra-param={live.bridge},0,0")     # the prefix, but no router
    return [*lines, "enable-ra"]


def hosts_text(live: NetworkConfig, members: Iterable[tuple[str, str]]) -> str:
    """dhcp-hostsfile: fixed addresses, and the names of running domains by (MAC, name). A name that is none there is left out."""
    lines = []
    macs, names = {host.mac for host in live.hosts}, {host.name for host in live.hosts}
    for host in live.hosts:
        lines.append(",".join(filter(None, (host.mac, host.ipv4, host.ipv6 and f"[{host.ipv6}]",
                                             None if NO_NAME.fullmatch(host.name.lower()) else host.name))))
    for mac, name in members:
        if mac not in macs and name.lower() not in names and is_label(name):
            macs.add(mac)
            names.add(name.lower())
            lines.append(f"{mac},{name.lower()}")
    return "".join(f"{line}\n" for line in lines)


def names_text(live: NetworkConfig) -> str:
    """addn-hosts: a [host] has its name before it ever asked for an address."""
    return "".join(f"{address} {host.name}\n" for host in live.hosts for address in (host.ipv4, host.ipv6) if address)


def is_label(name: str) -> bool:
    """Not every domain's name is one that DNS can bear."""
    try:
        DomainName().parse(name)
    except ValueError:
        return False
    return "." not in name and not NO_NAME.fullmatch(name.lower())


def write(path: str, text: str) -> bool:
    """Whole or not at all; read by dnsmasq's own user. Returns whether it is another text now."""
    try:
        with open(path) as file:
            if file.read() == text:
                return False
    except OSError:
        pass
    try:
        with open(f"{path}.new", "w") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)
        os.rename(f"{path}.new", path)
    except OSError as error:
        raise ConfigError(f"Cannot write the file: {error.strerror}", file=path) from None
    return True


# Its life.

def start(live: NetworkConfig, files: Files, members: Iterable[tuple[str, str]]) -> None:
    """Returns when it has its sockets. Raises HostError with what dnsmasq said."""
    stop(files)
    write(files.config, config_text(live, files))
    write(files.hosts, hosts_text(live, members))
    write(files.names, names_text(live))
    try:
        run(["dnsmasq", f"--conf-file={files.config}"], f"start DHCP and DNS of network '{live.name}'")
    except HostError as error:
        if "in use" in error.message:
            error.hint = "another DNS or DHCP server takes every address of this host: ss -lnup 'sport = 53 or sport = 67'"
        raise


def runs_as(live: NetworkConfig, files: Files) -> bool:
    """Whether the one that runs was started with the configuration that this network has now."""
    try:
        with open(files.config) as file:
            return bool(pid_of(files)) and file.read() == config_text(live, files)
    except OSError:
        return False


def tell(live: NetworkConfig, files: Files, members: Iterable[tuple[str, str]]) -> None:
    """Fixed addresses and names as they are now; it reads them on SIGHUP."""
    changed = write(files.hosts, hosts_text(live, members)) | write(files.names, names_text(live))
    pid = pid_of(files)
    if changed and pid:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGHUP)


def stop(files: Files) -> None:
    """Ends it and waits for its end; and one that a killed daemon was just starting, whose number stands in no file yet. Leases stay."""
    while pids := [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and runs_with(int(entry), files)]:
        if not all([end(pid, files) for pid in pids]):
            return


def end(pid: int, files: Files) -> bool:
    """Whether it has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except OSError:                             # before Linux 5.3
        return end_by_number(pid, files)
    try:
        waiter = select.poll()
        waiter.register(handle, select.POLLIN)
        for number in (signal.SIGTERM, signal.SIGKILL) if runs_with(pid, files) else ():
            signal.pidfd_send_signal(handle, number)
            if waiter.poll(STOP_PATIENCE * 1000):
                return True
        return not runs_with(pid, files)
    except ProcessLookupError:
        return True
    finally:
        os.close(handle)


def end_by_number(pid: int, files: Files) -> bool:
    """The same on a kernel that has no descriptors of processes: it is asked for until it is gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        late = time.monotonic() + STOP_PATIENCE
        with suppress(ProcessLookupError):
            if runs_with(pid, files):
                os.kill(pid, number)
        while runs_with(pid, files):
            if time.monotonic() > late:
                break
            time.sleep(LOOK_AGAIN)
        else:
            return True
    return False


def pid_of(files: Files) -> int:
    """Of the dnsmasq that runs with this configuration; 0 when there is none."""
    try:
        with open(files.pid) as file:
            pid = int(file.read())
    except (OSError, ValueError):
        return 0
    return pid if runs_with(pid, files) else 0


def runs_with(pid: int, files: Files) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as line:
            return line.read().rstrip(b"\0").split(b"\0")[1:] == [f"--conf-file={files.config}".encode()]
    except OSError:
        return False


# Its leases.

class LeaseFile:
    """The file's leases; it is read again when it has changed."""

    def __init__(self) -> None:
        self.read: tuple[str, Key] | None = None
        self.leases: list[Lease] = []

    def valid(self, path: str) -> list[Lease]:
        """Those that are valid now."""
        now, key = time.time(), status_key(path)
        if self.read != (path, key):
            try:
                with open(path, errors="replace") as file:
                    self.leases = parse_leases(file.read(LEASES_LIMIT))
            except OSError:
                return []
            self.read = (path, key) if key[1] / 1e9 < now - JUST_WRITTEN else None
        return [lease for lease in self.leases if lease.is_valid(now)]


def parse_leases(text: str, now: float = 0.0) -> list[Lease]:
    """`expiry mac address name client`; after the line `duid ...` IPv6 ones, with an association's number in the MAC's place. Those that
    are valid at that time.
    """
    leases = []
    version6 = False
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["duid"]:
            version6 = True
        if len(words) != 5 or not words[0].isdigit():
            continue
        expires, mac, address, name, client = int(words[0]), words[1], words[2], words[3], words[4]
        mac_there = mac_of_duid(client) if version6 else mac.rpartition("-")[2].lower()
        leases.append(Lease(expires, mac_there, address, None if name == "*" else name, None if client == "*" else client))
    return [lease for lease in leases if lease.is_valid(now)]


def mac_of_duid(duid: str) -> str | None:
    """DUIDs of RFC 8415 11.2 and 11.4 end in the Ethernet address."""
    parts = duid.lower().split(":")
    if parts[:4] in (["00", "01", "00", "01"], ["00", "03", "00", "01"]) and len(parts) in (14, 10):
        return ":".join(parts[-6:])
    return None
