"""PVH, multiboot and plain ELF kernels: what they are handed, and ELF files that lie."""
import struct
from functools import partial

import pytest

from kvmapp.boot.entry import CODE32, CODE64
from kvmapp.errors import GuestImageError
from kvmapp.layout import BOOT_CMDLINE, BOOT_GDT, BOOT_INFO, BOOT_PAGE_TABLES
from kvmapp.memory import GuestMemory
from tests.unit.boot_images import MIB, boot_files, elf, multiboot_header, note, pattern, pvh_note


@pytest.fixture
def memory():
    return GuestMemory(32 * MIB)


@pytest.fixture
def boot(tmp_path, memory):
    return partial(boot_files, tmp_path, memory, cmdline="hello")


def string(memory, gpa: int) -> bytes:
    return memory.read(gpa, 64).split(b"\0")[0]


@pytest.mark.parametrize("bits", [32, 64])
def test_pvh_kernel_gets_the_start_info(boot, memory, bits):
    entry = boot(elf(bits=bits, notes=note(b"GNU", 3, b"build") + pvh_note(MIB + 8)), pattern(3000))
    assert (entry.mode, entry.rip, entry.rbx) == ("protected", MIB + 8, BOOT_INFO)
    magic, version, flags, modules, module_list, cmdline, _rsdp, memmap, entries, reserved = struct.unpack(
        "<4I4Q2I", memory.read(BOOT_INFO, 56))
    assert (magic, version, flags, reserved) == (0x336EC578, 1, 0, 0)
    assert string(memory, cmdline) == b"hello"
    assert modules == 1
    initrd, size, module_cmdline, _ = struct.unpack("<4Q", memory.read(module_list, 32))
    assert (memory.read(initrd, size), module_cmdline) == (pattern(3000), 0)
    ranges = list(struct.iter_unpack("<QQII", memory.read(memmap, 24 * entries)))
    assert (MIB, 31 * MIB, 1, 0) in ranges


def test_pvh_kernel_without_initrd_has_no_module(boot, memory):
    boot(elf(notes=pvh_note(MIB)))
    assert struct.unpack("<I", memory.read(BOOT_INFO + 12, 4)) == (0,)
    assert struct.unpack("<Q", memory.read(BOOT_INFO + 16, 8)) == (0,)


def test_elf64_without_any_note_is_entered_in_64_bit_mode(boot):
    assert boot(elf(entry=MIB + 4)).mode == "long"


def test_virtual_entry_point_is_translated(boot):
    high = 0xFFFF_8000_0000_0000
    assert boot(elf(entry=high + 0x10, segments=((high, MIB, b"code", 4096),))).rip == MIB + 0x10


def test_gdt_and_page_tables(boot, memory):
    entry = boot(elf())
    assert struct.unpack("<Q", memory.read(BOOT_GDT + 0x10, 8)) == (CODE64,)
    pml4 = struct.unpack("<512Q", memory.read(BOOT_PAGE_TABLES, 4096))
    assert [i for i, value in enumerate(pml4) if value] == [0]
    pdpt = struct.unpack("<4Q", memory.read(pml4[0] & -4096, 32))
    for gib, directory in enumerate(pdpt):
        pages = struct.unpack("<512Q", memory.read(directory & -4096, 4096))
        assert all(page == (gib << 30 | i << 21 | 0x83) for i, page in enumerate(pages))
    assert entry.gdt_base == BOOT_GDT
    boot(elf(notes=pvh_note(MIB)))
    assert struct.unpack("<Q", memory.read(BOOT_GDT + 0x10, 8)) == (CODE32,)


def multiboot_info(memory):
    return struct.unpack("<29I", memory.read(BOOT_INFO, 116))


@pytest.mark.parametrize("bits", [32, 64])
def test_multiboot_elf_gets_the_information_structure(boot, memory, bits):
    entry = boot(elf(bits=bits, segments=((MIB, MIB, pattern(5000), 8192),), prefix=multiboot_header(3)), pattern(700))
    assert (entry.mode, entry.rip, entry.rax, entry.rbx) == ("protected", MIB, 0x2BADB002, BOOT_INFO)
    info = multiboot_info(memory)
    assert info[0] == 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    assert (info[1], info[2]) == (639, 31 * 1024)
    assert string(memory, info[4]) == b"hello"
    assert info[5] == 1
    start, end, text, reserved = struct.unpack("<4I", memory.read(info[6], 16))
    assert memory.read(start, end - start) == pattern(700)
    assert (start, text, reserved) == (MIB + 8192, 0, 0)
    rows = list(struct.iter_unpack("<IQQI", memory.read(info[12], info[11])))
    assert {row[0] for row in rows} == {20}
    assert (20, MIB, 31 * MIB, 1) in rows
    assert string(memory, info[16]) == b"kvmapp"


def test_multiboot_header_with_addresses_loads_a_raw_file(boot, memory):
    header = multiboot_header(1 << 16, MIB + 64, MIB, MIB + 1000, MIB + 5000, MIB + 96)
    memory.write(MIB + 1000, b"\xAA" * 4000)
    entry = boot(b"junk" * 4 + pattern(64) + header + pattern(4000))
    assert (entry.mode, entry.rip) == ("protected", MIB + 96)
    loaded = memory.read(MIB, 5000)
    assert loaded[:64] == pattern(64)
    assert loaded[64:64 + len(header)] == header
    assert loaded[1000:] == bytes(4000)


def test_multiboot_header_without_end_loads_the_whole_file(boot, memory):
    boot(multiboot_header(1 << 16, MIB, MIB, 0, 0, MIB + 32) + pattern(3000))
    assert memory.read(MIB + 32, 3000) == pattern(3000)


@pytest.mark.parametrize(("kernel", "message"), [
    (elf()[:100], "file is truncated"),
    (elf()[:30], "file is truncated"),
    (elf(segments=((MIB, MIB, b"x" * 8192, 8192),))[:4096], r"file is truncated \(header says 8312 bytes, file has 4096\)"),
    (elf(segments=((MIB, MIB, b"x" * 100, 50),)), "100 bytes in the file but 50 in memory"),
    (elf(segments=((0, 31 * MIB, b"", 2 * MIB),)), "is not in the guest's memory"),
    (elf(segments=((0, 2**64 - 4096, b"", 8192),)), "is not in the guest's memory"),
    (elf(segments=((0, MIB, b"", 2**64 - 1),)), "is not in the guest's memory"),
    (elf(segments=((0, 0x7000, b"x", 1),)), "overlaps the boot structures"),
    (elf(segments=((0, 0xF0000, b"x", 1),)), "overlaps the BIOS area"),
    (elf(segments=((0, MIB, b"x", 8192), (0, MIB + 4096, b"x", 1))), "overlaps another segment of it"),
    (elf(segments=()), "nothing to load"),
    (elf(entry=3 * MIB), "entry point 0x300000 lies in none of its segments"),
    (elf(notes=pvh_note(3 * MIB)), "entry point 0x300000 lies in none of its segments"),
    (elf(machine=183), "ELF file is for arm64, not x86"),
    (elf(machine=4242), "ELF file is for machine 4242, not x86"),
    (elf(kind=1), "object or core file"),
    (elf(extra=((3, 0, 4),)), "program for a running system"),
    (elf(extra=((4, 2**63, 2**63),)), "file is truncated"),
    (elf(prefix=multiboot_header(1 << 3)), r"features unknown to multiboot 1 \(flags 0x8\)"),
    (multiboot_header(0), "multiboot header without addresses"),
    (multiboot_header(1 << 16, MIB - 4, MIB, 0, 0, MIB), "addresses contradict each other"),
    (multiboot_header(1 << 16, 2 * MIB, MIB, 0, 0, MIB), "addresses contradict each other"),
    (multiboot_header(1 << 16, MIB, MIB, MIB - 4, 0, MIB), "addresses contradict each other"),
    (multiboot_header(1 << 16, MIB, MIB, 2 * MIB, 0, MIB), "file is truncated"),
    (multiboot_header(1 << 16, MIB, MIB, 0, 0, 2 * MIB), "entry point"),
    (multiboot_header(1 << 16), "file is truncated"),
])
def test_lying_kernels_are_refused(boot, kernel, message):
    with pytest.raises(GuestImageError, match=message):
        boot(kernel)


@pytest.mark.parametrize("notes", [
    b"\xFF" * 64,
    struct.pack("<III", 4, 0xFFFF_FFF0, 18) + b"Xen\0",
    struct.pack("<III", 0xFFFF_FFFF, 4, 18) + b"Xen\0" + bytes(8),
    note(b"Xen", 18, b"\0\0"),
    b"\0" * 11,
])
def test_malformed_notes_are_passed_over(boot, notes):
    assert boot(elf(notes=notes)).mode == "long"


def test_program_headers_beyond_reason_are_refused(boot):
    kernel = bytearray(elf())
    struct.pack_into("<HH", kernel, 54, 8, 3)
    with pytest.raises(GuestImageError, match="absurd program header table"):
        boot(bytes(kernel))


def test_misaligned_or_wrongly_summed_multiboot_headers_are_none(boot):
    wrong = struct.pack("<3I", 0x1BADB002, 0, 12345)
    with pytest.raises(GuestImageError, match="neither a bzImage, an ELF kernel nor a multiboot kernel"):
        boot(b"xx" + multiboot_header(1 << 16, MIB, MIB, 0, 0, MIB) + wrong + bytes(100))


def test_cmdline_with_nul_is_refused(boot):
    with pytest.raises(GuestImageError, match="NUL"):
        boot(elf(), cmdline="a\0b")


def test_cmdline_keeps_undecodable_bytes(boot, memory):
    boot(elf(), cmdline=b"caf\xe9 \xff".decode("utf-8", "surrogateescape"))
    assert string(memory, BOOT_CMDLINE) == b"caf\xe9 \xff"
