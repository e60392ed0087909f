"""`./build.sh dist`: dist/kvmapp, the one file, its checksum, and the list of what is inside. Same sources, same bytes.

    freeze     PyInstaller lays out the runtime tree (kvmapp.spec)
    complete   the libraries that it leaves to the host, the C library and its loader among them
    describe   the list of parts and their licences
    pack       the static launcher, and behind it the tree as one zstd stream (launcher.h, unpack.c have the format)

What was built from the very same sources and tools is kept in build.sh's cache folder.

    python -m onefile.build [--fresh] [--work DIR] [--to DIR]
"""
import argparse
import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import PyInstaller

from kvmapp import __version__
from onefile import elf, inventory

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("kvmapp", "conf", "init", "docs/man", "onefile")
SINGLE_SOURCES = ("kvmapp.spec", "setup.py", "pyproject.toml", "COPYING")
SUFFIXES_MADE = {".so", ".pyc", ".o"}
LAUNCHER_FLAGS = ["-std=gnu11", "-Os", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-static", "-no-pie", "-ffunction-sections",
                  "-Wl,--gc-sections", "-Wl,--build-id=none", "-s"]
STATIC = ("libc.a", "libzstd.a")
SEAL = struct.Struct("<16s64sQQQQ")
SEAL_MAGIC = b"kvmapp's seal\0\0\0"
ENTRY = struct.Struct("<IIQ")
EPOCH = "315532800"                     # of times that tools insist on: 1980, the first that a zip file knows
KEPT = 4
PRODUCTS = ("kvmapp", "kvmapp.sha256", "kvmapp.sbom.json")


def build(work: Path, to: Path) -> None:
    """All of it, in `work`; the products to `to`."""
    work.mkdir(parents=True, exist_ok=True)
    launcher = compile_launcher(work)
    tree = work / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    freeze(work, tree)
    libraries = complete(tree / "runtime")
    shutil.copy(launcher, tree / "kvmapp")
    parts = inventory.collect(work / "pyinstaller/kvmapp", __version__, libraries, static_libraries())
    (tree / "runtime/lib/sbom.json").write_text(inventory.bill(parts))
    inventory.lay_texts(parts, tree / "runtime/lib/licences")
    identity = f"{__version__}-{digest_of(tree)[:8]}"
    (tree / "runtime/lib/identity").write_text(f"{identity}\n")
    to.mkdir(parents=True, exist_ok=True)
    pack(launcher, tree, identity, to / "kvmapp")
    shutil.copy(tree / "runtime/lib/sbom.json", to / "kvmapp.sbom.json")
    (to / "kvmapp.sha256").write_text(f"{hashlib.sha256((to / 'kvmapp').read_bytes()).hexdigest()}  kvmapp\n")


def compile_launcher(work: Path) -> Path:
    launcher = work / "launcher"
    sources = sorted(path.name for path in (ROOT / "onefile").glob("*.c"))
    subprocess.run(["gcc", *LAUNCHER_FLAGS, "-o", launcher.resolve(), *sources, "-lzstd"], cwd=ROOT / "onefile", check=True)
    return launcher


def static_libraries() -> list[Path]:
    """Where the launcher's two stand; their packages are named for them."""
    return [Path(elf.run("gcc", f"-print-file-name={name}").strip()).resolve() for name in STATIC]


def freeze(work: Path, tree: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "0", "SOURCE_DATE_EPOCH": EPOCH}
    subprocess.run([sys.executable, "-m", "PyInstaller", "--noconfirm", "--clean", "--log-level", "ERROR", "--workpath",
                    (work / "pyinstaller").resolve(), "--distpath", tree.resolve(), "kvmapp.spec"], cwd=ROOT, env=environment, check=True)
    program, archive = tree / "runtime/kvmapp", tree / "runtime/kvmapp.pkg"
    elf.prepare_bootloader(Path(PyInstaller.__file__).parent / "bootloader/Linux-64bit-intel/run", program, "lib")
    with program.open("ab") as file:
        file.write(archive.read_bytes())
    archive.unlink()


def complete(runtime: Path) -> dict[str, Path]:
    """The whole of what it runs with, and nothing that it does not need there."""
    lib = runtime / "lib"
    added = elf.complete(lib)
    for path in sorted(lib.rglob("*")):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o644)
            if elf.is_elf(path) and path.suffix != ".elf":
                elf.slim(path)
    for name in {path.name for path in lib.glob("*.dist-info")}:
        shutil.rmtree(lib / name)
    return added


def files_of(tree: Path) -> list[Path]:
    return sorted(path for path in tree.rglob("*") if path.is_file())


def mode_of(path: Path) -> int:
    return 0o755 if path.stat().st_mode & 0o100 else 0o644


def digest_of(tree: Path) -> str:
    digest = hashlib.sha256()
    for path in files_of(tree):
        digest.update(f"{path.relative_to(tree)} {mode_of(path):o} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def pack(launcher: Path, tree: Path, identity: str, target: Path, level: str = "-19") -> None:
    """Launcher, packed tree; the seal in the launcher tells where and how much."""
    stream, unpacked = [], 0
    for path in files_of(tree):
        name, content = str(path.relative_to(tree)).encode(), path.read_bytes()
        stream += [ENTRY.pack(mode_of(path), len(name), len(content)), name, content]
        unpacked += len(content)
    stream.append(ENTRY.pack(0, 0, 0))
    packed = subprocess.run(["zstd", level, "--single-thread", "--check", "-q", "-c"], input=b"".join(stream), stdout=subprocess.PIPE,
                            check=True).stdout
    program = launcher.read_bytes()
    at = program.index(SEAL_MAGIC)
    assert program.count(SEAL_MAGIC) == 1
    seal = SEAL.pack(SEAL_MAGIC, identity.encode(), len(program), len(packed), len(program) + len(packed), unpacked)
    fresh = target.with_name(f".{target.name}.new")
    fresh.write_bytes(program[:at] + seal + program[at + len(seal):] + packed)
    fresh.chmod(0o755)
    fresh.replace(target)


# What was built already.

def cache_folder() -> Path:
    """The same as build.sh's."""
    if "KVMAPP_CACHE" in os.environ:
        return Path(os.environ["KVMAPP_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvmapp"


def key() -> str:
    """Of every source, of what was compiled from them (a compiler's cache may give the bytes of another folder), and of the tools."""
    digest = hashlib.sha256()
    sources = [path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in SUFFIXES_MADE]
    sources = [path for path in sources if not (path.suffix == ".c" and path.with_suffix(".pyx").exists()) and path.suffix != ".elf"]
    compiled = [path for suffix in ("so", "elf") for path in (ROOT / "kvmapp").rglob(f"*.{suffix}")]
    for path in [*sorted(sources), *(ROOT / name for name in SINGLE_SOURCES), *sorted(compiled)]:
        digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_mode & 0o111}\0".encode() + path.read_bytes())
    for command in (["gcc", "--version"], ["zstd", "--version"], ["ldconfig", "--version"], ["patchelf", "--version"]):
        digest.update(elf.run(*command).encode())
    digest.update(f"{sys.version} {Path(sys.prefix).resolve()}".encode())
    return digest.hexdigest()[:16]


def obtain() -> Path:
    """The folder that holds the products of these sources; built if they are new."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"dist-{key()}"
    with open(cache / "dist.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            print("== freezing", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix=".dist-", dir=cache) as work:
                build(Path(work), Path(work) / "products")
                (Path(work) / "products").rename(folder)
            for old in sorted(cache.glob("dist-*/"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
                shutil.rmtree(old)
        os.utime(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m onefile.build")
    parser.add_argument("--fresh", action="store_true", help="build it, whatever was built already")
    parser.add_argument("--work", type=Path, help="with --fresh: the folder to build in")
    parser.add_argument("--to", type=Path, default=ROOT / "dist", help="where the products go (dist)")
    given = parser.parse_args()
    os.chdir(ROOT)
    if given.fresh:
        build(given.work or ROOT / "build/onefile", given.to)
    else:
        given.to.mkdir(exist_ok=True)
        for name in PRODUCTS:
            shutil.copy(obtain() / name, given.to / name)
    for line in (given.to / "kvmapp.sha256").read_text().splitlines():
        print(f"{line} ({(given.to / 'kvmapp').stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
