"""A disk gives back what was written, whichever engine and cache mode carries it, and keeps to its bounds."""
import errno
import mmap
import os
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmapp.block.backend import BlockFlag, BlockOperation
from kvmapp.block.session import DiskSession
from kvmapp.errors import GuestImageError
from tests.device.disks import open_raw, skip_what_the_host_lacks

READ, WRITE, FLUSH, DISCARD, ZEROES = (BlockOperation(number) for number in range(5))
MIB = 1 << 20
SECTORS = 256


@pytest.fixture(params=["threads-writeback", "io_uring-writeback", "threads-none", "io_uring-none", "threads-none4k",
                        "io_uring-none4k", "io_uring-directsync", "threads-unsafe"])
def mode(request, tmp_path):
    """RawDisk's settings: each engine, each cache mode, and O_DIRECT on blocks of 4 KiB."""
    io, cache = request.param.split("-")
    settings = {"io": io, "cache": cache.removesuffix("4k"), "alignment": 4096 if cache.endswith("4k") else 512}
    probe = tmp_path / "probe"
    probe.write_bytes(bytes(4096))
    skip_what_the_host_lacks(probe, io=io, cache=settings["cache"])
    return settings


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SECTORS * 512))
    return path


@pytest.fixture
def session(image, mode):
    with open_raw(image, **mode) as disk, DiskSession(disk) as session:
        yield session


def pieces(memory, cuts):
    """The buffer as several, cut at these places."""
    places = sorted({0, len(memory), *(cut % len(memory) for cut in cuts)})
    return [memory[a:b] for a, b in pairwise(places)]


requests = st.lists(st.tuples(
    st.sampled_from([READ, READ, WRITE, WRITE, ZEROES, FLUSH]), st.integers(0, SECTORS - 1), st.integers(1, 40),
    st.integers(0, 255), st.lists(st.integers(1, 20000), max_size=3), st.sampled_from([0, 1, 8, 512]),
    st.sampled_from([0, BlockFlag.BLOCK_FUA, BlockFlag.BLOCK_MAY_UNMAP])), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(requests)
def check_against_shadow(disk, plan):
    """Random requests, many in flight; those that touch what is in flight wait for it."""
    shadow = bytearray(SECTORS * 512)
    with DiskSession(disk) as session:
        session.write(0, shadow)
        flying: list[range] = []
        expected: dict[int, tuple] = {}

        def land():
            for ticket, result in session.wait().items():
                memory, wanted = expected.pop(ticket)
                assert result == 0
                assert memory is None or bytes(memory) == wanted
            flying.clear()

        for operation, sector, count, fill, cuts, off, flags in plan:
            count = min(count, SECTORS - sector)
            span = range(sector * 512, (sector + count) * 512)
            if operation != FLUSH and any(span.start < other.stop and other.start < span.stop for other in flying):
                land()
            flying.append(span)
            if operation == FLUSH:
                expected[session.start(FLUSH)] = None, None
            elif operation == ZEROES:
                expected[session.start(ZEROES, span.start, length=len(span), flags=flags)] = None, None
                shadow[span.start:span.stop] = bytes(len(span))
            else:
                area = memoryview(mmap.mmap(-1, 32768))[off:off + len(span)]
                wanted = bytes([fill]) * len(span)
                if operation == WRITE:
                    area[:] = shadow[span.start:span.stop] = wanted
                ticket = session.start(operation, span.start, *pieces(area, cuts), flags=flags & BlockFlag.BLOCK_FUA)
                expected[ticket] = (area, bytes(shadow[span.start:span.stop])) if operation == READ else (None, None)
        land()
        assert session.read(0, SECTORS * 512) == shadow


def test_random_requests_agree_with_a_shadow_copy(image, mode):
    with open_raw(image, **mode) as disk:
        check_against_shadow(disk)
    assert image.stat().st_size == SECTORS * 512


def test_neighbouring_sectors_written_at_once_all_arrive(session):
    """Eight sectors of one 4 KiB block, in flight together: where blocks are rewritten, none may undo another."""
    for _ in range(20):
        for sector in range(64):
            session.start(WRITE, sector * 512, bytes([sector + 1]) * 512)
        assert set(session.wait().values()) == {0}
    assert session.read(0, 64 * 512) == b"".join(bytes([sector + 1]) * 512 for sector in range(64))


def test_more_in_flight_than_any_ring_holds(session):
    for index in range(3000):
        session.start(WRITE, index % SECTORS * 512, index.to_bytes(4) * 128)
    results = session.wait()
    assert len(results) == 3000
    assert set(results.values()) == {0}


def test_the_engine_is_the_one_asked_for(session, mode):
    assert session.channel.engine == mode["io"]


@pytest.mark.parametrize(("offset", "length"), [(SECTORS * 512, 512), ((SECTORS - 1) * 512, 1024), (0, (SECTORS + 1) * 512),
                                                (2**64 - 512, 512), (2**64 - 512, 1024), (2**63, 512), (1, 512), (0, 511)])
@pytest.mark.parametrize("operation", [READ, WRITE])
def test_what_is_out_of_bounds_is_refused_and_does_nothing(session, image, operation, offset, length):
    with pytest.raises(OSError, match="out of range"):
        session.do(operation, offset, bytearray(b"x" * length))
    assert image.read_bytes() == bytes(SECTORS * 512)


@pytest.mark.parametrize("operation", [DISCARD, ZEROES])
def test_discards_and_zeroes_keep_to_the_bounds_too(session, operation):
    for offset, length in ((SECTORS * 512, 512), (0, (SECTORS + 1) * 512), (512, 2**64 - 512), (2**64 - 512, 512)):
        with pytest.raises(OSError, match="out of range"):
            session.do(operation, offset, length=length)
    session.do(operation, SECTORS * 512, length=0)


def test_an_unknown_operation_is_refused(session):
    with pytest.raises(OSError, match="Invalid argument"):
        session.do(5, 0, bytes(512))


def allocated(path):
    """Bytes that the file takes on the host, after delayed allocation."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("free", ["discard", "write_zeroes"])
def test_freed_blocks_are_given_back_to_the_host(tmp_path, mode, free):
    path = tmp_path / "sparse.img"
    path.write_bytes(os.urandom(MIB))
    before = allocated(path)
    with open_raw(path, **mode) as disk, DiskSession(disk) as session:
        if free == "discard":
            session.discard(MIB // 4, MIB // 2)
        else:
            session.write_zeroes(MIB // 4, MIB // 2, may_unmap=True)
        assert session.read(MIB // 4, MIB // 2) == bytes(MIB // 2)
    assert allocated(path) <= before - MIB // 2
    assert path.stat().st_size == MIB


def test_discard_can_be_switched_off(tmp_path, mode):
    path = tmp_path / "thick.img"
    data = os.urandom(MIB)
    path.write_bytes(data)
    before = allocated(path)
    with open_raw(path, **mode, discard=False) as disk, DiskSession(disk) as session:
        assert disk.discard_granularity == 0
        session.discard(0, MIB)
        session.write_zeroes(0, MIB // 2, may_unmap=True)
    assert path.read_bytes() == bytes(MIB // 2) + data[MIB // 2:]
    assert allocated(path) >= before


@pytest.mark.parametrize("io", ["threads", "io_uring"])
def test_an_incomplete_last_sector_reads_as_zeroes_and_fills_when_written(tmp_path, io, caplog):
    path = tmp_path / "odd.img"
    path.write_bytes(b"a" * 1000)
    skip_what_the_host_lacks(path, io=io)
    with open_raw(path, io=io) as disk, DiskSession(disk) as session:
        assert disk.size == 1024
        assert "1000 bytes" in caplog.text
        assert session.read(0, 1024) == b"a" * 1000 + bytes(24)
        session.write_zeroes(0, 512)
        assert path.stat().st_size == 1000
        session.write(512, b"b" * 512)
        assert session.read(0, 1024) == bytes(512) + b"b" * 512
    assert path.read_bytes() == bytes(512) + b"b" * 512


def test_an_odd_length_cannot_be_written_past_the_page_cache(tmp_path):
    path = tmp_path / "odd.img"
    path.write_bytes(b"a" * 1536)
    skip_what_the_host_lacks(path, cache="none")
    with pytest.raises(Exception, match="1536 bytes are no multiple of 4096"):
        open_raw(path, cache="none", alignment=4096)
    with open_raw(path, cache="none", alignment=4096, read_only=True) as disk, DiskSession(disk) as session:
        assert session.read(0, 1536) == b"a" * 1536
        assert session.read(512, 512) == b"a" * 512


def test_a_read_only_disk_takes_no_change(image, mode):
    with open_raw(image, **mode, read_only=True) as disk, DiskSession(disk) as session:
        for change, *values in ((session.write, 0, bytes(512)), (session.discard, 0, 512), (session.write_zeroes, 0, 512)):
            with pytest.raises(OSError, match="Read-only") as refusal:
                change(*values)
            assert refusal.value.errno == errno.EROFS
        session.flush()
        assert session.read(0, 512) == bytes(512)


def test_counters_tell_requests_bytes_and_errors(image, mode):
    with open_raw(image, **mode) as disk:
        with DiskSession(disk) as session:
            session.write(0, bytes(4096))
            session.read(0, 1024)
            session.flush()
            with pytest.raises(OSError, match="out of range"):
                session.read(SECTORS * 512, 512)
        counts = disk.counters()
    assert counts["write"]["requests"] == 1
    assert counts["write"]["bytes"] == 4096
    assert counts["write"]["nanoseconds"] > 0
    assert (counts["read"]["requests"], counts["read"]["bytes"], counts["read"]["errors"]) == (2, 1024, 1)
    assert counts["flush"]["requests"] == 1


def test_after_close_nothing_is_taken(image):
    disk = open_raw(image)
    session = DiskSession(disk)
    session.start(WRITE, 0, b"w" * 65536)
    disk.close()
    disk.close()
    assert image.read_bytes()[:65536] == b"w" * 65536          # close waited for it
    with pytest.raises(OSError, match="shutdown"):
        session.read(0, 512)
    with pytest.raises(ValueError, match="closed"):
        DiskSession(disk)


def test_a_disk_left_open_warns_and_gives_its_descriptor_back(image):
    disk = open_raw(image)
    with pytest.warns(ResourceWarning, match="vda"):
        del disk


def test_resize_changes_the_file_and_the_bounds(image, mode):
    with open_raw(image, **mode) as disk, DiskSession(disk) as session:
        session.start(WRITE, 0, b"1" * 4096)
        disk.resize(MIB)
        assert (disk.size, image.stat().st_size) == (MIB, MIB)
        session.write(MIB - 4096, b"2" * 4096)
        with pytest.raises(GuestImageError, match="multiple"):
            disk.resize(1000, shrink=True)
        disk.resize(4096, shrink=True)
        with pytest.raises(OSError, match="out of range"):
            session.read(4096, 512)
        assert session.read(0, 4096) == b"1" * 4096


def test_two_channels_see_one_disk(image, mode):
    with open_raw(image, **mode) as disk, DiskSession(disk) as one, DiskSession(disk) as two:
        one.write(4096, b"seen" * 1024)
        assert two.read(4096, 4096) == b"seen" * 1024
