"""Linux kernels by Linux's own boot protocol: bzImage, and vmlinux entered where its decompressor would jump to.

Follows Documentation/arch/x86/boot.rst (boot protocol 2.02 to 2.15, 32-bit and 64-bit entry) and zero-page.rst. The real-mode
setup code of a bzImage is never run: its job, the zero page, is done here. Leaves out: zImage and protocols before 2.02 (Linux
2.4.0), and EFI hand-over. A bzImage that the host has unpacked is unpacked.py's.
"""
import os
import struct

from kvmapp.boot import e820
from kvmapp.boot.elf import ElfFile
from kvmapp.boot.entry import EntryState, long_mode, protected_mode
from kvmapp.boot.handover import Handover, Kernel
from kvmapp.boot.image import ImageFile
from kvmapp.boot.placement import Placement
from kvmapp.layout import BOOT_KERNEL, BOOT_SETUP_DATA, BOOT_ZERO_PAGE, MIB

# Offsets in a bzImage's first sectors and, the same, in the zero page.
ACPI_RSDP_ADDR = 0x070
E820_ENTRIES = 0x1E8
SETUP_HEADER = 0x1F1                                             # setup_sects, the header's first field
SYSSIZE = 0x1F4
VID_MODE = 0x1FA
BOOT_FLAG = 0x1FE
JUMP_LENGTH = 0x201                                              # of the jump over the header: the header ends behind it
MAGIC = 0x202
VERSION = 0x206
TYPE_OF_LOADER, LOADFLAGS = 0x210, 0x211
CODE32_START = 0x214
RAMDISK_IMAGE = 0x218                                            # and behind it ramdisk_size
CMD_LINE_PTR, INITRD_ADDR_MAX = 0x228, 0x22C
KERNEL_ALIGNMENT, RELOCATABLE_KERNEL = 0x230, 0x234
XLOADFLAGS, CMDLINE_SIZE = 0x236, 0x238
PAYLOAD_OFFSET, PAYLOAD_LENGTH = 0x248, 0x24C
SETUP_DATA, PREF_ADDRESS, INIT_SIZE = 0x250, 0x258, 0x260
HEADER_END = 0x290                                               # the zero page's next field starts here
E820_TABLE = 0x2D0

HEADER_MAGIC = b"HdrS"
BOOT_FLAG_VALUE = 0xAA55
LOADED_HIGH = 0x01
LOADER_UNDEFINED = 0xFF                                          # type_of_loader without an assigned number
XLF_KERNEL_64 = 0x01
VIDEO_MODE_NORMAL = 0xFFFF
ENTRY64_OFFSET = 0x200
SECTOR = 512
ZERO_PAGE_SIZE = 4096
SETUP_RNG_SEED, SEED_SIZE = 9, 32                               # a type of setup_data; bytes

OLDEST_VERSION = 0x0202
DEFAULT_INITRD_LIMIT = 0x3800_0000                               # protocols before 2.03
DEFAULT_CMDLINE_LIMIT = 255                                      # protocols before 2.06
VMLINUX_CMDLINE_LIMIT = 2047                                     # COMMAND_LINE_SIZE of arch/x86, less the NUL
UNPACKING_FACTOR = 5                                             # room to unpack in, where a kernel does not tell (before 2.10)


def is_bzimage(head: bytes) -> bool:
    return head[MAGIC:MAGIC + 4] == HEADER_MAGIC and head[BOOT_FLAG:BOOT_FLAG + 2] == b"\x55\xAA"


class BzImage(Kernel):
    """A compressed kernel that unpacks itself in the guest."""
    name = "bzImage"

    def __init__(self, file: ImageFile):
        """Checks the setup header. Raises GuestImageError."""
        self.file = file
        file.read(0, E820_TABLE)                                 # from here on a field cannot lie outside the file
        self.version = self._field("H", VERSION)
        if self.version < OLDEST_VERSION:
            raise file.error(f"boot protocol {self.version >> 8}.{self.version & 0xFF:02} is too old",
                             "protocol 2.02 (Linux 2.4.0) and later can be booted")
        if not self._field("B", LOADFLAGS) & LOADED_HIGH:
            raise file.error("it is a zImage, to be loaded below 640 KiB", "build the kernel as a bzImage")
        self.offset = ((self._field("B", SETUP_HEADER) or 4) + 1) * SECTOR
        self.size = self._protected_size()
        self.entry64 = bool(self._field("H", XLOADFLAGS, since=0x020C) & XLF_KERNEL_64)
        self.relocatable = bool(self._field("B", RELOCATABLE_KERNEL, since=0x0205))
        self.alignment = self._field("I", KERNEL_ALIGNMENT, since=0x0205)
        self.init_size = self._field("I", INIT_SIZE, since=0x020A)
        self.payload_offset = self.offset + self._field("I", PAYLOAD_OFFSET, since=0x0208)
        self.payload_size = self._field("I", PAYLOAD_LENGTH, since=0x0208)       # 0: it does not tell
        self.cmdline_limit = self._field("I", CMDLINE_SIZE, since=0x0206) or DEFAULT_CMDLINE_LIMIT
        self.initrd_limit = self._field("I", INITRD_ADDR_MAX, since=0x0203, default=DEFAULT_INITRD_LIMIT - 1) + 1

    def load(self, memory, placement: Placement) -> None:
        """Reads the protected-mode kernel to where it will run, or to 1 MiB when it insists on moving itself."""
        preferred = self._field("Q", PREF_ADDRESS, since=0x020A) or BOOT_KERNEL
        room = max(self.init_size or self.size * UNPACKING_FACTOR, self.size)
        self.address = preferred if self.relocatable else BOOT_KERNEL
        first = min(self.address, preferred)
        room = max(self.address + self.size, preferred + room) - first
        if problem := placement.conflict(first, room):
            raise self.file.error(f"it unpacks itself at {first:#x}-{first + room:#x}, which {problem}",
                                  f"give the guest at least {first + room + MIB - 1 >> 20} MiB of memory, and more for its work")
        placement.claim(first, room, "the kernel")
        self.file.read_into(memory, self.address, self.offset, self.size)

    def enter(self, memory, handover: Handover) -> EntryState:
        """Writes the zero page and names the entry point."""
        page = self.zero_page(memory, handover)
        struct.pack_into("<I", page, CODE32_START, self.address)
        memory.write(BOOT_ZERO_PAGE, page)
        if self.entry64:
            return long_mode(memory, self.address + ENTRY64_OFFSET, rsi=BOOT_ZERO_PAGE)
        return protected_mode(memory, self.address, rsi=BOOT_ZERO_PAGE)

    def zero_page(self, memory, handover: Handover) -> bytearray:
        """With the kernel's own header in it."""
        header_end = min(MAGIC + self._field("B", JUMP_LENGTH), HEADER_END)
        page = zero_page(self.file.head[SETUP_HEADER:header_end], handover)
        if self.version >= 0x0209:
            write_seed(memory, page)
        return page

    def _protected_size(self) -> int:
        """Bytes of the protected-mode kernel. The header counts in paragraphs of 16, so the file may be up to 15 shorter."""
        told = self._field("I" if self.version >= 0x0204 else "H", SYSSIZE) * 16
        there = self.file.size - self.offset
        if told > there + 15 or there <= ENTRY64_OFFSET:
            raise self.file.truncated(self.offset + max(told, ENTRY64_OFFSET + 1))
        return min(told, there) if self.version >= 0x0204 else there

    def _field(self, kind: str, offset: int, *, since: int = 0, default: int = 0) -> int:
        """A header field, or `default` where the kernel's boot protocol is older than the field."""
        if since and self.version < since:
            return default
        return struct.unpack_from("<" + kind, self.file.head, offset)[0]


class Vmlinux(Kernel):
    """An uncompressed ELF kernel, entered as its own decompressor would: in 64-bit mode with the zero page, or in 32-bit."""
    name = "vmlinux"
    cmdline_limit = VMLINUX_CMDLINE_LIMIT

    def __init__(self, elf: ElfFile):
        self.elf = elf

    def load(self, memory, placement: Placement) -> None:
        self.elf.load(memory, placement)

    def enter(self, memory, handover: Handover) -> EntryState:
        """Writes a zero page with the header that a bzImage would have brought along, and names the entry point."""
        header = bytearray(HEADER_END - SETUP_HEADER)
        struct.pack_into("<H4s", header, BOOT_FLAG - SETUP_HEADER, BOOT_FLAG_VALUE, b"")
        struct.pack_into("<4sH", header, MAGIC - SETUP_HEADER, HEADER_MAGIC, 0x020C)
        struct.pack_into("<I", header, KERNEL_ALIGNMENT - SETUP_HEADER, 16 * MIB)
        page = zero_page(header, handover)
        write_seed(memory, page)
        memory.write(BOOT_ZERO_PAGE, page)
        enter = long_mode if self.elf.is_64bit else protected_mode
        return enter(memory, self.elf.entry(), rsi=BOOT_ZERO_PAGE)


def zero_page(header: bytes | bytearray, handover: Handover) -> bytearray:
    """struct boot_params around a setup header: loader, command line, initrd, memory map, RSDP; the screen stays absent."""
    page = bytearray(ZERO_PAGE_SIZE)
    page[SETUP_HEADER:SETUP_HEADER + len(header)] = header
    page[TYPE_OF_LOADER] = LOADER_UNDEFINED
    page[LOADFLAGS] = LOADED_HIGH
    struct.pack_into("<H", page, VID_MODE, VIDEO_MODE_NORMAL)
    struct.pack_into("<Q", page, SETUP_DATA, 0)
    struct.pack_into("<I", page, CMD_LINE_PTR, handover.cmdline)
    struct.pack_into("<II", page, RAMDISK_IMAGE, handover.initrd, handover.initrd_size)
    struct.pack_into("<Q", page, ACPI_RSDP_ADDR, handover.rsdp)
    page[E820_ENTRIES] = len(handover.memory_map)
    table = e820.pack(handover.memory_map, "<QQI")
    page[E820_TABLE:E820_TABLE + len(table)] = table
    return page


def write_seed(memory, page: bytearray) -> None:
    """Random bytes for the kernel's generator, by setup_data: it has them before any device of ours could give it some."""
    memory.write(BOOT_SETUP_DATA, struct.pack("<QII", 0, SETUP_RNG_SEED, SEED_SIZE) + os.urandom(SEED_SIZE))
    struct.pack_into("<Q", page, SETUP_DATA, BOOT_SETUP_DATA)
