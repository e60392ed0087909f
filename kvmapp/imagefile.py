"""The file or block device of a disk: opened, found fit and locked; what is wrong with it is said.

By the domain process before it drops its privileges, or by the daemon for a domain that runs.
"""
from __future__ import annotations

import errno
import os
import pwd
import stat
import time

from kvmapp.errors import GuestImageError
from kvmapp.imagelocks import Locked, holders, lock

KINDS = ((stat.S_ISDIR, "a directory"), (stat.S_ISCHR, "a character device"), (stat.S_ISFIFO, "a named pipe"),
         (stat.S_ISSOCK, "a socket"))

DYING_SECONDS = 2.0


class Claimed(Locked):
    """A block device that somebody has for himself alone: another guest, or the host, which has it mounted or in LVM or RAID."""


def open_image(name: str, path: str, *, read_only: bool = False, shared: bool = False) -> int:
    """A descriptor of the image file or block device, locked. `shared`: others may write to it at the same time.

    What a killed process had open goes a moment after it, when the kernel has ended its I/O: what nobody is seen to hold is waited for.
    """
    deadline = None
    while True:
        try:
            return open_and_lock(name, path, read_only=read_only, shared=shared)
        except Locked as error:
            now = time.monotonic()
            if deadline is None:
                deadline = now if holders(path) else now + DYING_SECONDS
            if now >= deadline:
                raise in_use(name, path, error, read_only) from None
            time.sleep(DYING_SECONDS / 100)


def open_and_lock(name: str, path: str, *, read_only: bool, shared: bool) -> int:
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        status = os.stat(path)
        for is_kind, kind in KINDS:
            if is_kind(status.st_mode):
                raise refusal(name, path, f"it is {kind}", "a disk is an image file or a block device")
        if stat.S_ISBLK(status.st_mode) and not read_only and not shared:
            flags |= os.O_EXCL
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.EBUSY and flags & os.O_EXCL:
            raise Claimed from None
        raise refusal(name, path, error.strerror or str(error), reason(error, path, read_only)) from None
    try:
        lock(fd, read_only=read_only, shared=shared)
    except Locked:
        os.close(fd)
        raise
    except OSError as error:
        os.close(fd)
        raise refusal(name, path, f"it cannot be locked: {error.strerror}") from None
    return fd


def refusal(name: str, path: str, what: str, hint: str | None = None) -> GuestImageError:
    return GuestImageError(f"Cannot open disk '{name}' ({path}): {what}", hint)


def in_use(name: str, path: str, why: Locked, read_only: bool) -> GuestImageError:
    found = holders(path)
    if isinstance(why, Claimed) and not found:
        return refusal(name, path, os.strerror(errno.EBUSY), "the host itself uses the device: unmount it, or take it out of LVM or RAID")
    who = ", ".join(f"{pid} ({command})" for pid, command in found if pid != os.getpid())
    how = "written to" if read_only else "used"
    return refusal(name, path, f"it is being {how} by process {who}" if who else f"it is being {how} by another process",
                   "only guests that all have it readonly can share a disk")


def reason(error: OSError, path: str, read_only: bool) -> str | None:
    """The next step for one whom the system's own words leave alone."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return missing_permission(path, read_only)
    if error.errno == errno.ENOENT:
        missing = next((str(folder) for folder in ancestors(path) if not os.path.lexists(folder)), None)
        return f"there is no folder {missing}" if missing else f"make it first: truncate -s 20G {path}"
    return {
        errno.EROFS: "set readonly = yes",
        errno.ENXIO: "the device has no medium, or is gone",
        errno.ENOMEDIUM: "insert a medium",
        errno.ETXTBSY: "the host uses it as swap, or runs it",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
    }.get(error.errno or 0)


def missing_permission(path: str, read_only: bool) -> str:
    """Which bit is missing, on what, for whom."""
    uid = os.geteuid()
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    for folder in ancestors(path):
        if not os.access(folder, os.X_OK, effective_ids=True):
            return f"user {user} lacks search permission on {folder}"
    for what, mode in (("read", os.R_OK), *((("write", os.W_OK),) if not read_only else ())):
        if not os.access(path, mode, effective_ids=True):
            return f"user {user} lacks {what} permission on {path}"
    return "SELinux, AppArmor, a device cgroup or the file's immutable attribute forbids it (see ausearch -m avc, lsattr)"


def ancestors(path: str) -> list[str]:
    """The folders that lead to the file, from / down, symbolic links followed."""
    folder = os.path.dirname(os.path.realpath(path))
    folders = [folder]
    while folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
        folders.append(folder)
    return folders[::-1]
