"""A control group a domain: what the kernel's out-of-memory killer and the limits of later versions go by.

Documentation/admin-guide/cgroup-v2.rst, and cgroup-v1/ for older hosts. Under systemd the groups stand in the delegated group of
our unit; else below a group of our own. A host without writable groups has none, and that is no error.
"""
from __future__ import annotations

import os
from contextlib import suppress

MOUNT = "/sys/fs/cgroup"
V1_CONTROLLERS = ("memory", "cpu", "pids")
V2_CONTROLLERS = "+memory +cpu +pids"


class Cgroups:
    """`bases`: the folder below which domains' groups are made, one a hierarchy."""

    def __init__(self, base: str = "kvmapp"):
        self.unified = os.path.exists(f"{MOUNT}/cgroup.controllers")
        self.bases: list[str] = []
        try:
            if self.unified:
                self.bases = [self.prepare_unified(base)]
            else:
                self.bases = self.prepare_v1(base)
        except OSError:
            self.bases = []

    def prepare_unified(self, base: str) -> str:
        own = own_group()
        folder = f"{MOUNT}{own}" if own.endswith(".service") else f"{MOUNT}/{base}"
        if own.endswith(".service"):
            # A group that hands controllers to its children holds no processes itself.
            os.makedirs(f"{folder}/daemon", exist_ok=True)
            write(f"{folder}/daemon/cgroup.procs", "0")
        else:
            os.makedirs(folder, exist_ok=True)
        for control in (f"{MOUNT}/cgroup.subtree_control", f"{folder}/cgroup.subtree_control"):
            with suppress(OSError):  # then the group is without these limits; it still tells its processes apart
                write(control, V2_CONTROLLERS)
        return folder

    def prepare_v1(self, base: str) -> list[str]:
        bases = []
        for controller in V1_CONTROLLERS:
            if os.path.isdir(f"{MOUNT}/{controller}"):
                folder = f"{MOUNT}/{controller}/{base}"
                os.makedirs(folder, exist_ok=True)
                bases.append(folder)
        return bases

    def join(self, name: str, pid: int) -> None:
        """Makes the domain's groups and moves its process into them. May take the kernel 30 ms a hierarchy (it waits for every
        CPU), so it is done beside the start; what a domain takes of memory before is little.
        """
        if self.joined(name, pid):
            return
        for base in self.bases:
            folder = group(base, name)
            try:
                os.makedirs(folder, exist_ok=True)
                write(f"{folder}/cgroup.procs", str(pid))
            except OSError:             # the process has ended
                remove_group(folder)

    def joined(self, name: str, pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/cgroup") as lines:
                return sum(line.rstrip("\n").endswith(f"/domain-{name}") for line in lines) >= len(self.bases)
        except OSError:
            return True                 # it has ended

    def oom_kills(self, name: str) -> int:
        """How often the kernel killed in the domain's group for want of memory."""
        for base in self.bases:
            for file in ("memory.events", "memory.oom_control"):
                try:
                    with open(f"{group(base, name)}/{file}") as lines:
                        counts = dict(line.split() for line in lines)
                except (OSError, ValueError):
                    continue
                return int(counts.get("oom_kill", 0))
        return 0

    def remove(self, name: str) -> bool:
        """Whether they are gone; not while the process is a zombie still."""
        return all([remove_group(group(base, name)) for base in self.bases])

    def close(self, running: bool) -> None:
        """Takes our own groups away when no domain needs them."""
        if not running and not own_group().endswith(".service"):
            for base in self.bases:
                remove_group(base)


def group(base: str, name: str) -> str:
    return f"{base}/domain-{name}"


def own_group() -> str:
    """This process's group in the unified hierarchy: /system.slice/kvmapp.service."""
    try:
        with open("/proc/self/cgroup") as lines:
            unified = [line.rstrip("\n")[3:] for line in lines if line.startswith("0::")]
    except OSError:
        return ""
    return unified[0].removesuffix("/daemon") if unified else ""


def remove_group(folder: str) -> bool:
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        return True
    except OSError:
        return False                    # not empty
    return True


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
