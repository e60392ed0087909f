"""Locks that keep two guests from one disk, and who holds them.

They are open-file-description locks on the bytes that QEMU uses for the same purpose, so that a QEMU process or qemu-img and a
domain of ours keep out of each other's way too: byte 100 + n says «I do n», byte 200 + n «nobody else may do n». Kernels without
such locks (before Linux 3.15) get flock(2), which keeps out only ourselves. They go when the last copy of the descriptor goes.
"""
import errno
import fcntl
import logging
import os
import struct
from pathlib import Path

log = logging.getLogger(__name__)

DOES, FORBIDS = 100, 200
READ, WRITE, RESIZE = 0, 1, 3
FLOCK = struct.Struct("hhqqi4x")                    # struct flock: type, whence, start, length, pid
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class Locked(Exception):
    """Somebody else uses the file in a way that does not go with ours."""


def lock(fd: int, *, read_only: bool, shared: bool) -> None:
    """Locks for reading or for writing; `shared`: others may write too. Raises Locked, OSError."""
    does = {READ} if read_only else {READ, WRITE, RESIZE}
    forbids = set() if shared else {WRITE, RESIZE}
    try:
        for byte in sorted({DOES + what for what in does} | {FORBIDS + what for what in forbids}):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        for byte in sorted({FORBIDS + what for what in does} | {DOES + what for what in forbids}):
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
            if FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
                raise Locked
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise Locked from None
        if error.errno == errno.EINVAL:
            lock_whole(fd, exclusive=not read_only and not shared)
        elif error.errno in NO_LOCKS:
            log.warning("%s: its file system has no locks: nothing keeps a second guest from it",
                        os.readlink(f"/proc/self/fd/{fd}"))
        else:
            raise


def lock_whole(fd: int, *, exclusive: bool) -> None:
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Locked from None


def holders(path: str) -> list[tuple[int, str]]:
    """(pid, what it calls itself) of the processes that hold a lock on the file, as far as we may look."""
    wanted = os.stat(path)
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(holds_lock(process, fd, wanted) for fd in os.listdir(process / "fd")):
                found.append((int(process.name), command(process)))
        except OSError:
            continue                                # gone, or another user's
    return found


def holds_lock(process: Path, fd: str, wanted: os.stat_result) -> bool:
    try:
        status = os.stat(process / "fd" / fd)
        if (status.st_dev, status.st_ino) != (wanted.st_dev, wanted.st_ino):
            return False
        return "lock:" in (process / "fdinfo" / fd).read_text()
    except OSError:
        return False                                # closed since the look


def command(process: Path) -> str:
    """The name by which a domain's process shows in top; for others their program."""
    words = (process / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    return words if words.startswith("kvmapp:") else (process / "comm").read_text().strip()
