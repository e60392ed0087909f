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
import os
import re
import subprocess
import tempfile
from pathlib import Path
from statistics import median

from bench import _guests
from bench._program import ROOT
from bench.exits import host, order

LOAD = _guests.LOADS / "diskload"
SIZE = 256 << 20
MEMORY = 512                                         # MiB
ROWS = {"r1": "4k random read, depth 1", "w1": "4k random write, depth 1", "r32": "4k random read, depth 32",
        "w32": "4k random write, depth 32", "R4": "1M sequential read, depth 4", "W4": "1M sequential write, depth 4"}
OURS, PEER = "kvmapp", "QEMU"


def commands(options, initrd: Path, image: Path, cache: str) -> dict[str, list]:
    """Each VMM's command line, by its name."""
    append = f"{options.append} run=diskload,/dev/vda,{options.seconds:g},{','.join(ROWS)}"
    guest = options.machine, MEMORY, initrd, append
    ours = [*_guests.ours(options, *guest), "--disk", f"{image},cache={cache},poll={options.poll}",
            *(["--packed"] if options.packed else [])]
    kind = "virtio-blk-pci" if options.machine == "pc" else "virtio-blk-device"
    peer = [*_guests.peer(options, *guest), "-object", "iothread,id=io", "-drive",
            f"file={image},if=none,id=disk,format=raw,cache={cache},aio=io_uring", "-device",
            f"{kind},drive=disk,iothread=io" + (",packed=on" if options.packed else "")]
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
    parser = _guests.parser_of("bench blk_guest")
    parser.add_argument("--machine", choices=("pc", "microvm"), default="pc")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--seconds", type=float, default=1)
    parser.add_argument("--poll", type=int, default=0, metavar="MICROSECONDS", help="let our disk thread poll; QEMU polls as it does")
    parser.add_argument("--folder", help="where the disk's file lies")
    options = parser.parse_args(arguments)
    _guests.build_load(LOAD)
    _guests.find_kernel(options, "bench blk_guest", arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(options, Path(folder))


def measure(options, folder: Path) -> None:
    image, initrd = folder / "disk.img", folder / "initrd.gz"
    _guests.add_load(options, LOAD, initrd)
    with open(image, "wb") as file:                  # written once: a hole is no disk
        for _ in range(SIZE >> 20):
            file.write(os.urandom(1 << 20))
    cache = direct_or_not(image)
    rates: dict[str, list[dict[str, float]]] = {OURS: [], PEER: []}
    for turn in range(options.rounds):
        for name, command in order(turn, commands(options, initrd, image, cache).items()):
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
