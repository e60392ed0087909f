"""GuestMemory as Python sees it: views are writable, lie on the same RAM as read and write, and end where RAM ends."""
import subprocess
import sys
from pathlib import Path

import pytest

from kvmapp.boot.image import zero
from kvmapp.errors import HostError
from kvmapp.layout import GIB, HIGH_MEMORY_BASE, LOW_MEMORY_END, MIB
from kvmapp.memory import GuestAddressError, GuestMemory

SIZE = 1 << 20


def test_view_writes_through():
    memory = GuestMemory(SIZE)
    memory.view(0x1000, 4)[:] = b"boot"
    assert memory.read(0x1000, 4) == b"boot"


def test_memory_is_split_around_the_hole():
    memory = GuestMemory(4 * GIB)
    assert memory.ranges == [(0, LOW_MEMORY_END), (HIGH_MEMORY_BASE, GIB)]
    assert memory.size == 4 * GIB


@pytest.mark.parametrize(("gpa", "length"), [(SIZE, 1), (SIZE - 1, 2), (2**64 - 1, 2), (0, SIZE + 1), (1, 2**64 - 1)])
def test_ranges_outside_ram_are_refused(gpa, length):
    memory = GuestMemory(SIZE)
    with pytest.raises(GuestAddressError):
        memory.view(gpa, length)


@pytest.mark.parametrize("how", [{"prealloc": True}, {"locked": True}, {"mergeable": True}, {"huge_pages": False},
                                 {"shared": True}, {"shared": True, "prealloc": True}])
def test_kinds_of_memory_read_zeroes_after_a_clear(how):
    memory = GuestMemory(4 * MIB, **how)
    assert memory.is_pageable is not bool({"prealloc", "locked", "shared"} & how.keys())
    assert memory.is_shared is how.get("shared", False)
    memory.write(MIB, b"guest")
    memory.clear()
    assert not any(memory.read(0, 4 * MIB))


def test_shared_memory_is_given_back_by_a_clear():
    def taken():
        return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssShmem")).split()[1])
    before = taken()
    memory = GuestMemory(16 * MIB, shared=True, huge_pages=False)
    memory.view(0, 16 * MIB)[:] = b"x" * (16 * MIB)
    assert taken() - before == 16384
    memory.clear()
    assert taken() - before == 0
    assert not any(memory.read(0, 16 * MIB))


def test_preallocated_memory_is_there_before_it_is_touched():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    before = resident()
    memory = GuestMemory(32 * MIB, prealloc=True)
    assert resident() - before > 30 * MIB
    assert memory.size == 32 * MIB


def test_huge_pages_that_are_not_there_are_an_error_that_says_where_to_make_them():
    with pytest.raises(HostError, match="in huge pages of 1048576 KiB") as refused:
        GuestMemory(1 << 40, page=1 << 30)
    assert "hugepages-1048576kB/nr_hugepages" in refused.value.hint
    with pytest.raises(HostError, match="not made of pages of 2048 KiB"):
        GuestMemory(3 * MIB, page=2 * MIB)


def test_memory_that_may_not_be_locked_is_an_error_with_a_hint():
    code = ("from kvmapp.memory import GuestMemory\n"                                          # while its file may be read
            "import ctypes, resource; resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096)); "
            "ctypes.CDLL(None).prctl(24, 14, 0, 0, 0)\n"                       # PR_CAPBSET_DROP, CAP_IPC_LOCK
            "import os\nif os.geteuid() == 0: os.setresuid(65534, 65534, 65534)\n"
            "try: GuestMemory(1 << 20, locked=True)\nexcept Exception as error: print(type(error).__name__, error, error.hint)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "HostError Cannot lock 1 MiB of guest memory" in done.stdout, done
    assert "ulimit -l" in done.stdout


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="this kernel is without NUMA")
@pytest.mark.parametrize("how", [{}, {"prealloc": True}])
def test_memory_of_a_node_stays_bound_after_a_clear(how):
    def bound():
        return [line for line in Path("/proc/self/numa_maps").read_text().splitlines() if " bind:0 " in f"{line} "]
    memory = GuestMemory(4 * MIB, policy=2, nodes=[0], **how)
    assert len(bound()) == 1 and ("anon=1024" in bound()[0]) is bool(how)
    memory.clear()
    assert len(bound()) == 1
    del memory
    assert bound() == []


def test_memory_that_comes_from_a_file_may_be_merged_as_any_other(tmp_path):
    (path := tmp_path / "memory").write_bytes(bytes(SIZE))
    code = f"""if True:
        import os
        from kvmapp.memory import GuestMemory
        memory = GuestMemory({4 * SIZE}, mergeable=True)
        with open({str(path)!r}, "rb") as file:
            memory.map_file(file.fileno(), {SIZE}, {SIZE}, 0)
        whole = open("/proc/self/smaps").read().split("VmFlags:")
        [flags] = [after.split(chr(10))[0].split() for before, after in zip(whole, whole[1:]) if {str(path)!r} in before]
        assert "mg" in flags, flags
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


def test_nothing_is_cleared_behind_the_end():
    """What a kernel's last segment leaves to clear when it ends with the memory."""
    zero(GuestMemory(SIZE), SIZE, 0)
