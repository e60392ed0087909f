"""The probe guest's report parser, and the file a loader finds: its multiboot header, its PVH note, its size."""
import struct

import pytest

from kvmapp import probe

REPORT = """\
SeaBIOS (version 1.16.2)
ok cpu: Auth, KVMKVMKVM, x87 and SSE
skip virtio-net: no device
note virtio-blk: id 'DISK0', sector 0 begins 00 00 00 00
fail rtc: no periodic interrupt on IRQ 8 in 200 ms: register C 0x00
done passed=1 failed=1 skipped=1
"""


def test_a_report_is_read_line_by_line():
    report = probe.parse(REPORT)
    assert [step.verdict for step in report.steps] == ["ok", "skip", "fail"]
    assert [note.text for note in report.notes] == ["id 'DISK0', sector 0 begins 00 00 00 00"]
    assert report["rtc"].text == "no periodic interrupt on IRQ 8 in 200 ms: register C 0x00"
    assert [step.name for step in report.failures] == ["rtc"]
    assert report.complete
    assert not report.passed


def test_a_report_without_failures_has_passed():
    assert probe.parse("ok cpu: fine\nskip smp: one CPU\ndone passed=1 failed=0 skipped=1\n").passed


@pytest.mark.parametrize("text", [
    "",
    "ok cpu: fine\n",
    "ok cpu: fine\ndone passed=2 failed=0 skipped=0\n",
    "ok cpu: fine\ndone passed=1 failed=0",
    "ok cpu: fine\r\ngarbage \ufffd\ndone passed=1\n",
], ids=["empty", "cut before the end", "a line lost", "cut in the last line", "garbage"])
def test_a_report_that_is_not_whole_has_not_passed(text):
    report = probe.parse(text)
    assert not report.complete
    assert not report.passed


def test_a_step_that_did_not_run_is_not_found():
    with pytest.raises(KeyError):
        probe.parse(REPORT)["smp"]


@pytest.fixture(scope="module")
def image():
    return probe.IMAGE.read_bytes()


def test_the_image_is_a_small_elf_for_i386(image):
    assert image[:7] == b"\x7fELF\x01\x01\x01"
    assert struct.unpack_from("<HH", image, 16) == (2, 3)                    # ET_EXEC, EM_386
    assert len(image) < 64 << 10


def test_the_multiboot_header_is_where_loaders_look(image):
    headers = [at for at in range(0, 8192, 4) if image[at:at + 4] == struct.pack("<I", 0x1BADB002)]
    assert len(headers) == 1
    magic, flags, checksum = struct.unpack_from("<III", image, headers[0])
    assert (magic + flags + checksum) % (1 << 32) == 0
    assert flags & 0xFFFF_0000 == 0                                          # an ELF tells its own addresses


def program_headers(image):
    offset, = struct.unpack_from("<I", image, 28)
    size, count = struct.unpack_from("<HH", image, 42)
    return [struct.unpack_from("<8I", image, offset + i * size) for i in range(count)]


def test_the_pvh_note_names_the_entry(image):
    entry, = struct.unpack_from("<I", image, 24)
    notes = [header for header in program_headers(image) if header[0] == 4]  # PT_NOTE
    assert len(notes) == 1
    _, offset, *_ = notes[0]
    assert struct.unpack_from("<III4sI", image, offset) == (4, 4, 18, b"Xen\0", entry)


def test_the_image_fits_the_first_megabytes_that_long_mode_maps(image):
    loads = [header for header in program_headers(image) if header[0] == 1]  # PT_LOAD
    assert min(physical for _, _, _, physical, *_ in loads) == 1 << 20
    assert max(physical + memory for _, _, _, physical, _, memory, *_ in loads) < 4 << 20
