"""The files of /etc/kvmapp that describe no domain: networks, storage pools, the daemon, what holds for all guests.

As config.py does for domains, by the same table and machinery. Only the daemon reads these. kvmapp.conf and guest.conf may be
absent: then everything is at its default.
"""
from __future__ import annotations

import os

from kvmapp import schema
from kvmapp.settings import FileConfig, Origin, Settings, complete, read_file, slots, write_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ipaddress import IPv4Interface, IPv6Interface
    from typing import ClassVar


class Ipv4Config(Settings):
    section = schema.NETWORK.sections["ipv4"]
    __slots__ = slots(section)
    address: str
    dhcp: str | None
    lease: int


class Ipv6Config(Settings):
    section = schema.NETWORK.sections["ipv6"]
    __slots__ = slots(section)
    address: str
    dhcp: str | None


class HostConfig(Settings):
    section = schema.NETWORK.sections["host"]
    __slots__ = slots(section)
    name: str
    mac: str
    ipv4: str | None
    ipv6: str | None


class ForwardConfig(Settings):
    section = schema.NETWORK.sections["forward"]
    __slots__ = slots(section)
    name: str
    protocol: str
    listen: str | None
    port: int
    to: str
    to_port: int | None


class DnsConfig(Settings):
    section = schema.NETWORK.sections["dns"]
    __slots__ = slots(section)
    enabled: bool
    forwarders: list[str]


class NetworkConfig(FileConfig):
    file = schema.NETWORK
    section = file.top
    __slots__ = (*slots(section), *(part.attribute for part in file.sections.values()))
    parts: ClassVar = {"ipv4": Ipv4Config, "ipv6": Ipv6Config, "host": HostConfig, "forward": ForwardConfig,
                       "dns": DnsConfig}
    name: str
    uuid: str
    mode: str
    bridge: str | None
    mac: str
    mtu: int | None
    device: str | None
    domain: str | None
    ipv4: Ipv4Config | None
    ipv6: Ipv6Config | None
    hosts: list[HostConfig]
    forwards: list[ForwardConfig]
    dns: DnsConfig

    @classmethod
    def from_dict(cls, data: dict) -> NetworkConfig:
        config = super().from_dict(data)
        check_network(config, Origin())
        return config


class PoolConfig(FileConfig):
    file = schema.POOL
    section = file.top
    __slots__ = slots(section)
    parts: ClassVar = {}
    name: str
    uuid: str
    type: str
    path: str


class DaemonConfig(FileConfig):
    file = schema.DAEMON
    section = file.top
    __slots__ = slots(section)
    parts: ClassVar = {}
    unix_sock_group: str
    unix_sock_rw_perms: int
    unix_sock_ro_perms: int
    max_readonly_clients: int
    log_level: str


class GuestDefaults(FileConfig):
    file = schema.GUEST
    section = file.top
    __slots__ = slots(section)
    parts: ClassVar = {}
    user: str
    group: str
    shutdown_timeout: int
    log_max_size: int
    log_max_backups: int
    vnc_listen: str


def read_network(path: str, text: str | None = None) -> NetworkConfig:
    """The network file at `path`, checked; `config.made` not empty: the caller stores it by write_network."""
    config, ini = read_file(NetworkConfig, path, text)
    check_network(config, Origin(ini))
    complete(config, without=("mac",) if config.mode == "bridge" else ())
    return config


def write_network(path: str, config: NetworkConfig) -> None:
    write_file(path, config, lambda text: read_network(path, text))


def read_pool(path: str, text: str | None = None) -> PoolConfig:
    config, _ = read_file(PoolConfig, path, text)
    complete(config)
    return config


def write_pool(path: str, config: PoolConfig) -> None:
    write_file(path, config, lambda text: read_pool(path, text))


def read_daemon(path: str) -> DaemonConfig:
    """kvmapp.conf, or the defaults when there is none."""
    return read_file(DaemonConfig, path)[0] if os.path.lexists(path) else DaemonConfig()


def read_guest_defaults(path: str) -> GuestDefaults:
    """guest.conf, or the defaults when there is none."""
    return read_file(GuestDefaults, path)[0] if os.path.lexists(path) else GuestDefaults()


def check_network(config: NetworkConfig, origin: Origin) -> None:
    """What no setting alone can tell."""
    if config.mode == "bridge":
        check_foreign_bridge(config, origin)
        return
    if config.mode in ("nat", "route") and not config.ipv4 and not config.ipv6:
        origin.fail("", "mode", f"{config.mode!r}: needs addresses", "add [ipv4] or [ipv6]")
    if config.mode not in ("nat", "route"):
        if config.device is not None:
            origin.fail("", "device", f"{config.device!r}: only the modes nat and route have one")
        if config.forwards:
            origin.fail(config.forwards[0].heading, None, f"cannot be in a network of mode {config.mode}",
                        "only the modes nat and route have forwards")
    check_ranges(config, origin)
    check_hosts(config, origin)
    check_forwards(config, origin)


def check_foreign_bridge(config: NetworkConfig, origin: Origin) -> None:
    """Mode bridge: everything but its name belongs to whoever made it."""
    if config.bridge is None:
        origin.fail("", "mode", "'bridge': the bridge is not named", "bridge = its name; `ip -br link show type bridge`")
    for key in ("mac", "mtu", "device", "domain"):
        if getattr(config, key) is not None:
            origin.fail("", key, f"{getattr(config, key)!r}: an existing bridge is not changed (mode = bridge)")
    for part in config.all_parts():
        if not (part.section.always and part == type(part)()):
            origin.fail(part.heading, None, "cannot be in a network of mode bridge", "whoever made the bridge sees to that")


def subnets(config: NetworkConfig) -> dict[str, IPv4Interface | IPv6Interface]:
    from ipaddress import ip_interface
    return {part.section.kind: ip_interface(part.address) for part in (config.ipv4, config.ipv6) if part}


def check_ranges(config: NetworkConfig, origin: Origin) -> None:
    from ipaddress import ip_address
    for family, subnet in subnets(config).items():
        dhcp = getattr(config, family).dhcp
        for end in dhcp.split(" - ") if dhcp else ():
            network = subnet.network
            if ip_address(end) not in network or ip_address(end) in (network.network_address, network.broadcast_address):
                origin.fail(family, "dhcp", f"{dhcp!r}: {end} is no address for a guest of {network}")


def check_hosts(config: NetworkConfig, origin: Origin) -> None:
    from ipaddress import ip_address
    nets = subnets(config)
    seen: dict[str, HostConfig] = {}
    for host in config.hosts:
        if host.ipv4 is None and host.ipv6 is None:
            origin.fail(host.heading, None, "has no address", "ipv4 = ... or ipv6 = ...")
        for key in ("mac", "ipv4", "ipv6"):
            value = getattr(host, key)
            if value is None:
                continue
            other = seen.setdefault(value, host)
            if other is not host:
                origin.fail(host.heading, key, f"{value!r}: [{other.heading}] has it already")
            if key == "mac":
                continue
            if key not in nets:
                origin.fail(host.heading, key, f"{value!r}: the network has no {key}", f"add [{key}]")
            if ip_address(value) not in nets[key].network or ip_address(value) == nets[key].ip:
                origin.fail(host.heading, key, f"{value!r}: no address for a guest of {nets[key]}")


def check_forwards(config: NetworkConfig, origin: Origin) -> None:
    from ipaddress import ip_address
    nets = subnets(config)
    names = {host.name for host in config.hosts}
    seen: dict[tuple[str, int], list[ForwardConfig]] = {}
    for forward in config.forwards:
        if forward.to not in names:
            try:
                guest = ip_address(forward.to)
            except ValueError:
                origin.fail(forward.heading, "to", f"{forward.to!r}: neither an address nor a [host] of this file",
                            f"known here: {', '.join(sorted(names)) or 'no [host NAME] at all'}")
            if not any(guest in net.network and guest != net.ip for net in nets.values()):
                origin.fail(forward.heading, "to", f"{forward.to!r}: no address for a guest of "
                            f"{' or '.join(map(str, nets.values()))}")
        same_port = seen.setdefault((forward.protocol, forward.port), [])
        for other in same_port:
            if forward.listen is None or other.listen is None or forward.listen == other.listen:
                origin.fail(forward.heading, "port", f"'{forward.port}': [{other.heading}] has it already")
        same_port.append(forward)
