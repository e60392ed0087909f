"""The pid file: a lock says whether a daemon runs, the number in it only which one.

So a number that a killed daemon or a power cut left behind never keeps the next one from starting. Two locks are taken: first that of a
file which none but the daemon's user can open, so that nobody else keeps a daemon from starting. Then the pid file's own, for those who
ask whether a daemon runs, and for older daemons, which know no other.
"""
from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import suppress

from kvmapp.errors import HostError, KvmappError

FLOCK = struct.Struct("hhqqi4x")        # struct flock: type, whence, start, length, pid


class DaemonRunning(KvmappError):
    """Another daemon serves this folder."""
    code = "daemon-running"
    exit_code = 3


class PidFile:
    """Locked from `take` to `release` or to the end of the process; children do not inherit the locks. They are POSIX locks, fcntl(2):
    this process may not open the files a second time.
    """

    def __init__(self, path: str):
        self.path = path
        self.lock_path = f"{os.path.splitext(path)[0]}.lock"
        self.fd = self.lock = -1

    def take(self) -> None:
        """Raises DaemonRunning, or HostError when the files cannot be made."""
        try:
            self.take_lock()
            while not self.try_take():
                pass
        except OSError as error:
            self.release()
            raise HostError(f"Cannot write the pid file '{self.path}': {error.strerror}",
                            "the daemon is started by root, or with --run-dir in a folder of yours") from None
        except DaemonRunning:
            self.release()
            raise

    def take_lock(self) -> None:
        """Its file stays when the daemon ends: who removes one may leave two daemons a lock each."""
        self.lock = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if not try_lock(self.lock):
            raise self.runs(self.holder())

    def try_take(self) -> bool:
        # Its mode lets nobody else lock a new one before we have.
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if not try_lock(fd):
                holder = writer(fd)
                if holder is not None:
                    raise self.runs(holder)
                self.set_aside(fd)
            elif self.is_at_path(fd):           # else a daemon that stops has removed it between our open and our lock
                os.fchmod(fd, 0o644)
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                self.fd = fd
        finally:
            if self.fd != fd:
                os.close(fd)
        return self.fd >= 0

    def set_aside(self, fd: int) -> None:
        """Makes place for a new file: this one is locked for reading, which anybody may do, so no daemon has it. An older daemon that
        took it in this very moment has it back.
        """
        aside = f"{self.path}.old"
        with suppress(FileNotFoundError):       # a daemon that stops has removed it
            os.rename(self.path, aside)
            if writer(fd) is not None:
                with suppress(FileExistsError):
                    os.link(aside, self.path)
            os.unlink(aside)

    def runs(self, holder: int) -> DaemonRunning:
        return DaemonRunning(f"A kvmapp daemon runs already (pid {holder or 'unknown'})",
                             f"it holds {self.path}; /etc/init.d/kvmapp restart replaces it")

    def holder(self) -> int:
        """The pid of the daemon that runs, whoever asks; 0 when none does. Takes no lock, so it is in nobody's way."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (FileNotFoundError, PermissionError):        # one that is just being made is nobody else's to read
            return 0
        try:
            return writer(fd) or 0
        finally:
            os.close(fd)

    def is_at_path(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """The pid file last, since who stops a daemon waits for it; removed while still locked, so that nobody's file but ours is."""
        if self.lock >= 0:
            os.close(self.lock)
        if self.fd >= 0:
            os.unlink(self.path)
            os.close(self.fd)
        self.fd = self.lock = -1


def try_lock(fd: int) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def writer(fd: int) -> int | None:
    """The pid of who has locked it for writing, 0 when that is not known; None: nobody has."""
    answer = fcntl.fcntl(fd, fcntl.F_GETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
    kind, _, _, _, pid = FLOCK.unpack(answer)
    if kind == fcntl.F_UNLCK:
        return None
    try:
        return pid or int(os.pread(fd, 32, 0))
    except ValueError:
        return 0
