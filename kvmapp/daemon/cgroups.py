"""A control group a domain: what the kernel's out-of-memory killer and the limits of limits.py go by.

Documentation/admin-guide/cgroup-v2.rst, and cgroup-v1/ for older hosts. The groups stand below a group of our own; as systemd's unit, in
that of a unit beside ours (init/systemd), delegated to us. Not in our unit's own: a group that hands controllers to its children takes
no processes, so systemd could not start the next daemon while domains run. A host without writable groups has none, which is no error.
"""
from __future__ import annotations

import os
import signal
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.daemon.limits import Limit

MOUNT = "/sys/fs/cgroup"
CONTROLLERS = ("memory", "cpu", "pids")
UNIT, DOMAINS_UNIT = "kvmapp.service", "kvmapp-domains.service"
NO_GROUPS = "this host has no control groups that kvmapp may write"


class Cgroups:
    """`bases`: the folder below which domains' groups are made, one a hierarchy."""

    def __init__(self, base: str = "kvmapp", mount: str = MOUNT):
        self.mount = mount
        self.unified = os.path.exists(f"{mount}/cgroup.controllers")
        self.of_systemd = False
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
        self.of_systemd = own.endswith(f"/{UNIT}")
        folder = self.mount + (f"{own.removesuffix(UNIT)}{DOMAINS_UNIT}" if self.of_systemd else f"/{base}")
        os.makedirs(folder, exist_ok=True)
        for parent in (self.mount, folder):
            for controller in CONTROLLERS:
                with suppress(OSError):     # this host is without it; the group still tells processes apart
                    write(f"{parent}/cgroup.subtree_control", f"+{controller}")
        return folder

    def prepare_v1(self, base: str) -> list[str]:
        bases = []
        for controller in CONTROLLERS:
            if os.path.isdir(f"{self.mount}/{controller}"):
                folder = f"{self.mount}/{controller}/{base}"
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

    def make(self, name: str) -> dict[str, int]:
        """The domain's groups before it has a process: open files that it joins them by, writing 0, under names for the zygote. What
        it takes of memory is then counted from the start. The descriptors are the caller's.
        """
        files: dict[str, int] = {}
        with suppress(OSError):         # then `join` tries again, when there is a process
            for number, base in enumerate(self.bases):
                os.makedirs(group(base, name), exist_ok=True)
                files[f"cgroup:{number}"] = os.open(f"{group(base, name)}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        return files

    def left_over(self, name: str) -> bool:
        """Whether there are groups of an earlier run, whose process is not wholly gone, with that run's limits."""
        return any(os.path.isdir(group(base, name)) for base in self.bases) and not self.remove(name)

    def limit(self, name: str, limits: list[Limit]) -> list[str]:
        """Sets the limits of the domain's group; a sentence on each that this host does not keep."""
        return [complaint for one in limits if (complaint := self.set(one, self.folder(one.controller, name)))]

    def limit_vcpus(self, name: str, threads: dict[int, int], limits: list[Limit]) -> list[str]:
        """The same for each vCPU, by its thread, which gets a group in the domain's."""
        complaints: dict[str, None] = {}            # of several vCPUs mostly the same one
        for number, thread in threads.items() if limits else ():
            domain = self.folder("cpu", name)
            folder = f"{domain}/vcpu{number}" if domain else None
            try:
                if domain and folder:
                    self.move_vcpu(domain, folder, thread)
            except OSError as error:
                complaints[f"{limits[-1].what} is not kept: {folder}: {error.strerror}"] = None
                continue
            complaints |= {complaint: None for one in limits if (complaint := self.set(one, folder))}
        return list(complaints)

    def move_vcpu(self, domain: str, folder: str, thread: int) -> None:
        os.makedirs(folder, exist_ok=True)
        if self.unified:                # threads of one process may be in several groups only where these are said to be threaded
            write(f"{folder}/cgroup.type", "threaded")
            write(f"{domain}/cgroup.subtree_control", "+cpu")
        write(f"{folder}/{'cgroup.threads' if self.unified else 'tasks'}", str(thread))

    def folder(self, controller: str, name: str) -> str | None:
        """The domain's group that this controller limits."""
        if self.unified:
            return group(self.bases[0], name) if self.bases else None
        return next((group(base, name) for base in self.bases if base.startswith(f"{self.mount}/{controller}/")), None)

    def set(self, limit: Limit, folder: str | None) -> str | None:
        if folder is None:
            return f"{limit.what} is not kept: {NO_GROUPS if not self.bases else f'this host has no controller {limit.controller}'}"
        path = f"{folder}/{limit.file}"
        try:
            write(path, limit.text)
        except OSError as error:
            if not os.path.exists(path):            # where a file cannot be made, to write one that is not there is not permitted
                return f"{limit.what} is not kept: this host has no {path}"
            return f"{limit.what} is not kept: {path} = {limit.text}: {error.strerror}"
        return None

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
        """Whether they are gone; not while the process is a zombie still. What it has left behind would hold its disks and taps: that goes,
        too."""
        for base in self.bases:
            kill_all(group(base, name))
        return all([remove_group(group(base, name)) for base in self.bases])

    def close(self, running: bool) -> None:
        """Takes our own groups away when no domain needs them."""
        if not running and not self.of_systemd:
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
    return unified[0] if unified else ""


def kill_all(folder: str) -> None:
    """Before Linux 5.14 one by one, and so until the next look at what they have started meanwhile."""
    with suppress(OSError):
        kill = os.open(f"{folder}/cgroup.kill", os.O_WRONLY | os.O_CLOEXEC)
        with open(kill, "w") as file:
            file.write("1")
        return
    with suppress(OSError), open(f"{folder}/cgroup.procs") as pids:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def remove_group(folder: str) -> bool:
    try:
        for entry in os.listdir(folder):
            if entry.startswith("vcpu"):
                os.rmdir(f"{folder}/{entry}")
        os.rmdir(folder)
    except FileNotFoundError:
        return True
    except OSError:
        return False                    # not empty
    return True


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
