"""A bzImage that the host unpacked once, so that its guests need not do so at each start.

The unpacked kernel is kept in a folder (`KernelCache`) and found again by what the file system says of the packed file: its inode,
size and times; what is in it is named by its SHA-256, so that copies of one kernel are kept once. The kernel is entered as its own
decompressor would enter it, with the random virtual address that the decompressor would have given it (KASLR; `nokaslr` on the
command line turns it off there as here). Its physical address is the one it prefers. Leaves out: 32-bit kernels, which unpack
themselves.
"""
from __future__ import annotations

import fcntl
import os
import stat
import time
from contextlib import suppress

from kvmapp.boot.elf import ElfFile
from kvmapp.boot.entry import EntryState, long_mode
from kvmapp.boot.handover import Handover
from kvmapp.boot.image import ImageFile
from kvmapp.boot.linux import LOADFLAGS, BzImage
from kvmapp.boot.payload import PayloadError, is_known, unpack
from kvmapp.boot.placement import Placement
from kvmapp.errors import GuestImageError
from kvmapp.layout import BOOT_ZERO_PAGE

KASLR_FLAG = 0x02                                                # loadflags: its memory layout may be random too
KERNEL_MAP = 0xFFFF_FFFF_8000_0000                               # where x86-64 maps a kernel: physical 0 of it (__START_KERNEL_map)
KERNEL_IMAGE_SIZE = 1 << 30                                      # the room there of a kernel that can be relocated
KEPT_MOST = 8                                                    # kernels
LINKS_MOST = 256                                                 # files that they were unpacked from
RACY_NS = 2 * 10**9                                              # a file changed so lately may change again within the same time stamp
LOCK, BY_FILE, UNFINISHED = ".lock", "by-file", ".unfinished-"


class UnpackedKernel(BzImage):
    """The kernel of a bzImage, out of a file that holds it unpacked."""

    def __init__(self, file: ImageFile, unpacked: ImageFile, *, random: bool):
        """Raises GuestImageError where `unpacked` is no kernel that can be entered."""
        super().__init__(file)
        self.unpacked = unpacked
        self.elf = ElfFile(unpacked)
        self.elf.entry()
        self.random = random
        if not self.elf.is_64bit:
            raise unpacked.error("it is a 32-bit kernel")

    def load(self, memory, placement: Placement) -> None:
        """Reads the kernel to where it was linked to run, and gives it another virtual address."""
        self.elf.load(memory, placement)
        start = min(segment.physical for segment in self.elf.segments)
        room = max(self.init_size, self.elf.end - start)
        if not placement.conflict(self.elf.end, start + room - self.elf.end):
            placement.claim(self.elf.end, start + room - self.elf.end, "the kernel")
        self.shift = self._shift(start, room) if self.random else 0
        if self.shift:
            from kvmapp.boot.relocation import RelocationError, relocate
            try:
                relocate(memory, self._relocations(), self.shift, start, self.elf.end - start, KERNEL_MAP + start)
            except RelocationError as failure:
                raise self.file.error(f"its relocations are damaged: {failure}",
                                      "set unpack = no in the domain's [boot] section: then the kernel unpacks itself") from None

    def enter(self, memory, handover: Handover) -> EntryState:
        """Writes the zero page and names the entry point."""
        page = self.zero_page(memory, handover)
        if self.shift:
            page[LOADFLAGS] |= KASLR_FLAG
        memory.write(BOOT_ZERO_PAGE, page)
        return long_mode(memory, self.elf.entry(), rsi=BOOT_ZERO_PAGE)

    def _relocations(self) -> bytes:
        """What follows the ELF file."""
        end = self.elf.file_end()
        return self.unpacked.read(end, self.unpacked.size - end)

    def _shift(self, start: int, room: int) -> int:
        """Bytes, as find_random_virt_addr of the kernel's decompressor; 0 for a kernel that cannot be relocated."""
        if not self.alignment or self.unpacked.size <= self.elf.file_end() or self._mapped_elsewhere(start):
            return 0
        slots = (KERNEL_IMAGE_SIZE - start - room) // self.alignment + 1
        return int.from_bytes(os.urandom(8), "little") % slots * self.alignment if slots > 0 else 0

    def _mapped_elsewhere(self, start: int) -> bool:
        return not any(segment.physical == start and segment.virtual == KERNEL_MAP + start for segment in self.elf.segments)


class KernelCache:
    """Unpacked kernels in a folder of ours. A folder that others could write to, or that cannot be written, is not used."""

    def __init__(self, folder: str):
        self.folder = folder

    def open(self, kernel: BzImage, memory: int) -> ImageFile | None:
        """The unpacked file of this kernel, made now where it is not there; None where it cannot be had, or wants more than `memory` bytes:
        a small file may say that it unpacks to gigabytes.
        """
        if not kernel.payload_size or not kernel.entry64 or kernel.init_size > memory:
            return None
        try:
            index = os.path.join(self.folder, BY_FILE, identity(kernel.file))
            return self._existing(index) or self._make(kernel, index)
        except (OSError, PayloadError, GuestImageError):
            return None                                          # the guest unpacks it, as it would on any other machine

    def _existing(self, path: str) -> ImageFile | None:
        if not self._is_ours():
            return None
        try:
            return ImageFile(path, "kernel")
        except GuestImageError:
            return None

    def _make(self, kernel: BzImage, index: str) -> ImageFile | None:
        os.makedirs(os.path.dirname(index), 0o700, exist_ok=True)
        if not self._is_ours():
            return None
        lock = os.open(os.path.join(self.folder, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)                     # a hundred guests that start together unpack once
            return self._existing(index) or self._make_locked(kernel, index)
        finally:
            os.close(lock)

    def _make_locked(self, kernel: BzImage, index: str) -> ImageFile | None:
        payload = kernel.file.read(kernel.payload_offset, kernel.payload_size)
        if not is_known(payload):                                # before the digest, which each start would make in vain
            return None
        import hashlib
        path = os.path.join(self.folder, hashlib.sha256(payload).hexdigest())
        if not os.path.exists(path):
            self._write(path, unpack(payload, kernel.init_size))
            self._prune()
        if identity(kernel.file) == os.path.basename(index) and is_settled(kernel.file):
            with suppress(FileExistsError):                      # it led to a file that somebody took away
                os.symlink(os.path.join("..", os.path.basename(path)), index)
                self._prune_index()
        return self._existing(path)

    def _write(self, path: str, data: bytes) -> None:
        """Whole or not at all, whatever happens to the host."""
        unfinished = os.path.join(self.folder, f"{UNFINISHED}{os.path.basename(path)}")
        with suppress(FileNotFoundError):
            os.unlink(unfinished)                   # of one who was killed over it; only root could open it for writing
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view):]
            os.fsync(fd)
            os.rename(unfinished, path)
        except OSError:
            os.unlink(unfinished)
            raise
        finally:
            os.close(fd)

    def _prune(self) -> None:
        """The newest KEPT_MOST stay, and of the index what leads to them. Guests that run have theirs open."""
        kernels = [entry for entry in os.scandir(self.folder) if not entry.name.startswith(".") and entry.is_file()]
        kernels.sort(key=lambda entry: entry.stat().st_mtime)
        for entry in kernels[:-KEPT_MOST]:
            os.unlink(entry.path)
        self._prune_index()

    def _prune_index(self) -> None:
        """What leads nowhere, and all but the newest: each copy of a kernel is another file."""
        links = sorted(os.scandir(os.path.join(self.folder, BY_FILE)), key=lambda entry: entry.stat(follow_symlinks=False).st_mtime)
        for number, entry in enumerate(links, 1):
            if number <= len(links) - LINKS_MOST or not os.path.exists(entry.path):
                os.unlink(entry.path)

    def _is_ours(self) -> bool:
        try:
            status = os.stat(self.folder)
        except OSError:
            return False
        return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def identity(file: ImageFile) -> str:
    """Which file this is, in which state: it changes with each write."""
    status = file.status()
    return "-".join(f"{number:x}" for number in (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))


def is_settled(file: ImageFile) -> bool:
    """Whether a later change would show in `identity`."""
    return time.time_ns() - file.status().st_ctime_ns > RACY_NS
