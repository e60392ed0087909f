"""The virtio disk and drivers that break rules, or a host that fails: requests of no sense change nothing, and the next is served."""
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.device.virtio_blk.machine import (
    IN,
    IOERR,
    OK,
    OUT,
    SECTORS,
    T_DISCARD,
    T_FLUSH,
    T_ZEROES,
    UNSUPP,
    UNTOUCHED,
    Machine,
    header,
    span,
)
from tests.device.virtio_driver import WRITE, barrier
from tests.device.virtio_wirings import SPLIT

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize(("kind", "data", "status"), [
    (T_DISCARD, span(0, 8, 1), UNSUPP), (T_DISCARD, span(0, 8, 2), UNSUPP), (T_ZEROES, span(0, 8, 2), UNSUPP),
    (T_DISCARD, span(0, 8) * 2, IOERR), (T_DISCARD, span(0, 8) * 200, IOERR), (T_DISCARD, b"", IOERR),
    (T_ZEROES, span(0, 8)[:15], IOERR), (T_DISCARD, span(SECTORS, 1), IOERR), (T_ZEROES, span(0, SECTORS + 1), IOERR),
    (T_DISCARD, span(2**64 - 1, 2), IOERR), (T_ZEROES, span(2**55, 1), IOERR), (T_DISCARD, span(0, 2**32 - 1), IOERR),
    (T_ZEROES, span(2**55 - 1, 8), IOERR),
])
def test_bad_ranges_change_nothing(machine, image, kind, data, status):
    machine.do(OUT, 0, b"x" * 65536)
    assert machine.do(kind, data=data) == (status, b"", 1)
    assert image.read_bytes() == (b"x" * 65536).ljust(SECTORS * 512, b"\0")


@pytest.mark.parametrize("kind", [2, 3, 5, 7, 9, 10, 12, 14, 0x8000_0000, 0xFFFF_FFFF])
def test_unknown_requests_are_unsupported(machine, kind):
    assert machine.do(kind) == (UNSUPP, b"", 1)
    assert machine.do(kind, data=b"x" * 512, room=512) == (UNSUPP, bytes([UNTOUCHED]) * 512, 0)


@pytest.mark.parametrize(("sector", "length"), [
    (SECTORS, 512), (SECTORS - 1, 1024), (0, SECTORS * 512 + 512), (2**55, 512), (2**55 + 1, 512), (2**63, 512), (2**64 - 1, 512),
    (2**64 - 1, 1024), (2**55 - 1, 512), (0, 511), (0, 513), (0, 1),
])
def test_bad_places_and_lengths_touch_neither_disk_nor_memory(machine, image, sector, length):
    assert machine.do(IN, sector, room=length) == (IOERR, bytes([UNTOUCHED]) * length, 0)
    assert machine.do(OUT, sector, b"x" * length) == (IOERR, b"", 1)
    assert image.read_bytes() == bytes(SECTORS * 512)


def test_a_chain_longer_than_its_memory_in_bytes_is_refused(machine):
    """One buffer of a MiB, again and again: the request would be hundreds of times the guest's memory."""
    area = machine.guest.allocate(16 << 20)
    place = machine.guest.allocate(64)
    machine.guest.memory.write(place, header(IN))
    head = machine.queue.post_buffers([(place, 16, 0), *[(area, 16 << 20, WRITE)] * 200, (place + 32, 1, WRITE)])
    machine.queue.pending[head][1].clear()                       # three GiB that the test need not look at
    machine.queue.kick()
    machine.queue.wait()
    assert machine.guest.memory.read(place + 32, 1) == bytes([IOERR])


HEADER = header(OUT, 3)


@pytest.mark.parametrize(("readable", "writable", "status"), [
    ([HEADER, b"x" * 512], [], None),                                      # no status byte
    ([HEADER, b"x" * 512, b"s"], [], None),                                # status where the device cannot write
    ([], [1], IOERR), ([], [16, 512, 1], IOERR),                           # no header, or one that is to be written
    ([HEADER[:15]], [1], IOERR), ([b"h"], [512, 1], IOERR),                # half a header
    ([header(IN)], [1], OK),
])
def test_chains_of_the_wrong_shape_are_answered_and_the_next_is_served(machine, image, readable, writable, status):
    assert machine.run(readable, writable)[0] == status
    assert image.read_bytes() == bytes(SECTORS * 512)
    assert machine.do(OUT, 3, b"y" * 512)[0] == OK
    assert not machine.queue.driver.status & 0x40


def test_random_garbage_harms_nobody(image):
    """Whatever a driver puts into a chain, it comes back or breaks the queue; after a reset all is well."""
    machine = Machine(image)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from([0, 1, 4, 8, 11, 13, 99]), st.sampled_from([0, 1, SECTORS, 2**55, 2**64 - 1]),
                              st.lists(st.binary(max_size=40), max_size=4),
                              st.lists(st.sampled_from([1, 16, 511, 512, 513, 4096]), max_size=4)), min_size=1, max_size=8))
    def check(requests):
        machine.guest.free = 16 << 20
        for kind, sector, readable, writable in requests:
            parts = [part for part in [header(kind, sector), *readable] if part]
            machine.chain(parts, writable)
        machine.queue.kick()
        machine.queue.wait(len(requests))
        assert machine.do(T_FLUSH)[0] == OK

    with machine:
        check()


def test_the_rest_of_the_config_space_is_read_only(machine):
    before = [machine.driver.config(offset, 4) for offset in range(0, 60, 4)]
    for offset in range(0, 60, 4):
        machine.driver.put_config(offset, 4, 0xFFFF_FFFF)
    assert [machine.driver.config(offset, 4) for offset in range(0, 60, 4)] == before


@pytest.mark.parametrize("machine", SPLIT, indirect=True)
def test_a_driver_that_reuses_requests_gets_no_more_than_there_are_slots(machine):
    """The avail ring runs ahead of the used ring: one head again and again, more often than the queue is long."""
    head, [(place, _)] = machine.post(OUT, 1, b"r" * 512)
    for _ in range(200):
        machine.queue.offer(head)
    machine.queue.kick(force=True)
    while (seen := machine.queue.word(machine.queue.used + 2)) != 201:
        machine.queue.put_word(machine.queue.avail + 4 + 2 * machine.queue.size, seen)
        barrier()
        if machine.queue.word(machine.queue.used + 2) == seen:
            machine.driver.await_vector(1)
    assert machine.guest.memory.read(place, 1) == bytes([OK])


def test_a_failing_host_is_an_error_to_the_guest_and_a_line_in_the_log(image, log):
    with Machine(image) as machine:
        os.truncate(image, 4096)
        assert machine.do(IN, 8, room=512)[0] == IOERR
        assert machine.do(IN, 0, room=4096) == (OK, bytes(4096), 4097)
        assert log() == "vda: host error: cannot read at byte (0x1000): Input/output error\n"
