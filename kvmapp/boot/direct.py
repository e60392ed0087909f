"""Direct boot: a kernel, an initrd and a command line go straight into guest memory, and the first vCPU straight into the kernel.

No firmware runs; what it would have left behind (memory map, ACPI, MP table, SMBIOS, interrupt vectors) is written here.
Leaves out: booting from a disk, which takes firmware.
"""
import sys

from kvmapp.boot import acpi, e820, mptable, real_mode, smbios
from kvmapp.boot.entry import EntryState
from kvmapp.boot.handover import Handover, Kernel
from kvmapp.boot.image import ImageFile
from kvmapp.boot.kernel import recognise
from kvmapp.boot.linux import BzImage
from kvmapp.boot.placement import Placement
from kvmapp.boot.platform import Platform
from kvmapp.errors import GuestImageError, KvmappError
from kvmapp.layout import BOOT_CMDLINE, BOOT_CMDLINE_SIZE, KIB, MIB

SMALLEST_MEMORY = 2 * MIB


class DirectBoot:
    """The files and the command line of one domain; the files stay open, so that every reset of the guest can read them again."""

    def __init__(self, kernel: str, initrd: str | None = None, cmdline: str = "", cache: str | None = None,
                 memory: int = sys.maxsize):
        """Opens the files; a bzImage that says to fit into `memory` bytes is unpacked, or found unpacked, in the folder `cache`. Raises
        GuestImageError."""
        self.cmdline = cmdline
        self.unpacked: ImageFile | None = None
        self.packed = ""                                         # which file that was unpacked from
        self.initrd: ImageFile | None = None
        self.kernel = ImageFile(kernel, "kernel")
        try:
            recognised = recognise(self.kernel)
            if cache and isinstance(recognised, BzImage):
                self._open_unpacked(recognised, cache, memory)
            self.initrd = ImageFile(initrd, "initrd") if initrd else None
        except BaseException:
            self.kernel.close()
            raise

    def setup(self, memory, platform: Platform) -> EntryState:
        """Prepares guest memory for a start or a reset, and tells how the first vCPU enters. Raises KvmappError."""
        if memory.ranges[0][1] < SMALLEST_MEMORY:
            raise KvmappError(f"Cannot boot a guest with {memory.size // KIB} KiB of memory", "give it at least 2 MiB")
        placement = Placement(memory.ranges)
        self.kernel.measure()
        kernel = self._recognise()
        kernel.load(memory, placement)
        handover = Handover()
        handover.initrd, handover.initrd_size = self._load_initrd(memory, placement, kernel)
        handover.cmdline = self._write_cmdline(memory, kernel, platform)
        handover.memory_map = e820.memory_map(memory.ranges)
        handover.rsdp = acpi.write(memory, platform) if platform.acpi else 0
        mptable.write(memory, platform)
        smbios.write(memory, platform)
        real_mode.write(memory, platform)
        return kernel.enter(memory, handover)

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        for file in (self.kernel, self.initrd, self.unpacked):
            if file:
                file.close()

    def _open_unpacked(self, kernel: BzImage, folder: str, memory: int) -> None:
        from kvmapp.boot.unpacked import KernelCache, identity
        self.packed = identity(self.kernel)
        self.unpacked = KernelCache(folder).open(kernel, memory)

    def _recognise(self) -> Kernel:
        """The kernel as it is now: the file may have changed since it was unpacked."""
        kernel = recognise(self.kernel)
        if self.unpacked:
            from kvmapp.boot.unpacked import UnpackedKernel, identity
            if identity(self.kernel) == self.packed:
                try:
                    return UnpackedKernel(self.kernel, self.unpacked, random="nokaslr" not in self.cmdline.split())
                except GuestImageError:
                    pass                                         # no kernel after all: it unpacks itself
        return kernel

    def _load_initrd(self, memory, placement: Placement, kernel: Kernel) -> tuple[int, int]:
        """(gpa, size); both 0 where there is none."""
        if not self.initrd:
            return 0, 0
        self.initrd.measure()
        size = self.initrd.size
        gpa = kernel.place_initrd(placement, size)
        if gpa is None:
            raise self.initrd.error(f"its {size} bytes find no room beside the kernel in {memory.size // MIB} MiB of memory",
                                    f"give the guest at least {memory.size + size + MIB - 1 >> 20} MiB of memory")
        placement.claim(gpa, size, "the initrd")
        self.initrd.read_into(memory, gpa, 0, size)
        return gpa, size

    def _write_cmdline(self, memory, kernel: Kernel, platform: Platform) -> int:
        text = " ".join([*_windows(platform), self.cmdline]).encode("utf-8", "surrogateescape")
        limit = min(kernel.cmdline_limit, BOOT_CMDLINE_SIZE - 1)
        if len(text) > limit:
            raise self.kernel.error(f"the command line has {len(text)} bytes, a {kernel.name} takes {limit}", "shorten cmdline")
        if b"\0" in text:
            raise self.kernel.error("the command line holds a NUL character")
        memory.write(BOOT_CMDLINE, text + b"\0")
        return BOOT_CMDLINE


def _windows(platform: Platform):
    """Words for a Linux that cannot be told of virtio-mmio by ACPI (kernel-parameters, virtio_mmio.device)."""
    for base, size, gsi in platform.virtio_mmio or () if not platform.acpi else ():
        yield f"virtio_mmio.device={size}@{base:#x}:{gsi}"
