"""A file that goes into guest memory: opened once, measured once, and read from the page cache straight into guest RAM.

The file stays open, so that a guest can be reset after the process has dropped its privileges or the path is gone.
Leaves out: every format; those are read by linux, elf, pvh and multiboot.
"""
import os
import stat

from kvmapp.errors import GuestImageError

HEAD_SIZE = 36 * 1024                                            # reaches the ISO 9660 volume descriptor, the farthest signature
ZEROES = bytes(64 * 1024)


class ImageFile:
    """An open kernel or initrd; `what` is the word for it in messages."""
    __slots__ = ("_fd", "head", "path", "size", "what")

    def __init__(self, path: str, what: str):
        """Opens `path` for reading. Raises GuestImageError when it is missing, forbidden, empty or no file."""
        self.path, self.what = path, what
        self._fd = -1
        try:
            # Without O_NONBLOCK the opening of a FIFO would wait for a writer.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as failure:
            raise GuestImageError(f"Cannot open {what} '{path}': {failure.strerror}", self._hint(failure)) from None
        try:
            self.measure()
        except GuestImageError:
            self.close()
            raise

    def measure(self) -> None:
        """Takes the file's size and head, as they are now. Raises GuestImageError where there is nothing to use."""
        self._check_kind(os.fstat(self._fd))
        self.head = self._pread(HEAD_SIZE, 0)

    def status(self) -> os.stat_result:
        """What the file system says of it now."""
        return os.fstat(self._fd)

    def error(self, reason: str, hint: str | None = None) -> GuestImageError:
        """The error to raise about this file."""
        verb = "boot" if self.what == "kernel" else "load"
        return GuestImageError(f"Cannot {verb} {self.what} '{self.path}': {reason}", hint)

    def truncated(self, needed: int) -> GuestImageError:
        """The error for a file whose own header speaks of `needed` bytes."""
        return self.error(f"file is truncated (header says {needed} bytes, file has {self.size})",
                          f"copy or download the {self.what} again")

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`; for headers and notes, never for what goes into guest memory."""
        data = self.head[offset:offset + length]
        if len(data) < length and offset + length <= self.size:
            data = self._pread(length, offset)
        if len(data) < length:
            raise self.truncated(offset + length)
        return data

    def read_into(self, memory, gpa: int, offset: int, length: int) -> None:
        """Reads [offset, offset + length) of the file into guest RAM at `gpa`, which the caller has found free."""
        if offset + length > self.size:
            raise self.truncated(offset + length)
        if not length:
            return
        view = memory.view(gpa, length)
        done = 0
        while done < length:
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as failure:
                raise self.error(failure.strerror or str(failure)) from None
            if count == 0:
                raise self.error(f"file shrank while it was read (had {self.size} bytes)", "start the guest again")
            done += count

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _pread(self, length: int, offset: int) -> bytes:
        try:
            return os.pread(self._fd, length, offset)
        except OSError as failure:
            raise self.error(failure.strerror or str(failure)) from None

    def _check_kind(self, status: os.stat_result) -> None:
        if stat.S_ISDIR(status.st_mode):
            raise self.error("is a folder", f"name the {self.what} file in it")
        if not stat.S_ISREG(status.st_mode):
            raise self.error("is not a regular file", f"give the {self.what} as a plain file")
        if status.st_size == 0:
            raise self.error("file is empty", f"copy or download the {self.what} again")
        self.size = status.st_size

    def _hint(self, failure: OSError) -> str | None:
        if isinstance(failure, FileNotFoundError):
            return f"{self.what} = in the domain's [boot] section (or --{self.what}) must name a file on this host"
        if isinstance(failure, PermissionError):
            return f"uid {os.geteuid()} must be able to read it and to search every folder above it"
        return None


def zero(memory, gpa: int, length: int) -> None:
    """Clears a range of guest RAM; one of nothing may lie behind its end."""
    if not length:
        return
    view = memory.view(gpa, length)
    for start in range(0, length, len(ZEROES)):
        count = min(len(ZEROES), length - start)
        view[start:start + count] = ZEROES[:count]
