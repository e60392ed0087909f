"""Counters of running domains: what their processes count, with what the kernel counts of the processes themselves.

A domain that does not tell its counters in a moment costs the query that moment once; the answer then bears the last ones that it
told and their age. What a domain process says is checked field by field before it is passed on.
"""
from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress

from kvmapp.daemon.domain import Domain
from kvmapp.daemon.process import cpu_times_of, resident_of
from kvmapp.errors import KvmappError
from kvmapp.values import is_label

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.config import DiskConfig, InterfaceConfig

PATIENCE = 0.5                          # seconds
COUNTER_LIMIT = 1 << 64
COUNTERS = {"reqs": "requests", "bytes": "bytes", "ns": "nanoseconds"}
LIST_LIMIT = 1024
# virsh's names of the guest's figures (dommemstat), out of those of virtio/balloon.pyx
MEMORY_FIGURES = {"swap_in": "swap_in", "swap_out": "swap_out", "major_fault": "major_faults", "minor_fault": "minor_faults",
                  "unused": "free_memory", "available": "total_memory", "usable": "available_memory", "disk_caches": "disk_caches",
                  "hugetlb_pgalloc": "hugetlb_allocations", "hugetlb_pgfail": "hugetlb_failures"}
FRESH = 2                               # seconds: older figures are asked for again
GUEST_PATIENCE = 0.05                   # seconds that a guest gets for its figures


def empty_stats(domain: Domain) -> dict:
    state, reason = domain.state
    return {"name": domain.name, "id": domain.id, "state": state, "reason": reason, "time": None, "age": None,
            "cpu_time_ns": None, "cpu_user_ns": None, "cpu_system_ns": None, "vcpus": [], "exits": {}, "disks": [],
            "interfaces": [], "balloon": None}


async def running_stats(domain: Domain) -> dict:
    process, config = domain.process, domain.config
    assert process
    if not process.silent:
        with suppress(KvmappError):             # then the last ones serve
            told = await process.ask("stats", PATIENCE)
            if config and config.balloon and count(figures_of(told).get("age", FRESH + 1)) > FRESH:
                await asyncio.sleep(GUEST_PATIENCE)     # by asking, the guest was told to find out
                told = await process.ask("stats", PATIENCE)
            domain.stats = (time.time(), time.monotonic(), told)
    if domain.process is not process:           # it has ended meanwhile
        return empty_stats(domain)
    when, measured, told = domain.stats or (None, 0.0, {})
    times = cpu_times_of(process.pid)
    devices = table(told.get("devices"))
    return {
        **empty_stats(domain), "time": when, "age": None if when is None else time.monotonic() - measured,
        "cpu_time_ns": sum(times) if times else None, "cpu_user_ns": times[0] if times else None,
        "cpu_system_ns": times[1] if times else None,
        "vcpus": [{**{name: place[name] for name in ("number", "state", "cpu_time_ns")}, "kvm": kvm_counters(told, place["number"])}
                  for place in vcpu_places(process.pid, config.vcpus if config else 0)],
        "exits": exits(told.get("vcpus")),
        "disks": [disk_counts(disk, table(devices.get(disk.name))) for disk in config.disks] if config else [],
        "interfaces": [card_counts(domain, card, table(devices.get(f"net{card.index}"))) for card in config.interfaces]
        if config else [],
        "balloon": memory_counts(domain, figures_of(told), when) if config and config.balloon else None}


def figures_of(told: dict) -> dict:
    return table(table(told.get("devices")).get("balloon"))


def memory_counts(domain: Domain, figures: dict, when: float | None) -> dict:
    """Bytes, but for the faults and huge pages; what the guest does not tell is null."""
    counts = {name: count(figures[key]) if key in figures else None for name, key in MEMORY_FIGURES.items()}
    last_update = int(when) - count(figures["age"]) if when and "age" in figures else None
    assert domain.process and domain.config
    return {"current": domain.current_memory(), "maximum": domain.config.memory, "rss": resident_of(domain.process.pid),
            **counts, "last_update": last_update}


def table(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def count(value: object) -> int:
    return value if type(value) is int and 0 <= value < COUNTER_LIMIT else 0


def kvm_counters(told: dict, number: int) -> dict[str, int]:
    """What the kernel counts of a vCPU, by its names (kvmstats.py)."""
    vcpus = told.get("vcpus")
    one = table(vcpus[number]) if isinstance(vcpus, list) and number < len(vcpus) else {}
    return {name: count(value) for name, value in list(table(one.get("kvm")).items())[:LIST_LIMIT] if is_label(name)}


def exits(vcpus: object) -> dict[str, int]:
    """By reason, all vCPUs together."""
    sums: dict[str, int] = {}
    for vcpu in vcpus[:LIST_LIMIT] if isinstance(vcpus, list) else ():
        for reason, number in table(table(vcpu).get("exits")).items():
            if is_label(reason) and len(sums) < LIST_LIMIT:
                sums[reason] = sums.get(reason, 0) + count(number)
    return sums


def disk_counts(disk: DiskConfig, told: dict) -> dict:
    """virsh's counters out of those of block/backend.pyx."""
    counts: dict[str, object] = {"name": disk.name, "source": disk.source}
    for prefix, operation, fields in (("rd", "read", ("reqs", "bytes", "ns")), ("wr", "write", ("reqs", "bytes", "ns")),
                                      ("fl", "flush", ("reqs", "ns"))):
        one = table(told.get(operation))
        counts |= {f"{prefix}_{field}": count(one.get(COUNTERS[field])) for field in fields}
    return {**counts, "errors": sum(count(table(one).get("errors")) for one in told.values())}


def card_counts(domain: Domain, card: InterfaceConfig, told: dict) -> dict:
    taps = domain.record.taps if domain.record else {}
    counters = {f"{way}_{what}": count(told.get(f"{way}_{what}")) for way in ("rx", "tx") for what in ("bytes", "packets", "drop")}
    return {"index": card.index, "target": taps.get(str(card.index), card.target), "mac": card.mac, **counters}


def vcpu_places(pid: int, count: int) -> list[dict]:
    """On which of the host's CPUs each vCPU thread was last, its time, and where it may run; the thread is called vcpuN."""
    online = os.cpu_count() or 1
    threads = vcpu_threads(pid) if pid else {}
    tick = 10**9 // os.sysconf("SC_CLK_TCK")
    places = []
    for number in range(count):
        thread, cpu, spent = threads.get(number, (0, None, 0))
        try:
            allowed = os.sched_getaffinity(thread) if thread else set(range(online))
        except OSError:
            allowed = set(range(online))
        places.append({"number": number, "state": "running" if thread else "offline", "cpu": cpu, "cpu_time_ns": spent * tick,
                       "affinity": "".join("y" if one in allowed else "-" for one in range(online))})
    return places


def vcpu_numbers(pid: int) -> dict[int, int]:
    """vCPU number to thread id."""
    return {number: thread for number, (thread, _cpu, _spent) in vcpu_threads(pid).items()}


def vcpu_threads(pid: int) -> dict[int, tuple[int, int, int]]:
    """vCPU number to thread id, CPU and ticks: fields 39, 14 and 15 of proc_pid_stat(5)."""
    threads = {}
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/stat", "rb") as stat:
                head, _, rest = stat.read().rpartition(b")")
            name = head.partition(b"(")[2].removeprefix(b"vcpu").lstrip(b" -")
            if name.isdigit():
                parts = rest.split()
                threads[int(name)] = (int(thread), int(parts[36]), int(parts[11]) + int(parts[12]))
    return threads
