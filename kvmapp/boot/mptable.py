"""The MP table, for guests that know no ACPI or are told acpi=off: CPUs, buses, the I/O APIC and who interrupts where.

Follows the MultiProcessor Specification 1.4, chapter 4 and appendix D (PCI). Leaves out: the extended entries, and CPUs whose
APIC ID does not fit its 8 bits.
"""
import struct

from kvmapp.boot.acpi import LEVEL_HIGH, checksum
from kvmapp.boot.platform import Platform
from kvmapp.layout import EBDA, GSI_INTX, IOAPIC_BASE, LAPIC_BASE, PCI_SLOTS, ROM_MP_TABLE

FLOATING_POINTER = EBDA + 16                                     # the EBDA, which real_mode tells of, begins with its own size
REVISION_1_4 = 4

CPU_ENABLED, CPU_BOOTS = 1, 2
CPU_SIGNATURE, CPU_FEATURES = 0x0600, 0x0201                     # the guest asks CPUID; these only say: has an FPU and an APIC
LAPIC_VERSION, IOAPIC_VERSION = 0x14, 0x11
MOST_APIC_ID = 254

PCI_BUS, ISA_BUS = 0, 1
PCI_PINS = 4
INTERRUPT, NMI, EXTERNAL = 0, 1, 3
CONFORMING = 0
IOAPIC_ID, EVERY_LAPIC = 0, 0xFF
LINT0, LINT1 = 0, 1
ISA_TIMER, TIMER_PIN, CASCADE = 0, 2, 2


def write(memory, platform: Platform) -> None:
    """Writes the table, and the pointer to it where every system looks."""
    memory.write(FLOATING_POINTER, _floating_pointer(ROM_MP_TABLE))
    memory.write(ROM_MP_TABLE, build(platform))


def build(platform: Platform) -> bytes:
    """The configuration table."""
    entries = [*_processors(platform), *_buses(platform), struct.pack("<BBBBI", 2, IOAPIC_ID, IOAPIC_VERSION, 1, IOAPIC_BASE),
               *_isa_interrupts(platform), *(_pci_interrupts() if platform.pci else ()),
               struct.pack("<BBHBBBB", 4, EXTERNAL, CONFORMING, ISA_BUS, 0, 0, LINT0),
               struct.pack("<BBHBBBB", 4, NMI, CONFORMING, ISA_BUS, 0, EVERY_LAPIC, LINT1)]
    body = b"".join(entries)
    table = bytearray(struct.pack("<4sHBB8s12sIHHIHBB", b"PCMP", 44 + len(body), REVISION_1_4, 0, b"KVMAPP  ", b"VIRTUAL     ",
                                  0, 0, len(entries), LAPIC_BASE, 0, 0, 0) + body)
    table[7] = checksum(table)
    return bytes(table)


def _floating_pointer(table: int) -> bytes:
    pointer = bytearray(struct.pack("<4sIBBB5x", b"_MP_", table, 1, REVISION_1_4, 0))
    pointer[10] = checksum(pointer)
    return bytes(pointer)


def _processors(platform: Platform):
    for number, apic_id in enumerate(platform.topology.apic_ids()):
        if apic_id <= MOST_APIC_ID:
            flags = CPU_ENABLED | (CPU_BOOTS if number == 0 else 0)
            yield struct.pack("<BBBBII8x", 0, apic_id, LAPIC_VERSION, flags, CPU_SIGNATURE, CPU_FEATURES)


def _buses(platform: Platform):
    if platform.pci:
        yield struct.pack("<BB6s", 1, PCI_BUS, b"PCI   ")
    yield struct.pack("<BB6s", 1, ISA_BUS, b"ISA   ")


def _isa_interrupts(platform: Platform):
    """Every line to the pin of its number, but for the timer; the PICs' cascade and the lines that PCI has taken are none."""
    for line in range(16):
        if line != CASCADE and line not in platform.level_lines:
            pin = TIMER_PIN if line == ISA_TIMER else line
            yield struct.pack("<BBHBBBB", 3, INTERRUPT, CONFORMING, ISA_BUS, line, IOAPIC_ID, pin)


def _pci_interrupts():
    """The four pins of every slot of bus 0; the source is slot and pin."""
    for slot in range(PCI_SLOTS):
        for pin in range(PCI_PINS):
            gsi = GSI_INTX[(slot + pin) % PCI_PINS]
            yield struct.pack("<BBHBBBB", 3, INTERRUPT, LEVEL_HIGH, PCI_BUS, slot << 2 | pin, IOAPIC_ID, gsi)
