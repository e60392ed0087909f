"""Kernels with a PVH entry note: Linux, FreeBSD, Xen and unikernels, entered in 32-bit mode with no firmware at all.

Follows xen/docs/misc/pvh.pandoc and hvm_start_info version 1 (xen/include/public/arch-x86/hvm/start_info.h). Leaves out: Xen's
hypercall page and every other Xen note; the guest finds KVM, not Xen.
"""
import struct

from kvmapp.boot import e820
from kvmapp.boot.elf import ElfFile
from kvmapp.boot.entry import EntryState, protected_mode
from kvmapp.boot.handover import Handover, Kernel
from kvmapp.boot.placement import Placement
from kvmapp.layout import BOOT_INFO

XEN_ELFNOTE_PHYS32_ENTRY = 18
START_MAGIC, START_VERSION = 0x336E_C578, 1
START_INFO = struct.Struct("<4I4Q2I")                            # magic, version, flags, modules; 4 addresses; entries, reserved
MODULE = struct.Struct("<4Q")                                    # address, size, command line, reserved


def entry_note(elf: ElfFile) -> int | None:
    """The physical address in the PVH note, or None when there is no such note."""
    for owner, kind, text in elf.notes():
        if owner == b"Xen" and kind == XEN_ELFNOTE_PHYS32_ENTRY and len(text) in (4, 8):
            return int.from_bytes(text, "little")
    return None


class PvhKernel(Kernel):
    """An ELF kernel that names its 32-bit PVH entry point."""
    name = "PVH kernel"

    def __init__(self, elf: ElfFile, address: int):
        self.elf = elf
        self.address = elf.check_entry(address)

    def load(self, memory, placement: Placement) -> None:
        self.elf.load(memory, placement)

    def enter(self, memory, handover: Handover) -> EntryState:
        """Writes the start info, behind it the module list and the memory map."""
        modules = MODULE.pack(handover.initrd, handover.initrd_size, 0, 0) if handover.initrd_size else b""
        module_list = BOOT_INFO + START_INFO.size
        memory_map = module_list + len(modules)
        info = START_INFO.pack(START_MAGIC, START_VERSION, 0, len(modules) // MODULE.size,
                               module_list if modules else 0, handover.cmdline, handover.rsdp, memory_map,
                               len(handover.memory_map), 0)
        memory.write(BOOT_INFO, info + modules + e820.pack(handover.memory_map, "<QQI4x"))
        return protected_mode(memory, self.address, rbx=BOOT_INFO)
