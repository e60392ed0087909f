"""Kernel files with any bytes changed or cut off: direct boot sets the guest up or refuses, with the file's name, and no else."""
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmapp.boot.direct import DirectBoot
from kvmapp.boot.elf import NOTES_SIZE_MAX, ElfFile
from kvmapp.boot.image import ImageFile
from kvmapp.boot.platform import Platform
from kvmapp.boot.topology import Topology
from kvmapp.errors import KvmappError
from kvmapp.memory import GuestMemory
from tests.unit.boot_images import MIB, bzimage, elf, multiboot_header, note, pvh_note

IMAGES = {
    "bzimage": bzimage(size=4096),
    "pvh": elf(notes=note(b"GNU", 3, b"x") + pvh_note(MIB)),
    "vmlinux": elf(notes=note(b"Linux", 0x101, bytes(4))),
    "elf32": elf(bits=32, notes=pvh_note(MIB)),
    "multiboot": elf(prefix=multiboot_header(3)),
    "addressed": multiboot_header(1 << 16, MIB, MIB, MIB + 64, MIB + 4096, MIB) + bytes(128),
}
WORDS = st.sampled_from([struct.pack("<B", value) for value in range(256)]
                        + [struct.pack("<I", value) for value in (0, 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, MIB, 0xC000_0000)]
                        + [struct.pack("<Q", value) for value in (2**63, 2**64 - 1, 2**64 - 4096)])


def test_notes_are_bounded_however_often_a_file_names_them(tmp_path):
    """A file of 300 KB would keep the control thread busy for a minute, at each reset."""
    size = 200 << 10
    image = bytearray(elf(notes=note(b"GNU", 3, b"x"), extra=[(4, 4096, size)] * 1000))
    path = tmp_path / "kernel"
    path.write_bytes(image.ljust(4096, b"\0") + bytes(size))
    file = ImageFile(str(path), "kernel")
    assert sum(1 for _ in ElfFile(file).notes()) < 2 * NOTES_SIZE_MAX // 12
    file.close()


@pytest.mark.parametrize("name", IMAGES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_survived(tmp_path, name, data):
    image = bytearray(IMAGES[name])
    # Headers lie in the first KiB; a bzImage's fields from 0x1F1 up.
    reach = min(len(image), 1024)
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, reach - 1), WORDS), max_size=4)):
        image[at:at + len(value)] = value
    image = image[:data.draw(st.one_of(st.just(len(image)), st.integers(1, len(image))))]
    (tmp_path / "kernel").write_bytes(image)
    memory = GuestMemory(24 * MIB, huge_pages=False)
    try:
        boot = DirectBoot(str(tmp_path / "kernel"))
    except KvmappError as refusal:
        assert str(tmp_path / "kernel") in refusal.message
        return
    try:
        entry = boot.setup(memory, Platform(Topology(1)))
        assert entry.rip < memory.size
    except KvmappError as refusal:
        assert str(tmp_path / "kernel") in refusal.message
    finally:
        boot.close()
