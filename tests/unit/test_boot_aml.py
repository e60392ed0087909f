"""The AML assembler against encodings worked out by hand from the ACPI specification, chapter 20 and 6.4."""
import pytest

from kvmapp.boot import aml


@pytest.mark.parametrize(("value", "code"), [
    (0, b"\x00"), (1, b"\x01"), (2, b"\x0A\x02"), (0xFF, b"\x0A\xFF"), (0x100, b"\x0B\x00\x01"), (0xFFFF, b"\x0B\xFF\xFF"),
    (0x1_0000, b"\x0C\x00\x00\x01\x00"), (0xFFFF_FFFF, b"\x0C\xFF\xFF\xFF\xFF"), (1 << 32, b"\x0E\0\0\0\0\x01\0\0\0"),
])
def test_integers_take_the_shortest_form(value, code):
    assert aml.integer(value) == code


@pytest.mark.parametrize(("path", "code"), [
    ("_HID", b"_HID"), ("PIC", b"PIC_"), ("\\_SB", b"\\_SB_"), ("\\_SB.PCI0", b"\\\x2E_SB_PCI0"), ("^^A.B", b"^^\x2EA___B___"),
    ("A.B.C", b"\x2F\x03A___B___C___"),
])
def test_names(path, code):
    assert aml.ref(path) == code


@pytest.mark.parametrize(("size", "length"), [
    (57, b"\x3E"),                                  # 4 of name + 57 + 1 of length = 62
    (58, b"\x3F"),
    (59, b"\x41\x04"),                              # 65 = 4 << 4 | 1
    (4089, b"\x4F\xFF"),                            # 4095
    (4090, b"\x81\x00\x01"),                        # 4097 = 0x100 << 4 | 1
])
def test_package_length_counts_itself(size, length):
    assert aml.scope("SCOP", bytes(size)) == b"\x10" + length + b"SCOP" + bytes(size)


def test_identifiers():
    assert aml.eisa_id("PNP0A08") == b"\x0C\x41\xD0\x0A\x08"
    assert aml.uuid("33db4d5b-1ff7-401c-9657-7441c03dd766") == \
        b"\x11\x13\x0A\x10" + bytes.fromhex("5b4ddb33f71f1c4096577441c03dd766")


def test_data():
    assert aml.package(5, "ab", aml.package()) == b"\x12\x0B\x03\x0A\x05\x0Dab\0\x12\x02\x00"
    assert aml.named("X", 1) == b"\x08X___\x01"


def test_resource_descriptors():
    assert aml.io(0x3F8, 8) == b"\x47\x01\xF8\x03\xF8\x03\x01\x08"
    assert aml.irq(4) == b"\x22\x10\x00"
    assert aml.memory32(0xE000_0000, 0x1000) == b"\x86\x09\x00\x01\x00\x00\x00\xE0\x00\x10\x00\x00"
    assert aml.bus_window(0, 255) == b"\x88\x0D\x00\x02\x0C\x00\x00\x00\x00\x00\xFF\x00\x00\x00\x00\x01"
    assert aml.memory_window64(1 << 32, 1 << 33)[:3] == b"\x8A\x2B\x00"
    assert aml.resources() == b"\x11\x05\x0A\x02\x79\x00"


def test_regions_fields_and_notices():
    assert aml.io_region("PHPR", 0x640, 12) == b"\x5B\x80PHPR\x01\x0B\x40\x06\x0A\x0C"
    assert aml.dword_fields("PHPR", "AB", "CD") == b"\x5B\x81\x10PHPR\x03AB__\x20CD__\x20"
    assert aml.notify("S001", 3) == b"\x86S001\x0A\x03"
    assert aml.bit_and(aml.local(0), 2) == b"\x7B\x60\x0A\x02\x00"
    assert aml.call("\\_SB.PCI0.SCAN") == b"\\\x2F\x03_SB_PCI0SCAN"
