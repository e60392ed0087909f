"""Domain files and options to a typed DomainConfig and back: schema.py's table applied.

    read_domain(path)            a file, checked; errors say file, line, value and the nearest known key
    write_domain(path, config)   only what differs is rewritten; comments and order stay; atomically
    config_from_options(...)     what `kvmapp run` was given, on top of a file or alone
    DomainConfig.to_dict()       for JSON; DomainConfig.from_dict() checks what comes back as strictly as a file

Paths in a DomainConfig are absolute, sizes are bytes, durations seconds. Whether a kernel, disk or bridge exists is
not looked at here: the file may be older than they are. The classes' annotations repeat the table for the reader and
for mypy; a test holds the two together.
"""
from __future__ import annotations

import os

from kvmapp import schema
from kvmapp.settings import FileConfig, Origin, Settings, build, complete, read_file, slots, write_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import ClassVar


class BootConfig(Settings):
    section = schema.DOMAIN.sections["boot"]
    __slots__ = slots(section)
    kernel: str | None
    initrd: str | None
    cmdline: str
    unpack: bool


class DiskConfig(Settings):
    section = schema.DOMAIN.sections["disk"]
    __slots__ = slots(section)
    name: str
    source: str
    format: str
    bus: str
    readonly: bool
    serial: str | None
    cache: str
    error_policy: str
    discard: str
    io: str
    queues: int
    threads: int | None
    poll: int
    slot: int | None


class InterfaceConfig(Settings):
    section = schema.DOMAIN.sections["interface"]
    __slots__ = slots(section)
    index: int
    type: str
    source: str | None
    target: str | None
    model: str
    mac: str
    mtu: int | None
    queues: int
    vhost: str
    link: str
    vlan: int | None
    filter: str
    addresses: list[str]
    in_average: int | None
    in_peak: int | None
    in_burst: int | None
    out_average: int | None
    out_peak: int | None
    out_burst: int | None
    forwards: list[str]
    slot: int | None


class SerialConfig(Settings):
    section = schema.DOMAIN.sections["serial"]
    __slots__ = slots(section)
    index: int
    type: str
    path: str | None
    log: str | None


class ConsoleConfig(SerialConfig):
    section = schema.DOMAIN.sections["console"]
    __slots__ = ()


class RngConfig(Settings):
    section = schema.DOMAIN.sections["rng"]
    __slots__ = slots(section)


class BalloonConfig(Settings):
    section = schema.DOMAIN.sections["balloon"]
    __slots__ = slots(section)
    deflate_on_oom: bool


class PanicConfig(Settings):
    section = schema.DOMAIN.sections["panic"]
    __slots__ = slots(section)


class WatchdogConfig(Settings):
    section = schema.DOMAIN.sections["watchdog"]
    __slots__ = slots(section)
    model: str
    action: str


class VsockConfig(Settings):
    section = schema.DOMAIN.sections["vsock"]
    __slots__ = slots(section)
    cid: int
    path: str


class FilesystemConfig(Settings):
    section = schema.DOMAIN.sections["filesystem"]
    __slots__ = slots(section)
    tag: str
    source: str | None
    readonly: bool
    cache: str
    binary: str | None
    socket: str | None


class DebugConfig(Settings):
    section = schema.DOMAIN.sections["debug"]
    __slots__ = slots(section)
    port_402: bool
    exit_port: bool


class CputuneConfig(Settings):
    section = schema.DOMAIN.sections["cputune"]
    __slots__ = slots(section)
    cpuset: str | None
    emulatorpin: str | None
    shares: int
    period: int
    quota: int
    global_period: int
    global_quota: int


class VcpuConfig(Settings):
    section = schema.DOMAIN.sections["vcpu"]
    __slots__ = slots(section)
    index: int
    cpuset: str


class NumatuneConfig(Settings):
    section = schema.DOMAIN.sections["numatune"]
    __slots__ = slots(section)
    mode: str
    nodeset: str


class MemtuneConfig(Settings):
    section = schema.DOMAIN.sections["memtune"]
    __slots__ = slots(section)
    hard_limit: int | None
    soft_limit: int | None
    swap_hard_limit: int | None


class GraphicsConfig(Settings):
    section = schema.DOMAIN.sections["graphics"]
    __slots__ = slots(section)
    type: str
    listen: str


class DomainConfig(FileConfig):
    file = schema.DOMAIN
    section = file.top
    __slots__ = (*slots(section), *(part.attribute for part in file.sections.values()))
    parts: ClassVar = {"boot": BootConfig, "disk": DiskConfig, "interface": InterfaceConfig, "serial": SerialConfig,
             "console": ConsoleConfig, "rng": RngConfig, "balloon": BalloonConfig, "panic": PanicConfig,
             "watchdog": WatchdogConfig, "vsock": VsockConfig, "filesystem": FilesystemConfig, "debug": DebugConfig,
             "cputune": CputuneConfig, "vcpu": VcpuConfig, "numatune": NumatuneConfig, "memtune": MemtuneConfig,
             "graphics": GraphicsConfig}
    name: str
    uuid: str
    title: str | None
    description: str | None
    memory: int
    current_memory: int | None
    hugepages: str
    thp: bool
    ksm: bool
    prealloc: bool
    locked: bool
    vcpus: int
    cpu: str
    acpi: bool
    machine: str
    virtio: str
    packed: bool
    on_poweroff: str
    on_reboot: str
    on_crash: str
    autostart_order: int
    autostart_delay: int
    boot: BootConfig
    disks: list[DiskConfig]
    interfaces: list[InterfaceConfig]
    serials: list[SerialConfig]
    consoles: list[ConsoleConfig]
    rng: RngConfig | None
    balloon: BalloonConfig | None
    panic: PanicConfig | None
    watchdog: WatchdogConfig | None
    vsock: VsockConfig | None
    filesystems: list[FilesystemConfig]
    debug: DebugConfig
    cputune: CputuneConfig
    vcpu_pins: list[VcpuConfig]
    numatune: NumatuneConfig | None
    memtune: MemtuneConfig
    graphics: list[GraphicsConfig]

    @classmethod
    def from_dict(cls, data: dict) -> DomainConfig:
        config = super().from_dict(data)
        check_domain(config, Origin())
        return config


def read_domain(path: str, text: str | None = None) -> DomainConfig:
    """The domain file at `path`, checked. With `text`: that text, as if it stood there (define, edit).

    A UUID and MAC addresses that are absent are made; `config.made` is then not empty and the caller stores them by
    write_domain.
    """
    config, ini = read_file(DomainConfig, path, text)
    check_domain(config, Origin(ini))
    complete(config)
    return config


def write_domain(path: str, config: DomainConfig) -> None:
    """Saves the configuration; what stands in the file and means the same stays as it is written, comments included."""
    write_file(path, config, lambda text: read_domain(path, text))


def config_from_options(options: Iterable[tuple[str, str | None]], file: str | None = None,
                        folder: str | None = None) -> DomainConfig:
    """What `kvmapp run` was given: pairs of option and argument, as options.py parts them, on top of `file` if there
    is one.

    Relative paths in options belong to `folder` (the current one when absent). The first serial port is on the
    terminal unless the file says otherwise; with --console it is the virtio console.
    """
    from kvmapp.options import add_options
    folder = folder or os.getcwd()
    sections: dict[str, dict[str, str]] = {"": {}}
    ini = None
    if file is not None:
        from kvmapp.ini import Ini, read_text
        file = os.path.abspath(file)
        ini = Ini(read_text(file), file)
        sections = {heading: dict(texts) for heading, texts in ini.sections.items()}
        make_absolute(sections, os.path.dirname(file))
    flags = add_options(sections, options, folder)
    if ini is None:
        sections[""] = {"name": "guest", "memory": "512 MiB"} | sections[""]
    use_terminal(sections)
    origin = Origin(ini, flags)
    config = build(DomainConfig, sections, origin, folder)
    config.filename = file
    check_domain(config, origin)
    complete(config)
    return config


def make_absolute(sections: dict[str, dict[str, str]], folder: str) -> None:
    """Paths of the file, before those of options come among them."""
    for heading, texts in sections.items():
        section = schema.DOMAIN.sections.get(heading.partition(" ")[0])
        for key, text in texts.items():
            setting = section.settings.get(key) if section else None
            if setting and text and isinstance(setting.kind, schema.Path):
                texts[key] = os.path.join(folder, text)


def use_terminal(sections: dict[str, dict[str, str]]) -> None:
    """`kvmapp run` is for one who looks on: one character device has the terminal."""
    devices = [texts for heading, texts in sections.items() if heading.split(" ")[0] in ("serial", "console")]
    if not any(texts.get("type") == "stdio" for texts in devices):
        sections.setdefault("serial 0", {}).setdefault("type", "stdio")


def check_domain(config: DomainConfig, origin: Origin) -> None:
    """What no setting alone can tell."""
    check_memory(config, origin)
    check_boot(config, origin)
    check_disks(config, origin)
    check_interfaces(config, origin)
    check_slots(config, origin)
    check_character_devices(config, origin)
    check_watchdog(config, origin)
    check_filesystems(config, origin)
    check_tuning(config, origin)


def check_watchdog(config: DomainConfig, origin: Origin) -> None:
    if config.watchdog and config.machine == "microvm":
        origin.fail("watchdog", "model", f"{config.watchdog.model} is a PCI card, and a microvm has no PCI bus", "set machine = pc")


def check_filesystems(config: DomainConfig, origin: Origin) -> None:
    for one in config.filesystems:
        if one.source is None and one.socket is None:
            origin.fail(one.heading, None, "has neither source nor socket", "source = the folder")
        for key in ("source", "readonly", "cache", "binary") if one.socket is not None else ():
            value = getattr(one, key)
            if value != one.setting(key).default:
                origin.fail(one.heading, key, f"{one.setting(key).kind.format(value)!r}: of no use with socket, whose file server is "
                                              "started by somebody else")
    if config.filesystems and config.ksm:
        origin.fail("", "ksm", f"'yes': KSM cannot merge memory that is shared with the file server of [{config.filesystems[0].heading}]",
                    "set ksm = no")


def check_memory(config: DomainConfig, origin: Origin) -> None:
    if config.current_memory is None or config.current_memory == config.memory:
        return
    shown = repr(schema.DOMAIN.top.settings["memory"].kind.format(config.current_memory))
    if config.current_memory > config.memory:
        memory = schema.DOMAIN.top.settings["memory"].kind.format(config.memory)
        origin.fail("", "current_memory", f"{shown}: more than memory = {memory}")
    if config.balloon is None:
        origin.fail("", "current_memory", f"{shown}: only a balloon can take memory from the guest", "add [balloon]")


def check_boot(config: DomainConfig, origin: Origin) -> None:
    if config.boot.kernel is None:
        for key in ("initrd", "cmdline"):
            if getattr(config.boot, key):
                origin.fail("boot", key, f"{getattr(config.boot, key)!r}: of no use without a kernel",
                            "give kernel as well" if ("boot", key) not in origin.flags else "give --kernel as well")


def check_disks(config: DomainConfig, origin: Origin) -> None:
    seen: dict[str, DiskConfig] = {}
    for disk in config.disks:
        if (disk.threads or 1) > disk.queues:
            origin.fail(disk.heading, "threads", f"'{disk.threads}': the disk has no more than {disk.queues} queues to serve",
                        f"queues = {disk.threads}")
        other = seen.setdefault(disk.source, disk)
        if other is not disk and not (disk.readonly and other.readonly):
            origin.fail(disk.heading, "source", f"{disk.source!r}: is the source of disk {other.name} too",
                        "two disks may share a source only when both are readonly")


def check_interfaces(config: DomainConfig, origin: Origin) -> None:
    macs: dict[str, InterfaceConfig] = {}
    taps: dict[str, InterfaceConfig] = {}
    for interface in config.interfaces:
        heading, kind = interface.heading, interface.type
        wanted = {"bridge": "source", "network": "source", "tap": "target"}.get(kind)
        if wanted and getattr(interface, wanted) is None:
            what = {"bridge": "the bridge's name", "network": "the network's name", "tap": "the tap's name"}[kind]
            origin.fail(heading, None, f"of type {kind} has no {wanted}", f"{wanted} = {what}")
        if kind in ("user", "tap") and interface.source is not None:
            origin.fail(heading, "source", f"{interface.source!r}: an interface of type {kind} has none")
        if kind == "user" and interface.target is not None:
            origin.fail(heading, "target", f"{interface.target!r}: an interface of type user has no tap")
        if kind == "user" and interface.queues > 1:
            origin.fail(heading, "queues", f"'{interface.queues}': an interface of type user has one pair of queues")
        if kind == "user" and interface.vhost == "yes":
            origin.fail(heading, "vhost", "'yes': an interface of type user has no tap that vhost could serve")
        if interface.model != "virtio":
            check_model(config, interface, origin)
        if kind != "user" and interface.forwards:
            origin.fail(heading, "forwards", f"{interface.forwards[0]!r}: only an interface of type user has forwards",
                        "in a virtual network: kvmappctl net-update NETWORK add forward")
        check_port(interface, origin)
        for key, seen in (("mac", macs), ("target", taps)):
            value = getattr(interface, key)
            other = seen.setdefault(value, interface) if value is not None else interface
            if other is not interface:
                origin.fail(heading, key, f"{value!r}: [{other.heading}] has it already")


def check_slots(config: DomainConfig, origin: Origin) -> None:
    sections: list[DiskConfig | InterfaceConfig] = [*config.interfaces, *config.disks]
    taken: dict[int, DiskConfig | InterfaceConfig] = {}
    for one in sections:
        if one.slot is None:
            continue
        if config.machine == "microvm":
            origin.fail(one.heading, "slot", f"'{one.slot}': a microvm has no PCI bus", "set machine = pc, or take it away")
        other = taken.setdefault(one.slot, one)
        if other is not one:
            origin.fail(one.heading, "slot", f"'{one.slot}': [{other.heading}] has it already", "give it another one, or leave it out")


def check_model(config: DomainConfig, interface: InterfaceConfig, origin: Origin) -> None:
    """What only virtio cards have."""
    heading, model = interface.heading, interface.model
    if config.machine == "microvm":
        origin.fail(heading, "model", f"'{model}': is a PCI card, and a microvm has no PCI bus", "set machine = pc, or model = virtio")
    if interface.queues > 1:
        origin.fail(heading, "queues", f"'{interface.queues}': an interface of model {model} has one pair of queues", "set model = virtio")
    if interface.vhost == "yes":
        origin.fail(heading, "vhost", f"'yes': vhost cannot serve an interface of model {model}", "set model = virtio, or vhost = no")


def check_port(interface: InterfaceConfig, origin: Origin) -> None:
    """What the host does at the card's port of a bridge."""
    heading = interface.heading
    if interface.type not in ("bridge", "network"):
        for key in ("vlan", "filter", "addresses", *(f"{way}_{what}" for way in ("in", "out") for what in ("average", "peak", "burst"))):
            value = getattr(interface, key)
            if value != interface.setting(key).default:
                origin.fail(heading, key, f"{interface.setting(key).kind.format(value)!r}: only the types bridge and network have it")
    if interface.addresses and interface.filter == "none":
        origin.fail(heading, "addresses", f"{interface.addresses[0]!r}: of no use without filter = clean-traffic")
    for way in ("in", "out"):
        average, peak, burst = (getattr(interface, f"{way}_{what}") for what in ("average", "peak", "burst"))
        if average is None and (peak or burst):
            origin.fail(heading, f"{way}_{'peak' if peak else 'burst'}", f"'{peak or burst}': of no use without {way}_average")
        if average and peak and peak < average:
            origin.fail(heading, f"{way}_peak", f"'{peak}': less than {way}_average = {average}")


def check_character_devices(config: DomainConfig, origin: Origin) -> None:
    on_terminal: SerialConfig | None = None
    for device in (*config.serials, *config.consoles):
        wants_path = device.type == "file"
        if wants_path and device.path is None:
            origin.fail(device.heading, None, f"of type {device.type} has no path", "path = the file")
        if not wants_path and device.path is not None:
            origin.fail(device.heading, "path", f"{device.path!r}: only type file has one")
        if device.type == "stdio":
            if on_terminal is not None:
                origin.fail(device.heading, "type", f"'stdio': [{on_terminal.heading}] has the terminal already")
            on_terminal = device


def check_tuning(config: DomainConfig, origin: Origin) -> None:
    """What the host has is not looked at here: tuning.py does, at the start."""
    for pin in config.vcpu_pins:
        if pin.index >= config.vcpus:
            known = "only vCPU 0" if config.vcpus == 1 else f"vCPUs 0 to {config.vcpus - 1}"
            origin.fail(pin.heading, None, f"the domain has {known}", f"raise vcpus, or take [{pin.heading}] away")
    numa = config.numatune
    if numa and numa.mode == "preferred" and not numa.nodeset.isdigit():
        origin.fail("numatune", "nodeset", f"{numa.nodeset!r}: mode = preferred wants a single node", "mode = interleave takes several")
    check_limits(config, origin)


def check_limits(config: DomainConfig, origin: Origin) -> None:
    """A hard limit below the guest's memory has its uses, with swap or a guest that never takes all of it: it is told, not refused."""
    limits, size = config.memtune, schema.DOMAIN.top.settings["memory"].kind.format
    hard, swap = limits.hard_limit, limits.swap_hard_limit
    if swap is not None and (hard is None or swap < hard):
        origin.fail("memtune", "swap_hard_limit", f"{size(swap)!r}: " + (
            "of no use without hard_limit" if hard is None else f"is less than hard_limit = {size(hard)}"),
            "it counts memory and swap together")
    if hard is None or hard > config.memory or config.hugepages != "no":        # pages of hugetlbfs are not counted
        return
    if config.locked or config.prealloc:
        key = "locked" if config.locked else "prealloc"
        origin.fail("memtune", "hard_limit", f"{size(hard)!r}: {key} = yes takes all of memory = {size(config.memory)} at the start",
                    "kvmapp itself needs some memory, too: leave room, or take the limit away")
    config.warnings += (f"[memtune] hard_limit = {size(hard)}: is not more than memory = {size(config.memory)}; a guest that uses all "
                        "of it is swapped out, or killed where there is no swap",)
