"""Which guest RAM direct boot has given out, so that kernel, initrd and tables never overlap nor leave RAM.

Every address that comes out of a kernel file passes through `conflict` before a byte is written. Leaves out: RAM above 4 GiB,
which not every boot protocol can name; it stays the guest's own.
"""
from kvmapp.layout import (
    BOOT_CMDLINE,
    BOOT_CMDLINE_SIZE,
    BOOT_PAGE_TABLES,
    BOOT_SETUP_DATA,
    BOOT_SETUP_DATA_SIZE,
    EBDA,
    LOW_MEMORY_END,
    MIB,
    ROM_AREA_END,
)

PAGE_SIZE = 4096
BOOT_STRUCTURES = (
    (0, BOOT_PAGE_TABLES + 6 * PAGE_SIZE, "the boot structures"),
    (BOOT_SETUP_DATA, BOOT_SETUP_DATA + BOOT_SETUP_DATA_SIZE, "the seed"),
    (BOOT_CMDLINE, BOOT_CMDLINE + BOOT_CMDLINE_SIZE, "the command line"),
    (EBDA, ROM_AREA_END, "the BIOS area"),
)


class Placement:
    """The ranges below 4 GiB that are taken, each with its owner's name for messages."""
    __slots__ = ("claims", "end", "size")

    def __init__(self, ranges: list[tuple[int, int]]):
        """`ranges` are GuestMemory.ranges: the first is RAM from 0 up."""
        self.end = min(ranges[0][1], LOW_MEMORY_END)
        self.size = sum(size for _, size in ranges)
        self.claims: list[tuple[int, int, str]] = list(BOOT_STRUCTURES)

    def conflict(self, gpa: int, size: int) -> str | None:
        """Why [gpa, gpa + size) cannot be had, in words that complete "... which", or None when it can."""
        if gpa + size > self.end:
            return f"is not in the guest's memory ({self.size // MIB} MiB)"
        for start, end, owner in self.claims:
            if gpa < end and start < gpa + size:
                return f"overlaps {owner} ({start:#x}-{end:#x})"
        return None

    def claim(self, gpa: int, size: int, owner: str) -> None:
        """Takes a range that `conflict` has passed."""
        self.claims.append((gpa, gpa + size, owner))

    def highest(self, size: int, limit: int) -> int | None:
        """The highest page-aligned place for `size` bytes whose end is not above `limit`, or None."""
        ends = [min(limit, self.end), *(start for start, _, _ in self.claims if start <= limit)]
        places = ((end - size) & -PAGE_SIZE for end in ends)
        return max((gpa for gpa in places if gpa >= 0 and not self.conflict(gpa, size)), default=None)

    def lowest(self, size: int, start: int) -> int | None:
        """The lowest page-aligned place for `size` bytes from `start` up, or None."""
        starts = [start, *(end for _, end, _ in self.claims if end >= start)]
        places = (gpa + PAGE_SIZE - 1 & -PAGE_SIZE for gpa in starts)
        return min((gpa for gpa in places if not self.conflict(gpa, size)), default=None)
