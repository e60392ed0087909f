"""Files that are no kernel: what they are is said, with a hint; and files that cannot be read at all."""
import os

import pytest

from kvmapp.boot.direct import DirectBoot
from kvmapp.errors import GuestImageError
from tests.unit.boot_images import bzimage


def at(offset: int, signature: bytes) -> bytes:
    return (bytes(offset) + signature).ljust(40960, b"\0")


@pytest.mark.parametrize(("content", "message", "hint"), [
    (at(0, b"\x1f\x8b\x08"), "it is compressed with gzip", "gunzip"),
    (at(0, b"\xfd7zXZ\0"), "it is compressed with xz", "unxz"),
    (at(0, b"\x28\xb5\x2f\xfd"), "it is compressed with zstd", "unzstd"),
    (at(0, b"\x02\x21\x4c\x18"), "it is compressed with lz4", "unlz4"),
    (at(0x38, b"ARM\x64"), "it is an arm64 kernel Image", "x86_64"),
    (at(0, b"MZ" + bytes(54) + b"ARM\x64"), "it is an arm64 kernel Image", "x86_64"),
    (at(0, b"MZ"), "it is an EFI or DOS program", "bzImage"),
    (at(0, b"QFI\xfb"), "it is a qcow2 disk image", "attach it as a disk"),
    (at(0x1FE, b"\x55\xaa"), "it is a boot sector or disk image", "attach it as a disk"),
    (at(0x200, b"EFI PART"), "it is a disk image with a GPT", "attach it as a disk"),
    (at(0x8001, b"CD001"), "it is an ISO image", "CD-ROM"),
    (at(0x438, b"\x53\xef"), "it is an ext2/3/4 file system", "attach"),
    (at(0, b"070701"), "it is a cpio archive", "initrd"),
    (b"#!/bin/sh\nexec true\n", "it is a script", "bzImage"),
    (b"!<arch>\ndebian-binary   ", "it is a Debian package", "dpkg -x"),
    (b"x", "it is neither a bzImage", "bzImage or vmlinux"),
    (b"", "file is empty", "again"),
])
def test_foreign_files_are_named(tmp_path, content, message, hint):
    path = tmp_path / "vmlinuz"
    path.write_bytes(content)
    with pytest.raises(GuestImageError) as refusal:
        DirectBoot(str(path))
    assert refusal.value.message.startswith(f"Cannot boot kernel '{path}': {message}")
    assert hint in refusal.value.hint


def test_missing_kernel(tmp_path):
    with pytest.raises(GuestImageError, match=r"Cannot open kernel '.*/none': No such file or directory") as refusal:
        DirectBoot(str(tmp_path / "none"))
    assert "[boot]" in refusal.value.hint


def test_folder_is_named(tmp_path):
    with pytest.raises(GuestImageError, match="is a folder"):
        DirectBoot(str(tmp_path))


def test_fifo_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(GuestImageError, match="is not a regular file"):
        DirectBoot(str(tmp_path / "fifo"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_kernel(tmp_path):
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    (tmp_path / "vmlinuz").chmod(0)
    with pytest.raises(GuestImageError, match="Permission denied"):
        DirectBoot(str(tmp_path / "vmlinuz"))


def test_bad_initrd_leaves_no_file_open(tmp_path):
    (tmp_path / "vmlinuz").write_bytes(bzimage())
    before = os.listdir("/proc/self/fd")
    for initrd in ("none", ""):
        with pytest.raises(GuestImageError, match="initrd"):
            DirectBoot(str(tmp_path / "vmlinuz"), str(tmp_path / initrd))
    assert os.listdir("/proc/self/fd") == before
