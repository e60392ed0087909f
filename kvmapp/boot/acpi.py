"""The ACPI tables: RSDP, RSDT and XSDT, FADT, FACS, MADT, MCFG and the DSDT, in the ROM area.

Follows ACPI 6.5, chapter 5. The machine is a hardware-full one with fixed power button, PM timer and one GPE block, always in
ACPI mode (no SMI). Leaves out: HPET, SRAT, SSDTs, and sleep states other than S5.
"""
import struct

from kvmapp.boot import dsdt
from kvmapp.boot.platform import Platform
from kvmapp.layout import (
    ACPI_GPE0_SIZE,
    ACPI_RESET_VALUE,
    GSI_SCI,
    IOAPIC_BASE,
    LAPIC_BASE,
    PCI_BUSES,
    PCI_ECAM_BASE,
    PORT_ACPI_PM,
    PORT_ACPI_RESET,
    ROM_AREA,
    ROM_SMBIOS,
)

OEM = b"KVMAPP"
OEM_TABLE, OEM_REVISION = b"KVMAPP  ", 1
CREATOR, CREATOR_REVISION = b"KVMA", 1
HEADER_SIZE, CHECKSUM_AT = 36, 9
RSDP_SIZE, FACS_SIZE = 36, 64

# FADT.
PROFILE_ENTERPRISE_SERVER = 4
NO_C2, NO_C3 = 101, 1001                                         # latencies that say "not supported"
BOOT_LEGACY_DEVICES, BOOT_8042, BOOT_NO_VGA = 1 << 0, 1 << 1, 1 << 2
CMOS_CENTURY = 0x32
WBINVD, PROC_C1, NO_SLEEP_BUTTON, NO_FIXED_RTC, TIMER_32_BIT, RESET_REGISTER = (1 << bit for bit in (0, 2, 5, 6, 8, 10))
SPACE_IO = 1
PM1_EVENT, PM1_CONTROL, PM_TIMER, GPE0 = (PORT_ACPI_PM + offset for offset in (0, 4, 8, 0x20))

# MADT.
PCAT_COMPAT = 1
LEVEL_HIGH = 0x000D                                              # MPS INTI flags: level triggered, active high
ISA_TIMER, TIMER_GSI = 0, 2
EVERY_CPU8, EVERY_CPU32 = 0xFF, 0xFFFF_FFFF
XAPIC_IDS = 255


def write(memory, platform: Platform) -> int:
    """Writes the tables and gives the RSDP's address."""
    tables = build(platform, ROM_AREA)
    assert ROM_AREA + len(tables) <= ROM_SMBIOS
    memory.write(ROM_AREA, tables)
    return ROM_AREA


def build(platform: Platform, base: int) -> bytes:
    """The tables as they lie from `base`, a multiple of 64; the RSDP comes first."""
    area = bytearray(RSDP_SIZE)

    def add(content: bytes, alignment: int = 16) -> int:
        area.extend(bytes(-len(area) % alignment))
        area.extend(content)
        return base + len(area) - len(content)

    facs = add(_facs(), FACS_SIZE)
    definitions = add(_table(b"DSDT", 2, dsdt.build(platform)))
    tables = [add(_fadt(platform, facs, definitions)), add(_madt(platform))]
    if platform.pci:
        tables.append(add(_mcfg()))
    rsdt = add(_table(b"RSDT", 1, struct.pack(f"<{len(tables)}I", *tables)))
    xsdt = add(_table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    area[:RSDP_SIZE] = _rsdp(rsdt, xsdt)
    return bytes(area)


def checksum(data: bytes) -> int:
    """What makes the bytes sum to zero."""
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = struct.pack("<4sIBB6s8sI4sI", signature, HEADER_SIZE + len(body), revision, 0, OEM, OEM_TABLE, OEM_REVISION,
                         CREATOR, CREATOR_REVISION)
    table = bytearray(header + body)
    table[CHECKSUM_AT] = checksum(table)
    return bytes(table)


def _rsdp(rsdt: int, xsdt: int) -> bytes:
    """Revision 2 (5.2.5.3): a checksum over the first 20 bytes, then one over all."""
    rsdp = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM, 2, rsdt, RSDP_SIZE, xsdt, 0))
    rsdp[8] = checksum(rsdp[:20])
    rsdp[32] = checksum(rsdp)
    return bytes(rsdp)


def _facs() -> bytes:
    """Version 2, nothing to wake up to (5.2.10)."""
    return struct.pack("<4sI24xB31x", b"FACS", FACS_SIZE, 2)


def _fadt(platform: Platform, facs: int, definitions: int) -> bytes:
    """Revision 6 (5.2.9). Each register block is named twice, as a port and as a generic address."""
    boot_architecture = BOOT_LEGACY_DEVICES | (BOOT_8042 if platform.i8042 else 0) | (0 if platform.vga else BOOT_NO_VGA)
    flags = WBINVD | PROC_C1 | NO_SLEEP_BUTTON | NO_FIXED_RTC | TIMER_32_BIT | RESET_REGISTER
    none = bytes(12)
    return _table(b"FACP", 6, b"".join((
        struct.pack("<IIBBHIBBBB", facs, definitions, 0, PROFILE_ENTERPRISE_SERVER, GSI_SCI, 0, 0, 0, 0, 0),
        struct.pack("<8I", PM1_EVENT, 0, PM1_CONTROL, 0, 0, PM_TIMER, GPE0, 0),
        struct.pack("<8B", 4, 2, 0, 4, ACPI_GPE0_SIZE, 0, 0, 0),
        struct.pack("<4H5BHBI", NO_C2, NO_C3, 0, 0, 0, 0, 0, 0, CMOS_CENTURY, boot_architecture, 0, flags),
        _address(PORT_ACPI_RESET, 8, 1), struct.pack("<BHB", ACPI_RESET_VALUE, 0, 5),
        struct.pack("<QQ", 0, definitions),
        _address(PM1_EVENT, 32, 2), none, _address(PM1_CONTROL, 16, 2), none, none,
        _address(PM_TIMER, 32, 3), _address(GPE0, 8 * ACPI_GPE0_SIZE, 1), none,
        none, none, bytes(8),
    )))


def _address(port: int, bits: int, access: int) -> bytes:
    """A generic address structure in I/O space; `access` is 1 for bytes, 2 for words, 3 for dwords."""
    return struct.pack("<BBBBQ", SPACE_IO, bits, 0, access, port)


def _madt(platform: Platform) -> bytes:
    """CPUs, the I/O APIC, and where ISA lines differ from their numbers: the timer, and the level-triggered ones."""
    entries = [struct.pack("<II", LAPIC_BASE, PCAT_COMPAT)]
    apic_ids = platform.topology.apic_ids()
    for uid, apic_id in enumerate(apic_ids):
        if apic_id < XAPIC_IDS:
            entries.append(struct.pack("<BBBBI", 0, 8, uid & 0xFF, apic_id, 1))
        else:
            entries.append(struct.pack("<BBHIII", 9, 16, 0, apic_id, 1, uid))
    entries.append(struct.pack("<BBBBII", 1, 12, 0, 0, IOAPIC_BASE, 0))
    overrides = [(ISA_TIMER, TIMER_GSI, 0)] + [(gsi, gsi, LEVEL_HIGH) for gsi in sorted({GSI_SCI, *platform.level_lines})]
    entries += [struct.pack("<BBBBIH", 2, 10, 0, line, gsi, flags) for line, gsi, flags in overrides]
    entries.append(struct.pack("<BBBHB", 4, 6, EVERY_CPU8, 0, 1))
    if apic_ids[-1] >= XAPIC_IDS:
        entries.append(struct.pack("<BBHIB3x", 10, 12, 0, EVERY_CPU32, 1))
    return _table(b"APIC", 5, b"".join(entries))


def _mcfg() -> bytes:
    """ECAM of segment 0 (PCI Firmware Specification, 4.1.2)."""
    return _table(b"MCFG", 1, struct.pack("<8xQHBB4x", PCI_ECAM_BASE, 0, 0, PCI_BUSES - 1))
