"""The memory map and the placing of kernel and initrd in it."""
from itertools import pairwise

import pytest

from kvmapp.boot.e820 import RAM, RESERVED, memory_map, pci_window64
from kvmapp.boot.placement import Placement
from kvmapp.layout import GIB, HIGH_MEMORY_BASE, LOW_MEMORY_END, MIB, PCI_ECAM_BASE, PCI_ECAM_SIZE

SMALL = [(0, 64 * MIB)]
LARGE = [(0, LOW_MEMORY_END), (HIGH_MEMORY_BASE, 5 * GIB)]


@pytest.mark.parametrize("ranges", [[(0, 2 * MIB)], SMALL, LARGE])
def test_map_ascends_without_overlap_and_counts_all_ram(ranges):
    entries = memory_map(ranges)
    for (start, size, _), (following, _, _) in pairwise(entries):
        assert size > 0
        assert start + size <= following
    ram = sum(size for _, size, kind in entries if kind == RAM)
    assert ram == sum(size for _, size in ranges) - (MIB - 0x9FC00)


def test_map_reserves_ecam_and_lists_high_memory():
    entries = memory_map(LARGE)
    assert (PCI_ECAM_BASE, PCI_ECAM_SIZE, RESERVED) in entries
    assert entries[-1] == (HIGH_MEMORY_BASE, 5 * GIB, RAM)


@pytest.mark.parametrize(("ranges", "bits", "window"), [
    (SMALL, 40, (1 << 37, 1 << 37)), (LARGE, 38, (1 << 37, 1 << 37)), (LARGE, 37, None), (SMALL, 36, None),
    ([(0, LOW_MEMORY_END), (HIGH_MEMORY_BASE, 1 << 37)], 40, (1 << 38, 1 << 37)),
])
def test_pci_window_lies_above_memory_and_within_the_cpus_reach(ranges, bits, window):
    assert pci_window64(ranges, bits) == window


def test_highest_place_goes_around_claims():
    placement = Placement(SMALL)
    assert placement.highest(MIB, 1 << 32) == 63 * MIB
    placement.claim(60 * MIB, 4 * MIB, "the kernel")
    assert placement.highest(MIB, 1 << 32) == 59 * MIB
    assert placement.highest(MIB, 10 * MIB + 100) == 9 * MIB
    assert placement.highest(60 * MIB, 1 << 32) is None


def test_highest_place_for_an_odd_size_is_page_aligned():
    gpa = Placement(SMALL).highest(5000, 1 << 32)
    assert gpa == 64 * MIB - 8192


def test_lowest_place_goes_around_claims():
    placement = Placement(SMALL)
    placement.claim(MIB, 100, "the kernel")
    assert placement.lowest(4096, MIB + 100) == MIB + 4096
    placement.claim(2 * MIB, 4096, "another")
    assert placement.lowest(MIB, MIB + 100) == 2 * MIB + 4096
    assert placement.lowest(64 * MIB, MIB) is None


def test_conflicts_are_named():
    placement = Placement(SMALL)
    assert placement.conflict(MIB, 63 * MIB) is None
    assert placement.conflict(MIB, 63 * MIB + 1) == "is not in the guest's memory (64 MiB)"
    assert "the boot structures" in (placement.conflict(0x7000, 1) or "")
    assert "the command line" in (placement.conflict(0x11000, 0x20000) or "")
    assert "the BIOS area" in (placement.conflict(MIB - 1, 2) or "")


def test_nothing_is_placed_in_the_pci_hole_or_above():
    assert Placement(LARGE).highest(MIB, 1 << 40) == LOW_MEMORY_END - MIB
    assert Placement(LARGE).conflict(HIGH_MEMORY_BASE, 4096)
