"""ELF kernels: their loadable segments, notes and entry point, checked against the file and the guest's memory.

Follows the ELF specification (gABI 4.1) for x86, 32 and 64 bits. Leaves out: sections, symbols and relocations; a kernel is
loaded at the physical addresses its program headers name.
"""
import struct

from kvmapp.boot.image import ImageFile
from kvmapp.boot.segments import Segment, SegmentedImage

MAGIC = b"\x7fELF"
CLASS64 = 2
LITTLE_ENDIAN = 1
EM_386, EM_X86_64 = 3, 62
ET_EXEC, ET_DYN = 2, 3
PT_LOAD, PT_INTERP, PT_NOTE, PT_TLS = 1, 3, 4, 7
SHT_NOBITS = 8
MACHINES = {2: "SPARC", 8: "MIPS", 20: "PowerPC", 21: "PowerPC 64", 22: "s390", 40: "Arm", 50: "Itanium", 183: "arm64",
            243: "RISC-V", 258: "LoongArch"}
PROGRAM_HEADERS_MAX = 1024
NOTES_SIZE_MAX = 256 * 1024


class ElfFile(SegmentedImage):
    """An ELF file whose headers have been read and found sane."""

    def __init__(self, file: ImageFile):
        """Reads the headers. Raises GuestImageError for an ELF file that is no x86 kernel."""
        super().__init__(file)
        self.is_64bit = file.read(0, 20)[4] == CLASS64
        self._check_identity()
        self._notes: list[tuple[int, int, int]] = []             # (offset, size, alignment)
        for header in self._program_headers():
            self._take(*header)

    def notes(self):
        """Yields (owner, type, description) of every note; a malformed note ends its segment."""
        for offset, size, alignment in self._notes:
            data = self.file.read(offset, size)
            at = 0
            while at + 12 <= size:
                name_size, text_size, kind = struct.unpack_from("<III", data, at)
                text_at = at + 12 + _aligned(name_size, alignment)
                at = text_at + _aligned(text_size, alignment)
                if text_at + text_size > size:
                    break
                start = text_at - _aligned(name_size, alignment)
                yield data[start:start + name_size].rstrip(b"\0"), kind, data[text_at:text_at + text_size]

    def file_end(self) -> int:
        """Where the ELF file ends in its file: behind its last segment, section and section header."""
        offset, = struct.unpack("<Q" if self.is_64bit else "<I", self.file.read(40 if self.is_64bit else 32, 8 if self.is_64bit else 4))
        entry_size, count = struct.unpack("<HH", self.file.read(58 if self.is_64bit else 46, 4))
        table = self.file.read(offset, entry_size * count) if count else b""
        ends = [segment.offset + segment.file_size for segment in self.segments]
        ends += [note_offset + size for note_offset, size, _ in self._notes]
        for at in range(0, len(table) - (63 if self.is_64bit else 39), entry_size or 1):
            kind, where, size = (struct.unpack_from("<4xI16xQQ", table, at) if self.is_64bit
                                 else struct.unpack_from("<4xI8xII", table, at))
            ends.append(where + size if kind != SHT_NOBITS else 0)
        return max(*ends, offset + len(table))

    def _check_identity(self) -> None:
        _, order = self.file.head[4:6]
        kind, machine = struct.unpack("<HH" if order == LITTLE_ENDIAN else ">HH", self.file.head[16:20])
        if machine not in (EM_386, EM_X86_64) or order != LITTLE_ENDIAN:
            raise self.file.error(f"ELF file is for {MACHINES.get(machine, f'machine {machine}')}, not x86",
                                  "give a kernel built for x86_64 or i386")
        if kind not in (ET_EXEC, ET_DYN):
            raise self.file.error("ELF file is an object or core file, not a kernel", "give a linked kernel (vmlinux)")

    def _program_headers(self):
        """Reads the entry point; yields (type, offset, virtual, physical, file size, memory size, alignment)."""
        if self.is_64bit:
            self.entry_point, table = struct.unpack("<QQ", self.file.read(24, 16))
            entry_size, count = struct.unpack("<HH", self.file.read(54, 4))
            smallest = 56
        else:
            self.entry_point, table = struct.unpack("<II", self.file.read(24, 8))
            entry_size, count = struct.unpack("<HH", self.file.read(42, 4))
            smallest = 32
        if count > PROGRAM_HEADERS_MAX or (count and entry_size < smallest):
            raise self.file.error(f"ELF file has an absurd program header table ({count} entries of {entry_size} bytes)",
                                  "the file is damaged")
        data = self.file.read(table, count * entry_size)
        for at in (i * entry_size for i in range(count)):
            if self.is_64bit:
                kind, _flags, *fields = struct.unpack_from("<IIQQQQQQ", data, at)
                yield kind, *fields
            else:
                kind, offset, virtual, physical, in_file, in_memory, _flags, alignment = struct.unpack_from("<8I", data, at)
                yield kind, offset, virtual, physical, in_file, in_memory, alignment

    def _take(self, kind: int, offset: int, virtual: int, physical: int, in_file: int, in_memory: int, alignment: int) -> None:
        if kind in (PT_INTERP, PT_TLS):
            raise self.file.error("it is a program for a running system, not a kernel", "give a bzImage or vmlinux")
        if kind in (PT_LOAD, PT_NOTE) and offset + in_file > self.file.size:
            raise self.file.truncated(offset + in_file)
        if kind == PT_LOAD and in_memory:
            if in_file > in_memory:
                raise self.file.error(f"ELF segment at {physical:#x} has {in_file} bytes in the file but {in_memory} in memory",
                                      "the file is damaged")
            self.segments.append(Segment(offset, virtual, physical, in_file, in_memory))
        elif kind == PT_NOTE and sum(size for _, size, _ in self._notes) + in_file <= NOTES_SIZE_MAX:
            self._notes.append((offset, in_file, 8 if alignment == 8 else 4))


def _aligned(size: int, alignment: int) -> int:
    return size + alignment - 1 & -alignment
