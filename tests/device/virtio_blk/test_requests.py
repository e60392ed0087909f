"""The virtio disk's requests as a well-behaved driver makes them, on real files."""
import ctypes
import os
import select

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmapp.virtio.blk import VirtioBlk
from tests.device.disks import open_raw
from tests.device.virtio_blk.machine import (
    CONFIG_WCE,
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    MQ,
    OK,
    OUT,
    RO,
    SECTORS,
    T_DISCARD,
    T_FLUSH,
    T_ZEROES,
    UNSUPP,
    UNTOUCHED,
    ZEROES,
    Machine,
    header,
    span,
)
from tests.device.virtio_driver import F_EVENT_IDX, F_INDIRECT, Guest
from tests.waiting import until


@pytest.mark.parametrize("io", ["threads", "io_uring"])
@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("without", [0, F_EVENT_IDX, F_INDIRECT])
def test_what_is_written_is_read_back_and_is_in_the_file(image, io, cache, without):
    data = os.urandom(8192)
    with Machine(image, io=io, cache=cache, without=without) as machine:
        assert machine.do(OUT, 100, data) == (OK, b"", 1)
        assert machine.do(IN, 100, room=8192) == (OK, data, 8193)
        assert machine.do(T_FLUSH) == (OK, b"", 1)
        assert image.read_bytes()[51200:59392] == data
        assert machine.do(IN, SECTORS - 1, room=512) == (OK, bytes(512), 513)


def test_the_serial_number_is_told(machine):
    assert machine.do(GET_ID, room=20) == (OK, b"SN-1234".ljust(20, b"\0"), 21)
    assert machine.do(GET_ID, room=4) == (OK, b"SN-1", 5)
    assert machine.do(GET_ID, room=24) == (OK, b"SN-1234".ljust(20, b"\0") + bytes([UNTOUCHED]) * 4, 20)


def test_a_serial_number_fits_or_is_refused(image):
    with Machine(image, serial="X" * 20) as machine:
        assert machine.do(GET_ID, room=20)[1] == b"X" * 20
    with pytest.raises(ValueError, match="at most 20"), open_raw(image) as disk, Guest() as guest:
        VirtioBlk("vda", guest.memory, disk, serial="X" * 21)


def test_the_config_space_describes_the_disk(machine):
    config = machine.driver.config
    assert config(0, 4) | config(4, 4) << 32 == SECTORS
    assert config(12, 4) == 254                                  # seg_max
    assert config(20, 4) == 512                                  # blk_size
    assert 512 << config(24, 1) == machine.device.disk.physical_block
    assert config(32, 1) == 1                                    # writeback
    assert config(34, 2) == 1                                    # num_queues
    assert config(36, 4) > 0 < config(40, 4)                     # discard
    assert config(48, 4) > 0 < config(52, 4)                     # write zeroes
    assert machine.driver.features & (FLUSH | DISCARD | ZEROES | CONFIG_WCE) == FLUSH | DISCARD | ZEROES | CONFIG_WCE
    assert not machine.driver.features & (RO | MQ)


def test_a_read_only_disk_says_so_and_takes_no_change(image):
    with Machine(image, read_only=True) as machine:
        assert machine.driver.features & RO
        assert not machine.driver.features & (DISCARD | ZEROES | CONFIG_WCE)
        assert machine.do(OUT, 0, b"x" * 512) == (IOERR, b"", 1)
        assert machine.do(T_ZEROES, data=span(0, 1)) == (UNSUPP, b"", 1)
        assert machine.do(IN, 0, room=512) == (OK, bytes(512), 513)
        assert machine.do(T_FLUSH)[0] == OK
    assert image.read_bytes() == bytes(SECTORS * 512)


def test_discard_and_write_zeroes(machine, image):
    machine.do(OUT, 0, b"x" * 65536)
    assert machine.do(T_ZEROES, data=span(8, 8))[0] == OK
    assert machine.do(T_ZEROES, data=span(16, 8, 1))[0] == OK
    assert machine.do(T_DISCARD, data=span(64, 64))[0] == OK
    assert machine.do(T_DISCARD, data=span(0, 0))[0] == OK
    assert image.read_bytes()[:65536] == b"x" * 4096 + bytes(8192) + b"x" * (32768 - 12288) + bytes(32768)


def test_no_data_at_all_is_no_error(machine):
    assert machine.do(IN, 0) == (OK, b"", 1)
    assert machine.do(OUT, 0) == (OK, b"", 1)


def cut(data, places):
    """Bytes in pieces: cut after each of these lengths."""
    pieces = []
    for place in places:
        if len(data) > place:
            pieces.append(data[:place])
            data = data[place:]
    return [*pieces, data] if data else pieces


@pytest.mark.parametrize("indirect", [False, True])
def test_a_request_may_be_cut_into_single_bytes(machine, indirect):
    data = os.urandom(512)
    pieces = cut(header(OUT, 5), [1] * 16) + cut(data, [1] * 100)
    assert machine.run(pieces, [1], indirect=indirect)[0] == OK
    assert machine.run(cut(header(IN, 5), [1] * 16), [1] * 100 + [412, 1], indirect=indirect) == (OK, data, 513)
    status, got, written = machine.run([header(IN, 5)], [100, 413], indirect=indirect)    # the status ends the last buffer
    assert (status, got, written) == (OK, data, 513)


sizes = st.lists(st.integers(1, 600), max_size=6)


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_any_cutting_means_the_same(image, cache):
    machine = Machine(image, cache=cache)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, SECTORS - 4), st.integers(1, 4), sizes, sizes, st.booleans(), st.randoms(use_true_random=False))
    def check(sector, count, places, more, indirect, random):
        machine.guest.free = 16 << 20
        data = random.randbytes(count * 512)
        assert machine.run(cut(header(OUT, sector) + data, places), [1], indirect=indirect)[0] == OK
        rooms = [len(piece) for piece in cut(bytes(count * 512 + 1), more)]
        assert machine.run(cut(header(IN, sector), places), rooms, indirect=indirect) == (OK, data, count * 512 + 1)

    with machine:
        check()


def test_many_requests_come_back_each_once_with_few_interrupts(image):
    """A kick's requests are one batch: far fewer interrupts than requests, even where each round of answers gives one."""
    with Machine(image, without=F_EVENT_IDX) as machine:
        vector = machine.driver.card.vectors[1]
        interrupts = 0
        for _ in range(10):
            heads = [machine.post(IN, i, room=512)[0] for i in range(64)]
            machine.queue.kick()
            done: list = []
            while len(done) < 64:
                assert select.select([vector.fd], [], [], 20)[0]
                interrupts += vector.taken()
                done += machine.queue.collect()
            assert sorted(each.head for each in done) == sorted(heads)
        assert interrupts < 320


def test_queues_work_side_by_side(image):
    with Machine(image, queues=4) as machine:
        assert machine.driver.features & MQ
        assert machine.driver.config(34, 2) == 4
        assert len(machine.driver.queues) == 4
        for number, queue in enumerate(machine.driver.queues):
            for i in range(20):
                machine.post(OUT, number * 256 + i, bytes([number + 1]) * 512, queue=queue)
            queue.kick()
        for queue in machine.driver.queues:
            queue.wait(20)
        for number in range(4):
            assert machine.do(IN, number * 256, room=20 * 512)[1] == bytes([number + 1]) * 10240


def dirty_pages(path):
    """Pages of the file that the host has not written yet (cachestat(2), Linux 6.5)."""
    answer = (ctypes.c_uint64 * 5)()
    with open(path, "rb") as file:
        if ctypes.CDLL(None).syscall(451, file.fileno(), (ctypes.c_uint64 * 2)(0, 0), answer, 0):
            pytest.skip("no cachestat here")
    return answer[1]


def test_a_flush_from_the_host_leaves_nothing_that_a_power_cut_could_take(image):
    with Machine(image, cache="writeback") as machine:
        until(lambda: machine.do(OUT, 0, b"d" * 4096)[0] == OK and dirty_pages(image))
        machine.disk.flush()
        if dirty_pages(image):
            if image.stat().st_dev == os.stat("/dev/shm").st_dev:
                pytest.skip("this file system is memory")
            pytest.fail("pages are left that the host has not written")


@pytest.mark.parametrize("io", ["threads", "io_uring"])
@pytest.mark.parametrize(("without", "writeback", "cache", "durable"), [
    (0, 1, "writeback", False), (0, 0, "writeback", True), (CONFIG_WCE, None, "writeback", False),
    (CONFIG_WCE | FLUSH, None, "writeback", True), (0, None, "writethrough", True), (0, 0, "unsafe", False),
])
def test_a_driver_that_cannot_flush_gets_durable_writes(image, io, without, writeback, cache, durable):
    with open(image, "rb") as file:
        os.fsync(file)
    with Machine(image, io=io, cache=cache, without=without) as machine:
        if writeback is not None:
            machine.driver.put_config(32, 1, writeback)
            assert machine.driver.config(32, 1) == writeback
        assert bool(machine.driver.offered() & CONFIG_WCE) == (cache != "writethrough")

        def leaves_dirty_pages():
            assert machine.do(OUT, 0, b"d" * 4096)[0] == OK
            assert machine.do(T_ZEROES, data=span(64, 1))[0] == OK
            return dirty_pages(image)

        if not durable:
            until(leaves_dirty_pages)                            # the host may write them at any time
        elif leaves_dirty_pages():
            if image.stat().st_dev == os.stat("/dev/shm").st_dev:
                pytest.skip("this file system is memory")
            pytest.fail("pages are left that the host has not written")
