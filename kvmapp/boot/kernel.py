"""What a kernel file is, told by its content alone, and the way to boot it that asks the fewest steps of the guest.

Leaves out: unpacking of compressed ELF kernels; the error names the tool that does it.
"""
from kvmapp.boot import pvh
from kvmapp.boot.elf import MAGIC as ELF_MAGIC
from kvmapp.boot.elf import ElfFile
from kvmapp.boot.handover import Kernel
from kvmapp.boot.image import ImageFile
from kvmapp.boot.linux import BzImage, Vmlinux, is_bzimage
from kvmapp.boot.multiboot import MultibootKernel, find_header

UNPACK = "unpack it first ({}) and give the unpacked file"
ATTACH = "attach it as a disk ([disk vda] source = ...); [boot] kernel takes a bzImage or vmlinux"

# What people hand in by mistake: (offset, signature, what it is, hint). The first match is told.
FOREIGN = (
    (0x38, b"ARM\x64", "an arm64 kernel Image", "give a kernel built for x86_64"),
    (0x38, b"RSC\x05", "a RISC-V kernel Image", "give a kernel built for x86_64"),
    (0, b"\x1f\x8b", "compressed with gzip", UNPACK.format("gunzip")),
    (0, b"\xfd7zXZ\0", "compressed with xz", UNPACK.format("unxz")),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", UNPACK.format("unzstd")),
    (0, b"\x02\x21\x4c\x18", "compressed with lz4", UNPACK.format("unlz4")),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4", UNPACK.format("unlz4")),
    (0, b"BZh", "compressed with bzip2", UNPACK.format("bunzip2")),
    (0, b"\x5d\0\0", "compressed with lzma", UNPACK.format("unlzma")),
    (0, b"\x89LZO\0", "compressed with lzop", UNPACK.format("lzop -d")),
    (0, b"070701", "a cpio archive (an initrd?)", "give it as initrd, and a bzImage or vmlinux as kernel"),
    (0, b"070702", "a cpio archive (an initrd?)", "give it as initrd, and a bzImage or vmlinux as kernel"),
    (0, b"#!", "a script", "give a bzImage or vmlinux"),
    (0, b"QFI\xfb", "a qcow2 disk image", ATTACH),
    (0, b"KDMV", "a VMDK disk image", ATTACH),
    (0, b"conectix", "a VHD disk image", ATTACH),
    (0, b"vhdxfile", "a VHDX disk image", ATTACH),
    (0x40, b"\x7f\x10\xda\xbe", "a VirtualBox disk image", ATTACH),
    (0x8001, b"CD001", "an ISO image", "take the kernel and initrd out of it, or attach it as a CD-ROM and boot from firmware"),
    (0, b"!<arch>\ndebian-binary", "a Debian package", "unpack it (dpkg -x) and give the vmlinuz in its boot folder"),
    (0, b"\xed\xab\xee\xdb", "an RPM package", "unpack it (rpm2cpio) and give the vmlinuz in it"),
    (0x101, b"ustar", "a tar archive", "unpack it and give the kernel in it"),
    (0, b"PK\x03\x04", "a zip archive", "unpack it and give the kernel in it"),
    (0, b"hsqs", "a squashfs file system", ATTACH),
    (0x438, b"\x53\xef", "an ext2/3/4 file system", ATTACH),
    (0, b"XFSB", "an XFS file system", ATTACH),
    (0x200, b"EFI PART", "a disk image with a GPT", ATTACH),
    (0, b"MZ", "an EFI or DOS program without a Linux setup header", "give a bzImage or vmlinux"),
    (0x1FE, b"\x55\xaa", "a boot sector or disk image", ATTACH),
)


def recognise(file: ImageFile) -> Kernel:
    """The kernel in `file`. Raises GuestImageError that says what the file is instead.

    An ELF Linux goes by Linux's own protocol, which enters the kernel proper at once; its PVH entry would first build the same
    zero page in the guest.
    """
    if is_bzimage(file.head):
        return BzImage(file)
    header = find_header(file)
    if not file.head.startswith(ELF_MAGIC):
        if header is None:
            raise _foreign(file)
        return MultibootKernel(file, header)
    elf = ElfFile(file)
    if any(owner == b"Linux" for owner, _, _ in elf.notes()):
        return Vmlinux(elf)
    address = pvh.entry_note(elf)
    if address is not None:
        return pvh.PvhKernel(elf, address)
    return MultibootKernel(file, header) if header else Vmlinux(elf)


def _foreign(file: ImageFile):
    for offset, signature, what, hint in FOREIGN:
        if file.head[offset:offset + len(signature)] == signature:
            return file.error(f"it is {what}", hint)
    return file.error("it is neither a bzImage, an ELF kernel nor a multiboot kernel", "give a bzImage or vmlinux")
