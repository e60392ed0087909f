"""What the libraries of the tree need of each other, and making them find it there: binutils and patchelf do the work.

A library is taken from where the building host's own loader finds it. Left out: other machines than x86-64.
"""
import os
import re
import shutil
import subprocess
from pathlib import Path

MAGIC = b"\x7fELF"
LOADER = "ld-linux-x86-64.so.2"
LOADER_ROOM = 512                       # bytes for the loader's path in the program
DROPPED_SECTIONS = [".comment", ".note.gnu.build-id", ".note.stapsdt", ".gnu_debuglink"]     # differ from one build folder to another


def run(*command: object) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    if done.returncode:
        raise SystemExit(f"error: {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def needed_by(path: Path) -> list[str]:
    return re.findall(r"^\s+NEEDED\s+(\S+)$", run("objdump", "-p", path), re.MULTILINE)


def host_libraries() -> dict[str, Path]:
    """By name: what this host's loader would take."""
    found: dict[str, Path] = {}
    for name, path in re.findall(r"^\s+(\S+) \(libc6,x86-64[^)]*\) => (\S+)$", run("/sbin/ldconfig", "-p"), re.MULTILINE):
        found.setdefault(name, Path(path).resolve())
    return found


def complete(folder: Path) -> dict[str, Path]:
    """Copies into `folder` every library that a program or library below its parent needs; name → where it came from."""
    host = host_libraries()
    added: dict[str, Path] = {}
    there = {path.name for path in folder.parent.rglob("*") if path.is_file()}
    waiting = [path for path in sorted(folder.parent.rglob("*")) if path.is_file() and is_elf(path)]
    while waiting:
        for name in needed_by(waiting.pop()):
            if name in there:
                continue
            if name not in host:
                raise SystemExit(f"error: {name} is needed, and this host's loader does not know it")
            shutil.copy(host[name], folder / name)
            there.add(name)
            added[name] = host[name]
            waiting.append(folder / name)
    return added


def slim(path: Path) -> None:
    """Without symbols for debuggers, and without paths of its own: the program's leads to everything."""
    path.chmod(0o755)
    run("strip", "--strip-unneeded", *(f"--remove-section={name}" for name in DROPPED_SECTIONS), path)
    if path.name != LOADER and "PATH" in run("objdump", "-p", path):
        run("patchelf", "--remove-rpath", path)


def prepare_bootloader(source: Path, target: Path, libraries: str) -> None:
    """A copy that finds its libraries below itself, and has room for the path of a loader that is not the host's."""
    shutil.copy(source, target)
    room = "/" + "x" * (LOADER_ROOM - 2)        # in one go: patched twice, it crashes at its start
    run("patchelf", "--set-interpreter", room, "--force-rpath", "--set-rpath", f"$ORIGIN/{libraries}", target)
