"""What this host is and allows, read from its files and a few programs; nothing is changed.

`Host` is the host as seen through a root folder and a few calls, so that a test can show the code any host there is.
"""
from __future__ import annotations

import os

from kvmapp.cpuset import members

IO_URING_SETUP = 425                        # the same number on every architecture
PATIENCE = 10.0                             # seconds for a program that only prints


class Host:
    """Paths are absolute and looked up below `root`."""

    def __init__(self, root: str = "/", uid: int | None = None, groups: set[int] | None = None):
        self.root = root
        self.uid = os.geteuid() if uid is None else uid
        self.groups = {os.getegid(), *os.getgroups()} if groups is None else groups

    def path(self, path: str) -> str:
        return os.path.join(self.root, path.lstrip("/"))

    def exists(self, *paths: str) -> bool:
        return any(os.path.exists(self.path(path)) for path in paths)

    def text(self, path: str) -> str:
        """A file's text; empty when it cannot be read."""
        try:
            with open(self.path(path), encoding="utf-8", errors="replace") as stream:
                return stream.read()
        except OSError:
            return ""

    def stat(self, path: str) -> os.stat_result:
        return os.stat(self.path(path))

    def open(self, path: str) -> int:
        return os.open(self.path(path), os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, fd: int, request: int, argument: int = 0) -> int:
        import fcntl
        return fcntl.ioctl(fd, request, argument)

    def program(self, name: str) -> str | None:
        """Where a program is; administrators' folders are looked into even when PATH lacks them."""
        folders = [*os.environ.get("PATH", "").split(":"), "/usr/sbin", "/sbin", "/usr/bin", "/bin"]
        for folder in filter(None, folders):
            if os.access(self.path(f"{folder}/{name}"), os.X_OK):
                return f"{folder}/{name}"
        return None

    def output(self, *words: str) -> str:
        """What a program prints; empty when it fails."""
        import subprocess
        try:
            return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=PATIENCE,
                                  check=True, env={"LC_ALL": "C"}).stdout
        except (OSError, subprocess.SubprocessError):
            return ""

    def io_uring_error(self) -> int:
        """0 when an io_uring can be made, else the errno."""
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.syscall(IO_URING_SETUP, 1, ctypes.create_string_buffer(120))      # struct io_uring_params
        if fd < 0:
            return ctypes.get_errno()
        os.close(fd)
        return 0

    def cpu(self) -> dict[str, str]:
        """The first CPU's lines of /proc/cpuinfo."""
        first = self.text("/proc/cpuinfo").partition("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        return {name.strip(): value.strip() for name, _, value in pairs}

    def meminfo(self) -> dict[str, int]:
        """/proc/meminfo: bytes, and plain counts where the line has no unit."""
        values = {}
        for line in self.text("/proc/meminfo").splitlines():
            name, _, value = line.partition(":")
            number, _, unit = value.strip().partition(" ")
            if number.isdigit():
                values[name] = int(number) * (1024 if unit == "kB" else 1)
        return values

    def has_module(self, name: str) -> bool | None:
        """True when the kernel has the module, loaded, built in or to be loaded; None when it cannot be told."""
        if self.exists(f"/sys/module/{name}"):
            return True
        folder = f"/lib/modules/{self.text('/proc/sys/kernel/osrelease').strip()}"
        listed = self.text(f"{folder}/modules.builtin") + self.text(f"{folder}/modules.dep")
        if not listed:
            return None
        return any(line.partition(":")[0].rpartition("/")[2].partition(".")[0] == name for line in listed.splitlines())

    def package_tool(self) -> str:
        """How this host installs a package: "dnf", "yum" or "apt"; empty when it is neither family."""
        release = dict(line.replace('"', "").partition("=")[::2] for line in self.text("/etc/os-release").splitlines())
        family = {release.get("ID", ""), *release.get("ID_LIKE", "").split()}
        if family & {"debian", "ubuntu"}:
            return "apt"
        if family & {"rhel", "centos", "fedora"}:
            return "dnf" if self.program("dnf") else "yum"
        return ""


def user_name(uid: int) -> str:
    import pwd
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def group_name(gid: int) -> str:
    import grp
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"gid {gid}"


def allowed(status: os.stat_result, uid: int, groups: set[int], bit: int) -> bool:
    """Whether the mode's class for this user has `bit` (4 read, 2 write, 1 execute or search)."""
    shift = 6 if status.st_uid == uid else 3 if status.st_gid in groups else 0
    return bool(status.st_mode >> shift & bit)


def why_no_access(path: str, bits: int = 4, uid: int | None = None, groups: set[int] | None = None) -> str:
    """The first thing on the way to `path` that keeps the user (this process's, if not given) out, in words."""
    uid = os.geteuid() if uid is None else uid
    groups = {os.getegid(), *os.getgroups()} if groups is None else groups
    path = os.path.abspath(path)
    folder = "/"
    for part in ["", *os.path.dirname(path).split("/")[1:]]:
        folder = os.path.join(folder, part)
        try:
            status = os.stat(folder)
        except OSError as error:
            return f"{folder}: {error.strerror}"
        if uid and not allowed(status, uid, groups, 1):
            return f"user {user_name(uid)} lacks search permission on {folder.rstrip('/') or '/'}"
    try:
        status = os.stat(path)
    except FileNotFoundError:
        status = os.stat(folder)
        path, bits = folder, 2
    for bit, word in ((4, "read"), (2, "write"), (1, "execute")):
        if uid and bits & bit and not allowed(status, uid, groups, bit):
            return (f"user {user_name(uid)} lacks {word} permission on {path} "
                    f"(mode {status.st_mode & 0o7777:04o}, {user_name(status.st_uid)}:{group_name(status.st_gid)})")
    return f"the mode bits allow it: look for an ACL, SELinux or AppArmor rule, or a read-only mount, on {path}"


# What the host is: nodeinfo, nodecpustats, nodememstats, capabilities.

def read_small(path: str) -> str:
    """A file of /proc or /sys, stripped; empty when it is not there."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20).strip()
    except OSError:
        return ""


def cpu_blocks() -> list[dict[str, str]]:
    """/proc/cpuinfo, one dictionary a CPU that is online."""
    blocks = []
    for block in read_small("/proc/cpuinfo").split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        blocks.append({key.strip(): value.strip() for key, _, value in pairs})
    return [block for block in blocks if "processor" in block]


def meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    pairs = (line.split() for line in read_small("/proc/meminfo").splitlines())
    return {words[0].rstrip(":"): int(words[1]) << (10 if words[-1] == "kB" else 0) for words in pairs if len(words) > 1}


def numa_cells() -> list[dict]:
    """[{id, memory, cpus}]; a host without NUMA is one cell."""
    base = "/sys/devices/system/node"
    nodes = sorted(int(name[4:]) for name in os.listdir(base) if name[4:].isdigit()) if os.path.isdir(base) else []
    cells = []
    for node in nodes:
        total = [line.split()[3] for line in read_small(f"{base}/node{node}/meminfo").splitlines() if " MemTotal:" in line]
        cells.append({"id": node, "memory": int(total[0]) << 10 if total else 0,
                      "cpus": members(read_small(f"{base}/node{node}/cpulist"))})
    return cells or [{"id": 0, "memory": meminfo().get("MemTotal", 0),
                      "cpus": [int(block["processor"]) for block in cpu_blocks()]}]


def node_info() -> dict[str, object]:
    """What `nodeinfo` shows, in virsh's sense: sockets a cell, cores a socket, threads a core."""
    blocks = cpu_blocks()
    cells = len(numa_cells())
    packages = {block.get("physical id", "0") for block in blocks}
    cores = {(block.get("physical id", "0"), block.get("core id", block["processor"])) for block in blocks}
    machine = os.uname()
    return {"model": machine.machine, "cpus": len(blocks), "mhz": round(float(blocks[0].get("cpu MHz", "0"))) if blocks else 0,
            "sockets": max(1, len(packages) // cells), "cores": max(1, len(cores) // max(1, len(packages))),
            "threads": max(1, len(blocks) // max(1, len(cores))), "numa_cells": cells,
            "memory": meminfo().get("MemTotal", 0), "hostname": machine.nodename,
            "cpu_name": blocks[0].get("model name", "") if blocks else ""}


def cpu_times() -> list[dict]:
    """Time since boot: the sum of all CPUs (number None), then each, as proc_stat(5) counts it."""
    tick = 10**9 // os.sysconf("SC_CLK_TCK")
    found = []
    for line in read_small("/proc/stat").splitlines():
        name, *fields = line.split()
        if name.startswith("cpu"):
            user, nice, system, idle, iowait, irq, softirq, *_ = (int(field) * tick for field in fields)
            found.append({"number": int(name[3:]) if name[3:] else None, "user_ns": user + nice,
                          "system_ns": system + irq + softirq, "idle_ns": idle, "iowait_ns": iowait})
    return found


def memory_figures() -> dict[str, int]:
    figures = meminfo()
    return {"total": figures.get("MemTotal", 0), "free": figures.get("MemFree", 0), "buffers": figures.get("Buffers", 0),
            "cached": figures.get("Cached", 0), "available": figures.get("MemAvailable", figures.get("MemFree", 0))}


def virtualization() -> str | None:
    """vmx (Intel), svm (AMD), or None where KVM would have to interpret guest code."""
    flags = cpu_blocks()[0].get("flags", "").split() if cpu_blocks() else []
    return next((flag for flag in ("vmx", "svm") if flag in flags), None)


def boot_id() -> str:
    """Another one after each boot of the host."""
    return read_small("/proc/sys/kernel/random/boot_id")
