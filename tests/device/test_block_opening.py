"""Opening a disk: every refusal names the disk, the file, the reason and the next step; and no two guests write to one."""
import gc
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from kvmapp import imagefile
from kvmapp.block.session import DiskSession
from kvmapp.diskcards import open_disk
from kvmapp.errors import GuestImageError
from kvmapp.imagefile import open_image


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return path


def section(path, **changes):
    """A [disk vda] as the domain file gives it."""
    return SimpleNamespace(**{"name": "vda", "source": str(path), "format": "raw", "readonly": False, "cache": "writeback",
                              "io": "auto", "discard": "unmap", **changes})


def refused(path, **changes):
    with pytest.raises(GuestImageError) as refusal:
        open_disk(section(path, **changes)).close()
    assert "'vda'" in refusal.value.message
    assert str(path) in refusal.value.message
    return f"{refusal.value.message} | {refusal.value.hint}"


def test_a_good_file_opens_and_works(image):
    with open_disk(section(image)) as disk, DiskSession(disk) as session:
        session.write(512, b"x" * 512)
        assert session.read(512, 512) == b"x" * 512
        assert (disk.name, disk.size, disk.read_only, disk.write_cache) == ("vda", 4096, False, True)


def test_what_cannot_be_a_disk_is_named(tmp_path):
    assert "No such file or directory | make it first" in refused(tmp_path / "missing.img")
    assert f"there is no folder {tmp_path / 'no'}" in refused(tmp_path / "no" / "such" / "disk.img")
    assert "it is a directory" in refused(tmp_path)
    assert "a character device" in refused("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    assert "a named pipe" in refused(tmp_path / "pipe")
    (tmp_path / "empty.img").touch()
    assert "it is empty | give it a size" in refused(tmp_path / "empty.img")
    (tmp_path / "loop").symlink_to("loop")
    assert "symbolic links" in refused(tmp_path / "loop")


def run_as_nobody(code, *arguments):
    """Python code in a process without privileges; (exit status, output). The package is imported before they go."""
    drop = """
        import os, sys
        from kvmapp.imagefile import open_image
        if os.geteuid() == 0:
            os.setgroups([]); os.setgid(65534); os.setuid(65534)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(drop) + textwrap.dedent(code), *map(str, arguments)],
                            capture_output=True, text=True)
    return result.stdout + result.stderr


OPEN = """
    try:
        open_image("vda", sys.argv[1], read_only=len(sys.argv) > 2)
        print("opened")
    except Exception as error:
        print(error.message, "|", error.hint)
"""


def test_the_missing_permission_is_named_with_its_folder_and_user(tmp_path):
    base = tmp_path / "closed"
    (base / "inner").mkdir(parents=True)
    path = base / "inner" / "disk.img"
    path.write_bytes(bytes(512))
    for folder in (*[parent for parent in tmp_path.parents if parent.stat().st_uid == os.geteuid()], tmp_path):
        if len(folder.parts) > 2:
            folder.chmod(0o755)
    base.chmod(0o600)
    try:
        user = "nobody" if os.geteuid() == 0 else "user "
        output = run_as_nobody(OPEN, path)
        assert f"Cannot open disk 'vda' ({path}): Permission denied" in output
        assert user in output
        assert f"lacks search permission on {base}\n" in output
    finally:
        base.chmod(0o755)
    path.chmod(0o444)
    if os.geteuid() == 0:
        assert f"user nobody lacks write permission on {path}" in run_as_nobody(OPEN, path)
    assert run_as_nobody(OPEN, path, "read-only") == "opened\n"


def test_two_writers_are_kept_apart_and_the_holder_is_named(image):
    holder = subprocess.Popen([sys.executable, "-c", textwrap.dedent("""
        import sys
        from kvmapp.imagefile import open_image
        fd = open_image("vdb", sys.argv[1])
        print("locked", flush=True)
        sys.stdin.read()
    """), image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        message = refused(image)
        assert f"it is being used by process {holder.pid} (python" in message
        assert "it is being written to by process" in refused(image, readonly=True)
    finally:
        holder.communicate("")
    open_disk(section(image)).close()


@pytest.fixture
def ownerless_lock(image):
    """The image is locked by a descriptor that no process has any more: it is on its way. A call lets it go."""
    mine, other = socket.socketpair()
    fd = open_image("vdb", str(image))
    socket.send_fds(mine, [b"x"], [fd])
    os.close(fd)

    def let_go():
        _, fds, _, _ = socket.recv_fds(other, 1, 1)
        for received in fds:
            os.close(received)

    with mine, other:
        yield let_go


def test_a_lock_that_a_killed_process_leaves_for_a_moment_is_waited_for(image, ownerless_lock, monkeypatch):
    """The kernel ends its I/O after it."""
    waits = []

    def wait(seconds):
        waits.append(seconds)
        ownerless_lock()

    monkeypatch.setattr(imagefile.time, "sleep", wait)
    open_disk(section(image)).close()
    assert len(waits) == 1


def test_a_lock_of_nobody_that_stays_is_told(image, ownerless_lock, monkeypatch):
    monkeypatch.setattr(imagefile, "DYING_SECONDS", 0.05)
    assert "it is being used by another process" in refused(image)


def test_one_process_does_not_open_a_disk_twice_either(image, monkeypatch):
    monkeypatch.setattr(imagefile.time, "sleep", lambda seconds: pytest.fail("it waits for itself"))
    with open_disk(section(image)):
        assert "it is being used by another process" in refused(image)
    with open_disk(section(image, readonly=True)), open_disk(section(image, readonly=True)):
        assert "it is being used" in refused(image)
    first = open_image("vda", str(image), shared=True)
    second = open_image("vda", str(image), shared=True)
    os.close(first)
    os.close(second)
    open_disk(section(image)).close()


def test_a_descriptor_that_goes_while_its_process_is_looked_at_hides_no_other(image, monkeypatch):
    """The one by which we list our own has a number below the disk's here, and is gone when its turn comes."""
    monkeypatch.setattr(imagefile.time, "sleep", lambda seconds: pytest.fail("it waits for itself"))
    gaps = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]
    with open_disk(section(image)):
        for gap in gaps:
            os.close(gap)
        assert "it is being used by another process" in refused(image)


def test_the_locks_are_those_that_qemu_looks_at(image):
    """Bytes 100 and up: what we do; 200 and up: what we forbid others."""
    with open_disk(section(image)):
        inode = f":{image.stat().st_ino} "
        with open("/proc/locks") as locks:
            ranges = [line.split()[-2:] for line in locks if inode in line and "OFDLCK" in line]
        held = {byte for first, last in ranges for byte in range(int(first), int(last) + 1)}
    if not held:
        pytest.skip("no open-file-description locks here")
    assert held == {100, 101, 103, 201, 203}


@pytest.fixture
def loop(image, request):
    """A loop device on the image; parametrized with losetup's options."""
    if os.geteuid() != 0 or not shutil.which("losetup"):
        pytest.skip("needs loop devices and root")
    image.write_bytes(bytes(1 << 20))
    result = subprocess.run(["losetup", "--show", "-f", *request.param, image], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"no loop device to be had here: {result.stderr}")
    yield result.stdout.strip()
    subprocess.run(["losetup", "-d", result.stdout.strip()], check=True)


@pytest.mark.parametrize("loop", [["-r"]], indirect=True)
def test_a_read_only_device_opens_read_only(loop):
    assert "set readonly = yes" in refused(loop)
    with open_disk(section(loop, readonly=True)) as disk, DiskSession(disk) as session:
        assert session.read(0, 512) == bytes(512)


@pytest.mark.parametrize("loop", [[]], indirect=True)
def test_a_device_that_somebody_else_claims_is_left_alone(loop, monkeypatch):
    monkeypatch.setattr(imagefile, "DYING_SECONDS", 0.05)
    claim = os.open(loop, os.O_RDWR | os.O_EXCL)             # as a mount does
    assert "busy | the host itself uses the device" in refused(loop)
    os.close(claim)
    with open_disk(section(loop)), pytest.raises(OSError, match="busy"):
        os.close(os.open(loop, os.O_RDWR | os.O_EXCL))


@pytest.mark.parametrize("loop", [[]], indirect=True)
def test_a_device_that_a_killed_process_leaves_in_a_moment_is_waited_for(loop, monkeypatch):
    claim = os.open(loop, os.O_RDWR | os.O_EXCL)
    monkeypatch.setattr(imagefile.time, "sleep", lambda seconds: os.close(claim))
    open_disk(section(loop)).close()


@pytest.mark.parametrize("loop", [[]], indirect=True)
def test_a_device_of_another_guest_is_said_to_be_that(loop, monkeypatch):
    """At once, and not that the host had it mounted."""
    monkeypatch.setattr(imagefile.time, "sleep", lambda seconds: pytest.fail("it waits for a guest that runs"))
    with open_disk(section(loop)):
        assert "it is being used by another process" in refused(loop)


@pytest.mark.parametrize("loop", [["-b", "4096"]], indirect=True)
def test_a_device_with_large_blocks_takes_small_writes(loop):
    with open_disk(section(loop, cache="none")) as disk, DiskSession(disk) as session:
        assert disk.alignment == disk.physical_block == 4096
        session.write(512, b"s" * 512)
        session.write(4096, b"b" * 4096)
        assert session.read(0, 8192) == bytes(512) + b"s" * 512 + bytes(3072) + b"b" * 4096


def test_a_descriptor_opened_before_is_taken_over(image):
    fd = open_image("vda", str(image))
    with open_disk(section(image), fd=fd) as disk:
        assert disk.size == 4096
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    fd = open_image("vda", str(image), read_only=True)
    with pytest.raises(GuestImageError, match="opened read-only"):
        open_disk(section(image), fd=fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_failed_open_leaves_no_descriptor_and_no_lock(tmp_path):
    path = tmp_path / "empty.img"
    path.touch()
    gc.collect()                                             # so that nothing of other tests' is closed meanwhile
    before = len(os.listdir("/proc/self/fd"))
    refused(path)
    assert len(os.listdir("/proc/self/fd")) == before
    path.write_bytes(bytes(512))
    open_disk(section(path)).close()
