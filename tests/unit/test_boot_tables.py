"""ACPI, MP table and SMBIOS as a guest finds them in memory: checksums, lengths, contents; judged by iasl and dmidecode too."""
import shutil
import struct
import subprocess
from uuid import UUID

import pytest

from kvmapp.boot import acpi, mptable, real_mode, smbios
from kvmapp.boot.platform import Platform
from kvmapp.boot.topology import Topology
from kvmapp.layout import (
    GIB,
    GSI_COM1,
    GSI_COM2,
    GSI_INTX,
    GSI_SCI,
    IOAPIC_BASE,
    LAPIC_BASE,
    MIB,
    PCI_ECAM_BASE,
    PORT_ACPI_PM,
    PORT_COM1,
    PORT_COM2,
    ROM_AREA,
    ROM_AREA_END,
    ROM_MP_TABLE,
    ROM_SMBIOS,
)
from kvmapp.memory import GuestMemory

UUID_TEXT = "d340f42e-8611-52c5-949c-8013181e73d4"
LEVEL_HIGH = 0xD
WINDOWS = [(0xFEB0_0000, 0x1000, 5), (0xFEB0_1000, 0x1000, 16)]  # of virtio-mmio


def platform(vcpus: int = 2, virtio_mmio=None, **facts) -> Platform:
    return Platform(Topology(vcpus, **facts), uuid=UUID(UUID_TEXT).bytes, pci_window64=(1 << 38, 1 << 37),
                    serial_ports=((PORT_COM1, GSI_COM1), (PORT_COM2, GSI_COM2)), i8042=True, vga=True,
                    virtio_mmio=virtio_mmio, hotplug_slots=tuple(range(2, 32)) if virtio_mmio is None else ())


@pytest.fixture
def memory():
    return GuestMemory(4 * MIB)


def acpi_tables(memory, **facts) -> dict[str, bytes]:
    """{signature: table}, found by following the pointers from the RSDP as an operating system does."""
    rsdp = memory.read(acpi.write(memory, platform(**facts)), 36)
    assert rsdp[:8] == b"RSD PTR "
    assert sum(rsdp[:20]) % 256 == sum(rsdp) % 256 == 0
    revision, rsdt, length, xsdt = struct.unpack("<BIIQ", rsdp[15:32])
    assert (revision, length) == (2, 36)
    tables = {"RSDT": table_at(memory, rsdt), "XSDT": table_at(memory, xsdt)}
    pointers = struct.unpack(f"<{(len(tables['XSDT']) - 36) // 8}Q", tables["XSDT"][36:])
    assert pointers == struct.unpack(f"<{len(pointers)}I", tables["RSDT"][36:])
    for pointer in pointers:
        table = table_at(memory, pointer)
        tables[table[:4].decode()] = table
    facs, dsdt = struct.unpack("<II", tables["FACP"][36:44])
    assert facs % 64 == 0
    assert memory.read(facs, 8) == b"FACS" + struct.pack("<I", 64)
    assert struct.unpack("<Q", tables["FACP"][140:148]) == (dsdt,)
    tables["DSDT"] = table_at(memory, dsdt)
    return tables


def table_at(memory, gpa: int) -> bytes:
    table = memory.read(gpa, struct.unpack("<I", memory.read(gpa + 4, 4))[0])
    assert ROM_AREA <= gpa < gpa + len(table) <= ROM_SMBIOS
    assert sum(table) % 256 == 0, table[:4]
    assert table[10:16] == b"KVMAPP"
    return table


def madt_entries(madt: bytes):
    at = 44
    while at < len(madt):
        kind, length = madt[at], madt[at + 1]
        yield kind, madt[at + 2:at + length]
        at += length
    assert at == len(madt)


def test_acpi_tables_are_all_there(memory):
    assert set(acpi_tables(memory)) == {"RSDT", "XSDT", "FACP", "DSDT", "APIC", "MCFG"}


def test_fadt_names_the_power_management_registers(memory):
    fadt = acpi_tables(memory)["FACP"]
    assert (len(fadt), fadt[8]) == (276, 6)
    assert struct.unpack("<H", fadt[46:48]) == (GSI_SCI,)
    ports = (PORT_ACPI_PM, 0, PORT_ACPI_PM + 4, 0, 0, PORT_ACPI_PM + 8, PORT_ACPI_PM + 0x20, 0)
    assert struct.unpack("<8I", fadt[56:88]) == ports
    for at, port in ((148, PORT_ACPI_PM), (172, PORT_ACPI_PM + 4), (208, PORT_ACPI_PM + 8), (220, PORT_ACPI_PM + 0x20)):
        assert (fadt[at], struct.unpack("<Q", fadt[at + 4:at + 12])) == (1, (port,))
    assert struct.unpack("<BBBBQB", fadt[116:129]) == (1, 8, 0, 1, 0x630, 6)
    flags = struct.unpack("<I", fadt[112:116])[0]
    assert flags & 1 << 10, "reset register"
    assert not flags & 1 << 4, "the power button is a fixed one"
    assert not flags & 1 << 20, "not hardware-reduced"


@pytest.mark.parametrize(("facts", "bits"), [({}, 0b100), ({"i8042": True, "vga": True}, 0b010), ({"i8042": True}, 0b110)])
def test_fadt_says_which_legacy_devices_there_are(memory, facts, bits):
    tables = memory.read(acpi.write(memory, Platform(Topology(1), **facts)), 0x4000)
    fadt = tables[tables.index(b"FACP"):]
    assert struct.unpack("<H", fadt[109:111])[0] & 0b1110 == bits


def test_madt_lists_cpus_and_overrides(memory):
    madt = acpi_tables(memory, vcpus=6, sockets=2)["APIC"]
    assert struct.unpack("<II", madt[36:44]) == (LAPIC_BASE, 1)
    entries = list(madt_entries(madt))
    cpus = [struct.unpack("<BBI", body) for kind, body in entries if kind == 0]
    assert cpus == [(0, 0, 1), (1, 1, 1), (2, 2, 1), (3, 4, 1), (4, 5, 1), (5, 6, 1)]
    assert [struct.unpack("<BBII", body) for kind, body in entries if kind == 1] == [(0, 0, IOAPIC_BASE, 0)]
    overrides = [struct.unpack("<BBIH", body) for kind, body in entries if kind == 2]
    assert overrides == [(0, 0, 2, 0), (0, 9, 9, LEVEL_HIGH), (0, 10, 10, LEVEL_HIGH), (0, 11, 11, LEVEL_HIGH)]
    assert [body for kind, body in entries if kind == 4] == [b"\xFF\x00\x00\x01"]


def test_madt_names_large_apic_ids_in_x2apic_entries(memory):
    entries = list(madt_entries(acpi_tables(memory, vcpus=300)["APIC"]))
    ids = [body[1] for kind, body in entries if kind == 0]
    ids += [struct.unpack("<HIII", body)[1] for kind, body in entries if kind == 9]
    assert ids == list(range(300))
    assert [kind for kind, _ in entries if kind in (4, 10)] == [4, 10]


def test_mcfg_names_only_the_bus_that_exists(memory):
    assert struct.unpack("<8xQHBB4x", acpi_tables(memory)["MCFG"][36:]) == (PCI_ECAM_BASE, 0, 0, 0)


def test_dsdt_can_power_off(memory):
    assert b"\x08\\_S5_\x12\x08\x04\x0A\x05\x0A\x05\x00\x00" in acpi_tables(memory)["DSDT"]


def test_a_machine_without_pci_tells_of_none(memory):
    tables = acpi_tables(memory, virtio_mmio=WINDOWS)
    assert "MCFG" not in tables and b"PCI0" not in tables["DSDT"]
    overrides = [struct.unpack("<BBIH", body) for kind, body in madt_entries(tables["APIC"]) if kind == 2]
    assert overrides == [(0, 0, 2, 0), (0, 9, 9, LEVEL_HIGH)]
    entries = mp_table(memory, virtio_mmio=WINDOWS)
    assert [body[1:7] for kind, body in entries if kind == 1] == [b"ISA   "]
    interrupts = [struct.unpack("<BHBBBB", body) for kind, body in entries if kind == 3]
    assert {irq: (flags, pin) for _, flags, bus, irq, _, pin in interrupts if bus == 1 and irq >= 10} == \
        {line: (0, line) for line in range(10, 16)}
    assert all(bus == 1 for _, _, bus, *_ in interrupts)


@pytest.mark.skipif(not shutil.which("iasl"), reason="no iasl here")
def test_iasl_reads_the_windows_of_virtio_mmio(memory, tmp_path):
    (tmp_path / "DSDT.dat").write_bytes(acpi_tables(memory, virtio_mmio=WINDOWS)["DSDT"])
    subprocess.run(["iasl", "-d", "DSDT.dat"], cwd=tmp_path, check=True, capture_output=True)
    source = (tmp_path / "DSDT.dsl").read_text()
    assert source.count('Name (_HID, "LNRO0005")') == 2
    assert source.count("Interrupt (ResourceConsumer, Edge, ActiveHigh, Shared") == 2
    assert "0xFEB01000" in source and "0x00000010," in source
    compiled = subprocess.run(["iasl", "-vi", "-we", "DSDT.dsl"], cwd=tmp_path, capture_output=True, text=True)
    assert "0 Errors, 0 Warnings, 0 Remarks" in compiled.stdout, compiled.stdout + compiled.stderr


@pytest.mark.skipif(not shutil.which("iasl"), reason="NO iasl HERE (package acpica-tools): the DSDT is not judged by a compiler")
@pytest.mark.parametrize("vcpus", [1, 254])
def test_iasl_reads_every_table_and_compiles_it_again_without_warnings(memory, tmp_path, vcpus):
    for signature, table in acpi_tables(memory, vcpus=vcpus).items():
        (tmp_path / f"{signature}.dat").write_bytes(table)
        subprocess.run(["iasl", "-d", f"{signature}.dat"], cwd=tmp_path, check=True, capture_output=True)
        compiled = subprocess.run(["iasl", "-vi", "-we", f"{signature}.dsl"], cwd=tmp_path, capture_output=True, text=True)
        assert "0 Errors, 0 Warnings, 0 Remarks" in compiled.stdout, compiled.stdout + compiled.stderr
    source = (tmp_path / "DSDT.dsl").read_text()
    assert 'Name (_HID, EisaId ("PNP0A08") /* PCI Express Bus */)' in source
    assert source.count('Name (_HID, "ACPI0007"') == vcpus
    for device in ("PNP0501", "PNP0303", "PNP0B00", "PNP0C02"):
        assert f'EisaId ("{device}")' in source


def mp_table(memory, **facts):
    """(header fields, [(type, body)]) of the table that the EBDA's floating pointer leads to."""
    mptable.write(memory, platform(**facts))
    real_mode.write(memory, platform(**facts))
    ebda = struct.unpack("<H", memory.read(0x40E, 2))[0] << 4
    pointer = next(at for at in range(ebda, ebda + 1024, 16) if memory.read(at, 4) == b"_MP_")
    assert sum(memory.read(pointer, 16)) % 256 == 0
    table = struct.unpack("<I", memory.read(pointer + 4, 4))[0]
    length = struct.unpack("<H", memory.read(table + 4, 2))[0]
    assert ROM_MP_TABLE <= table < table + length <= ROM_AREA_END
    data = memory.read(table, length)
    assert data[:4] == b"PCMP"
    assert sum(data) % 256 == 0
    entries, at = [], 44
    while at < length:
        size = 20 if data[at] == 0 else 8
        entries.append((data[at], data[at + 1:at + size]))
        at += size
    assert len(entries) == struct.unpack("<H", data[34:36])[0]
    return entries


@pytest.mark.parametrize("vcpus", [1, 4, 254])
def test_mp_table_lists_cpus(memory, vcpus):
    cpus = [body for kind, body in mp_table(memory, vcpus=vcpus) if kind == 0]
    assert [body[0] for body in cpus] == list(range(vcpus))
    assert [body[2] for body in cpus] == [3] + [1] * (vcpus - 1)


def test_mp_table_leaves_out_cpus_it_cannot_number(memory):
    assert len([kind for kind, _ in mp_table(memory, vcpus=300) if kind == 0]) == 255


def test_mp_table_routes_isa_lines_and_pci_pins(memory):
    entries = mp_table(memory)
    assert [body[1:7] for kind, body in entries if kind == 1] == [b"PCI   ", b"ISA   "]
    interrupts = [struct.unpack("<BHBBBB", body) for kind, body in entries if kind == 3]
    isa = {irq: pin for kind, _, bus, irq, _, pin in interrupts if bus == 1}
    assert isa == {0: 2, 1: 1, **{line: line for line in range(3, 16) if line not in (10, 11)}}
    pci = {(irq >> 2, irq & 3): (flags, pin) for kind, flags, bus, irq, _, pin in interrupts if bus == 0}
    assert pci == {(slot, pin): (LEVEL_HIGH, GSI_INTX[(slot + pin) % 4]) for slot in range(32) for pin in range(4)}
    assert [struct.unpack("<BHBBBB", body) for kind, body in entries if kind == 4] == [(3, 0, 1, 0, 0, 0), (1, 0, 1, 0, 0xFF, 1)]


def smbios_structures(memory, vcpus: int = 2, **facts) -> list[tuple[int, bytes, list[str]]]:
    """[(type, formatted part, strings)] that both entry points lead to."""
    smbios.write(memory, platform(vcpus, **facts))
    new, old = memory.read(ROM_SMBIOS, 24), memory.read(ROM_SMBIOS + 0x20, 31)
    assert (new[:5], old[:4], old[16:21]) == (b"_SM3_", b"_SM_", b"_DMI_")
    assert sum(new) % 256 == sum(old) % 256 == sum(old[16:]) % 256 == 0
    size, table = struct.unpack("<IQ", new[12:24])
    assert struct.unpack("<HI", old[22:28]) == (size, table)
    assert table + size <= ROM_MP_TABLE
    data, found = memory.read(table, size), []
    while data:
        kind, length = data[0], data[1]
        end = data.index(b"\0\0", length)
        found.append((kind, data[:length], data[length:end].decode().split("\0")))
        data = data[end + 2:]
    assert struct.unpack("<H", old[28:30]) == (len(found),)
    return found


def test_smbios_structures(memory):
    found = smbios_structures(memory, vcpus=12, sockets=2, threads=2)
    assert [kind for kind, _, _ in found] == [0, 1, 3, 4, 4, 16, 17, 19, 32, 127]
    of_type = {kind: (formatted, strings) for kind, formatted, strings in found}
    assert of_type[0][1][0] == "kvmapp"
    assert of_type[1][1][:2] == ["kvmapp", "kvmapp virtual machine"]
    assert UUID(bytes_le=of_type[1][0][8:24]) == UUID(UUID_TEXT)
    assert tuple(of_type[4][0][0x23:0x26]) == (3, 3, 6)
    assert struct.unpack("<H", of_type[17][0][12:14]) == (4,)
    assert struct.unpack("<II", of_type[19][0][4:12]) == (0, 4095)


def test_smbios_counts_more_than_255_threads(memory):
    cpu = next(formatted for kind, formatted, _ in smbios_structures(memory, vcpus=600) if kind == 4)
    assert tuple(cpu[0x23:0x26]) == (255, 255, 255)
    assert struct.unpack("<3H", cpu[0x2A:0x30]) == (600, 600, 600)


def test_smbios_of_terabytes():
    ranges = [(0, 3 * GIB), (4 * GIB, 5 << 40)]
    found = {structure[0]: structure for structure in smbios.build(platform(), ranges)}
    size = 3 * GIB + (5 << 40)
    assert struct.unpack("<IHHQ", found[16][7:23]) == (0x8000_0000, 0xFFFE, 1, size)
    assert struct.unpack("<H", found[17][12:14]) == (0x7FFF,)
    assert struct.unpack("<I", found[17][28:32]) == (size >> 20,)
    assert struct.unpack("<II3xQQ", found[19][4:31]) == (0xFFFF_FFFF, 0xFFFF_FFFF, 4 * GIB, 4 * GIB + (5 << 40) - 1)


@pytest.mark.skipif(not shutil.which("dmidecode"), reason="NO dmidecode HERE: the SMBIOS structures are not judged by it")
def test_dmidecode_reads_the_structures(memory, tmp_path):
    smbios_structures(memory)
    entry = bytearray(memory.read(ROM_SMBIOS, 24))
    size, table = struct.unpack("<IQ", entry[12:24])
    struct.pack_into("<Q", entry, 16, 32)                       # a dump holds the structures behind the entry point
    entry[5] = (entry[5] - sum(entry)) % 256
    (tmp_path / "dump").write_bytes(bytes(entry).ljust(32, b"\0") + memory.read(table, size))
    shown = subprocess.run(["dmidecode", "--from-dump", str(tmp_path / "dump")], capture_output=True, text=True)
    assert shown.returncode == 0
    assert f"UUID: {UUID_TEXT}" in shown.stdout
    for wrong in ("<BAD INDEX>", "<OUT OF SPEC>", "TRUNCATED", "Wrong DMI"):
        assert wrong not in shown.stdout + shown.stderr
