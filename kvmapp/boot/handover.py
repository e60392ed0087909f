"""The contract between direct boot and the kernel formats: what a format can do, and what it is handed.

A format reads its kernel into guest memory, says where an initrd may lie, and last packs the hand-over in the way its kernels
expect it and names the entry point.
"""
from kvmapp.boot.e820 import Entry
from kvmapp.boot.entry import EntryState
from kvmapp.boot.placement import Placement
from kvmapp.layout import BOOT_CMDLINE_SIZE


class Handover:
    """What every kernel is handed. Addresses are guest-physical; 0 stands for what the guest does not have."""
    __slots__ = ("cmdline", "initrd", "initrd_size", "memory_map", "rsdp")

    def __init__(self) -> None:
        self.cmdline = 0                                         # NUL-terminated
        self.initrd = self.initrd_size = 0
        self.memory_map: list[Entry] = []
        self.rsdp = 0


class Kernel:
    """One kernel file of a known format, checked as far as its headers go."""
    name = "kernel"
    cmdline_limit = BOOT_CMDLINE_SIZE - 1                        # bytes, without the NUL
    initrd_limit = 1 << 32

    def load(self, memory, placement: Placement) -> None:
        """Reads the kernel into guest memory and claims what it will use. Raises GuestImageError."""
        raise NotImplementedError

    def place_initrd(self, placement: Placement, size: int) -> int | None:
        """Where an initrd of `size` bytes goes, once the kernel is loaded: as high as may be, out of the kernel's way."""
        return placement.highest(size, self.initrd_limit)

    def enter(self, memory, handover: Handover) -> EntryState:
        """Writes what the kernel reads first."""
        raise NotImplementedError
