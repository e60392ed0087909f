"""The guest's memory map: what is RAM and what is not, as the zero page, PVH, multiboot and firmware all tell it.

Follows ACPI 6.5, section 15 (INT 15h, E820h). Leaves out: ACPI data ranges of their own (the tables lie in the ROM area, which is
reserved as a whole) and hot-plugged memory.
"""
import struct

from kvmapp.layout import (
    EBDA,
    IDENTITY_MAP_BASE,
    KIB,
    PCI_ECAM_BASE,
    PCI_ECAM_SIZE,
    PCI_MMIO64_SIZE,
    ROM_AREA,
    ROM_AREA_END,
)

RAM, RESERVED = 1, 2
VIDEO_MEMORY = 640 * KIB
KVM_PAGES = 4 * 4096                                             # the identity-map page and the TSS's three pages

Entry = tuple[int, int, int]                                     # (gpa, size in bytes, type)


def memory_map(ranges: list[tuple[int, int]]) -> list[Entry]:
    """The map of a guest whose RAM lies at `ranges` (GuestMemory.ranges), ascending and free of overlaps."""
    (_, low), *high = ranges
    return [
        (0, EBDA, RAM),
        (EBDA, VIDEO_MEMORY - EBDA, RESERVED),
        (ROM_AREA, ROM_AREA_END - ROM_AREA, RESERVED),
        (ROM_AREA_END, low - ROM_AREA_END, RAM),
        (PCI_ECAM_BASE, PCI_ECAM_SIZE, RESERVED),
        (IDENTITY_MAP_BASE, KVM_PAGES, RESERVED),
        *((gpa, size, RAM) for gpa, size in high),
    ]


def pci_window64(ranges: list[tuple[int, int]], address_bits: int) -> tuple[int, int] | None:
    """(gpa, size in bytes) of the window for large BARs above guest memory; None where the CPU's addresses do not reach it."""
    memory_end = sum(ranges[-1])
    base = -(-memory_end // PCI_MMIO64_SIZE) * PCI_MMIO64_SIZE
    return (base, PCI_MMIO64_SIZE) if base + PCI_MMIO64_SIZE <= 1 << address_bits else None


def pack(entries: list[Entry], layout: str) -> bytes:
    """The map as a table of `layout`, a struct format that takes (gpa, size, type)."""
    return b"".join(struct.pack(layout, *entry) for entry in entries)
