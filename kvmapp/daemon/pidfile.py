"""The pid file: its lock says whether a daemon runs, the number in it only which one.

So a number that a killed daemon or a power cut left behind never keeps the next one from starting.
"""
from __future__ import annotations

import errno
import fcntl
import os
import struct

from kvmapp.errors import HostError, KvmappError

FLOCK = struct.Struct("hhqqi4x")        # struct flock: type, whence, start, length, pid


class DaemonRunning(KvmappError):
    """Another daemon serves this folder."""
    code = "daemon-running"
    exit_code = 3


class PidFile:
    """Locked from `take` to `release` or to the end of the process; children do not inherit the lock. It is a POSIX lock, fcntl(2):
    this process may not open the file a second time.
    """

    def __init__(self, path: str):
        self.path = path
        self.fd = -1

    def take(self) -> None:
        """Raises DaemonRunning, or HostError when the file cannot be made."""
        try:
            while not self.try_take():
                pass
        except OSError as error:
            raise HostError(f"Cannot write the pid file '{self.path}': {error.strerror}",
                            "the daemon is started by root, or with --run-dir in a folder of yours") from None

    def try_take(self) -> bool:
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self.is_at_path(fd):         # a daemon that stops has removed it between our open and our lock
                os.close(fd)
                return False
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise DaemonRunning(f"A kvmapp daemon runs already (pid {holder or 'unknown'})",
                                    f"it holds {self.path}; /etc/init.d/kvmapp restart replaces it") from None
            raise
        self.fd = fd
        return True

    def holder(self) -> int:
        """The pid of the daemon that runs, whoever asks; 0 when none does. Takes no lock, so it is in nobody's way."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return 0
        try:
            answer = fcntl.fcntl(fd, fcntl.F_GETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
            kind, _, _, _, pid = FLOCK.unpack(answer)
            return 0 if kind == fcntl.F_UNLCK else pid or int(os.pread(fd, 32, 0) or b"0")
        finally:
            os.close(fd)

    def is_at_path(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Removed while still locked, so that nobody's file but ours is."""
        if self.fd >= 0:
            os.unlink(self.path)
            os.close(self.fd)
            self.fd = -1
