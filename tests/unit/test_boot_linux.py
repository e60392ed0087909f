"""Linux by its own boot protocol: the zero page, where kernel and initrd go, the entry point; and files that lie."""
import os
import struct
from functools import partial

import pytest

from kvmapp.boot.direct import DirectBoot
from kvmapp.boot.platform import Platform
from kvmapp.boot.topology import Topology
from kvmapp.errors import GuestImageError, KvmappError
from kvmapp.layout import BOOT_CMDLINE, BOOT_PAGE_TABLES, BOOT_SETUP_DATA, BOOT_ZERO_PAGE
from kvmapp.memory import GuestMemory
from tests.unit.boot_images import MIB, boot_files, bzimage, elf, note, pattern, pvh_note

LINUX_NOTE = note(b"Linux", 0x101, bytes(4))


@pytest.fixture
def memory():
    return GuestMemory(64 * MIB)


@pytest.fixture
def boot(tmp_path, memory):
    return partial(boot_files, tmp_path, memory)


def field(memory, kind: str, offset: int) -> int:
    return struct.unpack("<" + kind, memory.read(BOOT_ZERO_PAGE + offset, struct.calcsize(kind)))[0]


def e820(memory) -> list[tuple[int, int, int]]:
    table = memory.read(BOOT_ZERO_PAGE + 0x2D0, 20 * field(memory, "B", 0x1E8))
    return list(struct.iter_unpack("<QQI", table))


def test_bzimage_enters_64_bit_code_where_the_kernel_prefers_to_lie(boot, memory):
    entry = boot(bzimage(size=100_000 // 16 * 16))
    assert (entry.mode, entry.rip, entry.rsi) == ("long", 16 * MIB + 0x200, BOOT_ZERO_PAGE)
    assert entry.cr3 == BOOT_PAGE_TABLES
    assert memory.read(16 * MIB, 100_000 // 16 * 16) == pattern(100_000 // 16 * 16)


def test_zero_page_carries_the_header_and_what_the_loader_fills_in(boot, memory):
    initrd = pattern(5000)
    boot(bzimage(), initrd, "root=/dev/vda")
    assert memory.read(BOOT_ZERO_PAGE + 0x202, 4) == b"HdrS"
    assert field(memory, "B", 0x210) == 0xFF
    assert field(memory, "I", 0x214) == 16 * MIB
    assert field(memory, "I", 0x228) == BOOT_CMDLINE
    assert memory.read(BOOT_CMDLINE, 14) == b"root=/dev/vda\0"
    assert field(memory, "I", 0x21C) == 5000
    assert memory.read(field(memory, "I", 0x218), 5000) == initrd
    assert field(memory, "B", 0x1EF) == 0, "the sentinel tells Linux that the loader cleared the page"


def seed(memory) -> bytes:
    head = struct.unpack("<QII", memory.read(BOOT_SETUP_DATA, 16))
    assert field(memory, "Q", 0x250) == BOOT_SETUP_DATA and head == (0, 9, 32)
    return memory.read(BOOT_SETUP_DATA + 16, 32)


@pytest.mark.parametrize("kernel", [bzimage(), bzimage(version=0x0209), elf(notes=LINUX_NOTE)], ids=["bzImage", "2.09", "vmlinux"])
def test_each_start_has_another_seed(boot, memory, kernel):
    boot(kernel)
    first = seed(memory)
    boot(kernel)
    assert any(first) and first != seed(memory)


def test_kernels_before_setup_data_get_none(boot, memory):
    boot(bzimage(version=0x0208))
    assert field(memory, "Q", 0x250) == 0 and not any(memory.read(BOOT_SETUP_DATA, 64))


def test_zero_page_holds_the_memory_map(boot, memory):
    boot(bzimage())
    ram = [(start, size) for start, size, kind in e820(memory) if kind == 1]
    assert ram == [(0, 0x9FC00), (MIB, 63 * MIB)]


def test_a_second_setup_leaves_the_same_memory(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(os, "urandom", bytes)                # the seed is another each time
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    files = DirectBoot(str(tmp_path / "vmlinuz"), None, "quiet")
    files.setup(memory, Platform(Topology(1)))
    once = memory.read(0, 64 * MIB)
    (tmp_path / "vmlinuz").unlink()
    memory.write(BOOT_ZERO_PAGE, b"\xAA" * 4096)
    memory.write(16 * MIB, b"\xAA" * 4096)
    files.setup(memory, Platform(Topology(1)))
    assert memory.read(0, 64 * MIB) == once
    files.close()


def test_a_kernel_changed_in_place_is_the_one_that_the_next_reset_boots(tmp_path, memory):
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    files = DirectBoot(str(tmp_path / "vmlinuz"))
    assert files.setup(memory, Platform(Topology(1))).rip == 16 * MIB + 0x200
    (tmp_path / "vmlinuz").write_bytes(bzimage(pref_address=32 * MIB))
    assert files.setup(memory, Platform(Topology(1))).rip == 32 * MIB + 0x200
    (tmp_path / "vmlinuz").write_bytes(bzimage()[:3000])
    with pytest.raises(GuestImageError, match="file is truncated"):
        files.setup(memory, Platform(Topology(1)))
    (tmp_path / "vmlinuz").write_bytes(b"")
    with pytest.raises(GuestImageError, match="file is empty"):
        files.setup(memory, Platform(Topology(1)))
    files.close()


def test_kernel_without_64_bit_entry_is_entered_in_protected_mode(boot):
    entry = boot(bzimage(xloadflags=0))
    assert (entry.mode, entry.rip, entry.rsi, entry.cr3) == ("protected", 16 * MIB, BOOT_ZERO_PAGE, 0)


@pytest.mark.parametrize("version", [0x0202, 0x0204, 0x0209])
def test_old_protocols_run_from_1_mib_in_protected_mode(boot, version):
    entry = boot(bzimage(version=version))
    assert (entry.mode, entry.rip) == ("protected", MIB)


def test_kernel_that_moves_itself_is_loaded_at_1_mib(boot):
    assert boot(bzimage(relocatable=0)).rip == MIB + 0x200


def test_initrd_stays_below_the_kernels_limit_and_off_the_kernel(boot, memory):
    boot(bzimage(initrd_addr_max=20 * MIB - 1, init_size=3 * MIB), pattern(300_000))
    start = field(memory, "I", 0x218)
    assert start % 4096 == 0
    assert start >= 19 * MIB
    assert start + 300_000 <= 20 * MIB
    boot(bzimage(initrd_addr_max=20 * MIB - 1, init_size=4 * MIB), pattern(300_000))
    assert field(memory, "I", 0x218) + 300_000 <= 16 * MIB


def test_windows_of_virtio_mmio_are_told_on_the_command_line_where_there_is_no_acpi(boot, memory):
    windows = [(0xFEB0_0000, 4096, 5), (0xFEB0_1000, 4096, 6)]
    boot(bzimage(), virtio_mmio=windows)
    assert memory.read(BOOT_CMDLINE, 14) == b"console=ttyS0\0"
    boot(bzimage(), virtio_mmio=windows, acpi=False)
    assert memory.read(BOOT_CMDLINE, 256).split(b"\0")[0] == \
        b"virtio_mmio.device=4096@0xfeb00000:5 virtio_mmio.device=4096@0xfeb01000:6 console=ttyS0"


def test_command_line_up_to_the_kernels_limit(boot, memory):
    boot(bzimage(cmdline_size=100), cmdline="x" * 100)
    assert memory.read(BOOT_CMDLINE, 101) == b"x" * 100 + b"\0"
    with pytest.raises(GuestImageError, match="command line has 101 bytes, a bzImage takes 100"):
        boot(bzimage(cmdline_size=100), cmdline="x" * 101)
    with pytest.raises(GuestImageError, match="takes 255"):
        boot(bzimage(version=0x0205), cmdline="x" * 256)
    with pytest.raises(GuestImageError, match="takes 65535"):
        boot(bzimage(cmdline_size=0xFFFF_FFFF), cmdline="x" * 65536)


def test_vmlinux_is_entered_by_linux_own_protocol_though_it_has_a_pvh_note(boot, memory):
    entry = boot(elf(entry=16 * MIB + 0x123, segments=((0xFFFF_FFFF_8100_0000, 16 * MIB, b"code" * 1000, MIB),),
                     notes=LINUX_NOTE + pvh_note(16 * MIB)), pattern(10))
    assert (entry.mode, entry.rip, entry.rsi) == ("long", 16 * MIB + 0x123, BOOT_ZERO_PAGE)
    assert memory.read(BOOT_ZERO_PAGE + 0x202, 4) == b"HdrS"
    assert memory.read(BOOT_ZERO_PAGE + 0x1FE, 2) == b"\x55\xAA"
    assert field(memory, "B", 0x211) == 1
    assert field(memory, "I", 0x21C) == 10


def test_32_bit_vmlinux_is_entered_in_protected_mode(boot):
    entry = boot(elf(bits=32, entry=MIB, notes=LINUX_NOTE))
    assert (entry.mode, entry.rip, entry.rsi) == ("protected", MIB, BOOT_ZERO_PAGE)


def test_bss_is_cleared_even_where_memory_was_used(boot, memory):
    memory.write(MIB, b"\xAA" * 200_000)
    boot(elf(segments=((MIB, MIB, b"text", 150_000),), notes=LINUX_NOTE))
    assert memory.read(MIB, 150_001) == b"text" + bytes(149_996) + b"\xAA"


@pytest.mark.parametrize(("kernel", "message"), [
    (bzimage()[:4096], r"file is truncated \(header says \d+ bytes, file has 4096\)"),
    (bzimage()[:0x220], r"file is truncated"),
    (bzimage(syssize=0xFFFF_FFFF), r"file is truncated \(header says 68719479280 bytes"),
    (bzimage(size=0x200), r"file is truncated"),
    (bzimage(version=0x0201), r"boot protocol 2\.01 is too old"),
    (bzimage(loadflags=0), r"zImage"),
    (bzimage(pref_address=2**64 - MIB), r"which is not in the guest's memory \(64 MiB\)"),
    (bzimage(pref_address=0x8000), r"overlaps the boot structures"),
    (bzimage(init_size=0xFFFF_F000), r"not in the guest's memory"),
    (bzimage(init_size=49 * MIB), r"unpacks itself at 0x1000000-0x4100000, which is not in the guest's memory"),
])
def test_lying_bzimages_are_refused(boot, kernel, message):
    with pytest.raises(GuestImageError, match=message):
        boot(kernel)


def test_kernel_that_needs_more_memory_says_how_much(boot):
    with pytest.raises(GuestImageError) as refusal:
        boot(bzimage(init_size=49 * MIB))
    assert refusal.value.hint == "give the guest at least 65 MiB of memory, and more for its work"


def test_initrd_without_room_says_so(boot):
    with pytest.raises(GuestImageError, match=r"Cannot load initrd '.*': its 50331648 bytes find no room"):
        boot(bzimage(), bytes(48 * MIB))


def test_guest_too_small_for_anything(tmp_path):
    (tmp_path / "k").write_bytes(bzimage())
    with pytest.raises(KvmappError, match="with 1024 KiB of memory"):
        DirectBoot(str(tmp_path / "k")).setup(GuestMemory(MIB), Platform(Topology(1)))
