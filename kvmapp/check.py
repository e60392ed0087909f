"""`kvmapp check`: whether this host can run guests, line by line as virt-host-validate does, and what to mend.

FAIL is what no guest can run without; WARN is slow, or missing for some guests only. Each question is a function of a `Host`
(hostinfo.py), which tests replace; nothing on the host is changed. KVM is asked by its ioctls (Documentation/virt/kvm/api.rst)
without the VMM, which may not even load on such a host; the probe guest of `--boot` is brought in by the caller.
"""
from __future__ import annotations

import errno
import os

from kvmapp.errors import KvmappError
from kvmapp.hostinfo import Host, group_name, user_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ABOUT = ("Tells, line by line, whether this host can run guests, and what to mend. With --boot it runs a small guest of its own; with "
         "--json it prints JSON. The exit status is 0 when nothing is missing.")
USAGE = "kvmapp check [--boot] [--json]"
PASS, WARN, FAIL = "PASS", "WARN", "FAIL"
KVM_GET_API_VERSION, KVM_CHECK_EXTENSION = 0xAE00, 0xAE03
KVM_API_VERSION = 12
# What the VMM cannot do without: core.REQUIRED, and a test holds the two together.
REQUIRED_CAPABILITIES = {
    "KVM_CAP_IRQCHIP": 0, "KVM_CAP_USER_MEMORY": 3, "KVM_CAP_SET_TSS_ADDR": 4, "KVM_CAP_EXT_CPUID": 7, "KVM_CAP_PIT2": 33,
    "KVM_CAP_IRQ_ROUTING": 25, "KVM_CAP_IRQFD": 32, "KVM_CAP_IOEVENTFD": 36, "KVM_CAP_IMMEDIATE_EXIT": 136,
}
# What a guest's state is saved and restored with.
STATE_CAPABILITIES = {
    "KVM_CAP_MP_STATE": 14, "KVM_CAP_ADJUST_CLOCK": 39, "KVM_CAP_VCPU_EVENTS": 41, "KVM_CAP_DEBUGREGS": 50,
    "KVM_CAP_XSAVE": 55,
}
LEAST_MEMORY = 256 << 20


class Line:
    """One answer. `note` says what was seen, `hint` what to mend."""
    __slots__ = ("group", "hint", "note", "subject", "verdict")

    def __init__(self, group: str, subject: str, verdict: str, note: str = "", hint: str = ""):
        self.group, self.subject, self.verdict, self.note, self.hint = group, subject, verdict, note, hint

    def render(self) -> str:
        why = "; ".join(filter(None, (self.note, self.hint)))
        return f"{self.group:>5}: Checking {self.subject:<50}: {self.verdict}" + (f" ({why})" if why else "")

    def to_dict(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ("group", "subject", "verdict", "note", "hint")}


def run_check(arguments: Sequence[str], boot_probe: Callable[[], str] | None = None, host: Host | None = None) -> int:
    """The verb: `check [--boot] [--json]`. Prints and returns the exit status, 0 when nothing is FAIL.

    `boot_probe` runs the probe guest and returns a line about it, or raises KvmappError.
    """
    from kvmapp.options import part_arguments
    pairs, rest = part_arguments(arguments, {"--json": False, "--boot": False, "--help": False})
    if rest:
        from kvmapp.errors import UsageError
        raise UsageError(f"check takes no argument, got {rest[0]!r}", USAGE)
    options = {flag for flag, _ in pairs}
    if "--help" in options:
        print(f"usage: {USAGE}\n\n{ABOUT}")
        return 0
    lines = check_host(host or Host(), boot_probe if "--boot" in options else None)
    failed = False
    if "--json" in options:
        import json
        found = list(lines)
        failed = any(line.verdict == FAIL for line in found)
        print(json.dumps({"can_run_guests": not failed, "checks": [line.to_dict() for line in found]}, indent=2))
    else:
        for line in lines:
            failed = failed or line.verdict == FAIL
            print(line.render(), flush=True)
    return 1 if failed else 0


def check_host(host: Host, boot_probe: Callable[[], str] | None = None) -> Iterator[Line]:
    """Every line, in the order in which one mends a host."""
    yield check_flags(host)
    yield check_device(host)
    opened = True
    for line in check_kvm(host):
        opened = opened and line.verdict != FAIL
        yield line
    if boot_probe is not None:
        yield check_boot(boot_probe) if opened else Line("KVM", "that a guest boots", FAIL, "KVM cannot be used, see above")
    yield check_io_uring(host)
    yield check_memory(host)
    yield check_huge_pages(host)
    yield check_cgroups(host)
    yield check_user(host)
    yield check_tun(host)
    yield check_vhost_net(host)
    yield check_bridge(host)
    yield check_bridge_filter(host)
    yield check_ip(host)
    yield check_nat(host)
    yield check_dnsmasq(host)
    yield check_port_53(host)


# KVM

def check_flags(host: Host) -> Line:
    subject = "that the CPU has hardware virtualization"
    flag = virtualization_flag(host)
    if flag:
        return Line("KVM", subject, PASS, {"vmx": "vmx, Intel VT-x", "svm": "svm, AMD-V"}[flag])
    if host.exists("/dev/kvm"):
        return Line("KVM", subject, WARN, "neither vmx nor svm in /proc/cpuinfo, though there is a /dev/kvm")
    return Line("KVM", subject, FAIL, "neither vmx nor svm in /proc/cpuinfo", how_to_get_virtualization(host))


def virtualization_flag(host: Host) -> str | None:
    flags = set(host.cpu().get("flags", "").split())
    return next((flag for flag in ("vmx", "svm") if flag in flags), None)


def how_to_get_virtualization(host: Host) -> str:
    cpu = host.cpu()
    intel = cpu.get("vendor_id") == "GenuineIntel"
    if "hypervisor" in cpu.get("flags", "").split():
        option = "kvm_intel nested=1" if intel else "kvm_amd nested=1"
        return f"this host is a guest itself: its own host must allow nested virtualization ({option}, CPU mode host)"
    return f"enable {'VT-x' if intel else 'AMD-V (SVM)'} in the BIOS, then power the host off and on"


def kvm_module(host: Host) -> str:
    flag = virtualization_flag(host)
    return "kvm_intel" if flag == "vmx" or (not flag and host.cpu().get("vendor_id") == "GenuineIntel") else "kvm_amd"


def check_device(host: Host) -> Line:
    subject = "that /dev/kvm exists"
    if host.exists("/dev/kvm"):
        return Line("KVM", subject, PASS)
    module = kvm_module(host)
    if not virtualization_flag(host):
        return Line("KVM", subject, FAIL, "no such file", how_to_get_virtualization(host))
    if host.exists(f"/sys/module/{module}"):
        return Line("KVM", subject, FAIL, f"{module} is loaded, but there is no device",
                    f"look for `kvm` in dmesg; if it says disabled by bios: {how_to_get_virtualization(host)}; in a container: "
                    "hand it /dev/kvm")
    return Line("KVM", subject, FAIL, f"the module {module} is not loaded",
                f"modprobe {module}; if that fails, dmesg says why (disabled by bios: enable it there)")


def check_kvm(host: Host) -> Iterator[Line]:
    """Opens /dev/kvm and asks it."""
    subject = "that /dev/kvm may be opened"
    if not host.exists("/dev/kvm"):
        yield Line("KVM", subject, FAIL, "it does not exist")
        return
    try:
        fd = host.open("/dev/kvm")
    except OSError as error:
        yield Line("KVM", subject, FAIL, os.strerror(error.errno or 0), why_not_opened(host, "/dev/kvm", error))
        return
    yield Line("KVM", subject, PASS)
    try:
        yield from ask_kvm(host, fd)
    finally:
        os.close(fd)


def why_not_opened(host: Host, device: str, error: OSError) -> str:
    if error.errno in (errno.ENODEV, errno.ENXIO):
        return f"the device node is stale: modprobe {kvm_module(host) if device == '/dev/kvm' else device.rpartition('/')[2]}"
    if error.errno == errno.EBUSY:
        return "another hypervisor (VirtualBox, VMware) holds the CPU's virtualization: stop it"
    if error.errno not in (errno.EACCES, errno.EPERM):
        return "look into dmesg"
    status = host.stat(device)
    owner, group = user_name(status.st_uid), group_name(status.st_gid)
    shown = f"mode {status.st_mode & 0o777:04o} {owner}:{group}"
    if host.uid == 0 or (status.st_gid in host.groups and status.st_mode & 0o060 == 0o060):
        return f"{shown} allows it, so a container or security module forbids it: allow it this device"
    user = user_name(host.uid)
    if status.st_gid and status.st_mode & 0o060 == 0o060:
        return f"{shown}; user {user} is not in group {group}: usermod -aG {group} {user}, then log in anew"
    return f"{shown}, user {user} may not; as root: chown root:kvm {device}; chmod 0660 {device}; usermod -aG kvm {user}"


def ask_kvm(host: Host, fd: int) -> Iterator[Line]:
    try:
        version = host.ioctl(fd, KVM_GET_API_VERSION)
    except OSError as error:
        yield Line("KVM", "its API version", FAIL, f"/dev/kvm is not KVM: {os.strerror(error.errno or 0)}",
                   f"rm /dev/kvm; modprobe {kvm_module(host)}")
        return
    good = version == KVM_API_VERSION
    yield Line("KVM", "its API version", PASS if good else FAIL, str(version), "" if good else f"wanted is {KVM_API_VERSION}")
    if not good:
        return
    lacking = lacking_capabilities(host, fd, REQUIRED_CAPABILITIES)
    yield Line("KVM", "that it can do what a guest needs", FAIL if lacking else PASS, ", ".join(lacking),
               "update the kernel: Linux 4.11 and later have all of them" if lacking else "")
    lacking = lacking_capabilities(host, fd, STATE_CAPABILITIES)
    yield Line("KVM", "that it can save and restore a guest", WARN if lacking else PASS, ", ".join(lacking),
               "guests run but cannot be saved; update the kernel" if lacking else "")
    if virtualization_flag(host):
        yield Line("KVM", "that it runs guest code on the CPU", PASS)
    else:
        yield Line("KVM", "that it runs guest code on the CPU", WARN,
                   "KVM here interprets guest code; expect stock kernels to be very slow",
                   "use a host whose /proc/cpuinfo has vmx or svm")


def lacking_capabilities(host: Host, fd: int, wanted: dict[str, int]) -> list[str]:
    lacking = []
    for name, number in wanted.items():
        try:
            there = host.ioctl(fd, KVM_CHECK_EXTENSION, number) > 0
        except OSError:
            there = False
        if not there:
            lacking.append(name)
    return lacking


def check_boot(boot_probe: Callable[[], str]) -> Line:
    try:
        return Line("KVM", "that a guest boots", PASS, boot_probe())
    except KvmappError as error:
        return Line("KVM", "that a guest boots", FAIL, str(error), error.hint or "")


# The host

def check_io_uring(host: Host) -> Line:
    subject = "that disks can use io_uring"
    error = host.io_uring_error()
    if not error:
        return Line("Host", subject, PASS)
    disabled = host.text("/proc/sys/kernel/io_uring_disabled").strip()
    if error == errno.ENOSYS:
        hint = "Linux 5.6 or later has it"
    elif disabled not in ("", "0"):
        hint = f"kernel.io_uring_disabled is {disabled}: sysctl -w kernel.io_uring_disabled=0"
    else:
        hint = "a container or security module forbids it"
    return Line("Host", subject, WARN, f"{os.strerror(error)}; threads are used instead", hint)


def check_memory(host: Host) -> Line:
    memory = host.meminfo()
    total, free = memory.get("MemTotal", 0), memory.get("MemAvailable", memory.get("MemFree", 0))
    note = f"{free >> 20} of {total >> 20} MiB available"
    good = free >= LEAST_MEMORY
    return Line("Host", "that there is memory for guests", PASS if good else WARN, note,
                "" if good else "stop something, or give the host more memory")


def check_huge_pages(host: Host) -> Line:
    subject = "that guest memory can have huge pages"
    modes = host.text("/sys/kernel/mm/transparent_hugepage/enabled")
    reserved = host.meminfo().get("HugePages_Total", 0)
    note = f"{reserved} are reserved" if reserved else ""
    if "[always]" in modes or "[madvise]" in modes:
        return Line("Host", subject, PASS, note)
    return Line("Host", subject, PASS if reserved else WARN, note or "transparent huge pages are off; guests are slower",
                "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled" if modes else "this kernel has none")


def check_cgroups(host: Host) -> Line:
    subject = "for control groups"
    if host.exists("/sys/fs/cgroup/cgroup.controllers"):
        return Line("Host", subject, PASS, "version 2")
    if host.exists("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/cpu/cpu.shares",
                   "/sys/fs/cgroup/cpu,cpuacct/cpu.shares"):
        return Line("Host", subject, PASS, "version 1")
    return Line("Host", subject, WARN, "none are mounted; guests cannot be limited",
                "mount -t cgroup2 none /sys/fs/cgroup, or start systemd")


def check_user(host: Host) -> Line:
    subject = "for the user and group that guests run as"
    lacking = [f"{what} {name}" for what, name, path in (("user", "kvmapp", "/etc/passwd"), ("group", "kvmapp-guest", "/etc/group"))
               if not any(line.startswith(f"{name}:") for line in host.text(path).splitlines())]
    if not lacking:
        return Line("Host", subject, PASS, "kvmapp, kvmapp-guest")
    return Line("Host", subject, WARN, f"no {' and no '.join(lacking)}", "kvmapp setup makes them; kvmapp run needs none")


# The network

def check_tun(host: Host) -> Line:
    subject = "that taps can be made (/dev/net/tun)"
    if not host.exists("/dev/net/tun"):
        return Line("Net", subject, WARN, "/dev/net/tun does not exist; no bridged and no NAT network",
                    "modprobe tun; in a container: hand it /dev/net/tun")
    try:
        os.close(host.open("/dev/net/tun"))
    except OSError as error:
        return Line("Net", subject, WARN, os.strerror(error.errno or 0), why_not_opened(host, "/dev/net/tun", error))
    return Line("Net", subject, PASS)


def check_vhost_net(host: Host) -> Line:
    subject = "for the kernel's own virtio-net (/dev/vhost-net)"
    if host.exists("/dev/vhost-net"):
        return Line("Net", subject, PASS)
    can_load = host.has_module("vhost_net")
    return Line("Net", subject, WARN, "it does not exist; only domains with vhost = yes or auto want it",
                "this kernel has no vhost_net" if can_load is False else "modprobe vhost_net")


def check_bridge(host: Host) -> Line:
    subject = "that bridges can be made"
    has = host.has_module("bridge")
    if has:
        return Line("Net", subject, PASS)
    return Line("Net", subject, WARN, "cannot be told: the kernel's modules are not listed" if has is None else
                "the kernel has no module bridge", "" if has is None else packages(host, "kernel-modules", "linux-image-amd64"))


def check_bridge_filter(host: Host) -> Line:
    subject = "that the firewall leaves bridged packets alone"
    if host.text("/proc/sys/net/bridge/bridge-nf-call-iptables").strip() == "1":
        return Line("Net", subject, WARN, "iptables sees packets between guests (docker sets this and drops them)",
                    "sysctl -w net.bridge.bridge-nf-call-iptables=0, or allow them in the chain FORWARD")
    return Line("Net", subject, PASS)


def check_ip(host: Host) -> Line:
    """Asked for JSON as the daemon does (hostnet.ask): an old one has none, or for some of its lists only; busybox's has none."""
    import json
    subject = "for ip (networks, VLANs and rates of cards)"
    found = host.program("ip")
    if not found:
        return Line("Net", subject, WARN, "it is not installed", packages(host, "iproute", "iproute2"))
    try:
        json.loads(host.output(found, "-json", "route", "show", "table", "local"))
    except ValueError:
        return Line("Net", subject, WARN, f"{found} prints no JSON", "install iproute2 4.16 or newer")
    return Line("Net", subject, PASS, found)


def check_nat(host: Host) -> Line:
    subject = "for nft or iptables (NAT networks)"
    found = host.program("nft") or host.program("iptables")
    return Line("Net", subject, PASS, found) if found else \
        Line("Net", subject, WARN, "neither is installed", packages(host, "nftables", "nftables"))


def check_dnsmasq(host: Host) -> Line:
    subject = "for dnsmasq (addresses and names in networks)"
    found = host.program("dnsmasq")
    return Line("Net", subject, PASS, found) if found else \
        Line("Net", subject, WARN, "it is not installed", packages(host, "dnsmasq", "dnsmasq-base"))


def check_port_53(host: Host) -> Line:
    """dnsmasq binds to a network's own address, which a server bound to every address keeps it from."""
    subject = "that port 53 is free for networks' DNS"
    for protocol in ("udp", "tcp", "udp6", "tcp6"):
        for line in host.text(f"/proc/net/{protocol}").splitlines()[1:]:
            address, _, port = line.split()[1].rpartition(":")
            if port == "0035" and not address.strip("0"):
                return Line("Net", subject, WARN, f"a DNS server of this host is bound to every address ({protocol})",
                            "`ss -lnptu sport = :53` names it: bind it to its own addresses (bind-interfaces, listen-on)")
    return Line("Net", subject, PASS)


def packages(host: Host, rpm: str, deb: str) -> str:
    """The command of this host's family; of both where it is neither."""
    tool = host.package_tool()
    commands = {"dnf": f"dnf install {rpm}", "yum": f"yum install {rpm}", "apt": f"apt install {deb}"}
    return commands.get(tool) or f"CentOS/RHEL: {commands['dnf']}; Debian: {commands['apt']}"
