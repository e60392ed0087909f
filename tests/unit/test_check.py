"""`kvmapp check` on every host there may be: each is a folder of files and a few answers."""
import errno
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from kvmapp import check
from kvmapp.__main__ import dispatch
from kvmapp.errors import HostError, UsageError
from kvmapp.hostinfo import Host, why_no_access

AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu {}\n\nprocessor\t: 1\nflags\t: vmx\n"
INTEL = AMD.replace("AuthenticAMD", "GenuineIntel")


class FakeHost(Host):
    """A host in a folder, whose /dev/kvm answers as the test says."""

    def __init__(self, root, uid=54321, groups=frozenset({54321})):
        super().__init__(str(root), uid, set(groups))
        self.version = 12
        self.lacking: set[int] = set()
        self.open_error: dict[str, int] = {}
        self.uring = 0

    def open(self, path):
        if path in self.open_error:
            raise OSError(self.open_error[path], os.strerror(self.open_error[path]))
        return super().open(path)

    def ioctl(self, fd, request, argument=0):
        if isinstance(self.version, OSError):
            raise self.version
        return self.version if request == check.KVM_GET_API_VERSION else int(argument not in self.lacking)

    def io_uring_error(self):
        return self.uring

    def output(self, *words):
        return self.text(words[0])

    def program(self, name):
        return f"/bin/{name}" if os.path.exists(self.path(f"/bin/{name}")) else None

    def write(self, path, text=""):
        target = self.path(path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w", encoding="utf-8") as stream:
            stream.write(text)

    def remove(self, path):
        os.unlink(self.path(path))

    def verdicts(self, **options):
        return {line.subject: line for line in check.check_host(self, **options)}

    def line(self, words):
        found = [line for subject, line in self.verdicts().items() if words in subject]
        assert len(found) == 1, f"{len(found)} lines about {words!r}"
        return found[0]


@pytest.fixture
def host(tmp_path):
    """A host on which nothing is to be mended."""
    host = FakeHost(tmp_path)
    for path in ("/dev/kvm", "/dev/net/tun", "/dev/vhost-net", "/sys/module/bridge/x", "/bin/nft", "/bin/dnsmasq",
                 "/sys/fs/cgroup/cgroup.controllers"):
        host.write(path)
    host.write("/bin/ip", '[{"dst": "127.0.0.1"}]')
    host.write("/proc/cpuinfo", AMD.format("svm"))
    host.write("/proc/meminfo", "MemTotal:  8388608 kB\nMemAvailable:   4194304 kB\nHugePages_Total:       0\n")
    host.write("/sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
    host.write("/proc/sys/kernel/osrelease", "6.1.0\n")
    host.write("/etc/passwd", "root:x:0:0::/root:/bin/sh\nkvmapp:x:990:990::/:/bin/false\n")
    host.write("/etc/group", "kvmapp-guest:x:991:\n")
    host.write("/etc/os-release", 'ID=debian\nVERSION_ID="12"\n')
    return host


def test_a_good_host_passes_every_line(host):
    assert {line.verdict for line in host.verdicts().values()} == {"PASS"}
    assert len(host.verdicts()) == 20


def test_every_line_has_its_own_subject_and_fits(host):
    lines = list(check.check_host(host))
    assert len({line.subject for line in lines}) == len(lines)
    for line in lines:
        assert re.match(r" {1,3}(KVM|Host|Net): Checking .{50}: PASS", line.render())


# What stands in the way of KVM: change the good host, name the line, its verdict, and words of what it says.

def no_flags(host):
    host.write("/proc/cpuinfo", AMD.format("sse2"))


def bios_off(host):
    no_flags(host)
    host.remove("/dev/kvm")


def bios_off_intel(host):
    host.write("/proc/cpuinfo", INTEL.format("sse2"))
    host.remove("/dev/kvm")


def inside_a_guest(host):
    host.write("/proc/cpuinfo", INTEL.format("hypervisor"))
    host.remove("/dev/kvm")


def module_missing(host):
    host.remove("/dev/kvm")


def module_missing_intel(host):
    host.write("/proc/cpuinfo", INTEL.format("vmx"))
    host.remove("/dev/kvm")


def device_missing(host):
    host.remove("/dev/kvm")
    host.write("/sys/module/kvm_amd/refcnt")


def fails_to_open(code, **mode):
    def change(host):
        host.open_error["/dev/kvm"] = code
        if mode:
            os.chmod(host.path("/dev/kvm"), mode["mode"])
        if "gid" in mode:
            status = os.stat(host.path("/dev/kvm"))
            host.stat = lambda path: os.stat_result((status.st_mode, 0, 0, 1, 0, mode["gid"], 0, 0, 0, 0))
    return change


def as_root(host):
    fails_to_open(errno.EPERM)(host)
    host.uid = 0


def in_the_group(host):
    fails_to_open(errno.EACCES, mode=0o660, gid=54321)(host)


def answers(version):
    def change(host):
        host.version = version
    return change


def lacks(*numbers):
    def change(host):
        host.lacking = set(numbers)
    return change


KVM_TROUBLE = [
    (no_flags, "hardware virtualization", "WARN", "though there is a /dev/kvm"),
    (no_flags, "runs guest code on the CPU", "WARN",
     "KVM here interprets guest code; expect stock kernels to be very slow"),
    (bios_off, "hardware virtualization", "FAIL", "enable AMD-V (SVM) in the BIOS"),
    (bios_off, "/dev/kvm exists", "FAIL", "AMD-V"),
    (bios_off_intel, "hardware virtualization", "FAIL", "enable VT-x in the BIOS"),
    (inside_a_guest, "hardware virtualization", "FAIL", "nested virtualization (kvm_intel nested=1"),
    (module_missing, "/dev/kvm exists", "FAIL", "modprobe kvm_amd"),
    (module_missing_intel, "/dev/kvm exists", "FAIL", "modprobe kvm_intel"),
    (device_missing, "/dev/kvm exists", "FAIL", "kvm_amd is loaded, but there is no device"),
    (device_missing, "may be opened", "FAIL", "it does not exist"),
    (fails_to_open(errno.EACCES, mode=0o660, gid=4242), "may be opened", "FAIL",
     "mode 0660 root:gid 4242; user uid 54321 is not in group gid 4242: usermod -aG"),
    (fails_to_open(errno.EACCES, mode=0o600), "may be opened", "FAIL", "chmod 0660 /dev/kvm"),
    (as_root, "may be opened", "FAIL", "a container or security module forbids it"),
    (in_the_group, "may be opened", "FAIL", "a container or security module forbids it"),
    (fails_to_open(errno.ENODEV), "may be opened", "FAIL", "stale: modprobe kvm_amd"),
    (fails_to_open(errno.EBUSY), "may be opened", "FAIL", "VirtualBox"),
    (fails_to_open(errno.EIO), "may be opened", "FAIL", "Input/output error; look into dmesg"),
    (answers(11), "API version", "FAIL", "11; wanted is 12"),
    (answers(OSError(errno.ENOTTY, "")), "API version", "FAIL", "is not KVM: Inappropriate ioctl"),
    (lacks(32, 136), "what a guest needs", "FAIL", "KVM_CAP_IRQFD, KVM_CAP_IMMEDIATE_EXIT; update the kernel"),
    (lacks(55), "save and restore", "WARN", "KVM_CAP_XSAVE"),
]


@pytest.mark.parametrize(("change", "subject", "verdict", "words"), KVM_TROUBLE)
def test_trouble_with_kvm(host, change, subject, verdict, words):
    change(host)
    line = host.line(subject)
    assert line.verdict == verdict
    assert words in line.render()


def low_memory(host):
    host.write("/proc/meminfo", "MemTotal: 262144 kB\nMemFree: 102400 kB\n")


def no_thp(host):
    host.write("/sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n")


def reserved_pages(host):
    no_thp(host)
    host.write("/proc/meminfo", "MemAvailable: 4194304 kB\nHugePages_Total: 16\n")


def cgroup_v1(host):
    host.remove("/sys/fs/cgroup/cgroup.controllers")
    host.write("/sys/fs/cgroup/memory/memory.limit_in_bytes")


def without(*paths, release=None):
    def change(host):
        for path in paths:
            host.remove(path)
        if release is not None:
            host.write("/etc/os-release", release)
    return change


def uring(code, disabled=""):
    def change(host):
        host.uring = code
        host.write("/proc/sys/kernel/io_uring_disabled", disabled)
    return change


def modules(listing):
    def change(host):
        os.unlink(host.path("/sys/module/bridge/x"))
        os.rmdir(host.path("/sys/module/bridge"))
        host.write("/lib/modules/6.1.0/modules.dep", listing)
    return change


def prints(program, text):
    return lambda host: host.write(program, text)


def filtered(host):
    host.write("/proc/sys/net/bridge/bridge-nf-call-iptables", "1\n")


def dns_server(protocol, address):
    def change(host):
        host.write(f"/proc/net/{protocol}", f"  sl  local_address rem_address   st\n   0: {address} 00000000:0000 0A\n")
    return change


HOST_TROUBLE = [
    (uring(errno.ENOSYS), "io_uring", "WARN", "threads are used instead; Linux 5.6"),
    (uring(errno.EPERM, "2"), "io_uring", "WARN", "kernel.io_uring_disabled is 2"),
    (uring(errno.EPERM), "io_uring", "WARN", "a container or security module"),
    (low_memory, "memory for guests", "WARN", "100 of 256 MiB"),
    (no_thp, "huge pages", "WARN", "echo madvise"),
    (without("/sys/kernel/mm/transparent_hugepage/enabled"), "huge pages", "WARN", "this kernel has none"),
    (reserved_pages, "huge pages", "PASS", "16 are reserved"),
    (cgroup_v1, "control groups", "PASS", "version 1"),
    (without("/sys/fs/cgroup/cgroup.controllers"), "control groups", "WARN", "cgroup2"),
    (without("/etc/group"), "user and group", "WARN", "(no group kvmapp-guest; kvmapp setup makes them"),
    (without("/etc/group", "/etc/passwd"), "user and group", "WARN", "no user kvmapp and no group kvmapp"),
    (without("/dev/net/tun"), "taps", "WARN", "modprobe tun"),
    (without("/dev/vhost-net"), "virtio-net", "WARN", "modprobe vhost_net"),
    (modules("kernel/net/bridge/bridge.ko.xz: kernel/net/stp.ko\n"), "bridges can be made", "PASS", ""),
    (modules("kernel/net/bridge/br_netfilter.ko: kernel/net/bridge/bridge.ko\n"), "bridges can be made", "WARN",
     "apt install linux-image-amd64"),
    (modules(""), "bridges can be made", "WARN", "cannot be told"),
    (filtered, "bridged packets", "WARN", "bridge-nf-call-iptables=0"),
    (without("/bin/ip"), "for ip", "WARN", "apt install iproute2"),
    (prints("/bin/ip", "local 127.0.0.1 dev lo proto kernel\n"), "for ip", "WARN", "(/bin/ip prints no JSON; install iproute2 4.16"),
    (prints("/bin/ip", ""), "for ip", "WARN", "prints no JSON"),
    (without("/bin/nft"), "nft or iptables", "WARN", "apt install nftables"),
    (without("/bin/dnsmasq"), "dnsmasq", "WARN", "apt install dnsmasq-base"),
    (without("/bin/dnsmasq", release='ID="centos"\nID_LIKE="rhel fedora"'), "dnsmasq", "WARN", "yum install dnsmasq"),
    (without("/bin/dnsmasq", release="ID=arch"), "dnsmasq", "WARN",
     "CentOS/RHEL: dnf install dnsmasq; Debian: apt install dnsmasq-base"),
    (dns_server("udp", "00000000:0035"), "port 53", "WARN", "(udp)"),
    (dns_server("tcp6", "0" * 32 + ":0035"), "port 53", "WARN", "(tcp6)"),
    (dns_server("udp", "3500007F:0035"), "port 53", "PASS", ""),
    (dns_server("udp", "00000000:0044"), "port 53", "PASS", ""),
]


@pytest.mark.parametrize(("change", "subject", "verdict", "words"), HOST_TROUBLE)
def test_trouble_with_the_host(host, change, subject, verdict, words):
    change(host)
    line = host.line(subject)
    assert line.verdict == verdict
    assert words in line.render()
    assert all(other.verdict != "FAIL" for other in host.verdicts().values())


def test_a_host_of_which_nothing_is_known(tmp_path):
    """Empty /proc, /sys and /dev: every line still answers."""
    verdicts = {line.verdict for line in FakeHost(tmp_path).verdicts().values()}
    assert verdicts == {"PASS", "WARN", "FAIL"}


def test_boot_probe(host):
    assert host.verdicts(boot_probe=lambda: "14 of 14 steps")["that a guest boots"].render().endswith("PASS (14 of 14 steps)")

    def broken():
        raise HostError("the probe guest hung at step pci", "send the log")

    line = host.verdicts(boot_probe=broken)["that a guest boots"]
    assert line.render().endswith("FAIL (the probe guest hung at step pci; send the log)")
    host.remove("/dev/kvm")
    assert host.verdicts(boot_probe=lambda: pytest.fail("called"))["that a guest boots"].verdict == "FAIL"


def test_the_verb(host, capsys):
    assert check.run_check([], host=host) == 0
    assert len(capsys.readouterr().out.splitlines()) == 20
    assert check.run_check(["--boot"], boot_probe=lambda: "fine", host=host) == 0
    assert "that a guest boots" in capsys.readouterr().out
    host.remove("/dev/kvm")
    assert check.run_check(["--json"], host=host) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["can_run_guests"] is False
    assert {"group": "KVM", "subject": "that /dev/kvm may be opened", "verdict": "FAIL", "note": "it does not exist",
            "hint": ""} in answer["checks"]
    with pytest.raises(UsageError, match="check takes no argument"):
        check.run_check(["now"], host=host)
    with pytest.raises(UsageError, match="unknown option"):
        check.run_check(["--jsno"], host=host)


def test_this_host_is_read_without_a_crash(capsys):
    assert check.run_check([]) in (0, 1)
    assert len(capsys.readouterr().out.splitlines()) >= 15


def test_capabilities_are_those_of_the_vmm_and_the_kernel():
    core = pytest.importorskip("kvmapp.core")
    assert core.REQUIRED == check.REQUIRED_CAPABILITIES
    header = "/usr/include/linux/kvm.h"
    with open(header, encoding="utf-8") as stream:
        numbers = dict(re.findall(r"#define (KVM_CAP_\w+)\s+(\d+)", stream.read()))
    for name, number in (check.REQUIRED_CAPABILITIES | check.STATE_CAPABILITIES).items():
        assert int(numbers[name]) == number


class TestWhyNoAccess:
    """Which folder or file lacks which bit for which user."""

    @pytest.fixture
    def file(self):
        root = Path(tempfile.mkdtemp(dir="/tmp"))   # pytest's own folders are closed to other users
        root.chmod(0o755)
        path = root / "home" / "disk.img"
        path.parent.mkdir()
        path.write_text("")
        yield path
        shutil.rmtree(root)

    def test_a_folder_that_may_not_be_searched(self, file):
        file.parent.chmod(0o700)
        assert why_no_access(str(file), 4, 54321, {54321}) == \
            f"user uid 54321 lacks search permission on {file.parent}"

    def test_a_file_that_may_not_be_written(self, file):
        file.chmod(0o644)
        assert why_no_access(str(file), 6, 54321, {54321}).startswith(
            f"user uid 54321 lacks write permission on {file} (mode 0644, ")
        assert "ACL" in why_no_access(str(file), 4, 54321, {54321})

    def test_the_group_counts(self, file):
        file.chmod(0o640)
        group = file.stat().st_gid
        assert "lacks read" in why_no_access(str(file), 4, 54321, {54321})
        assert "lacks write" in why_no_access(str(file), 6, 54321, {group})
        assert "ACL" in why_no_access(str(file), 4, 54321, {group})

    def test_a_file_to_be_made_wants_its_folder_writable(self, file):
        file.parent.chmod(0o755)
        assert f"lacks write permission on {file.parent}" in why_no_access(f"{file}.new", 6, 54321, {54321})

    def test_what_is_not_there(self, file):
        assert why_no_access(f"{file.parent}/none/x", 4, 54321, set()) == \
            f"{file.parent}/none: No such file or directory"


@pytest.mark.parametrize("verb", ["run", "check", "setup", "licenses", "daemon"])
def test_every_verb_knows_help(verb, capsys):
    try:
        assert dispatch([verb, "--help"]) == 0
    except SystemExit as ended:                 # argparse's own way
        assert ended.code == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"usage: kvmapp {verb}") and shown.err == ""


def test_what_programs_print(tmp_path):
    host = Host()
    assert host.output("/bin/echo", "a", "b") == "a b\n"
    assert host.output("/bin/sh", "-c", "echo a; exit 1") == "" and host.output(str(tmp_path / "none")) == ""
