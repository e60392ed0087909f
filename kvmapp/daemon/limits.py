"""[cputune] and [memtune] as the files of control groups have them, version 2 and version 1; cgroups.py writes them.

Documentation/admin-guide/cgroup-v2.rst; cgroup-v1/memory.rst and scheduler/sched-bwc.rst. Shares and global quota are the domain's
group's; quota is each vCPU's, whose thread has a group of its own in it, as in libvirt. What a file leaves at its default is not
written, so that a host without a controller complains of nothing that nobody asked for.
"""
from __future__ import annotations

from kvmapp.config import CputuneConfig, MemtuneConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.config import DomainConfig

WEIGHT_MOST = 10000


class Limit:
    """`text` in `file` of a group of `controller`, because the domain's file says `what`."""
    __slots__ = ("controller", "file", "text", "what")

    def __init__(self, what: str, controller: str, file: str, text: str):
        self.what, self.controller, self.file, self.text = what, controller, file, text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Limit) and (self.file, self.text) == (other.file, other.text)

    __hash__ = None                                             # type: ignore[assignment]


class Tunables:
    """What of a configuration becomes limits; without one, the kernel's defaults."""

    def __init__(self, config: DomainConfig | None = None):
        self.cpu = config.cputune if config else CputuneConfig()
        self.memory = config.memtune if config else MemtuneConfig()


def group_limits(new: Tunables, old: Tunables, unified: bool) -> list[Limit]:
    """What to write into the domain's group, in this order, to come from `old` to `new`."""
    limits = unified_limits if unified else v1_limits
    before = limits(old)
    changed = [limit for limit in limits(new) if limit not in before]
    # v1 wants memory.limit <= memory.memsw.limit at each moment: the larger one goes first when they grow.
    if not unified and most(new.memory.hard_limit) > most(old.memory.hard_limit):
        changed.reverse()
    return changed


def no_limits(unified: bool) -> list[Limit]:
    """All that `group_limits` ever writes, at its default."""
    limits = unified_limits(Tunables()) if unified else v1_limits(Tunables())
    return limits[::-1]                 # v1: memory.memsw.limit grows first


def vcpu_limits(new: Tunables, old: Tunables, unified: bool) -> list[Limit]:
    """The same for the group of each vCPU."""
    before = bandwidth("quota", old.cpu.quota, old.cpu.period, unified)
    return [limit for limit in bandwidth("quota", new.cpu.quota, new.cpu.period, unified) if limit not in before]


def unified_limits(tunables: Tunables) -> list[Limit]:
    cpu, memory = tunables.cpu, tunables.memory
    swap = memory.swap_hard_limit - memory.hard_limit if memory.swap_hard_limit and memory.hard_limit else None
    return [Limit("[cputune] shares", "cpu", "cpu.weight", str(weight(cpu.shares))),
            *bandwidth("global_quota", cpu.global_quota, cpu.global_period, True),
            Limit("[memtune] hard_limit", "memory", "memory.max", size(memory.hard_limit, "max")),
            Limit("[memtune] soft_limit", "memory", "memory.high", size(memory.soft_limit, "max")),
            Limit("[memtune] swap_hard_limit", "memory", "memory.swap.max", size(swap, "max"))]


def v1_limits(tunables: Tunables) -> list[Limit]:
    cpu, memory = tunables.cpu, tunables.memory
    return [Limit("[cputune] shares", "cpu", "cpu.shares", str(cpu.shares)),
            *bandwidth("global_quota", cpu.global_quota, cpu.global_period, False),
            Limit("[memtune] soft_limit", "memory", "memory.soft_limit_in_bytes", size(memory.soft_limit, "-1")),
            Limit("[memtune] hard_limit", "memory", "memory.limit_in_bytes", size(memory.hard_limit, "-1")),
            Limit("[memtune] swap_hard_limit", "memory", "memory.memsw.limit_in_bytes", size(memory.swap_hard_limit, "-1"))]


def bandwidth(key: str, quota: int, period: int, unified: bool) -> list[Limit]:
    if unified:
        return [Limit(f"[cputune] {key}", "cpu", "cpu.max", f"{'max' if quota < 0 else quota} {period}")]
    return [Limit(f"[cputune] {key.replace('quota', 'period')}", "cpu", "cpu.cfs_period_us", str(period)),
            Limit(f"[cputune] {key}", "cpu", "cpu.cfs_quota_us", str(quota))]


def weight(shares: int) -> int:
    """1024 shares are a weight of 100: what a group has that nobody touched."""
    return min(max(1, shares * 100 // 1024), WEIGHT_MOST)


def size(value: int | None, unlimited: str) -> str:
    return unlimited if value is None else str(value)


def most(limit: int | None) -> float:
    return float("inf") if limit is None else limit
