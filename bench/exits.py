"""What an exit costs: the same guest loop of port and memory-mapped accesses under our run loop and Bus, and under plain C.

Method: both VMMs run the same guest bytes (bench/guests/exits.S) from entry to triple fault, in turns, so that a busy moment of
the host falls on both. A round is one run of each; the table shows the median and the best of the rounds, per exit, and the median
of the rounds' ratios and (in brackets) the ratio of the best. CPU time is the better figure on a busy host: a process that waits
its turn spends none.
    python -m bench exits [--rounds N] [--seconds S]
The guest and the C VMM are built into bench/results, so that after one run here they also serve where there is no gcc (the lab).
"""
import argparse
import select
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

from kvmapp.core import Kvm, Vm
from kvmapp.devices import Device
from kvmapp.memory import GuestMemory

HERE = Path(__file__).parent
LOOPS = ["port write", "port read", "MMIO write", "MMIO read"]
CODE, ZEROES, PORT, ADDRESS = 0x1000, 0x2000, 0x80, 0xC000_0000              # as in exits.c
GOAL = 1.05
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    wall: float                                      # nanoseconds an exit
    cpu: float


class Entry:
    """Flat 32-bit protected mode at one of the loops."""

    mode, rsp = "protected", 0x8000
    rax = rsi = cr3 = gdt_base = gdt_limit = 0
    rbx, rdx, rdi = ZEROES, PORT, ADDRESS

    def __init__(self, loop: int, count: int):
        self.rip, self.rcx = CODE + loop * 64, count


def build() -> tuple[Path, Path]:
    """The guest's code and the C VMM, made anew when their sources are."""
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    guest_source, vmm_source, guest, code, vmm = (HERE / "guests/exits.S", HERE / "exits.c", folder / "exits.o",
                                                  folder / "exits.bin", folder / "exits")
    if is_older(code, guest_source):
        subprocess.run(["gcc", "-m32", "-c", "-o", guest, guest_source], check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", guest, code], check=True)
    if is_older(vmm, vmm_source):
        subprocess.run(["gcc", "-O2", "-Wall", "-o", vmm, vmm_source], check=True)
    return code, vmm


def is_older(product: Path, source: Path) -> bool:
    return not product.exists() or product.stat().st_mtime < source.stat().st_mtime


def run_plain_c(vmm: Path, code: Path, loop: int, count: int) -> Sample:
    words = subprocess.run([vmm, code, str(loop), str(count)], check=True, capture_output=True, text=True).stdout.split()
    return Sample(int(words[0]) / count, int(words[1]) / count)


def run_kvmapp(code: bytes, loop: int, count: int) -> Sample:
    memory = GuestMemory(16 << 20)
    memory.write(CODE, code)
    vm = Vm(Kvm(), memory)
    vm.add_vcpu(vm.kvm.supported_cpuid())
    vm.pio.map(PORT, 1, Device())
    vm.mmio.map(ADDRESS, 0x1000, Device())
    vm.set_entry(Entry(loop, count))
    try:
        wall, cpu = time.monotonic_ns(), time.process_time_ns()
        vm.resume()
        select.select([vm.power.fd], [], [])
        sample = Sample((time.monotonic_ns() - wall) / count, (time.process_time_ns() - cpu) / count)
        exits = sum(vm.vcpus[0].exit_counts().values())
        if exits < count:
            raise SystemExit(f"error: the guest ended after {exits} exits of {count}")
        return sample
    finally:
        vm.close()


def host() -> str:
    text = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "unknown CPU")
    kind = "hardware virtualization" if {"vmx", "svm"} & set(text.split()) else "no vmx/svm: KVM interprets guest code"
    return f"{model}; {kind}"


def measure(rounds: int, seconds: float) -> list[tuple[str, int, list[Sample], list[Sample]]]:
    """Per loop: name, exits a run, and the samples of ours and of plain C, in the order they were taken."""
    rows = []
    code, vmm = build()
    guest = code.read_bytes()
    for loop, name in enumerate(LOOPS):
        count = max(1000, int(seconds * 1e9 / run_plain_c(vmm, code, loop, 1000).cpu))
        ours, plain = in_turns(rounds, partial(run_kvmapp, guest, loop, count), partial(run_plain_c, vmm, code, loop, count))
        rows.append((name, count, ours, plain))
    return rows


def order(turn: int, sides: Iterable[T]) -> list[T]:
    """Who is measured in this turn after whom: backwards in every second one."""
    return list(sides)[::-1 if turn % 2 else 1]


def in_turns(rounds: int, ours: Callable[[], T], peer: Callable[[], T]) -> tuple[list[T], list[T]]:
    """What each gave in so many rounds; the peer is first in every second one."""
    mine, its = [], []
    for turn in range(rounds):
        if turn % 2:
            its.append(peer())
        mine.append(ours())
        if not turn % 2:
            its.append(peer())
    return mine, its


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench exits", description="what an exit costs, against plain C")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=0.25, help="CPU time of one run")
    options = parser.parse_args(arguments)
    print(f"Exit round trip, guest to VMM and back: kvmapp against plain C (bench/exits.c), same guest code\nhost: {host()}")
    print(f"method: {options.rounds} rounds in turns; nanoseconds an exit, CPU time: median (best); goal: ratio <= {GOAL}\n")
    print(f"{'':12}{'exits a run':>12}{'kvmapp':>18}{'plain C':>18}{'ratio':>16}{'wall ratio':>12}")
    for name, count, ours, plain in measure(options.rounds, options.seconds):
        cells = [f"{median(s.cpu for s in side):.0f} ({min(s.cpu for s in side):.0f})" for side in (ours, plain)]
        cpu, wall = (median(getattr(a, clock) / getattr(b, clock) for a, b in zip(ours, plain, strict=True)) for clock in ("cpu", "wall"))
        best = min(s.cpu for s in ours) / min(s.cpu for s in plain)
        print(f"{name:12}{count:>12}{cells[0]:>18}{cells[1]:>18}{f'{cpu:.3f} ({best:.3f})':>16}{wall:>12.3f}")
