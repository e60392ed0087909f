"""THE table of settings: every file, section and key that kvmapp knows, with kind, default, meaning and first
version.

From it come validation (config.py), the options of `kvmapp run` (options.py), completion, the samples in conf/ and
the man page of the format (samples.py). A setting is added here and nowhere else. A setting whose `since` lies ahead
of this version is understood but not honoured yet: config.py accepts it only at its default, so that nothing an
administrator asks for is dropped.

Importing this module imports no other than values.py and cpuset.py: the command line tools start with it.
"""
from __future__ import annotations

from kvmapp.cpuset import NODES_MOST, CpuSet
from kvmapp.values import (
    KIB,
    MIB,
    TIB,
    Address,
    AddressRange,
    Bool,
    Choice,
    DiskName,
    DomainName,
    Duration,
    Forward,
    Integer,
    InterfaceName,
    Kind,
    ListOf,
    Mac,
    Name,
    Path,
    Permissions,
    Quota,
    Size,
    Subnet,
    Text,
    Uuid,
    Word,
)


class Setting:
    """One `key = value`. `default` is a typed value; None means that the key may be absent."""
    __slots__ = ("default", "example", "help", "key", "kind", "live", "made", "option", "option_help", "option_value", "required", "shown",
                 "since")

    def __init__(self, key: str, kind: Kind, default=None, *, help: str, required: bool = False, made: bool = False,
                 shown: bool = False, live: bool = False, since: str = "0.1", example: str = "", option: str = "",
                 option_value: str | None = None, option_help: str = ""):
        self.key, self.kind, self.help = key, kind, help
        self.default = [] if default is None and kind.python_type is list else default
        self.required = required            # a file without it is not whole
        self.made = made                    # made once where it is absent, then kept in the file
        self.shown = shown                  # kvmapp writes it at its default too, since an administrator looks for it
        self.live = live                    # may change while the guest runs
        self.since = since
        self.example = example              # text for the samples, where the default shows nothing
        self.option = option                # of `kvmapp run`
        self.option_value = option_value    # the text that an option without an argument stands for
        self.option_help = option_help or help


class Section:
    """`[kind]` or `[kind WORD]`. `attribute` is its place in the configuration object: a list when there is a word."""
    __slots__ = ("always", "attribute", "help", "kind", "option", "settings", "since", "word")

    def __init__(self, kind: str, *settings: Setting, attribute: str = "", word: Setting | None = None,
                 always: bool = False, help: str, since: str = "0.1", option: str = ""):
        self.kind, self.help, self.since, self.option = kind, help, since, option
        self.attribute = attribute or kind
        self.word = word
        self.always = always                # left out means all defaults; otherwise left out means not there
        self.settings = {setting.key: setting for setting in settings}

    @property
    def shape(self) -> str:
        """The heading as documents show it."""
        return f"[{self.kind} {self.word.kind.metavar}]" if self.word else f"[{self.kind}]"


class File:
    """One kind of INI file below /etc/kvmapp: what stands before the first heading (`top`) and the sections."""
    __slots__ = ("help", "kind", "path", "sections", "top")

    def __init__(self, kind: str, path: str, top: Section, *sections: Section, help: str):
        self.kind, self.path, self.top, self.help = kind, path, top, help
        self.sections = {section.kind: section for section in sections}


YES_NO = Bool()
PORT = Integer(1, 65535)
LIFE_CYCLE = Choice("destroy", "restart", "preserve")
CHARACTER_TYPES = Choice("pty", "stdio", "file", "null")


def character_settings(what: str) -> tuple[Setting, ...]:
    """A serial port and a virtio console have the same other end on the host."""
    return (
        Setting("type", CHARACTER_TYPES, "pty",
                help=f"The other end of the {what}: a pseudo terminal, the terminal of `kvmapp run`, a file that is "
                     "written, or nothing."),
        Setting("path", Path(), example=f"/var/log/kvmapp/linuxvm02-{what.split()[0]}.out",
                help="The file of type file."),
        Setting("log", Path(), example=f"/var/log/kvmapp/linuxvm02-{what.split()[0]}.log",
                help="A file to which everything that the guest prints here is added as well."),
    )


def slot_setting(example: str, text: str) -> Setting:
    return Setting("slot", Integer(1, 31), example=example,
                   help="The slot of the PCI bus where the card stands; the first free one behind those of its kind before it when "
                        f"absent.{text} The verbs that attach and detach write it where a card would otherwise move.")


def rate_settings(way: str, where: str) -> tuple[Setting, ...]:
    """libvirt's <bandwidth>, and its units."""
    rate = Integer(1, 4 << 20)
    return (
        Setting(f"{way}_average", rate, live=True, example="1000",
                help=f"For the types bridge and network: how much goes {where}, in kilobytes a second; no limit when absent."),
        Setting(f"{way}_peak", rate, live=True, example="2000", help="The most in kilobytes a second, while a burst lasts."),
        Setting(f"{way}_burst", rate, live=True, example="512", help="How many kilobytes may go at the peak's speed."))


def tuning_sections() -> tuple[Section, ...]:
    """Where a guest runs and how much it may take of the host: libvirt's <cputune>, <numatune> and <memtune>, and their words."""
    period, limit = Integer(1000, 1000000), Size(MIB, 64 * TIB, step=4 * KIB, bare=MIB)
    return (
        Section(
            "cputune",
            Setting("cpuset", CpuSet(), live=True, example="0-3,^2",
                    help="The host's CPUs on which the domain runs: each vCPU without a [vcpu N] of its own, and everything else unless "
                         "emulatorpin says where; those that the host's scheduler chooses when absent."),
            Setting("emulatorpin", CpuSet(), live=True, example="0",
                    help="The host's CPUs for all that is no vCPU: control and I/O threads."),
            Setting("shares", Integer(2, 262144), 1024, live=True,
                    help="How much CPU time the domain gets when the host is short of it, in proportion to other domains: 2048 is twice "
                         "1024. With control groups v2 a weight of shares * 100 / 1024."),
            Setting("period", period, 100000, live=True, help="Microseconds in which each vCPU may run for those of quota."),
            Setting("quota", Quota(), -1, live=True,
                    help="Microseconds that each vCPU may run in a period; -1, without a limit. 50000 of 100000 is half a CPU."),
            Setting("global_period", period, 100000, live=True, help="Microseconds in which the whole domain may run for those of "
                                                                     "global_quota."),
            Setting("global_quota", Quota(), -1, live=True,
                    help="Microseconds that the domain, all its threads together, may run in a global_period; -1, without a limit."),
            always=True,
            help="On which of the host's CPUs the domain runs, and for how long. Shares and quotas are not kept by `kvmapp run`."),
        Section(
            "vcpu",
            Setting("cpuset", CpuSet(), required=True, live=True, example="2", help="The host's CPUs for this one."),
            attribute="vcpu_pins",
            word=Setting("index", Integer(0, 253), required=True, example="0", help="The vCPU, from 0."),
            help="Where one vCPU runs."),
        Section(
            "numatune",
            Setting("mode", Choice("strict", "preferred", "interleave"), "strict",
                    help="strict, the guest's memory comes from these nodes only; preferred, from this one as long as it has any; "
                         "interleave, from each in turn."),
            Setting("nodeset", CpuSet("NUMA nodes", NODES_MOST), required=True, example="0",
                    help="The host's NUMA nodes; preferred wants a single one."),
            help="From which NUMA nodes of the host the guest's memory comes."),
        Section(
            "memtune",
            Setting("hard_limit", limit, live=True, example="2 GiB",
                    help="The most memory of the host that the domain's process may take, the guest's memory included; it is killed "
                         "when it needs more. Leave room above memory for kvmapp itself. A bare number is in MiB."),
            Setting("soft_limit", limit, live=True, example="1 GiB",
                    help="What it is pushed back to when the host is short of memory (v1), or slowed down at (v2: memory.high)."),
            Setting("swap_hard_limit", limit, live=True, example="3 GiB",
                    help="The most memory and swap together; needs hard_limit, and is no less."),
            always=True,
            help="How much memory of the host the domain may take. Not kept by `kvmapp run`."),
    )


DOMAIN = File(
    "domain", "domains/NAME.conf",
    Section(
        "",
        Setting("name", Name(), required=True, option="--name", example="linuxvm02",
                help="The domain's name; domains/NAME.conf is its file."),
        Setting("uuid", Uuid(), made=True, example="d340f42e-8611-52c5-949c-8013181e73d4",
                help="Tells the domain from every other; made when absent."),
        Setting("title", Text(200), live=True, example="The web server", help="A short description, shown by list --title."),
        Setting("description", Text(4096, lines=True), live=True, example="Ask Ann before touching it",
                help="Anything worth knowing, in several lines between triple quotes if need be; shown by desc."),
        Setting("memory", Size(MIB, 16 * TIB, step=4 * KIB, bare=MIB), required=True, option="--memory",
                example="1024 MiB",
                help="The guest's memory; a bare number is in MiB."),
        Setting("current_memory", Size(MIB, 16 * TIB, step=4 * KIB, bare=MIB), live=True, example="512 MiB",
                help="What the balloon leaves of it to the guest (all of it when absent); needs [balloon]."),
        Setting("hugepages", Choice("no", "2M", "1G"), "no",
                help="The guest's memory comes from the host's pool of huge pages of this size (hugetlbfs), which must hold enough "
                     "of them."),
        Setting("thp", YES_NO, True,
                help="Plain memory may be backed by transparent huge pages: fewer TLB misses, but whole 2 MiB for each byte touched."),
        Setting("ksm", YES_NO, False,
                help="The host may keep equal pages of its guests once (KSM, when its /sys/kernel/mm/ksm/run is 1); it also lets a guest "
                     "guess at what others hold."),
        Setting("prealloc", YES_NO, False, help="All memory is taken from the host at the start, not when the guest touches it."),
        Setting("locked", YES_NO, False, help="The guest's memory is never swapped out."),
        Setting("vcpus", Integer(1, 254), 1, option="--vcpus", help="How many virtual CPUs the guest has."),
        Setting("cpu", Choice("host", "baseline"), "host", option="--cpu",
                help="What the guest's CPUs can do: host, all that this host's KVM offers; baseline, the level "
                     "x86-64-v2 (CPUs from 2009 on) and no more, so that the guest may move to any host."),
        Setting("acpi", YES_NO, True, shown=True, option="--no-acpi", option_value="no",
                option_help="A machine without ACPI tables and without a power button.",
                help="ACPI tables and power button; without them `shutdown` cannot reach the guest."),
        Setting("machine", Choice("pc", "microvm"), "pc", option="--machine",
                help="pc, with a PCI bus; microvm, without: the guest's kernel needs a driver for virtio-mmio, and starts the "
                     "sooner."),
        Setting("virtio", Choice("transitional", "modern", "legacy"), "transitional", option="--virtio",
                help="Which drivers find the virtio devices: transitional, those of every age; modern, those of VIRTIO 1.0 "
                     "and later (Linux 4.0, 2015); legacy, all, but they must use the interface of before 1.0."),
        Setting("packed", YES_NO, False, option="--packed", option_value="yes",
                help="Whether the virtio devices offer packed rings, for drivers from Linux 5.0 (2019) on."),
        Setting("on_poweroff", LIFE_CYCLE, "destroy",
                help="What happens when the guest powers off: destroy ends the domain, restart starts it anew, "
                     "preserve leaves its memory for inspection."),
        Setting("on_reboot", LIFE_CYCLE, "restart", option="--no-reboot", option_value="destroy",
                option_help="A guest that reboots ends, with exit status 3.",
                help="What happens when the guest reboots."),
        Setting("on_crash", LIFE_CYCLE, "destroy", help="What happens when the guest crashes."),
        Setting("autostart_order", Integer(0, 9999), 100,
                help="Domains marked by autostart start in this order, lowest first."),
        Setting("autostart_delay", Duration(0, 3600), 0, help="How long to wait after this one before the next one."),
        help="The domain as a whole."),
    Section(
        "boot",
        Setting("kernel", Path(), option="--kernel", example="/var/lib/kvmapp/boot/vmlinuz",
                help="The kernel's file: bzImage, ELF with a PVH note, or multiboot."),
        Setting("initrd", Path(), option="--initrd", example="/var/lib/kvmapp/boot/initrd.img",
                help="The initial RAM disk (multiboot: the first module)."),
        Setting("cmdline", Text(2047), "", option="--append", example="console=ttyS0 root=/dev/vda1",
                help="The kernel's command line."),
        Setting("unpack", YES_NO, True, option="--no-unpack", option_value="no",
                option_help="A Linux bzImage unpacks itself in the guest, at each start.",
                help="A Linux bzImage is unpacked by the host, once for all guests and starts, and kept in /var/cache/kvmapp; else "
                     "the guest unpacks it at each start."),
        always=True,
        help="What the guest starts from: a Linux or multiboot kernel that is loaded directly, without firmware."),
    Section(
        "disk",
        Setting("source", Path(), required=True, example="/data/linuxvm02.img",
                help="The image file or the host's block device."),
        Setting("format", Choice("raw"), "raw", help="How the guest's blocks lie in the source."),
        Setting("bus", Choice("virtio"), "virtio", help="The controller that the guest sees."),
        Setting("readonly", YES_NO, False, help="The guest may not write; then several guests may share the source."),
        Setting("serial", Text(20, ascii=True), example="WEB-ROOT",
                help="The serial number that the guest reads (/dev/disk/by-id/virtio-SERIAL)."),
        Setting("cache", Choice("writeback", "none", "unsafe"), "writeback",
                help="writeback, through the host's page cache, flushed when the guest asks; none, past it (O_DIRECT); "
                     "unsafe, as writeback but the guest's flushes are ignored: for data that may be lost."),
        Setting("error_policy", Choice("enospace", "report"), "enospace",
                help="What happens when the host has no room for what the guest writes: enospace, the guest is paused, and goes on "
                     "with that write when it is resumed; report, the guest gets an error, as it always does for other errors. Where the "
                     "host notices only when it flushes (NFS, thin volumes), that holds with cache = none alone."),
        Setting("discard", Choice("unmap", "ignore"), "unmap",
                help="Whether blocks that the guest frees are given back to the host."),
        Setting("io", Choice("auto", "io_uring", "threads"), "auto",
                help="How requests reach the host: io_uring where its kernel has it, else a pool of threads."),
        Setting("queues", Integer(1, 16), 1, help="Queues of requests, for as many vCPUs that use the disk at once."),
        Setting("threads", Integer(1, 16), example="2",
                help="Threads of the host that serve the queues, each its share of them; one for each queue when absent."),
        Setting("poll", Integer(0, 1000), 0,
                help="Microseconds for which such a thread, before it sleeps, looks for the next request by itself, as long as that pays: "
                     "less latency for more CPU time of the host. 0: never."),
        slot_setting("10", " Guests count disks in the order of their slots."),
        attribute="disks", option="--disk",
        word=Setting("name", DiskName(), required=True, example="vda", help="The guest's name for the disk."),
        help="A virtio disk."),
    Section(
        "interface",
        Setting("type", Choice("bridge", "network", "user", "tap"), "bridge",
                help="bridge, a tap is made and put into the bridge `source`; network, the same with the bridge of the "
                     "virtual network `source`; user, outgoing connections only, needs no privileges; tap, the tap "
                     "`target` is there already and is used as it is."),
        Setting("source", Name(), example="br0", help="The bridge or the virtual network."),
        Setting("target", InterfaceName(), example="tap0",
                help="The tap on the host; vnetN when absent. For type tap: the existing one."),
        Setting("model", Choice("virtio", "e1000"), "virtio",
                help="The network card that the guest sees: virtio; e1000, Intel's 82540EM, slower, for guests without virtio drivers."),
        Setting("mac", Mac(), made=True, example="52:54:00:7f:0d:cb",
                help="The card's address; made under 52:54:00 when absent."),
        Setting("mtu", Integer(68, 65535), example="1500",
                help="The largest packet; the bridge's or tap's when absent."),
        Setting("queues", Integer(1, 16), 1,
                help="Pairs of queues, so that as many vCPUs send and receive at once; an existing tap must have been made with "
                     "multi_queue."),
        Setting("vhost", Choice("auto", "yes", "no"), "no",
                help="Whether the host's kernel carries the frames (vhost-net): auto, where the host has it; yes, it must; no, "
                     "kvmapp does."),
        Setting("link", Choice("up", "down"), "up", live=True, help="Whether the cable is plugged in."),
        Setting("vlan", Integer(1, 4094), example="20",
                help="For the types bridge and network: the guest is in this VLAN, and its own frames bear no tag. Wants a bridge "
                     "that filters VLANs."),
        Setting("filter", Choice("none", "clean-traffic"), "none", live=True,
                help="For the types bridge and network: clean-traffic lets out only what bears the card's own MAC address and the "
                     "guest's own IP addresses, in ARP and neighbour discovery too, and no answers of a DHCP server or a router."),
        Setting("addresses", ListOf(Address()), live=True, example="192.168.122.10, fd00:122::10",
                help="For filter = clean-traffic: the guest's own addresses. When absent they are, in a virtual network, those that "
                     "it lends; on another bridge the first IPv4 address that the guest uses. IPv6 addresses made of the card's MAC "
                     "address (EUI-64) are always its own."),
        *rate_settings("in", "to the guest"), *rate_settings("out", "from the guest"),
        Setting("forwards", ListOf(Forward()), example="tcp:127.0.0.1:2222:22",
                help="For type user: ports of the host that lead to the guest, each tcp:[ADDRESS:]PORT:GUESTPORT; without an "
                     "address 127.0.0.1."),
        slot_setting("9", " Guests name cards by it: ens9."),
        attribute="interfaces", option="--net",
        word=Setting("index", Integer(0, 31), required=True, example="0", help="Numbers the cards from 0."),
        help="A network card."),
    Section(
        "serial", *character_settings("serial port"),
        attribute="serials",
        word=Setting("index", Integer(0, 1), required=True, example="0", help="0 is COM1 (ttyS0), 1 is COM2 (ttyS1)."),
        help="A 16550A serial port."),
    Section(
        "console", *character_settings("console"),
        attribute="consoles", option="--console",
        word=Setting("index", Integer(0, 7), required=True, example="0", help="N of hvcN."),
        help="A virtio console (hvcN in Linux)."),
    Section("rng", option="--rng", help="A virtio source of entropy, fed from the host's kernel."),
    Section(
        "balloon",
        Setting("deflate_on_oom", YES_NO, False,
                help="The guest may take memory back from the balloon before it kills processes for want of memory."),
        help="A virtio balloon, by which setmem changes the guest's memory while it runs. Memory that the guest does not use goes "
             "back to the host by itself."),
    Section("panic", help="A pvpanic device, by which the guest tells that it panicked: on_crash then says what happens."),
    Section(
        "watchdog",
        Setting("model", Choice("i6300esb"), "i6300esb", help="The watchdog that the guest sees."),
        Setting("action", Choice("reset", "shutdown", "poweroff", "pause", "none"), "reset",
                help="What happens when the guest does not answer in time: reset, as by the reset button (on_reboot says what follows); "
                     "shutdown, the power button is pressed; poweroff, it ends at once (on_poweroff says what follows); pause, until "
                     "resume; none, a line in the log only."),
        help="A watchdog, which acts when the guest hangs. It runs once a program in the guest opens it."),
    Section(
        "vsock",
        Setting("cid", Integer(3, 2**32 - 2), 3,
                help="The guest's address among sockets of the family AF_VSOCK; the host is 2. Each guest has its own socket on the "
                     "host, so several may have the same."),
        Setting("path", Path(), required=True, example="/run/kvmapp/linuxvm02.vsock",
                help="A UNIX socket that is made: who connects to it and says `CONNECT PORT` reaches that port of the guest. Who listens "
                     "at PATH_PORT is reached by the guest as port PORT of the host."),
        help="Sockets between guest and host, without a network."),
    Section(
        "filesystem",
        Setting("source", Path(), example="/srv/share", help="The host's folder that the guest sees."),
        Setting("readonly", YES_NO, False, help="The guest may not write there."),
        Setting("cache", Choice("auto", "none", "always"), "auto",
                help="How long the guest may go by what it has read: auto, until it opens a file anew, and a second for names; none, not "
                     "at all; always, for ever: for folders that nobody else writes to."),
        Setting("binary", Path(), example="/usr/libexec/virtiofsd",
                help="The file server's program; virtiofsd, where distributions put it, when absent."),
        Setting("socket", Path(), example="/run/share.sock",
                help="In the place of source: a file server for vhost-user that listens there already. What it shares, and how, is its "
                     "own affair."),
        attribute="filesystems", option="--share",
        word=Setting("tag", Word(36), required=True, example="share",
                     help="The name by which the guest mounts it: mount -t virtiofs TAG FOLDER (Linux 5.4 and later)."),
        help="A folder of the host's that the guest mounts, by virtio-fs. A file server is started for it, which shares the guest's memory "
             "(ksm = yes is not possible then, and thp depends on the host's setting shmem_enabled). A domain with one cannot be saved."),
    Section(
        "debug",
        Setting("port_402", YES_NO, False, option="--debug-console", option_value="yes",
                help="What the guest writes to I/O port 0x402 goes to the domain's log; firmware and tests use it."),
        Setting("exit_port", YES_NO, False, option="--debug-exit", option_value="yes",
                help="A write of N to I/O port 0xf4 ends the domain with exit status 2N+1 (isa-debug-exit of QEMU)."),
        always=True,
        help="Ports for those who write kernels and firmware."),
    *tuning_sections(),
    Section(
        "graphics",
        Setting("listen", Text(64), "127.0.0.1", help="The address where a viewer may connect."),
        attribute="graphics",
        word=Setting("type", Choice("vnc"), required=True, example="vnc", help="How a viewer speaks to the screen."),
        since="0.3", help="A screen and a keyboard for viewers."),
    help="One guest: its memory, vCPUs and devices. A device whose section is left out is not there.")


NETWORK = File(
    "network", "networks/NAME.conf",
    Section(
        "",
        Setting("name", Name(), required=True, example="default", help="The network's name; networks/NAME.conf is its file."),
        Setting("uuid", Uuid(), made=True, example="d340f42e-8611-52c5-949c-8013181e73d4",
                help="Tells the network from every other; made when absent."),
        Setting("mode", Choice("nat", "route", "isolated", "open", "bridge"), "nat",
                help="nat, guests reach the outside under the host's address; route, under their own; isolated, they "
                     "reach each other and the host; open, as route but without firewall rules of ours; bridge, guests "
                     "join a bridge that is there already."),
        Setting("bridge", InterfaceName(), example="virbr0",
                help="The bridge that is made; virbrN, the first that is free, when absent. For mode bridge: the existing one."),
        Setting("mac", Mac(), made=True, example="52:54:00:0a:cd:21", help="The address of the bridge; made when absent."),
        Setting("mtu", Integer(68, 65535), example="1500", help="The largest packet; the kernel's 1500 when absent."),
        Setting("device", InterfaceName(), example="eth0",
                help="For the modes nat and route: packets leave the host by this device only."),
        Setting("domain", DomainName(), example="guests.example", help="The DNS domain of the guests' names."),
        help="The network as a whole."),
    Section(
        "ipv4",
        Setting("address", Subnet(4), required=True, example="192.168.122.1/24",
                help="The host's address in the network, and the network's size."),
        Setting("dhcp", AddressRange(4), example="192.168.122.2 - 192.168.122.254",
                help="The addresses that are lent to guests; no DHCP when absent."),
        Setting("lease", Duration(120, 604800), 3600, help="For how long an address is lent."),
        help="IPv4 in the network."),
    Section(
        "ipv6",
        Setting("address", Subnet(6), required=True, example="fd00:122::1/64",
                help="The host's address in the network, and the network's size."),
        Setting("dhcp", AddressRange(6), example="fd00:122::100 - fd00:122::1ff",
                help="The addresses that are lent to guests; guests make their own from the announced prefix when absent."),
        help="IPv6 in the network."),
    Section(
        "host",
        Setting("mac", Mac(), required=True, example="52:54:00:7f:0d:cb", help="The guest's network card."),
        Setting("ipv4", Address(4), example="192.168.122.10", help="The IPv4 address that it always gets."),
        Setting("ipv6", Address(6), example="fd00:122::10", help="The IPv6 address that it always gets."),
        attribute="hosts",
        word=Setting("name", DomainName(), required=True, example="web", help="The guest's name in DNS."),
        help="A guest with a fixed address."),
    Section(
        "forward",
        Setting("protocol", Choice("tcp", "udp"), "tcp", help="What is forwarded."),
        Setting("listen", Address(), example="192.0.2.1", help="The host's address; every one of them when absent."),
        Setting("port", PORT, required=True, example="8080", help="The host's port."),
        Setting("to", Text(253), required=True, example="web", help="The guest: an address of the network, or a [host NAME]."),
        Setting("to_port", PORT, example="80", help="The guest's port; the same as the host's when absent."),
        attribute="forwards", word=Setting("name", Word(), required=True, example="http", help="Any name for it."),
        help="A port of the host that leads to a guest, for the modes nat and route."),
    Section(
        "dns",
        Setting("enabled", YES_NO, True, help="Whether the host answers the guests' DNS queries."),
        Setting("forwarders", ListOf(Address()), example="9.9.9.9, 2620:fe::fe",
                help="Where queries for other names go; the servers of the host's /etc/resolv.conf when absent."),
        always=True, help="Names."),
    help="A virtual network: a bridge on the host with addresses, DHCP, DNS and a way out.")

POOL = File(
    "pool", "storage/NAME.conf",
    Section(
        "",
        Setting("name", Name(), required=True, example="default", help="The pool's name; storage/NAME.conf is its file."),
        Setting("uuid", Uuid(), made=True, example="d340f42e-8611-52c5-949c-8013181e73d4",
                help="Tells the pool from every other; made when absent."),
        Setting("type", Choice("dir"), "dir", help="What holds the volumes: a folder of files."),
        Setting("path", Path(), required=True, example="/var/lib/kvmapp/images", help="The folder."),
        help="The pool as a whole."),
    help="A place for volumes, the images of disks.")

DAEMON = File(
    "daemon", "kvmapp.conf",
    Section(
        "",
        Setting("unix_sock_group", Word(), "kvmapp", help="Members of this group may use the daemon's socket."),
        Setting("unix_sock_rw_perms", Permissions(), 0o770, help="Who may do everything."),
        Setting("unix_sock_ro_perms", Permissions(), 0o777, help="Who may look, through the read-only socket."),
        Setting("max_readonly_clients", Integer(1, 4096), 64,
                help="How many connections the read-only socket has at a time, no more than half of them a user's; who comes then is "
                     "told to come again."),
        Setting("log_level", Choice("error", "warning", "info", "debug"), "info",
                help="The least important lines that the daemon logs."),
        help="The daemon."),
    help="The daemon: who may speak to it and what it logs. Read at start and at reload.")

GUEST = File(
    "guest", "guest.conf",
    Section(
        "",
        Setting("user", Word(), "kvmapp", help="The user that domain processes run as."),
        Setting("group", Word(), "kvmapp-guest",
                help="Their group; never the one whose members may use the daemon's socket."),
        Setting("shutdown_timeout", Duration(1, 86400), 60,
                help="How long a guest may take to heed shutdown; then its log and an event (guest-ignored) say that it ignores the "
                     "power button."),
        Setting("log_max_size", Size(64 * KIB, 1 * TIB), 2 * MIB,
                help="A domain's log in /var/log/kvmapp is set aside when it has grown to this size."),
        Setting("log_max_backups", Integer(0, 99), 3, help="How many logs that were set aside are kept a domain."),
        Setting("vnc_listen", Address(), "127.0.0.1", since="0.3", help="Where viewers may connect unless a domain says."),
        help="All guests."),
    help="What holds for every guest. Read when a domain starts.")

FILES = (DOMAIN, NETWORK, POOL, DAEMON, GUEST)


def version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
