"""Multiboot 1 kernels: test kernels, hobby systems, Xen; ELF of 32 or 64 bits, or raw with addresses in the header.

Follows the Multiboot Specification 0.6.96. Leaves out: a video mode (there may be no screen; the kernel is told of none), the
APM, drive and symbol tables, and multiboot 2.
"""
import struct

from kvmapp.boot import e820
from kvmapp.boot.elf import MAGIC as ELF_MAGIC
from kvmapp.boot.elf import ElfFile
from kvmapp.boot.entry import EntryState, protected_mode
from kvmapp.boot.handover import Handover, Kernel
from kvmapp.boot.image import ImageFile
from kvmapp.boot.placement import Placement
from kvmapp.boot.segments import Segment, SegmentedImage
from kvmapp.layout import BOOT_INFO, EBDA, KIB, ROM_AREA_END

HEADER_MAGIC = 0x1BAD_B002
SEARCH_SIZE = 8192
LOADER_MAGIC = 0x2BAD_B002

# Header flags: the loader must understand bits 0 to 15.
UNKNOWN_REQUIREMENTS = 0xFFF8
HAS_ADDRESSES = 1 << 16

# Information flags and structure (3.3).
INFO_MEMORY, INFO_CMDLINE, INFO_MODULES, INFO_MMAP, INFO_LOADER_NAME = 1 << 0, 1 << 2, 1 << 3, 1 << 6, 1 << 9
INFO_SIZE = 116
MODULE_SIZE = 16
LOADER_NAME = b"kvmapp\0"


def find_header(file: ImageFile) -> tuple[int, int] | None:
    """(offset, flags) of the header: 4-byte aligned in the first 8 KiB, its three words summing to zero; or None."""
    words = file.head[:SEARCH_SIZE - SEARCH_SIZE % 4]
    magic = struct.pack("<I", HEADER_MAGIC)
    at = words.find(magic)
    while at >= 0:
        if at % 4 == 0 and at + 12 <= len(words):
            _, flags, checksum = struct.unpack_from("<3I", words, at)
            if HEADER_MAGIC + flags + checksum & 0xFFFF_FFFF == 0:
                return at, flags
        at = words.find(magic, at + 1)
    return None


class MultibootKernel(Kernel):
    """A kernel with a multiboot header, entered in 32-bit mode."""
    name = "multiboot kernel"

    def __init__(self, file: ImageFile, header: tuple[int, int]):
        """Checks the header. Raises GuestImageError."""
        self.offset, self.flags = header
        if self.flags & UNKNOWN_REQUIREMENTS:
            raise file.error(f"its multiboot header requires features unknown to multiboot 1 (flags {self.flags:#x})")
        self.image: SegmentedImage
        if self.flags & HAS_ADDRESSES:
            self.image = AddressedImage(file, self.offset)
        elif file.head.startswith(ELF_MAGIC):
            self.image = ElfFile(file)
        else:
            raise file.error("it has a multiboot header without addresses, and is no ELF file", "the file is damaged")

    def load(self, memory, placement: Placement) -> None:
        self.image.load(memory, placement)

    def place_initrd(self, placement: Placement, size: int) -> int | None:
        """Right behind the kernel, as other loaders do: small kernels map only the first MiBs."""
        return placement.lowest(size, self.image.end)

    def enter(self, memory, handover: Handover) -> EntryState:
        """Writes the information structure, behind it module list, memory map and the loader's name."""
        modules = b""
        if handover.initrd_size:
            end = handover.initrd + handover.initrd_size
            modules = struct.pack("<4I", handover.initrd, end, 0, 0)
        mmap = b"".join(struct.pack("<IQQI", 20, *entry) for entry in handover.memory_map)
        module_list = BOOT_INFO + INFO_SIZE
        mmap_at = module_list + len(modules)
        flags = INFO_MEMORY | INFO_CMDLINE | INFO_MMAP | INFO_LOADER_NAME | (INFO_MODULES if modules else 0)
        info = bytearray(INFO_SIZE)
        struct.pack_into("<3I", info, 0, flags, EBDA // KIB, self._upper_memory(handover))
        struct.pack_into("<3I", info, 16, handover.cmdline, len(modules) // MODULE_SIZE, module_list if modules else 0)
        struct.pack_into("<2I", info, 44, len(mmap), mmap_at)
        struct.pack_into("<I", info, 64, mmap_at + len(mmap))
        memory.write(BOOT_INFO, bytes(info) + modules + mmap + LOADER_NAME)
        return protected_mode(memory, self.image.entry(), rax=LOADER_MAGIC, rbx=BOOT_INFO)

    def _upper_memory(self, handover: Handover) -> int:
        """KiB of RAM from 1 MiB up to the first hole."""
        return next(size for gpa, size, kind in handover.memory_map if gpa == ROM_AREA_END and kind == e820.RAM) // KIB


class AddressedImage(SegmentedImage):
    """A kernel whose multiboot header says where its text, data and bss go: one segment, whatever the file's format."""

    def __init__(self, file: ImageFile, header_offset: int):
        """Checks the header's addresses (3.1.3). Raises GuestImageError."""
        super().__init__(file)
        header_at, load_at, load_end, bss_end, self.entry_point = struct.unpack("<5I", file.read(header_offset + 12, 20))
        offset = header_offset - (header_at - load_at)
        in_file = load_end - load_at if load_end else file.size - offset
        if header_at < load_at or offset < 0 or in_file <= 0:
            raise file.error(f"its multiboot header's addresses contradict each other (header {header_at:#x}, load "
                             f"{load_at:#x}-{load_end:#x})", "the file is damaged")
        if offset + in_file > file.size:
            raise file.truncated(offset + in_file)
        self.segments = [Segment(offset, load_at, load_at, in_file, max(in_file, bss_end - load_at))]
