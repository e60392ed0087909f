"""The devices compiled once more, into build/fuzz/KIND, with instrumentation: 'coverage', or 'sanitized' with AddressSanitizer and
UndefinedBehaviorSanitizer as well. Needs what `./build.sh build` leaves: Cython's C files next to the sources."""
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "fuzz"
RUNTIME = Path(__file__).with_name("coverage.c")
FLAGS = ["-fPIC", "-O1", "-g1", "-fwrapv", "-fno-omit-frame-pointer", "-w"]
COVERAGE = ["-fsanitize-coverage=trace-pc,trace-cmp"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
              "-fno-sanitize=alignment,vptr,null"]      # rings lie at any even address; Cython's NULL arithmetic is harmless
KINDS = {"coverage": COVERAGE, "sanitized": [*COVERAGE, *SANITIZERS]}
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))     # here: its first call is not for several threads at once
GUIDED = ("hw", "virtio", "block", "net")               # coverage of these and of the contracts; the rest is not the guest's


def build(kind: str) -> Path:
    """The folder to put before everything else in PYTHONPATH; only what changed is compiled."""
    target = FOLDER / kind
    for source in (ROOT / "kvmapp").rglob("*.py"):
        link = target / source.relative_to(ROOT)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(source)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_extension, source, target, kind) for source in sorted((ROOT / "kvmapp").rglob("*.pyx"))]
        jobs.append(pool.submit(_run, ["gcc", "-shared", "-fPIC", "-O2"], RUNTIME, FOLDER / "coverage.so"))
    for job in jobs:
        job.result()
    return target


def environment(kind: str) -> dict[str, str]:
    """For a process that runs the instrumented devices."""
    preload = [str(FOLDER / "coverage.so")]
    if kind == "sanitized":
        preload += [_library("libasan.so"), _library("libubsan.so")]
    options = "detect_leaks=0:quarantine_size_mb=4:verify_asan_link_order=0:allocator_may_return_null=1:handle_segv=1"
    return {**os.environ, "PYTHONPATH": f"{FOLDER / kind}:{ROOT}", "PYTHONSAFEPATH": "1", "PYTHONMALLOC": "malloc",
            "LD_PRELOAD": ":".join(preload), "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONFAULTHANDLER": "0" if kind == "sanitized" else "1"}


def _extension(source: Path, folder: Path, kind: str) -> None:
    """One module: a .pyx names the libraries that it wants in its first line."""
    name = source.relative_to(ROOT).with_suffix("")
    flags = KINDS[kind] if name.parts[1] in GUIDED or len(name.parts) == 2 else []
    compiler = ["ccache", "gcc"] if shutil.which("ccache") else ["gcc"]
    first_line = source.read_text().partition("\n")[0]
    libraries = [f"-l{word}" for word in first_line.partition("libraries =")[2].split()]
    compiled = (folder / name).with_suffix(".o")
    _run([*compiler, "-c", *FLAGS, *flags, "-I", sysconfig.get_path("include"), "-I", str(ROOT)], source.with_suffix(".c"), compiled)
    _run(["gcc", "-shared", *flags], compiled, (folder / name).with_suffix(SUFFIX), libraries)


def _run(command: list[str], source: Path, target: Path, libraries: Sequence[str] = ()) -> None:
    """Makes `target` of `source` when it is older."""
    if target.exists() and target.stat().st_mtime > source.stat().st_mtime:
        return
    fresh = target.with_suffix(".new")
    result = subprocess.run([*command, "-o", str(fresh), str(source), *libraries], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"error: {source}: {result.stderr[-2000:]}")
    fresh.replace(target)


def _library(name: str) -> str:
    return subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
