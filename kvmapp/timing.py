"""`kvmapp run --timing`: where the time of a start went, as a table on standard error when the guest has ended, and how often its
vCPUs left the guest.

A guest marks its own points by a line "timing: NAME" on the debug port (--debug-console). Left out: markers of a daemon's domains.
"""
from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmapp.machine import Machine

GUEST_MARK = "debug: timing: "          # how the debug port's line comes into the log
MARKS_MOST = 1000                       # of a guest that never stops


class Timing:
    """Points in time, by name; ns of CLOCK_MONOTONIC."""

    def __init__(self) -> None:
        self.vcpus: list[dict] = []     # their counters, at the end
        self.marks = [("process started", process_start()), ("options read", time.monotonic_ns())]

    def mark(self, name: str, when: int = 0) -> None:
        if len(self.marks) < MARKS_MOST:
            self.marks.append((name, when or time.monotonic_ns()))

    def hearing(self, log: Callable[[str], None]) -> Callable[[str], None]:
        """The same log; a guest's marker that goes by is marked."""
        def listener(text: str) -> None:
            if text.startswith(GUEST_MARK):
                self.mark(f"guest: {text.removeprefix(GUEST_MARK)}")
            log(text)
        return listener

    def end(self, machine: Machine) -> None:
        """The guest has ended; its machine is still there."""
        self.mark("end")
        self.vcpus = machine.stats()["vcpus"]
        first = machine.vm.vcpus[0]
        for name, when in (("first vCPU enters the guest", first.first_entry), ("first exit", first.first_exit)):
            if when:
                self.marks.append((name, when))

    def table(self) -> str:
        """A line a mark, in order: ms since the process started, and since the mark before."""
        marks = sorted(self.marks, key=lambda mark: mark[1])
        start = before = marks[0][1]
        lines = ["timing, in ms since the process started, and since the line before:"]
        for name, when in marks:
            lines.append(f"{(when - start) / 1e6:10.1f} {(when - before) / 1e6:+10.1f}  {name}")
            before = when
        return "\n".join([*lines, *self.exits()]) + "\n"

    def exits(self) -> list[str]:
        """A line a reason for which KVM called us, and a line a counter of the kernel's own that is not zero; all vCPUs together."""
        sums: dict[str, int] = {}
        for vcpu in self.vcpus:
            counters = {f"to kvmapp: {reason}": number for reason, number in vcpu["exits"].items()}
            for name, number in {**counters, **vcpu["kvm"]}.items():
                sums[name] = sums.get(name, 0) + number
        lines = [f"{number:10} {'':10}  {name}" for name, number in sums.items() if number]
        return ["exits of the vCPUs, and what else KVM counts of them:", *lines] if lines else []


def process_start() -> int:
    """When this process was made, to a clock tick (mostly 10 ms): proc_pid_stat(5), field 22."""
    with open("/proc/self/stat", "rb") as stat:
        ticks = int(stat.read().rpartition(b")")[2].split()[19])
    age = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - ticks * 10**9 // os.sysconf("SC_CLK_TCK")
    return time.monotonic_ns() - age
