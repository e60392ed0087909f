"""A virtio disk as a guest's programs meet it: requests a second under `kvmapp run` and under QEMU, the same guest, file and load.

Method: a load of our own (bench/guests/diskload.c, static, past the guest's page cache) runs in the guest, for the same time a row, on
the same file past the host's page cache (where its file system allows that). QEMU has io_uring and an iothread for the disk. The
VMMs take turns; the table shows medians over the rounds and the median of the rounds' ratios, ours by QEMU's. The same machine type
is compared with the same: microvm (virtio-mmio) and pc (PCI).
    python -m bench blk_guest [--kernel FILE --initrd FILE] [--machine pc|microvm] [--packed] [--rounds N] [--seconds S]
                              [--peer-cpu MODEL] [--folder DIR]
The initrd's init must know `run=` (commas for spaces), as that of the lab does; the load is appended to it. Without a kernel:
Debian's stock cloud kernel, in the lab where this host's KVM only interprets guest code.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench.boot import LAB_INITRD, LAB_KERNEL, QBOOT, ROOT, START
from bench.exits import host
from kvmapp.core import Kvm
from tests.lab import initramfs

LOAD = ROOT / "build" / "bench" / "diskload"
SIZE = 256 << 20
ROWS = {"r1": "4k random read, depth 1", "w1": "4k random write, depth 1", "r32": "4k random read, depth 32",
        "w32": "4k random write, depth 32", "R4": "1M sequential read, depth 4", "W4": "1M sequential write, depth 4"}
OURS, PEER = "kvmapp", "QEMU"


def build_load() -> None:
    """The guest's program; before the lab is entered, which has no compiler."""
    LOAD.parent.mkdir(parents=True, exist_ok=True)
    source = ROOT / "bench" / "guests" / "diskload.c"
    if not LOAD.exists() or LOAD.stat().st_mtime < source.stat().st_mtime:
        subprocess.run(["gcc", "-O2", "-Wall", "-static", "-o", LOAD, source], check=True)


def commands(options, initrd: Path, image: Path, cache: str) -> dict[str, list]:
    """Each VMM's command line, by its name."""
    append = f"{options.append} run=diskload,/dev/vda,{options.seconds:g},{','.join(ROWS)}"
    ours = [sys.executable, "-S", "-c", START, "run", "--kernel", options.kernel, "--initrd", initrd, "--append", append, "--memory", "512",
            "--no-reboot", "--machine", options.machine, "--disk", f"{image},cache={cache}", *(["--packed"] if options.packed else [])]
    kind = "virtio-blk-pci" if options.machine == "pc" else "virtio-blk-device"
    machine = ["-M", "pc"] if options.machine == "pc" else ["-M", "microvm,rtc=on,ioapic2=off", "-bios", str(QBOOT)]
    peer = ["qemu-system-x86_64", "-enable-kvm", "-cpu", options.peer_cpu, "-m", "512", *machine, "-nodefaults", "-no-user-config",
            "-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", options.kernel, "-initrd", initrd, "-append", append,
            "-object", "iothread,id=io", "-drive", f"file={image},if=none,id=disk,format=raw,cache={cache},aio=io_uring",
            "-device", f"{kind},drive=disk,iothread=io" + (",packed=on" if options.packed else "")]
    return {OURS: ours, PEER: peer}


def run(command: list) -> dict[str, float]:
    """{row: requests a second}"""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, timeout=600)
    text = done.stdout.decode(errors="replace")
    rates = {name: float(rate) for name, rate in re.findall(r"ROW (\w+) ([\d.]+)", text)}
    if set(rates) != set(ROWS):
        raise SystemExit(f"error: status {done.returncode}, rows missing from: {' '.join(map(str, command))}\n{text[-1500:]}")
    return rates


def direct_or_not(image: Path) -> str:
    """The cache mode: past the page cache where the file system can."""
    try:
        os.close(os.open(image, os.O_RDWR | os.O_DIRECT))
    except OSError:
        return "writeback"
    return "none"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench blk_guest")
    parser.add_argument("--kernel")
    parser.add_argument("--initrd")
    parser.add_argument("--append", default="console=ttyS0 quiet reboot=t panic=-1 then=reboot")
    parser.add_argument("--machine", choices=("pc", "microvm"), default="pc")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1)
    parser.add_argument("--peer-cpu", default="host", metavar="MODEL")
    parser.add_argument("--folder", help="where the disk's file lies")
    options = parser.parse_args(arguments)
    if shutil.which("gcc"):
        build_load()
    if options.kernel is None:
        if not LAB_KERNEL.exists():
            if not Kvm().interprets:
                raise SystemExit("error: which kernel?\nhint: python -m bench blk_guest --kernel FILE --initrd FILE, or in the lab")
            raise SystemExit(subprocess.run([ROOT / "tests/lab/run", "python3", "-m", "bench", "blk_guest", *arguments]).returncode)
        options.kernel, options.initrd = LAB_KERNEL, LAB_INITRD
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(options, Path(folder))


def measure(options, folder: Path) -> None:
    image, initrd = folder / "disk.img", folder / "initrd.gz"
    initrd.write_bytes(Path(options.initrd).read_bytes() + initramfs.archive({"bin/diskload": initramfs.program(LOAD)}))
    with open(image, "wb") as file:                  # written once: a hole is no disk
        for _ in range(SIZE >> 20):
            file.write(os.urandom(1 << 20))
    cache = direct_or_not(image)
    rates: dict[str, list[dict[str, float]]] = {OURS: [], PEER: []}
    for _ in range(options.rounds):
        for name, command in commands(options, initrd, image, cache).items():
            rates[name].append(run(command))
    show(options, rates, cache)


def show(options, rates: dict[str, list[dict[str, float]]], cache: str) -> None:
    rings = "packed" if options.packed else "split"
    print(f"\nA guest's disk: {Path(options.kernel).name}, machine {options.machine}, {rings} rings, raw file, cache={cache}")
    print(f"host: {host()}")
    print(f"method: medians of {options.rounds} rounds in turns, {options.seconds:g} s a row; QEMU with io_uring and an iothread")
    print("goal: ratio >= 1\n")
    print(f"{'requests a second':<30}{OURS:>12}{PEER:>12}{'ratio':>10}{'least':>8}")
    for row, name in ROWS.items():
        ours, peers = ([one[row] for one in rates[vmm]] for vmm in (OURS, PEER))
        ratios = [mine / its for mine, its in zip(ours, peers, strict=True)]
        print(f"{name:<30}{median(ours):>12.0f}{median(peers):>12.0f}{median(ratios):>10.2f}{min(ratios):>8.2f}")
