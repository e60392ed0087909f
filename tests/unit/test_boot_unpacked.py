"""A bzImage that the host unpacks: every compressor, the cache, relocations, and what is not worth unpacking."""
import bz2
import errno
import gzip
import lzma
import os
import struct
import threading
import tracemalloc
from collections.abc import Callable

import pytest

from kvmapp.boot import unpacked as unpacked_module
from kvmapp.boot.direct import DirectBoot
from kvmapp.boot.linux import BzImage
from kvmapp.boot.payload import PayloadError, unpack
from kvmapp.boot.platform import Platform
from kvmapp.boot.relocation import RelocationError, relocate
from kvmapp.boot.topology import Topology
from kvmapp.boot.unpacked import BY_FILE, KEPT_MOST, KERNEL_MAP, UnpackedKernel
from kvmapp.errors import GuestImageError
from kvmapp.layout import BOOT_ZERO_PAGE
from kvmapp.memory import GuestMemory
from tests.unit.boot_images import MIB, bzimage, elf, pattern

lz4 = pytest.importorskip("lz4.block")
START = 16 * MIB
TEXT = bytes(64 * 1024)


def lz4_packed(data: bytes, block: int = 8 << 20) -> bytes:
    parts = (lz4.compress(data[at:at + block], store_size=False) for at in range(0, len(data), block))
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(part)) + part for part in parts)


def gzip_packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)                  # the same bytes tomorrow


def zstd_packed(data: bytes) -> bytes:
    from backports import zstd
    return zstd.compress(data)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip_packed, "xz": lzma.compress, "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE), "bzip2": bz2.compress,
    "lz4": lz4_packed, "zstd": zstd_packed}


def table(*lists: list[int]) -> bytes:
    """The table of relocations: lists of places, each behind a zero."""
    return b"".join(struct.pack(f"<{len(places) + 1}I", 0, *places) for places in lists)


def place(offset: int) -> int:
    return (KERNEL_MAP + START + offset) & 0xFFFF_FFFF


def kernel_elf(content: bytes = TEXT, **more) -> bytes:
    return elf(entry=START, segments=((KERNEL_MAP + START, START, content, len(content) + 4096),), **more)


def packed(payload: bytes, pack=gzip_packed, *, tail: bytes | None = None, init_size: int = 8 * MIB, **header) -> bytes:
    """A bzImage that carries `payload`, with the unpacked size behind it as kernel builds append it."""
    data = pack(payload) + (struct.pack("<I", len(payload)) if tail is None else tail)
    offset = 0x300
    body = bytes(offset) + data
    body += bytes(-len(body) % 16)
    image = bytearray(bzimage(size=len(body), init_size=init_size, **header))
    struct.pack_into("<II", image, 0x248, offset, len(data))
    image[-len(body):] = body
    return bytes(image)


@pytest.fixture
def memory():
    return GuestMemory(64 * MIB)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def boot(tmp_path, memory, cache, monkeypatch):
    """Boots an image with the cache; gives the DirectBoot, whose kernel is in memory."""
    opened = []

    def run(image: bytes, cmdline: str = "", settled: bool = True) -> DirectBoot:
        path = tmp_path / "vmlinuz"
        path.write_bytes(image)
        if settled:                                      # as if it had been written some seconds ago
            monkeypatch.setattr(unpacked_module, "is_settled", lambda file: True)
        opened.append(DirectBoot(str(path), None, cmdline, str(cache)))
        opened[-1].setup(memory, Platform(Topology(1)))
        return opened[-1]

    yield run
    for one in opened:
        one.close()


def loadflags(memory) -> int:
    return memory.read(BOOT_ZERO_PAGE + 0x211, 1)[0]


# -- compressors

@pytest.mark.parametrize("name", PACKERS)
def test_every_compressor(name):
    data = pattern(300_000)
    assert unpack(PACKERS[name](data) + struct.pack("<I", len(data)), MIB) == data


@pytest.mark.parametrize("name", PACKERS)
def test_a_payload_that_is_cut_short_or_too_large(name):
    data = os.urandom(100_000)
    with pytest.raises(PayloadError):
        unpack(PACKERS[name](data)[:-2000], MIB)
    with pytest.raises(PayloadError):
        unpack(PACKERS[name](data) + bytes(4), 50_000)


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"\x89LZO\0", b"\x02\x21\x4c\x18\xff\xff\xff\xff12345", b"\x1f\x8b" + bytes(100),
                                  b"\x28\xb5\x2f\xfd" + b"\xff" * 50, b"\x5d\0\0" + b"\xff" * 50])
def test_no_payload_at_all(data):
    with pytest.raises(PayloadError):
        unpack(data, MIB)


def test_lz4_of_several_blocks():
    data = pattern(20 << 20)
    assert unpack(lz4_packed(data) + bytes(4), 32 << 20) == data


# -- relocations

def test_the_three_lists(memory):
    memory.write(START, struct.pack("<QiI", KERNEL_MAP + START + 0x100, -0x2000, 0x8100_0200))
    relocate(memory, table([place(0)], [place(8)], [place(12)]), 4 * MIB, START, MIB, KERNEL_MAP + START)
    assert struct.unpack("<QiI", memory.read(START, 16)) == (KERNEL_MAP + START + 4 * MIB + 0x100, -0x2000 - 4 * MIB, 0x8140_0200)


def test_kernels_since_6_15_have_two(memory):
    memory.write(START, struct.pack("<QI", 1, 2))
    relocate(memory, table([place(0)], [place(8)]), 2 * MIB, START, MIB, KERNEL_MAP + START)
    assert struct.unpack("<QI", memory.read(START, 12)) == (1 + 2 * MIB, 2 + 2 * MIB)


def test_the_kernels_last_bytes_are_its_own(memory):
    relocate(memory, table([], [place(MIB - 4)]), 2 * MIB, START, MIB, KERNEL_MAP + START)
    relocate(memory, table([place(MIB - 8)], []), 2 * MIB, START, MIB, KERNEL_MAP + START)
    for bad in (table([], [place(MIB - 3)]), table([place(MIB - 7)], []), table([place(-1)], []), table([4], [])):
        with pytest.raises(RelocationError, match="is not in the kernel"):
            relocate(memory, bad, 2 * MIB, START, MIB, KERNEL_MAP + START)


@pytest.mark.parametrize("bad", [b"", b"\0\0\0", table([1]), struct.pack("<3I", 1, 0, 0), table([], [], [], [])])
def test_a_table_that_is_none(memory, bad):
    with pytest.raises(RelocationError):
        relocate(memory, bad, 2 * MIB, START, MIB, KERNEL_MAP + START)


def test_a_table_of_zeroes_costs_no_memory(memory):
    tracemalloc.start()
    try:
        with pytest.raises(RelocationError):
            relocate(memory, bytes(4 * MIB), 2 * MIB, START, MIB, KERNEL_MAP + START)
        assert tracemalloc.get_traced_memory()[1] < 5 * MIB
    finally:
        tracemalloc.stop()


def test_a_kernel_that_does_not_lie_in_memory(memory):
    with pytest.raises(RelocationError):
        relocate(memory, table([], []), 2 * MIB, 1 << 40, MIB, KERNEL_MAP + START)


# -- the kernel

def test_it_enters_the_kernel_proper(boot, memory):
    content = pattern(100_000)
    files = boot(packed(kernel_elf(content)))
    entry = files.setup(memory, Platform(Topology(1)))
    assert (entry.mode, entry.rip, entry.rsi) == ("long", START, BOOT_ZERO_PAGE)
    assert memory.read(START, len(content)) == content
    assert memory.read(BOOT_ZERO_PAGE + 0x202, 4) == b"HdrS" and not loadflags(memory) & 2


def test_it_runs_at_a_random_address(boot, memory):
    image = packed(kernel_elf() + table([place(0)], [place(8)], [place(16)]))
    shifts = set()
    for _ in range(8):
        boot(image)
        shift, inverse, low = struct.unpack("<QiI", memory.read(START, 8) + memory.read(START + 8, 4) + memory.read(START + 16, 4))
        assert shift % (2 * MIB) == 0 and START + shift + 8 * MIB <= 1 << 30
        assert (inverse, low) == (-shift, shift) and bool(loadflags(memory) & 2) == bool(shift)
        shifts.add(shift)
    assert len(shifts) > 1                               # eight times the same of 500: no


def test_nokaslr(boot, memory):
    boot(packed(kernel_elf() + table([place(0)], [], [])), "console=ttyS0 nokaslr quiet")
    assert memory.read(START, 8) == bytes(8) and not loadflags(memory) & 2


def test_damaged_relocations_are_an_error_with_the_way_out(boot):
    with pytest.raises(GuestImageError, match="its relocations are damaged") as caught:
        for _ in range(3):                               # once in 500 times there is no shift, and nothing to do
            boot(packed(kernel_elf() + table([4], [])))
    assert caught.value.hint and "unpack = no" in caught.value.hint


def test_a_reset_reads_it_again(boot, memory):
    files = boot(packed(kernel_elf(pattern(5000))))
    memory.write(START, bytes(5000))
    files.setup(memory, Platform(Topology(1)))
    assert memory.read(START, 5000) == pattern(5000)


def test_a_kernel_that_was_exchanged_meanwhile_unpacks_itself(boot, tmp_path, memory):
    files = boot(packed(kernel_elf()))
    (tmp_path / "vmlinuz").write_bytes(packed(kernel_elf(pattern(100))))
    assert files.setup(memory, Platform(Topology(1))).rip == START + 0x200
    assert type(files._recognise()) is BzImage


@pytest.mark.parametrize("image", [
    packed(b"no ELF file at all" * 10), packed(elf(bits=32, entry=START, segments=((START, START, TEXT, 65536),))),
    packed(kernel_elf()[:30]), packed(kernel_elf(), tail=b"", pack=lambda data: b"?" + data), packed(kernel_elf(), init_size=4096),
    packed(kernel_elf(), xloadflags=0), packed(kernel_elf(), version=0x0207), bzimage()],
    ids=["no ELF", "32 bits", "truncated", "unknown packer", "larger than told", "32-bit entry", "old protocol", "no payload"])
def test_what_cannot_be_unpacked_unpacks_itself(boot, image):
    assert type(boot(image)._recognise()) is BzImage


# -- the cache

def files_of(cache) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_file() and not path.name.startswith("."))


def test_it_is_unpacked_once(boot, cache, monkeypatch):
    boot(packed(kernel_elf()))
    monkeypatch.setattr(unpacked_module, "unpack", lambda *_: pytest.fail("unpacked again"))
    files = DirectBoot(boot(packed(kernel_elf())).kernel.path, None, "", str(cache))      # other times, the same content
    assert isinstance(files._recognise(), UnpackedKernel) and len(files_of(cache)) == 1
    files.close()


def test_a_file_that_may_still_change_is_not_remembered(boot, cache):
    assert isinstance(boot(packed(kernel_elf()), settled=False)._recognise(), UnpackedKernel)
    assert list((cache / BY_FILE).iterdir()) == []


def test_many_at_once_unpack_once(tmp_path, cache, monkeypatch):
    path = tmp_path / "vmlinuz"
    path.write_bytes(packed(kernel_elf()))
    calls: list[int] = []

    def counted(data: bytes, most: int) -> bytes:
        calls.append(most)
        return unpack(data, most)

    monkeypatch.setattr(unpacked_module, "unpack", counted)
    found = []

    def start() -> None:
        files = DirectBoot(str(path), None, "", str(cache))
        found.append(type(files._recognise()))
        files.close()

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [UnpackedKernel] * 8 and len(calls) == 1


def test_old_kernels_go(boot, cache):
    for number in range(KEPT_MOST + 3):
        boot(packed(kernel_elf(bytes([number]) * 5000)))
    assert len(files_of(cache)) == KEPT_MOST
    assert len(list((cache / BY_FILE).iterdir())) <= KEPT_MOST


def test_of_many_copies_the_newest_are_remembered(boot, cache, monkeypatch):
    monkeypatch.setattr(unpacked_module, "LINKS_MOST", 3)
    for _ in range(6):
        last = boot(packed(kernel_elf()))
    links = {path.name for path in (cache / BY_FILE).iterdir()}
    assert len(links) == 3 and unpacked_module.identity(last.kernel) in links and len(files_of(cache)) == 1


def test_what_does_not_fit_into_the_guest_is_not_unpacked(tmp_path, cache):
    """A file of some kilobytes may say that it unpacks to gigabytes, of the host's memory and disk."""
    path = tmp_path / "vmlinuz"
    path.write_bytes(packed(kernel_elf(), init_size=0xFFFFF000))
    files = DirectBoot(str(path), None, "", str(cache), memory=64 * MIB)
    assert type(files._recognise()) is BzImage and not cache.exists()
    files.close()


def test_a_folder_that_others_can_write_is_not_used(boot, cache):
    cache.mkdir()
    cache.chmod(0o777)
    assert type(boot(packed(kernel_elf()))._recognise()) is BzImage and files_of(cache) == []


def test_a_full_disk_leaves_nothing_half(boot, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(unpacked_module.os, "fsync", full)
    assert type(boot(packed(kernel_elf()))._recognise()) is BzImage
    assert [path for path in cache.iterdir() if path.name not in (".lock", BY_FILE)] == []


def test_what_a_killed_one_left_is_no_obstacle(boot, cache):
    """It is taken away, not written into: but for root nobody may write to it."""
    path = boot(packed(kernel_elf())).kernel.path
    (kept,) = files_of(cache)
    (cache / kept).unlink()
    left = cache / f".unfinished-{kept}"
    left.write_bytes(b"half")
    other = left.stat().st_ino
    with open(left, "rb"):                              # keeps its number from the next file
        files = DirectBoot(path, None, "", str(cache))
        assert isinstance(files._recognise(), UnpackedKernel)
        files.close()
    assert (cache / kept).stat().st_ino != other and not left.exists()


def test_without_a_cache_nothing_is_unpacked(tmp_path):
    path = tmp_path / "vmlinuz"
    path.write_bytes(packed(kernel_elf()))
    files = DirectBoot(str(path))
    assert type(files._recognise()) is BzImage
    files.close()
