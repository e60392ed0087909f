"""What this program runs from: the sources, or a tree that the one file laid down or unpacked for one run.

    /usr/lib/kvmapp/0.1.0-1a2b3c4d/kvmapp           the launcher, onefile/launcher.c
    /usr/lib/kvmapp/0.1.0-1a2b3c4d/runtime/         the program that it starts, and all that belongs to it
    /usr/lib/kvmapp/current                         → the tree that is in use; /usr/sbin/kvmapp leads through it

A tree whose processes live is kept, whatever `current` is: guests run on under the version that started them. What nothing runs from
is taken away by the next setup, and by the daemon when it begins and when a guest ends.
"""
from __future__ import annotations

import fcntl
import os
import shutil
import sys

from kvmapp import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

FROZEN: bool = getattr(sys, "frozen", False)
LAUNCHER = "kvmapp"
CURRENT = "current"
LOCK = ".lock"                          # held while a tree is laid down or taken away
UNFINISHED = ".unfinished-"             # before the name of a tree that is being laid down
PADDING_OF_DELETED = " (deleted)"


def tree() -> str:
    """The folder of the tree that this program runs from; only where it is frozen."""
    return os.path.dirname(os.path.dirname(os.path.abspath(sys.executable)))


def identity() -> str:
    """Version and build; from source the version alone."""
    if not FROZEN:
        return __version__
    with open(os.path.join(tree(), "runtime/lib/identity")) as file:
        return file.read().strip()


IDENTITY = identity()


def program() -> list[str]:
    """The words that run kvmapp's verbs in a process of their own."""
    return [os.path.join(tree(), LAUNCHER)] if FROZEN else [sys.executable, "-m", "kvmapp"]


def private() -> bool:
    """Whether the tree is a copied file's own, gone after this run."""
    return FROZEN and not os.path.lexists(os.path.join(os.path.dirname(tree()), CURRENT))


def library() -> str | None:
    """The folder of installed trees that ours is in."""
    return os.path.dirname(tree()) if FROZEN and not private() else None


# Trees that are in nobody's use any more.

def in_use(folder: str, but: int | None) -> set[str]:
    """The names of trees in `folder` that a process runs from, other than `but`."""
    folder = os.path.realpath(folder)       # as the kernel says it; /usr/local is a link on some hosts
    found = set()
    for path in programs(but):
        if path.startswith(f"{folder}/"):
            found.add(path[len(folder) + 1:].partition("/")[0])
    return found


def programs(but: int | None) -> Iterator[str]:
    """Of every process that may be looked at: the file it runs."""
    for pid in os.listdir("/proc"):
        if pid.isdigit() and int(pid) != but:
            try:
                yield os.readlink(f"/proc/{pid}/exe").removesuffix(PADDING_OF_DELETED)
            except OSError:
                continue


def sweep(folder: str) -> list[str]:
    """Takes away the trees that are neither current nor in use; their names. Does nothing while a setup works there."""
    try:
        lock = os.open(os.path.join(folder, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return []
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return sweep_locked(folder)
    except OSError:
        return []
    finally:
        os.close(lock)


def sweep_locked(folder: str, but: int | None = None) -> list[str]:
    """For who holds the lock."""
    kept = {os.path.basename(os.readlink(os.path.join(folder, CURRENT)))} if os.path.lexists(os.path.join(folder, CURRENT)) else set()
    kept |= in_use(folder, but)
    gone = [name for name in sorted(os.listdir(folder)) if name not in kept and is_tree(os.path.join(folder, name))]
    for name in gone:
        shutil.rmtree(unnamed(folder, name), ignore_errors=True)
    return gone


def unnamed(folder: str, name: str) -> str:
    """Without a name that says it were whole: what is taken away in part must never be taken for a tree. Its path."""
    path = os.path.join(folder, name if name.startswith(UNFINISHED) else f"{UNFINISHED}{name}")
    if not name.startswith(UNFINISHED):
        shutil.rmtree(path, ignore_errors=True)
        os.rename(os.path.join(folder, name), path)
    return path


def is_tree(path: str) -> bool:
    """One of ours, whole or not; whatever else an administrator keeps there stays."""
    name = os.path.basename(path)
    return os.path.isdir(path) and not os.path.islink(path) and (
        name.startswith(UNFINISHED) or os.path.exists(os.path.join(path, "runtime/lib/identity")))
