"""From the VMM's start to the guest's /init, and to its end: the same kernel and initrd under `kvmapp run` and under QEMU with KVM.

Method: every VMM runs the same kernel, initrd and memory with one vCPU; the guest boots to its /init, which says so on the console (the
first time), and resets itself, which ends the VMM (the second: the kernel takes the VM apart before the process is gone). The VMMs take
turns, each being the first in some rounds, so that a busy moment of the host and the memory that the one before has left behind fall on
all; the table shows medians over the rounds, and the median of the rounds' ratios. kvmapp has unpacked the kernel in the first round and
finds it in those that follow. A run that did not show `--marker` on its console is an error, not a figure.
    python -m bench boot [--kernel FILE --initrd FILE] [--append WORDS] [--memory MIB] [--rounds N] [--peer-cpu MODEL]
Without a kernel: Debian's stock cloud kernel, in the lab where this host's KVM only interprets guest code.
"""
import argparse
import os
import shutil
import subprocess
import time
from pathlib import Path
from statistics import median

from bench._guests import QBOOT, find_kernel, ours, parser_of, peer
from bench._program import ROOT
from bench.exits import host

PARTS = (("to /init", 0.4), ("to its end", 0.5))     # and the ratio to microvm that each shall have at most
RESET = 3                                            # exit status of a run whose guest reset itself


def commands(options) -> dict[str, list]:
    """Each VMM's command line, by its name; kvmapp first."""
    guest = options.memory, options.initrd, options.append
    vmms = {"kvmapp run": ours(options, "pc", *guest), "kvmapp run, microvm": ours(options, "microvm", *guest)}
    if shutil.which("qemu-system-x86_64") is None:
        raise SystemExit("error: no peer: qemu-system-x86_64 is not installed\nhint: apt-get install qemu-system-x86")
    if QBOOT:
        vmms["QEMU microvm, qboot"] = peer(options, "microvm", *guest)
    if options.pc:
        vmms["QEMU pc, SeaBIOS"] = peer(options, "pc", *guest)
    return vmms


def run(command: list, marker: str) -> tuple[float, float]:
    """Seconds from the start of the process to the marker on its output, and to its end."""
    start = time.monotonic()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT) as process:
        assert process.stdout
        said, seen = b"", 0.0
        while part := os.read(process.stdout.fileno(), 65536):
            said += part
            if not seen and marker.encode() in said:
                seen = time.monotonic() - start
    seconds = time.monotonic() - start
    if not seen or process.returncode not in (0, RESET):
        tail = said.decode(errors="replace")[-1500:]
        raise SystemExit(f"error: status {process.returncode}, no '{marker}' from: {' '.join(map(str, command))}\n{tail}")
    return seen, seconds


def parse(table: str, arguments: list[str]) -> argparse.Namespace:
    """The options, with a kernel."""
    parser = parser_of(table, append="console=ttyS0 quiet reboot=t panic=-1 modules=none then=reboot")
    parser.add_argument("--memory", type=int, default=512, metavar="MIB")
    parser.add_argument("--marker", default="GUEST UP")
    parser.add_argument("--pc", action=argparse.BooleanOptionalAction, default=True, help="QEMU's pc machine too (slow)")
    options = parser.parse_args(arguments)
    find_kernel(options, table, arguments)
    return options


def main(arguments: list[str]) -> None:
    options = parse("bench boot", arguments)
    vmms = commands(options)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in vmms}
    for turn in range(options.rounds):
        names = list(vmms)
        for name in names[turn % len(names):] + names[:turn % len(names)]:      # each comes first in its turn
            times[name].append(run(vmms[name], options.marker))
    show(times, options)


def show(times: dict[str, list[tuple[float, float]]], options) -> None:
    print(f"\nBoot: {Path(options.kernel).name}, {options.memory} MiB, one vCPU")
    print(f"host: {host()}")
    print(f"method: medians of {options.rounds} rounds in turns, since the process started")
    for part, (what, goal) in enumerate(PARTS):
        print(f"\n{what}; goal: ratio to microvm <= {goal}")
        show_times({name: [one[part] for one in all_of_it] for name, all_of_it in times.items()})


def show_times(times: dict[str, list[float]]) -> None:
    """A line a VMM, ours being the first of them."""
    mine = next(iter(times.values()))
    print(f"{'VMM':<22}{'seconds':>10}{'least':>10}{'kvmapp / it':>14}")
    for name, seconds in times.items():
        ratio = median(one / other for one, other in zip(mine, seconds, strict=True))
        print(f"{name:<22}{median(seconds):>10.3f}{min(seconds):>10.3f}{ratio:>14.3f}")
