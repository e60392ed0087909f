"""Kernel files built byte by byte for the boot tests: bzImage, ELF with notes, multiboot; and what it takes to boot them."""
import struct

from kvmapp.boot.direct import DirectBoot
from kvmapp.boot.platform import Platform
from kvmapp.boot.topology import Topology

MIB = 1 << 20


def bzimage(*, version=0x020F, size=64 * 1024, setup_sects=4, loadflags=1, xloadflags=1, relocatable=1, pref_address=16 * MIB,
            init_size=2 * MIB, cmdline_size=2047, initrd_addr_max=0x7FFF_FFFF, syssize=None) -> bytes:
    """A bzImage whose protected-mode part is `size` bytes of a recognisable pattern."""
    head = bytearray((setup_sects + 1) * 512)
    head[0x1F1] = setup_sects
    struct.pack_into("<I", head, 0x1F4, size // 16 if syssize is None else syssize)
    head[0x1FE:0x200] = b"\x55\xAA"
    head[0x200:0x202] = b"\xEB\x6A"
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, version)
    head[0x211] = loadflags
    struct.pack_into("<I", head, 0x22C, initrd_addr_max)
    struct.pack_into("<IBxH", head, 0x230, 0x20_0000, relocatable, xloadflags)
    struct.pack_into("<I", head, 0x238, cmdline_size)
    struct.pack_into("<QI", head, 0x258, pref_address, init_size)
    return bytes(head) + pattern(size)


def pattern(size: int) -> bytes:
    """`size` bytes without a zero, whose period divides no page."""
    return (bytes(range(1, 252)) * (size // 251 + 1))[:size]


def note(owner: bytes, kind: int, text: bytes) -> bytes:
    name = owner + b"\0"
    return struct.pack("<III", len(name), len(text), kind) + name.ljust(-(-len(name) // 4) * 4, b"\0") \
        + text.ljust(-(-len(text) // 4) * 4, b"\0")


def pvh_note(address: int) -> bytes:
    return note(b"Xen", 18, struct.pack("<Q", address))


def elf(*, bits=64, machine=None, kind=2, entry=MIB, segments=((MIB, MIB, b"kernel", 4096),), notes=b"", extra=(),
        prefix=b"") -> bytes:
    """An ELF file; `segments` are (virtual, physical, content, memory size), `extra` are further headers (type, offset, size),
    `prefix` stands between the program headers and the first segment.
    """
    machine = machine or (62 if bits == 64 else 3)
    count = len(segments) + bool(notes) + len(extra)
    header_size, entry_size = (64, 56) if bits == 64 else (52, 32)
    at = header_size + count * entry_size + len(prefix)
    table, content = b"", prefix
    rows = [(1, virtual, physical, data, size) for virtual, physical, data, size in segments]
    rows += [(4, 0, 0, notes, len(notes))] if notes else []
    for row_kind, virtual, physical, data, size in rows:
        table += _program_header(bits, row_kind, at, virtual, physical, len(data), size)
        content += data
        at += len(data)
    for row_kind, offset, size in extra:
        table += _program_header(bits, row_kind, offset, 0, 0, size, size)
    ident = b"\x7fELF" + bytes((2 if bits == 64 else 1, 1, 1)) + bytes(9)
    if bits == 64:
        head = struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, entry, 64, 0, 0, 64, 56, count, 0, 0, 0)
    else:
        head = struct.pack("<HHIIIIIHHHHHH", kind, machine, 1, entry, 52, 0, 0, 52, 32, count, 0, 0, 0)
    return ident + head + table + content


def _program_header(bits, kind, offset, virtual, physical, in_file, in_memory) -> bytes:
    if bits == 64:
        return struct.pack("<IIQQQQQQ", kind, 7, offset, virtual, physical, in_file, in_memory, 4)
    return struct.pack("<8I", kind, offset, virtual, physical, in_file, in_memory, 7, 4)


def multiboot_header(flags=0, *fields) -> bytes:
    """The three words that sum to zero, then the address fields if any."""
    return struct.pack("<3I", 0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFF_FFFF) + struct.pack(f"<{len(fields)}I", *fields)


def boot_files(folder, memory, kernel: bytes, initrd: bytes | None = None, cmdline: str = "console=ttyS0", **facts):
    """Boots kernel and initrd bytes; gives the entry state."""
    (folder / "kernel").write_bytes(kernel)
    if initrd is not None:
        (folder / "initrd").write_bytes(initrd)
    files = DirectBoot(str(folder / "kernel"), str(folder / "initrd") if initrd is not None else None, cmdline)
    try:
        return files.setup(memory, Platform(Topology(1), **facts))
    finally:
        files.close()
