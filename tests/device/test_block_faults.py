"""What the host refuses or loses reaches the guest as an error, and is never made up for with invented data."""
import gc
import os
import resource
import shutil
import subprocess
import sys
import textwrap

import pytest

from kvmapp.block.session import DiskSession
from kvmapp.errors import HostError
from tests.device.disks import open_raw, skip_what_the_host_lacks

MIB = 1 << 20


@pytest.fixture(params=["threads", "io_uring"])
def io(request, tmp_path):
    path = tmp_path / "probe"
    path.write_bytes(bytes(512))
    skip_what_the_host_lacks(path, io=request.param)
    return request.param


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"d" * MIB)
    return path


def test_a_file_cut_behind_our_back_gives_errors_not_zeroes(image, io):
    with open_raw(image, io=io) as disk, DiskSession(disk) as session:
        os.truncate(image, MIB // 2)
        assert session.read(0, MIB // 2) == b"d" * (MIB // 2)
        for offset, length in ((MIB // 2, 512), (MIB - 512, 512), (MIB // 2 - 512, 1024)):
            with pytest.raises(OSError, match="Input/output error"):
                session.read(offset, length)
        assert disk.counters()["read"]["errors"] == 3


def test_a_write_beyond_what_the_host_allows_fails_and_the_next_one_works(image, io):
    with open_raw(image, io=io) as disk, DiskSession(disk) as session:
        disk.resize(2 * MIB)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                session.write(MIB, b"w" * 4096)
            with pytest.raises(OSError, match="File too large"):
                session.write(MIB - 4096, b"w" * 8192)         # half of it would fit
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        session.write(MIB, b"v" * 4096)
        assert session.read(MIB, 4096) == b"v" * 4096
        assert disk.counters()["write"]["errors"] == 2


FULL_DISK = """
    import ctypes, os, sys
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x20000) or libc.mount(b"none", b"/", None, 0x44000, None):     # a mount namespace of our own, private
        sys.exit(77)
    if libc.mount(b"tmpfs", sys.argv[1].encode(), b"tmpfs", 0, b"size=256k"):
        sys.exit(77)
    from kvmapp.block.raw import RawDisk
    from kvmapp.block.session import DiskSession
    path = sys.argv[1] + "/disk.img"
    with open(path, "wb") as file:
        file.truncate(1 << 20)
    with RawDisk(os.open(path, os.O_RDWR), io=sys.argv[2]) as disk, DiskSession(disk) as session:
        tickets = {session.start(1, i * 65536, bytes([i + 1]) * 65536): i for i in range(16)}
        results = session.wait()
        kept = [tickets[t] for t, result in results.items() if result == 0]
        lost = [tickets[t] for t, result in results.items() if result != 0]
        assert kept and lost and {results[t] for t in results} == {0, -28}, results
        for i in kept:
            assert session.read(i * 65536, 65536) == bytes([i + 1]) * 65536, i
        session.discard(kept[0] * 65536, 65536)                 # room again: the guest's next try goes through
        session.write(lost[0] * 65536, b"w" * 65536)
        assert session.read(lost[0] * 65536, 65536) == b"w" * 65536
        assert disk.counters()["write"]["errors"] == len(lost)
"""


def test_no_space_left_fails_those_writes_that_did_not_fit(tmp_path, io):
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(FULL_DISK), tmp_path, io], capture_output=True, text=True)
    if result.returncode == 77:
        pytest.skip("no mount namespace to be had here")
    assert result.returncode == 0, result.stderr


def test_io_uring_refused_by_the_host_is_replaced_by_threads_unless_it_was_asked_for(image):
    """The kernel's io_uring_setup is made to fail as it does under a seccomp filter: by a limit on descriptors."""
    spare = []
    gc.collect()                                                # what another test left behind is given back now, not meanwhile
    with open_raw(image, io="auto") as disk, open_raw(image, io="io_uring") as asked:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, limits[1]))
        try:
            while True:
                try:
                    spare.append(os.open("/dev/null", os.O_RDONLY))
                except OSError:
                    break
            with pytest.raises(Exception, match="Cannot use io_uring for disk"):
                DiskSession(asked)
            os.close(spare.pop())                               # one descriptor: enough for the threads' event
            session = DiskSession(disk)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for fd in spare:
                os.close(fd)
        assert session.channel.engine == "threads"
        session.write(0, b"t" * 512)
        assert session.read(0, 512) == b"t" * 512


@pytest.mark.skipif(not shutil.which("losetup") or os.geteuid() != 0, reason="needs loop devices and root")
def test_a_block_device_that_shrinks_under_us_gives_errors(image, io):
    device = subprocess.run(["losetup", "--show", "-f", image], capture_output=True, text=True).stdout.strip()
    if not device:
        pytest.skip("no loop device to be had here")
    try:
        with open_raw(device, io=io, cache="none") as disk, DiskSession(disk) as session:
            assert disk.size == MIB
            session.write(MIB - 4096, b"w" * 4096)
            session.write_zeroes(0, 4096)
            session.discard(4096, 8192)
            session.flush()
            assert session.read(0, 4096) == bytes(4096)
            os.truncate(image, MIB // 2)
            with pytest.raises(OSError, match=r"."):
                session.read(MIB - 4096, 4096)
            subprocess.run(["losetup", "-c", device], check=True)
            disk.resize()
            assert disk.size == MIB // 2
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@pytest.mark.parametrize(("cache", "sticks"), [("writeback", True), ("none", False)])
def test_a_flush_that_failed_fails_for_ever_only_where_the_page_cache_forgets(image, cache, sticks):
    """What was lost on its way from the page cache is told once; past it each flush tells anew."""
    skip_what_the_host_lacks(image, cache=cache)
    with open_raw(image, cache=cache, io="threads") as disk, DiskSession(disk) as session:
        [number] = [int(fd) for fd in os.listdir("/proc/self/fd") if points_to(fd, image)]
        good, (nowhere, other) = os.dup(number), os.pipe()
        os.dup2(nowhere, number)                                 # whose fdatasync is EINVAL
        with pytest.raises(OSError, match="Invalid argument"):
            session.flush()
        with pytest.raises(HostError, match=r"Cannot flush disk 'vda' \(.*disk.img\): Invalid argument"):
            disk.flush()
        os.dup2(good, number)
        for fd in (good, nowhere, other):
            os.close(fd)
        if sticks:
            with pytest.raises(OSError, match="Invalid argument"):
                session.flush()
        else:
            session.flush()
            disk.flush()


def points_to(fd, path):
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == str(path)
    except OSError:
        return False


# `lost`: the first fdatasync tells of lost writes, late, and the others know nothing of them. `full`: no fallocate finds room.
SHIM = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

atomic_int flushes;

int fdatasync(int fd)
{
    int number = ++flushes;
    if (number > 1 || strcmp(getenv("SHIM"), "lost"))
        return 0;
    for (int i = 0; i < 300 && flushes == 1; i++)
        usleep(1000);
    return errno = EIO, -1;
}

static int refuse(void)
{
    return strcmp(getenv("SHIM"), "full") ? 0 : (errno = ENOSPC, -1);
}

int fallocate(int fd, int mode, off_t offset, off_t length) { return refuse(); }
int fallocate64(int fd, int mode, off64_t offset, off64_t length) { return refuse(); }
"""
HEAD = """
import ctypes, os, sys
from kvmapp.block.raw import RawDisk
from kvmapp.block.session import DiskSession
flushes = ctypes.c_int.in_dll(ctypes.CDLL(None), "flushes")
with RawDisk(os.open(sys.argv[1], os.O_RDWR), io=sys.argv[2]) as disk, DiskSession(disk) as session:
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c"], check=True)

    def told(kind, body, *arguments):
        code = HEAD + textwrap.indent(textwrap.dedent(body), "    ")
        done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False,
                              env={**os.environ, "LD_PRELOAD": str(folder / "shim.so"), "SHIM": kind})
        assert done.returncode == 0, done.stderr
        return done.stdout

    return told


def test_of_two_flushes_at_once_neither_says_that_all_is_well(image, io, shim):
    """The kernel tells one of them only."""
    assert shim("lost", """
        tickets = [session.start(2) for _ in range(2)]
        print(sorted(session.wait().values()))
    """, image, io) == "[-5, -5]\n"


def test_flushes_that_came_while_another_was_under_way_share_the_next(image, io, shim):
    """Each must begin after its request came, so that one does not do; but two do for all."""
    assert shim("slow", """
        for _ in range(16):
            session.start(2)
        assert set(session.wait().values()) == {0}
        assert 1 <= flushes.value <= 16
        before = flushes.value
        session.flush()
        print(flushes.value - before)
    """, image, io) == "1\n"


def test_a_discard_for_which_there_is_no_room_is_no_error(image, io, shim):
    """Its end would give room back."""
    assert shim("full", """
        session.discard(0, 65536)
        session.write_zeroes(0, 65536, may_unmap=True)
        session.write_zeroes(65536, 65536)
        print(set(session.read(0, 131072)))
    """, image, io) == "{0}\n"
