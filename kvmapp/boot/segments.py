"""A kernel as a list of segments: the part that ELF files and multiboot's own address fields have in common.

Every address and size has come out of a file and is checked here, before the first byte goes into guest memory.
"""
from kvmapp.boot.image import ImageFile, zero
from kvmapp.boot.placement import Placement
from kvmapp.layout import MIB


class Segment:
    """`file_size` bytes at `offset` go to `physical`; zeroes follow up to `memory_size`."""
    __slots__ = ("file_size", "memory_size", "offset", "physical", "virtual")

    def __init__(self, offset: int, virtual: int, physical: int, file_size: int, memory_size: int):
        self.offset, self.virtual, self.physical = offset, virtual, physical
        self.file_size, self.memory_size = file_size, memory_size


class SegmentedImage:
    """The file, its segments and its entry point; subclasses fill the last two."""
    segments: list[Segment]
    entry_point: int

    def __init__(self, file: ImageFile):
        self.file = file
        self.segments = []
        self.entry_point = 0

    def load(self, memory, placement: Placement) -> None:
        """Reads every segment to its physical address and clears what the file does not fill."""
        if not self.segments:
            raise self.file.error("it has nothing to load", "give a linked kernel")
        for segment in self.segments:
            self._claim(segment, placement)
        for segment in self.segments:
            self.file.read_into(memory, segment.physical, segment.offset, segment.file_size)
            zero(memory, segment.physical + segment.file_size, segment.memory_size - segment.file_size)

    @property
    def end(self) -> int:
        """The first address behind the highest segment."""
        return max(segment.physical + segment.memory_size for segment in self.segments)

    def entry(self) -> int:
        """The physical entry point: some kernels name it physically, some virtually."""
        for segment in self.segments:
            if 0 <= self.entry_point - segment.virtual < segment.memory_size:
                return segment.physical + self.entry_point - segment.virtual
        return self.check_entry(self.entry_point)

    def check_entry(self, address: int) -> int:
        """`address`, if it lies in a segment. Raises GuestImageError otherwise."""
        if any(0 <= address - segment.physical < segment.memory_size for segment in self.segments):
            return address
        raise self.file.error(f"its entry point {address:#x} lies in none of its segments", "the file is damaged, or no kernel")

    def _claim(self, segment: Segment, placement: Placement) -> None:
        end = segment.physical + segment.memory_size
        if problem := placement.conflict(segment.physical, segment.memory_size):
            hint = f"give the guest more than {end + MIB - 1 >> 20} MiB of memory" if end > placement.end else None
            raise self.file.error(f"its segment at {segment.physical:#x}-{end:#x} {problem}", hint)
        placement.claim(segment.physical, segment.memory_size, "another segment of it")
