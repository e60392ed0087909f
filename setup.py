"""Builds every .pyx of the tree, by glob, with one set of directives, and the probe guest; the rest stands in pyproject.toml.

A Cython performance hint (a Python operation where C was meant) fails the build: there is no Python on a per-exit path.
"""
import os
import subprocess
from pathlib import Path

from Cython.Build import cythonize
from Cython.Compiler import Errors
from setuptools import Extension, setup

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "nonecheck": False,
    "embedsignature": True,
    "show_performance_hints": True,
}

PROBE = Path("kvmapp/probe")
PROBE_FLAGS = ["-m32", "-march=i686", "-Os", "-std=gnu11", "-Wall", "-Wextra", "-ffreestanding", "-mgeneral-regs-only",
               "-fno-pic", "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fcf-protection=none",
               "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-T,kvmapp/probe/probe.ld"]

hints: list[str] = []
say = Errors.performance_hint


def note_hint(position, message, env):
    hints.append(f"{position[0].get_description()}:{position[1]}: {message}")
    say(position, message, env)


for module in ("Cython.Compiler.Errors", "Cython.Compiler.Nodes", "Cython.Compiler.ExprNodes"):
    compiler = __import__(module, fromlist=["performance_hint"])
    if hasattr(compiler, "performance_hint"):
        compiler.performance_hint = note_hint


def extension(path: Path) -> Extension:
    name = ".".join(path.with_suffix("").parts)
    return Extension(name, [str(path)], extra_compile_args=["-O2", "-g1", "-Wall", "-Wno-unused-function"])


def build_probe() -> None:
    """The probe guest: C and assembly for a bare 32-bit PC, in one go; gcc and binutils suffice, no 32-bit libc."""
    target = PROBE / "probe.elf"
    inputs = [Path("setup.py"), *PROBE.glob("*.[cSh]"), *PROBE.glob("*.ld")]
    if target.exists() and target.stat().st_mtime >= max(path.stat().st_mtime for path in inputs):
        return
    sources = sorted(str(path) for path in inputs if path.suffix in {".c", ".S"})
    fresh = target.with_suffix(".new")
    subprocess.run(["gcc", *PROBE_FLAGS, "-o", str(fresh), *sources], check=True)
    fresh.replace(target)


os.chdir(Path(__file__).resolve().parent)
build_probe()
modules = cythonize([extension(path) for path in sorted(Path("kvmapp").rglob("*.pyx"))],
                    compiler_directives=DIRECTIVES, include_path=["."])
if hints:
    raise SystemExit("error: Cython performance hints (make the call nogil/noexcept or typed):\n  " + "\n  ".join(hints))
setup(ext_modules=modules)
