"""A disk that becomes larger, or smaller, while it is in use."""
import os
import resource
import shutil
import subprocess

import pytest

from kvmapp.block.session import DiskSession
from kvmapp.errors import GuestImageError, HostError
from tests.device.disks import open_raw, skip_what_the_host_lacks

MIB = 1 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"d" * MIB)
    return path


@pytest.fixture(params=["threads-writeback", "threads-none", "io_uring-writeback", "io_uring-none"])
def disk(request, image):
    io, cache = request.param.split("-")
    skip_what_the_host_lacks(image, io=io, cache=cache)
    with open_raw(image, io=io, cache=cache) as disk:
        yield disk


def test_a_larger_disk_keeps_what_it_had_and_ends_with_zeroes(disk, image):
    with DiskSession(disk) as session:
        with pytest.raises(OSError, match="result"):
            session.read(MIB, 512)
        disk.resize(3 * MIB)
        assert disk.size == image.stat().st_size == 3 * MIB
        assert session.read(0, 3 * MIB) == b"d" * MIB + bytes(2 * MIB)
        session.write(3 * MIB - 4096, b"w" * 4096)
        assert session.read(3 * MIB - 4096, 4096) == b"w" * 4096
        disk.resize(3 * MIB)
        assert session.read(3 * MIB - 4096, 4096) == b"w" * 4096


def test_a_smaller_one_has_to_be_asked_for_twice(disk, image):
    with DiskSession(disk) as session:
        with pytest.raises(GuestImageError, match=f"to 524288 bytes: it has {MIB}, and what is at its end would be lost") as refusal:
            disk.resize(MIB // 2)
        assert "--shrink" in (refusal.value.hint or "") and disk.size == image.stat().st_size == MIB
        disk.resize(MIB // 2, shrink=True)
        assert disk.size == image.stat().st_size == MIB // 2
        assert session.read(0, MIB // 2) == b"d" * (MIB // 2)
        with pytest.raises(OSError, match="result"):
            session.write(MIB // 2, b"w" * 512)
        assert image.stat().st_size == MIB // 2


def test_what_somebody_else_has_made_longer_is_not_cut_either(image):
    with open_raw(image) as disk:
        os.truncate(image, 3 * MIB)
        for size in MIB, 2 * MIB:
            with pytest.raises(GuestImageError, match=f"it has {3 * MIB}, and what is at its end would be lost"):
                disk.resize(size)
        assert image.stat().st_size == 3 * MIB and disk.size == MIB


@pytest.mark.parametrize(("size", "words"), [
    (MIB + 1, "1048577 bytes are no multiple of 512"), (0, "to 0 bytes"), (-512, "to -512 bytes"),
    (1 << 63, "to 9223372036854775808 bytes"), (1 << 70, "to 1180591620717411303424 bytes")])
def test_a_size_that_no_disk_has(image, size, words):
    with open_raw(image) as disk:
        with pytest.raises(GuestImageError, match=f"Cannot resize disk 'vda' .*{words}"):
            disk.resize(size, shrink=True)
        assert disk.size == image.stat().st_size == MIB


def test_a_size_that_the_host_has_not(image):
    with open_raw(image) as disk:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limits[1]))
        try:
            with pytest.raises(HostError, match=f"Cannot resize disk 'vda' .* to {2 * MIB} bytes: File too large"):
                disk.resize(2 * MIB)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert disk.size == image.stat().st_size == MIB


def test_past_the_page_cache_it_ends_with_a_whole_block(image):
    skip_what_the_host_lacks(image, cache="none", alignment=4096)
    with open_raw(image, cache="none", alignment=4096) as disk:
        if disk.alignment != 4096:
            pytest.fail(f"the alignment is {disk.alignment}")
        with pytest.raises(GuestImageError, match="are no multiple of 4096"):
            disk.resize(MIB + 512)
        os.truncate(image, MIB + 512)
        with pytest.raises(GuestImageError, match=f"its {MIB + 512} bytes are no multiple of 4096"):
            disk.resize()
        assert disk.size == MIB
        disk.resize(MIB + 8192)
        assert disk.size == image.stat().st_size == MIB + 8192


def test_what_the_file_was_made_behind_our_back_is_taken_over(disk, image):
    with DiskSession(disk) as session:
        for size in (2 * MIB, MIB // 2, MIB):
            os.truncate(image, size)
            disk.resize()
            assert disk.size == size and len(session.read(0, size)) == size
        os.truncate(image, 0)
        with pytest.raises(GuestImageError, match="it is empty"):
            disk.resize()
        assert disk.size == MIB


def test_a_disk_that_may_not_be_written_keeps_its_file(image):
    with open_raw(image, read_only=True) as disk:
        with pytest.raises(GuestImageError, match="it is read-only"):
            disk.resize(2 * MIB)
        assert image.stat().st_size == MIB
        os.truncate(image, 2 * MIB)
        disk.resize()
        assert disk.size == 2 * MIB
    with pytest.raises(GuestImageError, match="it is closed"):
        disk.resize(4 * MIB)
    assert image.stat().st_size == 2 * MIB


@pytest.mark.skipif(not shutil.which("losetup") or os.geteuid() != 0, reason="needs loop devices and root")
def test_a_block_device_has_the_size_that_the_host_gave_it(image):
    device = subprocess.run(["losetup", "--show", "-f", image], capture_output=True, text=True).stdout.strip()
    if not device:
        pytest.skip("no loop device to be had here")
    try:
        with open_raw(device) as disk, DiskSession(disk) as session:
            os.truncate(image, 2 * MIB)
            subprocess.run(["losetup", "-c", device], check=True)
            with pytest.raises(GuestImageError, match=f"to {4 * MIB} bytes: the device has {2 * MIB}") as refusal:
                disk.resize(4 * MIB)
            assert "lvextend" in (refusal.value.hint or "") and disk.size == MIB
            disk.resize()
            assert disk.size == 2 * MIB and session.read(MIB, MIB) == bytes(MIB)
            disk.resize(2 * MIB)
            assert disk.size == 2 * MIB
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
