"""Lays a runtime tree down for `kvmapp setup`, so that a power cut at any moment leaves the old version or the new one in use.

    1  copy to LIBRARY/.unfinished-NAME, every byte on the disk
    2  rename to LIBRARY/NAME
    3  rename a new link over LIBRARY/current: from here on the new version starts
    4  take away the trees that nothing runs from

Whoever does this holds LIBRARY/.lock. The program in a tree names its loader by its whole path (ELF, PT_INTERP), which is why a copy is
good for one place only. Left out: verifying what lies there already; a tree that is whole has its name.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import struct

from kvmapp.errors import HostError
from kvmapp.runtime import CURRENT, LAUNCHER, LOCK, UNFINISHED, sweep_locked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROGRAM, LOADER = "runtime/kvmapp", "runtime/lib/ld-linux-x86-64.so.2"
PT_INTERP = 3
ELF_HEADER = struct.Struct("<32xQ14xHH")            # e_phoff, e_phentsize, e_phnum of Elf64_Ehdr
PROGRAM_HEADER = struct.Struct("<IIQQQQ")           # p_type, p_flags, p_offset, p_vaddr, p_paddr, p_filesz of Elf64_Phdr


class SetupRuns(HostError):
    """Another setup works on the same folder."""
    code = "setup-running"


@contextlib.contextmanager
def locked(library: str) -> Iterator[None]:
    os.makedirs(library, exist_ok=True)
    fd = os.open(os.path.join(library, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SetupRuns(f"Another kvmapp setup works on {library}", "wait for its end, then look whether this one is still needed"
                            ) from None
        yield
    finally:
        os.close(fd)


def lay(source: str, library: str, name: str, final: str, say: Callable[[str], None]) -> None:
    """The tree `source` to `library`/`name`, and into use. `final` is what `library` is called on the host that will run it."""
    target = os.path.join(library, name)
    if not os.path.isdir(target):
        unfinished = os.path.join(library, f"{UNFINISHED}{name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            copy(source, unfinished)
            os.symlink(LAUNCHER, os.path.join(unfinished, "kvmappctl"))
            name_loader(os.path.join(unfinished, PROGRAM), os.path.join(final, name, LOADER))
            os.rename(unfinished, target)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise no_room(library, error, source) from None
        sync_folder(library)
        say(f"laid down {target}")
    use(library, name, say)
    for old in sweep_locked(library):
        say(f"removed {os.path.join(library, old)}: nothing runs from it")


def use(library: str, name: str, say: Callable[[str], None]) -> None:
    """Makes it the current one."""
    link = os.path.join(library, CURRENT)
    if os.path.islink(link) and os.readlink(link) == name:
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{link}.new")
    os.symlink(name, f"{link}.new")
    os.rename(f"{link}.new", link)
    sync_folder(library)
    say(f"{link} is {name} now")


def copy(source: str, target: str) -> None:
    """Every file of it, on the disk when this returns."""
    for folder, _, names in os.walk(source):
        there = os.path.normpath(os.path.join(target, os.path.relpath(folder, source)))
        os.makedirs(there, mode=0o755)
        os.chmod(there, 0o755)
        for name in names:
            if folder == source and name != LAUNCHER:
                continue                    # a lock of the launcher that unpacked it, the link that is made here
            copy_file(os.path.join(folder, name), os.path.join(there, name))
        sync_folder(there)


def copy_file(source: str, target: str) -> None:
    with open(source, "rb") as old, open(target, "xb") as new:
        shutil.copyfileobj(old, new)
        new.flush()
        os.fchmod(new.fileno(), 0o755 if os.fstat(old.fileno()).st_mode & 0o100 else 0o644)
        os.fsync(new.fileno())


def name_loader(program: str, loader: str) -> None:
    """Writes the path into the room that the build left for it."""
    with open(program, "r+b") as file:
        offset, size, count = ELF_HEADER.unpack(file.read(ELF_HEADER.size))
        for number in range(count):
            file.seek(offset + number * size)
            kind, _, place, _, _, room = PROGRAM_HEADER.unpack(file.read(PROGRAM_HEADER.size))
            if kind == PT_INTERP:
                path = os.fsencode(loader)
                if len(path) >= room:
                    raise HostError(f"The path {loader} is too long", "a shorter --prefix")
                file.seek(place)
                file.write(path.ljust(room, b"\0"))
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def no_room(library: str, error: OSError, source: str) -> HostError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return HostError(f"Cannot lay down the program: {error.filename or library}: {error.strerror}",
                         "what was in use before still is")
    need = sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(source) for name in names)
    return HostError(f"Cannot lay down the program in {library}: {error.strerror}",
                     f"it needs {(need >> 20) + 1} MiB there, or --prefix elsewhere; what was in use before still is")
