"""The block device as a driver meets it, well-behaved and hostile, on real files."""
import ctypes
import gc
import os
import select
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmapp.block.raw import RawDisk
from kvmapp.devices import set_log
from kvmapp.state import StateError
from kvmapp.virtio.blk import VirtioBlk
from tests.device.virtio_driver import F_EVENT_IDX, F_INDIRECT, WRITE, Guest
from tests.device.virtio_wirings import ALL, SPLIT

IN, OUT, T_FLUSH, GET_ID, T_DISCARD, T_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
RO, FLUSH, CONFIG_WCE, MQ, DISCARD, ZEROES = (1 << bit for bit in (5, 9, 11, 12, 13, 14))
SECTORS = 2048
UNTOUCHED = 0xEE


class Machine:
    """A guest with one virtio disk on `path`, and requests by their parts."""

    def __init__(self, path, *, serial="", queues=1, start=True, without=0, wiring="pci", **disk):
        fd = os.open(path, os.O_RDWR)
        try:
            backend = RawDisk(fd, name="vda", **disk)
        except BaseException:
            os.close(fd)
            raise
        self.guest = Guest(wiring=wiring)
        self.device = VirtioBlk("vda", self.guest.memory, backend, serial=serial, queues=queues)
        self.driver = self.guest.plug(self.device)
        if start:
            self.driver.start(without=without)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.guest.close()

    @property
    def queue(self):
        return self.driver.queues[0]

    def chain(self, readable, writable, queue=None, indirect=False):
        """Posts any chain, its writable bytes UNTOUCHED; (head, where the writable ones are)."""
        queue = queue or self.queue
        buffers = []
        for data in readable:
            buffers.append((self.guest.allocate(len(data), 1), len(data), 0))
            self.guest.memory.write(buffers[-1][0], data)
        for length in writable:
            buffers.append((self.guest.allocate(length, 1), length, WRITE))
            self.guest.memory.write(buffers[-1][0], bytes([UNTOUCHED]) * length)
        return queue.post_buffers(buffers, indirect), [(address, size) for address, size, flags in buffers if flags & WRITE]

    def post(self, kind, sector=0, data=b"", room=0, **options):
        """Posts a request of the usual shape: header, data, status."""
        return self.chain([header(kind, sector), *([data] if data else [])], [*([room] if room else []), 1], **options)

    def run(self, readable, writable, **options):
        """Any one chain to its end: (status, the other writable bytes, what the device says it wrote)."""
        _, places = self.chain(readable, writable, **options)
        self.queue.kick()
        [done] = self.queue.wait()
        memory = b"".join(self.guest.memory.read(*place) for place in places)
        return memory[-1] if memory else None, memory[:-1], done.written

    def do(self, kind, sector=0, data=b"", room=0):
        return self.run([header(kind, sector), *([data] if data else [])], [*([room] if room else []), 1])


def header(kind, sector=0):
    return struct.pack("<IIQ", kind, 0, sector)


def span(sector, count, flags=0):
    return struct.pack("<QII", sector, count, flags)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SECTORS * 512))
    return path


@pytest.fixture(params=ALL)
def machine(image, request):
    with Machine(image, serial="SN-1234", wiring=request.param) as machine:
        yield machine


@pytest.fixture(autouse=True)
def quiet():
    """The guest's misdeeds are logged; here into nothing."""
    sink = os.open(os.devnull, os.O_WRONLY)
    set_log(sink)
    yield
    set_log(2)
    os.close(sink)


@pytest.mark.parametrize("io", ["threads", "io_uring"])
@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("without", [0, F_EVENT_IDX, F_INDIRECT])
def test_what_is_written_is_read_back_and_is_in_the_file(image, io, cache, without):
    data = os.urandom(8192)
    try:
        machine = Machine(image, io=io, cache=cache, without=without)
    except Exception as error:
        pytest.skip(str(error))
    with machine:
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
    with pytest.raises(ValueError, match="at most 20"), RawDisk(os.open(image, os.O_RDWR)) as disk, Guest() as guest:
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


def test_no_data_at_all_is_no_error(machine):
    assert machine.do(IN, 0) == (OK, b"", 1)
    assert machine.do(OUT, 0) == (OK, b"", 1)


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
    try:
        machine = Machine(image, cache=cache)
    except Exception as error:
        pytest.skip(str(error))

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


def dirty_pages(path):
    """Pages of the file that the host has not written yet (cachestat(2), Linux 6.5)."""
    answer = (ctypes.c_uint64 * 5)()
    with open(path, "rb") as file:
        if ctypes.CDLL(None).syscall(451, file.fileno(), (ctypes.c_uint64 * 2)(0, 0), answer, 0):
            pytest.skip("no cachestat here")
    return answer[1]


@pytest.mark.parametrize("io", ["threads", "io_uring"])
@pytest.mark.parametrize(("without", "writeback", "cache", "durable"), [
    (0, 1, "writeback", False), (0, 0, "writeback", True), (CONFIG_WCE, None, "writeback", False),
    (CONFIG_WCE | FLUSH, None, "writeback", True), (0, None, "writethrough", True), (0, 0, "unsafe", False),
])
def test_a_driver_that_cannot_flush_gets_durable_writes(image, io, without, writeback, cache, durable):
    os.sync()
    with Machine(image, io=io, cache=cache, without=without) as machine:
        if writeback is not None:
            machine.driver.put_config(32, 1, writeback)
            assert machine.driver.config(32, 1) == writeback
        assert bool(machine.driver.offered() & CONFIG_WCE) == (cache != "writethrough")
        assert machine.do(OUT, 0, b"d" * 4096)[0] == OK
        assert machine.do(T_ZEROES, data=span(64, 1))[0] == OK
        if dirty_pages(image) and image.stat().st_dev == os.stat("/dev/shm").st_dev:
            pytest.skip("this file system is memory")
        assert (dirty_pages(image) == 0) == durable


def test_the_rest_of_the_config_space_is_read_only(machine):
    before = [machine.driver.config(offset, 4) for offset in range(0, 60, 4)]
    for offset in range(0, 60, 4):
        machine.driver.put_config(offset, 4, 0xFFFF_FFFF)
    assert [machine.driver.config(offset, 4) for offset in range(0, 60, 4)] == before


@pytest.mark.parametrize("io", ["threads", "io_uring"])
def test_after_a_reset_the_host_writes_no_guest_memory(tmp_path, io):
    """Reads are under way when the driver resets the device; from then on its buffers are its own."""
    path = tmp_path / "big.img"
    path.write_bytes(b"d" * (16 << 20))
    try:
        machine = Machine(path, io=io, cache="none")
    except Exception as error:
        pytest.skip(str(error))
    with machine:
        for _ in range(8):
            machine.guest.free = 4 << 20
            places = [machine.post(IN, i * 256, room=128 << 10)[1] for i in range(60)]
            machine.queue.kick()
            machine.driver.set_status(0)
            assert machine.driver.status == 0
            for (address, length), _ in places:
                machine.guest.memory.write(address, bytes([0x55]) * length)
            machine.device.disk.drain()                          # whatever were still under way would land now
            for (address, length), _ in places:
                assert machine.guest.memory.read(address, length) == bytes([0x55]) * length
            machine.driver.start()
            assert machine.do(IN, 0, room=512) == (OK, b"d" * 512, 513)


@pytest.mark.parametrize("io", ["threads", "io_uring"])
def test_a_drain_takes_over_what_its_thread_has_in_flight(tmp_path, io):
    path = tmp_path / "big.img"
    path.write_bytes(b"d" * (8 << 20))
    try:
        machine = Machine(path, io=io, cache="none")
    except Exception as error:
        pytest.skip(str(error))
    with machine:
        for _ in range(10):
            machine.guest.free = 4 << 20
            for i in range(50):
                machine.post(IN, i * 128, room=64 << 10)
            machine.queue.kick()
            machine.device.disk.drain()
            assert all(done.data[:65536] == b"d" * 65536 for done in machine.queue.wait(50))


def test_pause_ends_what_is_under_way_and_resume_takes_up_what_came_meanwhile(machine):
    for i in range(50):
        machine.post(OUT, i * 8, b"p" * 4096)
    machine.queue.kick()
    machine.driver.card.pause()
    state = machine.driver.card.save()
    queue = state["virtio"]["queues"][0]
    assert queue["last_avail"] == queue["next_used"]             # nothing in between
    done = len(machine.queue.collect())
    machine.post(IN, 0, room=512)
    machine.queue.kick(force=True)
    assert machine.queue.collect() == []
    machine.driver.card.resume()
    machine.queue.wait(51 - done)


def test_state_goes_over_to_a_new_device(image):
    with Machine(image) as first:
        first.driver.put_config(32, 1, 0)
        assert first.do(OUT, 9, b"s" * 512)[0] == OK
        first.driver.card.pause()
        state = first.driver.card.save()
    with Machine(image, start=False) as second:
        second.driver.card.pause()
        second.driver.card.restore(state)
        assert second.driver.card.save() == state
        assert second.driver.config(32, 1) == 0


def test_a_state_of_another_disk_is_refused(image):
    with Machine(image) as machine:
        machine.driver.card.pause()
        state = machine.driver.card.save()
        for change in ({"capacity": 1}, {"capacity": "2048"}, {"writeback": 1}, {"version": 2}, {"more": 1}):
            device = {**state["virtio"]["device"], **change}
            with pytest.raises(StateError, match="vda"):
                machine.driver.card.restore({**state, "virtio": {**state["virtio"], "device": device}})
        assert machine.driver.card.save() == state


def test_a_resize_is_told_to_the_guest(machine, image):
    generation = machine.driver.generation()
    assert machine.do(IN, SECTORS, room=512)[0] == IOERR
    machine.device.resize(2 * SECTORS * 512)
    machine.driver.await_vector(0)
    assert machine.driver.generation() != generation
    assert machine.driver.config(0, 4) == 2 * SECTORS
    assert machine.do(IN, SECTORS, room=512) == (OK, bytes(512), 513)
    assert image.stat().st_size == 2 * SECTORS * 512


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


@pytest.mark.parametrize("machine", SPLIT, indirect=True)
def test_a_driver_that_reuses_requests_gets_no_more_than_there_are_slots(machine):
    """The avail ring runs ahead of the used ring: one head again and again, more often than the queue is long."""
    head, [(place, _)] = machine.post(OUT, 1, b"r" * 512)
    for _ in range(200):
        machine.queue.offer(head)
    machine.queue.kick(force=True)
    while machine.queue.word(machine.queue.used + 2) != 201:
        seen = machine.queue.word(machine.queue.used + 2)
        machine.queue.put_word(machine.queue.avail + 4 + 2 * machine.queue.size, seen)
        if machine.queue.word(machine.queue.used + 2) == seen:
            machine.driver.await_vector(1)
    assert machine.guest.memory.read(place, 1) == bytes([OK])


def test_a_failing_host_is_an_error_to_the_guest_and_a_line_in_the_log(image):
    read_end, write_end = os.pipe()
    with Machine(image) as machine:
        set_log(write_end)
        os.truncate(image, 4096)
        assert machine.do(IN, 8, room=512)[0] == IOERR
        assert machine.do(IN, 0, room=4096) == (OK, bytes(4096), 4097)
        assert os.read(read_end, 4096) == b"vda: host error: cannot read at byte (0x1000): Input/output error\n"
    os.close(read_end)
    os.close(write_end)


def test_two_threads_of_control_do_not_disturb_io(machine):
    """Counters and saves of a running device, asked for while requests fly."""
    stop = threading.Event()
    seen = []

    def ask():
        while not stop.is_set():
            seen.append(machine.device.disk.counters()["write"]["requests"])

    asker = threading.Thread(target=ask)
    asker.start()
    for i in range(200):
        assert machine.do(OUT, i, b"w" * 512)[0] == OK
    stop.set()
    asker.join()
    assert seen == sorted(seen)
    assert machine.device.disk.counters()["write"]["requests"] == 200


def open_for(path):
    """What this process has open of the disk: its file and its engines' rings."""
    links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)]
    return [link for link in links if str(path) in link or "io_uring" in link]


def test_closing_lets_go_of_the_disk(image):
    gc.collect()
    with Machine(image) as machine:
        machine.do(IN, 0, room=512)
        assert open_for(image)
        machine.driver.card.close()
        assert open_for(image) == []
