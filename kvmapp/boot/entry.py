"""How the first vCPU enters the guest: the registers, and the descriptor and page tables that they rest on.

Follows the entry states of Linux (Documentation/arch/x86/boot.rst, 32-bit and 64-bit boot protocol), PVH (xen/docs/misc/pvh) and
multiboot 1 (section 3.2), which agree: flat segments, interrupts off, no paging in 32 bits and an identity map in 64.
Leaves out: the other vCPUs (they wait for INIT and SIPI), and turning this state into KVM's registers (vcpu.pyx, Vcpu.set_entry).
"""
import struct

from kvmapp.layout import BOOT_GDT, BOOT_PAGE_TABLES, BOOT_STACK_TOP

# Segment descriptors (Intel SDM 3A, 3.4.5): base 0, limit 4 GiB, accessed.
CODE64 = 0x00AF_9B00_0000_FFFF
CODE32 = 0x00CF_9B00_0000_FFFF
DATA = 0x00CF_9300_0000_FFFF
GDT_SIZE = 32

# Page-table entries (Intel SDM 3A, 4.5).
PRESENT_WRITABLE = 0x3
LARGE_PAGE = 0x80
LARGE_PAGE_SIZE = 2 << 20
PAGE_SIZE = 4096
DIRECTORIES = 4                                                  # page directories, 1 GiB each


class EntryState:
    """The first vCPU's registers. `mode` is 'long', 'protected' or 'real'; what is not named here is zero.

    In 'long' and 'protected' mode CS is 0x10, the data segments are 0x18, and the GDT lies at `gdt_base`; 'long' has paging on at
    `cr3`. In 'real' mode the vCPU stands at its reset vector and only `rip` counts.
    """
    __slots__ = ("cr3", "gdt_base", "gdt_limit", "mode", "rax", "rbx", "rcx", "rdi", "rdx", "rip", "rsi", "rsp")

    def __init__(self, mode: str, rip: int, *, rax: int = 0, rbx: int = 0, rsi: int = 0):
        self.mode = mode
        self.rip = rip
        self.rax, self.rbx, self.rsi = rax, rbx, rsi
        self.rcx = self.rdx = self.rdi = 0
        self.rsp = 0 if mode == "real" else BOOT_STACK_TOP
        self.cr3 = BOOT_PAGE_TABLES if mode == "long" else 0
        self.gdt_base, self.gdt_limit = (0, 0xFFFF) if mode == "real" else (BOOT_GDT, GDT_SIZE - 1)

    def __repr__(self) -> str:
        registers = " ".join(f"{name}={getattr(self, name):#x}" for name in ("rip", "rsp", "rax", "rbx", "rsi", "cr3"))
        return f"<EntryState {self.mode} {registers}>"


def long_mode(memory, rip: int, *, rsi: int = 0) -> EntryState:
    """Enters 64-bit code at `rip` on an identity map of the first 4 GiB."""
    _write_gdt(memory, CODE64)
    _write_page_tables(memory)
    return EntryState("long", rip, rsi=rsi)


def protected_mode(memory, rip: int, *, rax: int = 0, rbx: int = 0, rsi: int = 0) -> EntryState:
    """Enters 32-bit code at `rip` with flat segments and paging off."""
    _write_gdt(memory, CODE32)
    return EntryState("protected", rip, rax=rax, rbx=rbx, rsi=rsi)


def _write_gdt(memory, code: int) -> None:
    """Null, unused, code, data."""
    memory.write(BOOT_GDT, struct.pack("<4Q", 0, 0, code, DATA))


def _write_page_tables(memory) -> None:
    """PML4, PDPT and four page directories of 2 MiB pages, in a row from BOOT_PAGE_TABLES."""
    pdpt = BOOT_PAGE_TABLES + PAGE_SIZE
    directory = pdpt + PAGE_SIZE
    memory.write(BOOT_PAGE_TABLES, struct.pack("<Q", pdpt | PRESENT_WRITABLE))
    memory.write(pdpt, struct.pack("<4Q", *(directory + i * PAGE_SIZE | PRESENT_WRITABLE for i in range(DIRECTORIES))))
    pages = range(PRESENT_WRITABLE | LARGE_PAGE, DIRECTORIES << 30, LARGE_PAGE_SIZE)
    memory.write(directory, struct.pack(f"<{len(pages)}Q", *pages))
