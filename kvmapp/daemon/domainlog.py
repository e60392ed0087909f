"""A domain's log, /var/log/kvmapp/NAME.log: opened here as root, appended to by the domain process, set aside by size.

The domain process may outlive the daemon and holds the file open, so a log that grows too large while the domain runs is copied
to NAME.log.1 and cut: with O_APPEND the writer goes on at the new end. What a full disk costs is lines, never a guest.
"""
from __future__ import annotations

import os
import time
from contextlib import suppress

BLOCK = 1 << 20
COPIED_MOST = 4                         # times the size at which a log is set aside


def open_log(path: str, limit: int, backups: int) -> int:
    """A descriptor for the domain; of /dev/null when the file cannot be written. Sets an over-long log aside first."""
    rotate(path, limit, backups, in_use=False)
    return open_again(path)


def open_again(path: str) -> int:
    """As `open_log`, while it is in use."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    except OSError:
        return os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)


def write_line(fd: int, text: str) -> None:
    """One entry; the lines of its text after the first are indented, so that each entry begins with its time."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    with suppress(OSError):  # a full disk
        os.write(fd, f"{stamp}+0000: {text}\n".replace("\n", "\n\t", text.count("\n")).encode("utf-8", "replace"))


def append(path: str, text: str) -> None:
    """A line by the daemon itself, when the domain process no longer writes."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return
    write_line(fd, text)
    os.close(fd)


def rotate(path: str, limit: int, backups: int, *, in_use: bool) -> None:
    with suppress(OSError):  # no room for a copy: the log grows on until there is
        if os.stat(path).st_size < limit:
            return
        if not backups:
            os.truncate(path, 0)
        elif in_use:
            copy_and_cut(path, backups, COPIED_MOST * limit)
        else:
            shift(path, backups)
            os.rename(path, f"{path}.1")


def shift(path: str, backups: int) -> None:
    for number in range(backups, 1, -1):
        if os.path.exists(f"{path}.{number - 1}"):
            os.rename(f"{path}.{number - 1}", f"{path}.{number}")


def copy_and_cut(path: str, backups: int, most: int) -> None:
    """The copy first: where there is no room for it, the older ones stay as they are. The last `most` bytes: a guest that writes without
    end shall hold up nobody."""
    new = f"{path}.new"
    try:
        copy(path, new, most)
        shift(path, backups)
        os.rename(new, f"{path}.1")
    except OSError:
        with suppress(FileNotFoundError):
            os.unlink(new)
        raise
    os.truncate(path, 0)


def copy(path: str, backup: str, most: int) -> None:
    """What there is now and no more: a process may write faster than we copy."""
    with open(path, "rb") as log, open(backup, "wb", opener=private) as file:
        size = os.fstat(log.fileno()).st_size
        left = min(size, most)
        log.seek(size - left)
        while left and (data := log.read(min(BLOCK, left))):
            file.write(data)
            left -= len(data)


def private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)


def last_lines(path: str, count: int) -> list[str]:
    """The log's end."""
    try:
        with open(path, "rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - 400 * count))
            lines = log.read(400 * count).decode("utf-8", "replace").splitlines()       # its writer may make it longer meanwhile
    except FileNotFoundError:
        return []
    return (lines if size <= 400 * count else lines[1:])[-count:]
