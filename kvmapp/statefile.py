"""The file of a saved machine: what lies where, written so that a power cut leaves the old file or the whole new one, and read
without trust. docs/snapshot-format.md is its specification.

    with Draft(path) as draft:                      # a temporary file beside `path`
        write(draft.fd, config, state, memory)      # memory: anything with runs(granule) and view(gpa, length)
        draft.publish()                             # fsync, rename, fsync of the folder

    saved = read(fd, name)                          # StateError for whatever is not whole and known
    saved.config, saved.state, saved.runs           # the memory itself is mapped or read by who needs it

It knows no machine: configuration and state are dicts of str, int, bool, None, bytes, lists and dicts. Leaves out: compression.
"""
from __future__ import annotations

import binascii
import json
import os
import struct
import zlib
from _thread import allocate_lock  # its public face would bring what `kvmapp run --restore` does without
from contextlib import suppress
from itertools import count

from kvmapp.errors import HostError, StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import NoReturn, Protocol

    class Memory(Protocol):
        size: int

        def runs(self, granule: int) -> list[tuple[int, int]]: ...
        def view(self, gpa: int, length: int) -> memoryview: ...

MAGIC = b"KVMAPPST"
VERSION = 1
PAGE = 4096
HEADER = struct.Struct("<8sIIQI4x")                 # magic, version, checksum of the header page, size of the file, sections
SECTION = struct.Struct("<IIQQ")                    # kind, checksum, offset, length
RUN = struct.Struct("<QII")                         # gpa, length, checksum: one stretch of memory, stored after the one before
CONFIG, STATE, RUNS, MEMORY = 1, 2, 3, 4
NAMES = {CONFIG: "configuration", STATE: "machine state", RUNS: "table of memory", MEMORY: "memory"}
MOST = {CONFIG: 1 << 20, STATE: 64 << 20, RUNS: 64 << 20, MEMORY: 1 << 60}      # bytes; a file that claims more is refused
SECTIONS_MOST = 16
RUN_MOST = 4 << 20                                  # bytes of memory under one checksum
STRETCHES_MOST = 8192                               # what a machine's memory is cut into: each becomes one mapping
BYTES_KEY = "base64"                                # {"base64": "..."} stands for bytes
COPY_AGAIN = "copy the file again, or start the domain anew without it"


class SavedState:
    """A file that was read and found whole, apart from its memory, which nobody has touched yet."""
    __slots__ = ("config", "fd", "memory_offset", "memory_size", "name", "runs", "state")

    def __init__(self, fd: int, name: str):
        self.fd, self.name = fd, name
        self.config: dict = {}
        self.state: dict = {}
        self.runs: list[tuple[int, int, int]] = []          # (gpa, length, checksum), ascending
        self.memory_offset = self.memory_size = 0

    def stretches(self) -> list[tuple[int, int, int]]:
        """[(gpa, length, offset in the file)] of memory that lies in one piece here and there."""
        found: list[tuple[int, int, int]] = []
        offset = self.memory_offset
        for gpa, length, _ in self.runs:
            if found and found[-1][0] + found[-1][1] == gpa:
                found[-1] = found[-1][0], found[-1][1] + length, found[-1][2]
            else:
                found.append((gpa, length, offset))
            offset += length
        return found

    def verify(self) -> None:
        """Reads all of the memory and compares checksums. Raises StateError."""
        offset = self.memory_offset
        for gpa, length, checksum in self.runs:
            if zlib.crc32(os.pread(self.fd, length, offset)) != checksum:
                raise StateError(f"Saved state '{self.name}': the memory at {gpa:#x} is damaged (its checksum is wrong)", COPY_AGAIN)
            offset += length


# Writing.

def sync_folder(path: str) -> None:
    """What was renamed or removed there is so after a power cut, too. Raises OSError."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


NUMBERS = count()


def published(temporary: str) -> str:
    """The path that a draft of this temporary path gets."""
    folder, name = os.path.split(temporary)
    return os.path.join(folder, name.removeprefix(".").removesuffix(".new").rpartition(".")[0])


class Draft:
    """A temporary file beside `path`, gone again at the end unless it was published. Raises HostError.

    `publish` and `close` may be two threads'; one that is `given_up` before it has its name gets none. With its name it stays: the domain
    that wrote it may have seen that (vmsaving.py), and is gone.
    """

    def __init__(self, path: str, mode: int = 0o600):
        self.lock, self.given_up = allocate_lock(), False
        self.path = os.path.abspath(path)
        folder, name = os.path.split(self.path)
        self.temporary = os.path.join(folder, f".{name}.{os.getpid()}-{next(NUMBERS)}.new")     # two may be saved to one path at once
        if os.path.isdir(self.path):
            raise HostError(f"Cannot save to '{path}': Is a directory", "name a file")
        if os.path.exists(self.path) and not os.path.isfile(self.path):     # the rename would put a file in the place of its node
            raise HostError(f"Cannot save to '{path}': it is a device, not a file", "name a file")
        try:
            if os.path.lexists(self.temporary):         # of a process with our number that was killed
                os.unlink(self.temporary)
            self.fd = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        except OSError as error:
            raise HostError(f"Cannot save to '{path}': {error.strerror}", hint_for(error)) from None

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """A second call does nothing."""
        with self.lock:
            if self.fd >= 0:
                fd, self.fd = self.fd, -1
                with suppress(OSError):                 # of what was synced, or is thrown away
                    os.close(fd)
            if self.temporary:
                with suppress(OSError):                 # its folder is gone, or cannot be written any more
                    os.unlink(self.temporary)
                self.temporary = ""

    def publish(self) -> None:
        """The file is whole: gives it its name. Raises HostError."""
        try:
            with self.lock:
                os.fsync(self.fd)
                if self.given_up:
                    return
                os.rename(self.temporary, self.path)
                self.temporary = self.path              # a file that is said to have failed must not stay: its guest goes on
                try:
                    sync_folder(os.path.dirname(self.path))
                finally:
                    if self.given_up:                   # then nobody says so
                        self.temporary = ""
                self.temporary = ""
        except OSError as error:
            raise HostError(f"Cannot save to '{self.path}': {error.strerror}", hint_for(error)) from None


def write(fd: int, config: dict, state: dict, memory: Memory, progress: Callable[[int], None] = lambda done: None) -> int:
    """Fills the open, empty file, and syncs it; its size. The header comes last, so that half a file is none. Raises HostError."""
    try:
        offset = PAGE
        sections = []
        granule = granule_of(memory.size)
        runs = []
        for gpa, length in pieces(memory.runs(granule)):
            view = memory.view(gpa, length)
            write_all(fd, view, offset)
            runs.append(RUN.pack(gpa, length, zlib.crc32(view)))
            offset += length
            progress(offset - PAGE)
        sections.append(SECTION.pack(MEMORY, 0, PAGE, offset - PAGE))
        for kind, data in ((CONFIG, encode(config)), (STATE, encode(state)), (RUNS, b"".join(runs))):
            if len(data) > MOST[kind]:
                raise HostError(f"Cannot save: the {NAMES[kind]} has {len(data)} bytes, the format takes {MOST[kind]}")
            write_all(fd, memoryview(data), offset)
            sections.append(SECTION.pack(kind, zlib.crc32(data), offset, len(data)))
            offset += len(data)
        os.fsync(fd)
        write_all(fd, memoryview(header(offset, sections)), 0)
        os.fsync(fd)
        return offset
    except OSError as error:
        raise HostError(f"Cannot write the saved state: {error.strerror}", hint_for(error)) from None


def granule_of(size: int) -> int:
    """Into what the memory is cut to look for zeroes: pages, as long as that does not make too many stretches."""
    granule = PAGE
    while size // granule > 2 * STRETCHES_MOST:
        granule *= 2
    return granule


def pieces(runs: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    for gpa, length in runs:
        for start in range(0, length, RUN_MOST):
            yield gpa + start, min(RUN_MOST, length - start)


def write_all(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def header(size: int, sections: list[bytes]) -> bytes:
    table = b"".join(sections)
    page = (HEADER.pack(MAGIC, VERSION, 0, size, len(sections)) + table).ljust(PAGE, b"\0")
    return HEADER.pack(MAGIC, VERSION, zlib.crc32(page), size, len(sections)) + page[HEADER.size:]


def encode(value: dict) -> bytes:
    return json.dumps(value, default=encode_bytes, separators=(",", ":"), allow_nan=False).encode()


def encode_bytes(value: object) -> dict[str, str]:
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} cannot be saved")
    return {BYTES_KEY: binascii.b2a_base64(value, newline=False).decode("ascii")}


def hint_for(error: OSError) -> str | None:
    import errno
    return {errno.ENOSPC: "make room, or save to another file system", errno.EDQUOT: "make room, or save to another file system",
            errno.EFBIG: "this file system or ulimit -f allows no larger file", errno.ENOENT: "the folder must be there already",
            errno.EACCES: "the folder must be writable for kvmapp"}.get(error.errno or 0)


# Reading.

def open_file(path: str) -> int:
    """A descriptor of the file. Raises StateError."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)       # a FIFO would wait for a writer
    except OSError as error:
        raise StateError(f"Cannot open saved state '{path}': {error.strerror}", hint_for(error)) from None


def read(fd: int, name: str) -> SavedState:
    """Everything but the memory. `name` is the file's, for messages. Raises StateError."""
    reader = Reader(fd, name)
    saved = SavedState(fd, name)
    sections = reader.sections()
    saved.config, saved.state = reader.decode(CONFIG, sections), reader.decode(STATE, sections)
    _, saved.memory_offset, saved.memory_size = sections[MEMORY]
    saved.runs = reader.runs(sections)
    return saved


class Reader:
    def __init__(self, fd: int, name: str):
        self.fd, self.name = fd, name

    def fail(self, reason: str, hint: str = COPY_AGAIN) -> NoReturn:
        raise StateError(f"Saved state '{self.name}': {reason}", hint)

    def sections(self) -> dict[int, tuple[int, int, int]]:
        """{kind: (checksum, offset, length)}, all four of them, inside the file."""
        page = self.pread(PAGE, 0)
        if page[:len(MAGIC)] != MAGIC:
            if page[:len(MAGIC)].strip(b"\0"):
                self.fail("it is no saved machine", "give a file that kvmappctl save or kvmapp run --save wrote")
            self.fail("it was not written to its end")
        if len(page) < PAGE:
            self.fail(f"it is cut short: {len(page)} bytes")
        _, version, checksum, size, count = HEADER.unpack_from(page)
        if version != VERSION:
            self.fail(f"its format is version {version}, this kvmapp reads version {VERSION}",
                      "restore it with the version of kvmapp that saved it, or a newer one")
        if zlib.crc32(page[:12] + bytes(4) + page[16:]) != checksum:
            self.fail("its header is damaged")
        there = os.fstat(self.fd).st_size
        if there != size:
            self.fail(f"it has {there} bytes, its header says {size}")
        if count > SECTIONS_MOST:
            self.fail(f"its header speaks of {count} sections")
        found: dict[int, tuple[int, int, int]] = {}
        for kind, crc, offset, length in (SECTION.unpack_from(page, HEADER.size + i * SECTION.size) for i in range(count)):
            if kind not in NAMES or kind in found:
                self.fail(f"its section of kind {kind} is unknown or there twice")
            if length > MOST[kind] or offset < PAGE or offset + length > size:
                self.fail(f"its {NAMES[kind]} lies outside of the file or is too large ({length} bytes)")
            found[kind] = crc, offset, length
        if lacking := [NAMES[kind] for kind in NAMES if kind not in found]:
            self.fail(f"it has no {lacking[0]}")
        return found

    def decode(self, kind: int, sections: dict[int, tuple[int, int, int]]) -> dict:
        try:
            value = json.loads(self.section(kind, sections), object_hook=decode_bytes, parse_constant=no_number, parse_float=no_number)
        except (ValueError, RecursionError) as error:
            self.fail(f"its {NAMES[kind]} cannot be understood ({str(error)[:80]})")
        if not isinstance(value, dict):
            self.fail(f"its {NAMES[kind]} is no table")
        return value

    def runs(self, sections: dict[int, tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """Ascending, apart from each other, of whole pages, and together as long as the memory section."""
        table = self.section(RUNS, sections)
        _, offset, size = sections[MEMORY]
        if len(table) % RUN.size or offset % PAGE:
            self.fail("its table of memory is malformed")
        runs = list(RUN.iter_unpack(table))
        end = total = 0
        for gpa, length, _ in runs:
            if gpa % PAGE or length % PAGE or not 0 < length <= RUN_MOST or gpa < end or gpa + length > 1 << 52:
                self.fail(f"its table of memory is malformed at {gpa:#x} (+{length:#x})")
            end = gpa + length
            total += length
        if total != size:
            self.fail(f"its memory has {size} bytes, its table of memory says {total}")
        return runs

    def section(self, kind: int, sections: dict[int, tuple[int, int, int]]) -> bytes:
        checksum, offset, length = sections[kind]
        data = self.pread(length, offset)
        if len(data) != length or zlib.crc32(data) != checksum:
            self.fail(f"its {NAMES[kind]} is damaged (the checksum is wrong)")
        return data

    def pread(self, length: int, offset: int) -> bytes:
        try:
            return os.pread(self.fd, length, offset)
        except OSError as error:
            self.fail(f"cannot read it: {error.strerror}", "give a file that kvmappctl save or kvmapp run --save wrote")


def decode_bytes(table: dict) -> object:
    if BYTES_KEY not in table:
        return table
    if len(table) != 1 or not isinstance(table[BYTES_KEY], str):
        raise ValueError(f"'{BYTES_KEY}' among other keys")
    return binascii.a2b_base64(table[BYTES_KEY], strict_mode=True)


def no_number(text: str) -> NoReturn:
    raise ValueError(f"the number {text}")
