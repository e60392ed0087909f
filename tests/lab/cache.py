"""Folders that are expensive to make, made once: each is named by a hash of all that went into it.

An artifact is built in a temporary folder beside its final place and renamed when whole, under a file lock, so that any
number of runs may start at once. What no run has used for a week is removed when something new is built.
"""
import fcntl
import hashlib
import inspect
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

Part = str | Path | Callable[..., object]                # a value, a file's content, or a function's source
KEPT_SECONDS = 7 * 24 * 3600


def cache_folder() -> Path:
    """The same folder as build.sh uses."""
    if "KVMAPP_CACHE" in os.environ:
        return Path(os.environ["KVMAPP_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvmapp"


def artifact(name: str, made_of: Sequence[Part], build: Callable[[Path], None]) -> Path:
    """The folder of the artifact `name`; `build` fills it when there is none for this very input yet."""
    folder = cache_folder() / f"lab-{name}-{_digest(made_of)}"
    if not folder.is_dir():
        with _locked(cache_folder() / f"lab-{name}.lock"):
            if not folder.is_dir():
                _build(name, folder, build)
    os.utime(folder)
    return folder


def _digest(made_of: Sequence[Part]) -> str:
    digest = hashlib.sha256()
    for part in made_of:
        if callable(part):
            part = inspect.getsource(part)
        data = part.encode() if isinstance(part, str) else part.read_bytes()
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()[:12]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(name: str, folder: Path, build: Callable[[Path], None]) -> None:
    _remove_unused(name)
    unfinished = Path(tempfile.mkdtemp(prefix=f".lab-{name}-", dir=folder.parent))
    try:
        unfinished.chmod(0o755)
        build(unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _remove_unused(name: str) -> None:
    """Old artifacts, and what a killed build left behind (its lock is ours now, so nobody is in it)."""
    for folder in cache_folder().glob(f".lab-{name}-*"):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in cache_folder().glob(f"lab-{name}-*"):
        if folder.is_dir() and time.time() - folder.stat().st_mtime > KEPT_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
