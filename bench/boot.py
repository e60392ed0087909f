"""From the VMM's start to the guest's end: the same kernel and initrd under `kvmapp run` and under QEMU with KVM.

Method: every VMM runs the same kernel, initrd and memory with one vCPU; the guest boots to its /init and resets itself, which ends the
VMM. The VMMs take turns, so that a busy moment of the host falls on all; the table shows medians over the rounds, and the median
of the rounds' ratios. A run that did not show `--marker` on its console is an error, not a figure.
    python -m bench boot [--kernel FILE --initrd FILE] [--append WORDS] [--memory MIB] [--rounds N] [--peer-cpu MODEL]
Without a kernel: Debian's stock cloud kernel, in the lab where this host's KVM only interprets guest code.
"""
import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from bench.exits import host
from kvmapp.core import Kvm

ROOT = Path(__file__).parent.parent
LAB_KERNEL, LAB_INITRD = Path("/lab/vmlinuz"), Path("/lab/initramfs.gz")
QBOOT = next((path for path in map(Path, ("/usr/share/qemu/qboot.rom", "/usr/share/qboot/bios.bin")) if path.exists()), None)
GOAL = 0.5
# From source, as the packaged file starts: without looking for site packages, which a run without a domain file does not need.
START = "from kvmapp.__main__ import entry; entry()"
RESET = 3                                            # exit status of a run whose guest reset itself


def commands(options) -> dict[str, list]:
    """Each VMM's command line, by its name; kvmapp first."""
    common = ["-enable-kvm", "-cpu", options.peer_cpu, "-m", str(options.memory), "-nodefaults", "-no-user-config", "-display", "none",
              "-serial", "stdio", "-no-reboot", "-kernel", options.kernel, "-initrd", options.initrd, "-append", options.append]
    vmms = {"kvmapp run": [sys.executable, "-S", "-c", START, "run", "--kernel", options.kernel, "--initrd", options.initrd, "--append",
                           options.append, "--memory", str(options.memory), "--no-reboot"]}
    if shutil.which("qemu-system-x86_64") is None:
        raise SystemExit("error: no peer: qemu-system-x86_64 is not installed\nhint: apt-get install qemu-system-x86")
    if QBOOT:
        vmms["QEMU microvm, qboot"] = ["qemu-system-x86_64", "-M", "microvm,rtc=on,ioapic2=off", "-bios", QBOOT, *common]
    if options.pc:
        vmms["QEMU pc, SeaBIOS"] = ["qemu-system-x86_64", "-M", "pc", *common]
    return vmms


def run(command: list, marker: str) -> float:
    """Seconds from the start of the process to its end."""
    start = time.monotonic()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, timeout=300)
    seconds = time.monotonic() - start
    if marker.encode() not in done.stdout or done.returncode not in (0, RESET):
        tail = done.stdout.decode(errors="replace")[-1500:]
        raise SystemExit(f"error: status {done.returncode}, no '{marker}' from: {' '.join(map(str, command))}\n{tail}")
    return seconds


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench boot")
    parser.add_argument("--kernel")
    parser.add_argument("--initrd")
    parser.add_argument("--append", default="console=ttyS0 quiet reboot=t panic=-1 modules=none then=reboot")
    parser.add_argument("--memory", type=int, default=512, metavar="MIB")
    parser.add_argument("--marker", default="GUEST UP")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-cpu", default="host", metavar="MODEL")
    parser.add_argument("--pc", action=argparse.BooleanOptionalAction, default=True, help="QEMU's pc machine too (slow)")
    options = parser.parse_args(arguments)
    if options.kernel is None:
        if not LAB_KERNEL.exists():
            if not Kvm().interprets:
                raise SystemExit("error: which kernel?\nhint: python -m bench boot --kernel FILE --initrd FILE, or in the lab")
            raise SystemExit(subprocess.run([ROOT / "tests/lab/run", "python3", "-m", "bench", "boot", *arguments]).returncode)
        options.kernel, options.initrd = LAB_KERNEL, LAB_INITRD
    vmms = commands(options)
    times: dict[str, list[float]] = {name: [] for name in vmms}
    for _ in range(options.rounds):
        for name, command in vmms.items():
            times[name].append(run(command, options.marker))
    show(times, options)


def show(times: dict[str, list[float]], options) -> None:
    ours = times["kvmapp run"]
    print(f"\nBoot: {Path(options.kernel).name} to /init and its end, {options.memory} MiB, one vCPU")
    print(f"host: {host()}")
    print(f"method: medians of {options.rounds} rounds in turns, process start to exit; goal: ratio to microvm <= {GOAL}\n")
    print(f"{'VMM':<22}{'seconds':>10}{'least':>10}{'kvmapp / it':>14}")
    for name, seconds in times.items():
        ratio = median(mine / its for mine, its in zip(ours, seconds, strict=True))
        print(f"{name:<22}{median(seconds):>10.3f}{min(seconds):>10.3f}{ratio:>14.3f}")
