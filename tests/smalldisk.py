"""A file system that is soon full. For root."""
import contextlib
import subprocess
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder, size=64 << 10):
    """One of `size` bytes on the folder."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=False).returncode:
        pytest.skip("this host lets nobody mount: NOT TESTED")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def make_room(folder, size=4 << 20):
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)


def fill(path):
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def sparse(path: Path, size: int) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
    return path
