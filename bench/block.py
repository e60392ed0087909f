"""What a disk request costs on the host's side: our engines against the plainest C loop on the same file.

Method: a load of our own (bench/blockload.pyx: no Python in the loop) on a raw disk, and the same load in C (bench/block.c: io_uring,
or pread and pwrite in as many threads as there are requests in flight), each for the same time, in turns. The table shows medians
over the rounds: microseconds of CPU a request (all threads) and thousands of requests a second, and the medians of the rounds'
ratios, ours by C. CPU is the better figure on a busy host, and the rate says more where the disk is the limit. A guest's side is
not in it.
    python -m bench block [--rounds N] [--seconds S] [--folder DIR]
"""
import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from bench.exits import in_turns
from kvmapp.block.raw import RawDisk

HERE = Path(__file__).parent
SIZE = 64 << 20
READ, WRITE = 0, 1


@dataclass(frozen=True)
class Row:
    operation: int
    engine: str
    cache: str
    depth: int
    block: int = 4096

    @property
    def name(self) -> str:
        kind = ("read", "write")[self.operation]
        return f"{self.engine:9}{self.cache:11}{'4k random' if self.block == 4096 else '1M sequential'} {kind}, {self.depth}"


@dataclass(frozen=True)
class Sample:
    rate: float                                      # requests a second
    cpu: float                                       # seconds of CPU a request


ROWS = [Row(operation, engine, cache, depth) for engine in ("io_uring", "threads") for cache in ("writeback", "none")
        for operation in (READ, WRITE) for depth in (1, 32) if (engine, cache) != ("threads", "none") or depth == 1]
ROWS += [Row(operation, "io_uring", "none", 4, 1 << 20) for operation in (READ, WRITE)]


def build_load(folder: Path):
    """The compiled module of bench/blockload.pyx."""
    script = ("from Cython.Build import cythonize; from setuptools import Extension, setup; import sys; setup(script_args="
              "['-q', 'build_ext', '-b', sys.argv[1], '-t', sys.argv[1]], ext_modules=cythonize(Extension('blockload', "
              "[sys.argv[2]]), include_path=['.'], language_level=3, quiet=True, build_dir=sys.argv[1]))")
    environment = {**os.environ, "CC": "ccache gcc" if shutil.which("ccache") else "gcc"}
    subprocess.run([sys.executable, "-c", script, folder, HERE / "blockload.pyx"], check=True, cwd=HERE.parent, env=environment)
    spec = importlib.util.spec_from_file_location("blockload", next(folder.rglob("blockload*.so")))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_ours(load, path: Path, row: Row, seconds: float) -> Sample:
    with RawDisk(os.open(path, os.O_RDWR), io=row.engine, cache=row.cache) as disk:
        work = load.Load(disk, row.operation, row.block, row.depth, row.block > 4096)
        cpu = time.process_time()
        wall = work.run(int(seconds * 1e9)) / 1e9
        cpu = time.process_time() - cpu
        if work.failed:
            raise SystemExit(f"error: {work.failed} of {work.done} requests failed")
        return Sample(work.done / wall, cpu / work.done)


def run_plain_c(program: Path, path: Path, row: Row, seconds: float) -> Sample:
    words = [program, path, ("read", "write")[row.operation], "uring" if row.engine == "io_uring" else "sync",
             "direct" if row.cache == "none" else "cached", str(row.depth), str(row.block),
             "random" if row.block == 4096 else "sequential", str(int(seconds * 1e9))]
    done, wall, cpu = map(int, subprocess.run(words, check=True, capture_output=True, text=True).stdout.split())
    return Sample(done / wall * 1e9, cpu / done / 1e9)


def measure(folder: Path, rounds: int, seconds: float):
    """Yields each row with the samples of ours and of plain C."""
    load, program = build_load(folder), folder / "block"
    subprocess.run(["gcc", "-O2", "-Wall", "-o", program, HERE / "block.c", "-luring", "-pthread"], check=True)
    path = folder / "disk.img"
    with path.open("wb") as file:
        for _ in range(SIZE >> 20):
            file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())
    for row in ROWS:
        path.read_bytes()                            # into the page cache: rows without it throw it out
        yield row, *in_turns(rounds, partial(run_ours, load, path, row, seconds), partial(run_plain_c, program, path, row, seconds))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench block", description="what a disk request costs, against plain C")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.1, help="length of one run")
    parser.add_argument("--folder", default=".", help="where the disk lies: its file system is what is measured")
    options = parser.parse_args(arguments)
    print("Disk requests on the host's side: kvmapp's engines against plain C (bench/block.c) on the same file")
    print(f"method: medians of {options.rounds} rounds of {options.seconds} s in turns; CPU in µs a request, (1000 requests/s)\n")
    print(f"{'engine, cache, load, requests in flight':48}{'kvmapp':>16}{'plain C':>16}{'ratio':>14}")
    with tempfile.TemporaryDirectory(prefix="kvmapp-bench-", dir=options.folder) as folder:
        for row, ours, peer in measure(Path(folder).resolve(), options.rounds, options.seconds):
            cells = [f"{median(s.cpu for s in side) * 1e6:.1f} ({median(s.rate for s in side) / 1000:.1f})" for side in (ours, peer)]
            cpu, rate = (median(getattr(a, key) / getattr(b, key) for a, b in zip(ours, peer, strict=True))
                         for key in ("cpu", "rate"))
            print(f"{row.name:48}{cells[0]:>16}{cells[1]:>16}{cpu:>7.2f} ({rate:.2f})", flush=True)
