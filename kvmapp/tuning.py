"""Where the threads of a domain run and where its memory comes from: [cputune], [vcpu N] and [numatune], applied to this process.

A thread inherits the CPUs of the one that makes it (sched_setaffinity(2)), and everything here is made by the main thread: it takes
emulatorpin's CPUs before there are I/O threads, and those of a vCPU for the moment in which it makes that vCPU's thread. So no
thread ever runs where it should not, and none has to do anything for it.

A CPU or node that is not there stops a start, and is only told when a saved guest is restored, which may be on another host. Leaves
out: limits, which are the daemon's (daemon/limits.py), and the kernel's own threads that work for a guest (vhost, io_uring).
"""
import os

from kvmapp.cpuset import CPUS_MOST, members, ranges
from kvmapp.errors import HostError
from kvmapp.hostinfo import read_small

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmapp.config import DomainConfig

POLICIES = {"preferred": 1, "strict": 2, "interleave": 3}       # mbind(2): MPOL_PREFERRED, MPOL_BIND, MPOL_INTERLEAVE
NODES = "/sys/devices/system/node"
HUGE_KIB = {"2M": 2048, "1G": 1048576}


class Tuning:
    """The places that a configuration asks for. `warn` hears of those that this host lacks, which are then left out; without it they
    are HostErrors.
    """

    def __init__(self, config: "DomainConfig", warn: "Callable[[str], None] | None" = None):
        self.warn = warn
        self.everywhere = os.sched_getaffinity(0)       # where we run unless the file says otherwise
        self.has_quota = config.cputune.quota >= 0
        self.read_cpus(config)
        self.nodes = self.usable_nodes(config)
        self.policy = POLICIES[config.numatune.mode] if self.nodes and config.numatune else 0

    def read_cpus(self, config: "DomainConfig") -> None:
        cputune = config.cputune
        wanted = {"[cputune] cpuset": cputune.cpuset, "[cputune] emulatorpin": cputune.emulatorpin,
                  **{f"[{pin.heading}] cpuset": pin.cpuset for pin in config.vcpu_pins}}
        found = {what: self.usable_cpus(what, text) for what, text in wanted.items() if text}
        rest = found.get("[cputune] cpuset") or self.everywhere
        self.emulator = found.get("[cputune] emulatorpin") or rest
        self.vcpus = [found.get(f"[vcpu {index}] cpuset") or rest for index in range(config.vcpus)]

    def usable_cpus(self, what: str, text: str) -> set[int]:
        wanted = set(members(text))
        missing = wanted - available_cpus()
        if missing:
            there = set(members(read_small("/sys/devices/system/cpu/online")))
            many = "s" if len(missing) > 1 else ""
            why = f"this host has no CPU{many} {ranges(sorted(missing - there))}" if missing - there else \
                f"CPU{many} {ranges(sorted(missing))} may not be used by kvmapp (a cpuset control group says so)"
            return self.lack(f"{what} = {text}: {why}", f"there are CPUs {ranges(sorted(available_cpus()))}", wanted - missing)
        return wanted

    def usable_nodes(self, config: "DomainConfig") -> list[int]:
        if config.numatune is None:
            return []
        text = config.numatune.nodeset
        wanted, there = set(members(text)), memory_nodes()
        if missing := wanted - there:
            many = "s" if len(missing) > 1 else ""
            wanted = self.lack(f"[numatune] nodeset = {text}: this host has no NUMA node{many} {ranges(sorted(missing))} with memory for "
                               "kvmapp", f"there are nodes {ranges(sorted(there))}", set())
        if wanted and config.numatune.mode == "strict" and config.hugepages != "no":
            check_pool(wanted, HUGE_KIB[config.hugepages], config.memory)
        return sorted(wanted)

    def lack(self, message: str, hint: str, rest: set[int]) -> set[int]:
        """What is left to go by."""
        if self.warn is None:
            raise HostError(message, hint)
        self.warn(f"{message}; {hint}: " + (f"going by {ranges(sorted(rest))}" if rest else "going without"))
        return rest

    # Applying it. Raises HostError.

    def take_place(self) -> None:
        """For this thread, and what it makes from now on."""
        if self.emulator != os.sched_getaffinity(0):
            move(0, self.emulator, "its process")

    def start_vcpus(self, vcpus: list) -> None:
        for vcpu in vcpus:
            self.start_vcpu(vcpu)
        if self.has_quota:                  # the daemon puts their threads into groups, and finds them by their names
            for vcpu in vcpus:
                number_of(vcpu)

    def start_vcpu(self, vcpu) -> None:
        """Starts the vCPU's thread at its place."""
        own, wanted = os.sched_getaffinity(0), self.vcpus[vcpu.index]
        if own == wanted:
            vcpu.start()
            return
        move(0, wanted, f"vCPU {vcpu.index}")
        try:
            vcpu.start()
        finally:
            os.sched_setaffinity(0, own)

    def change(self, config: "DomainConfig", vcpus: list) -> None:
        """Moves the threads of the running machine to where this configuration has them; none is moved when it asks for what is not
        there.
        """
        self.warn = None
        self.read_cpus(config)
        numbers = [number_of(vcpu) for vcpu in vcpus]
        for index, number in enumerate(numbers):
            move(number, self.vcpus[index], f"vCPU {index}")
        move(0, self.emulator, "its process")
        for task in os.listdir("/proc/self/task"):
            if int(task) not in numbers:
                try:
                    os.sched_setaffinity(int(task), self.emulator)
                except OSError:
                    pass                    # it has ended, or is one of io_uring's, which the kernel places


def move(thread: int, cpus: set[int], what: str) -> None:
    try:
        os.sched_setaffinity(thread, cpus)
    except OSError as error:
        raise HostError(f"Cannot let {what} run on CPUs {ranges(sorted(cpus))}: {error.strerror}",
                        f"there are CPUs {ranges(sorted(available_cpus()))}") from None


def number_of(vcpu) -> int:
    """The kernel's number of its thread, which the thread tells at its beginning, when it has its name."""
    while not vcpu.thread_number:
        os.sched_yield()
    return vcpu.thread_number


def available_cpus() -> set[int]:
    """Where this thread could go: the kernel takes away what is not there, or not in our cpuset control group. An affinity that was
    set before us (taskset) is none of these limits.
    """
    own = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, range(CPUS_MOST))
        return os.sched_getaffinity(0)
    except OSError:                         # forbidden altogether, by a seccomp filter
        return own
    finally:
        try:
            os.sched_setaffinity(0, own)
        except OSError:
            pass


def memory_nodes() -> set[int]:
    """Nodes with memory that we may use (proc(5), Mems_allowed_list); a kernel without NUMA shows one."""
    there = set(members(read_small(f"{NODES}/has_memory") or read_small(f"{NODES}/has_normal_memory") or "0"))
    for line in read_small("/proc/self/status").splitlines():
        if line.startswith("Mems_allowed_list:"):
            there &= set(members(line.partition(":")[2]))
    return there


def check_pool(nodes: set[int], kib: int, size: int) -> None:
    """mmap(2) asks the host's whole pool of huge pages; a page that its node then lacks would be a SIGBUS in the guest's first access."""
    free = sum(int(read_small(f"{NODES}/node{node}/hugepages/hugepages-{kib}kB/free_hugepages") or 0) for node in nodes)
    if free * kib << 10 < size:
        first = min(nodes)
        raise HostError(f"[numatune] nodeset = {ranges(sorted(nodes))}: {free} huge pages of {kib} KiB are free there, and the guest "
                        f"needs {size // (kib << 10)}",
                        f"echo N > {NODES}/node{first}/hugepages/hugepages-{kib}kB/nr_hugepages makes N of them on node {first}")
