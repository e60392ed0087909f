"""Virtqueues: what a driver may do with its rings, what it may not, and that a broken ring never harms more than its device.

The console is the device under test: what its output queue reads and what its input queue writes can be seen.
"""

import pytest

from kvmapp.chardev import CharBackend
from kvmapp.layout import HIGH_MEMORY_BASE, LOW_MEMORY_END
from kvmapp.virtio.console import VirtioConsole
from kvmapp.virtio.rng import VirtioRng
from tests.device.virtio_driver import DRIVER_OK, F_EVENT_IDX, F_INDIRECT, INDIRECT, NEEDS_RESET, NEXT, WRITE, Guest, Queue

SIZE = 4 << 20
CAPACITY = 64                            # of the console's chains


class Console:
    def __init__(self, guest, **options):
        self.guest, self.options = guest, options
        self.backend = CharBackend("hvc0")
        self.backend.discard(True)
        self.driver = guest.drive(VirtioConsole("hvc0", guest.memory, self.backend), **options)

    @property
    def input(self):
        return self.driver.queues[0]

    @property
    def output(self):
        return self.driver.queues[1]

    def works(self):
        """Output goes through."""
        self.backend.discard(False)
        self.output.post(readable=[b"fine"])
        self.output.kick()
        self.output.wait()
        return self.backend.take() == b"fine"


@pytest.fixture
def guest():
    with Guest(SIZE) as guest:
        yield guest


@pytest.fixture
def console(guest):
    return Console(guest)


# ---- what a driver may do

def test_direct_descriptors_may_end_in_an_indirect_table(guest, console):
    queue = console.output
    console.backend.discard(False)
    text, table = guest.allocate(64), guest.allocate(32)
    guest.memory.write(text, b"one two three ")
    queue.describe(0, text, 4, NEXT, 1)
    queue.describe(1, table, 32, INDIRECT | WRITE)        # WRITE means nothing here (2.7.5.3.2)
    queue.describe(0, text + 4, 4, NEXT, 1, table)
    queue.describe(1, text + 8, 6, 0, 0, table)
    queue.pending[0] = [], []
    queue.offer(0)
    queue.kick()
    queue.wait()
    assert console.backend.take() == b"one two three "


@pytest.mark.parametrize("size", [1, 2, 64])
@pytest.mark.parametrize("without", [0, F_EVENT_IDX])
def test_indices_wrap_around_at_every_size(guest, size, without):
    console = Console(guest, size=size, without=without)
    queue, rounds = console.output, 0x10000 // size + 3
    if size < 64:
        rounds = 300
    address = guest.allocate(4)
    for _ in range(rounds):
        for _ in range(size):
            queue.post_buffers([(address, 4, 0)])
        queue.kick()
        assert len(queue.wait(size)) == size
    assert console.works()


def test_indices_wrap_around_with_a_small_queue_too(guest):
    console = Console(guest, size=2)
    state = console.driver.card.save()
    console.driver.card.pause()
    queue = state["virtio"]["queues"][1]
    queue["last_avail"] = queue["next_used"] = 0xFFFE
    console.output.next_avail = console.output.next_used = console.output.kicked = 0xFFFE
    for ring in (console.output.avail, console.output.used):
        console.output.put_word(ring + 2, 0xFFFE)
    console.driver.card.restore(state)
    console.driver.card.resume()
    for _ in range(4):
        assert console.works()


def test_a_chain_as_long_as_the_queue(guest, console):
    console.output.post(readable=[b"x"] * CAPACITY)
    console.output.kick()
    assert len(console.output.wait()) == 1
    console.output.post(readable=[b"x"] * CAPACITY, indirect=True)
    console.output.kick()
    assert len(console.output.wait()) == 1


def test_requests_posted_before_driver_ok_are_served_after(guest):
    driver = guest.plug(VirtioRng("rng0", guest.memory))
    driver.negotiate()
    driver.enable_msix()
    queue = Queue(driver, 0)
    queue.enable(vector=1)
    queue.post(writable=[8])
    queue.kick(force=True)
    driver.set_status(DRIVER_OK)
    assert queue.wait()[0].written == 8


# ---- kicks and interrupts that are not wanted

@pytest.mark.parametrize("without", [0, F_EVENT_IDX])
def test_an_idle_device_asks_for_kicks(guest, without):
    """A round asks for the next kick before it shows what it did."""
    console = Console(guest, without=without)
    queue = console.output
    for _ in range(5):
        queue.post(readable=[b"x"])
        queue.kick()
        queue.wait()
        if queue.event_idx:
            assert queue.word(queue.used + 4 + 8 * queue.size) == queue.next_avail
        else:
            assert queue.word(queue.used) == 0


def test_no_interrupt_flag(guest):
    console = Console(guest, without=F_EVENT_IDX)
    queue = console.output
    queue.put_word(queue.avail, 1)
    queue.post(readable=[b"x"])
    queue.kick()
    guest.settle()
    queue.put_word(queue.avail, 0)
    queue.post(readable=[b"y"])
    queue.kick()
    console.driver.await_vector(queue.index + 1)
    assert len(queue.collect()) == 2
    assert not console.driver.interrupted(queue.index + 1)


def test_used_event_says_when_to_interrupt(guest, console):
    queue, vector = console.output, console.output.index + 1
    queue.put_word(queue.avail + 4 + 2 * queue.size, 2)          # after the third
    for sent, wanted in enumerate([False, False, True, False], 1):
        queue.post(readable=[b"x"])
        queue.kick(force=True)
        guest.settle()
        assert len(queue.collect()) == 1
        assert console.driver.interrupted(vector) == wanted, f"after {sent}"


# ---- what a driver may not do: the device says so, and a reset mends it

def loop(queue, guest):
    for index, link in ((0, 1), (1, 2), (2, 1)):
        queue.describe(index, 0x1000, 8, NEXT, link)
    return 0


def self_loop(queue, guest):
    queue.describe(5, 0x1000, 8, NEXT, 5)
    return 5


def indirect_loop(queue, guest):
    table = guest.allocate(64)
    for index, link in ((0, 1), (1, 0)):
        queue.describe(index, 0x1000, 8, NEXT, link, table)
    queue.describe(0, table, 64, INDIRECT)
    return 0


def overlong(queue, guest):
    table = guest.allocate(16 * (CAPACITY + 1))
    for index in range(CAPACITY + 1):
        queue.describe(index, 0x1000, 8, NEXT if index < CAPACITY else 0, index + 1, table)
    queue.describe(0, table, 16 * (CAPACITY + 1), INDIRECT)
    return 0


def head_out_of_range(queue, guest):
    return queue.size


def far_head(queue, guest):
    return 0xFFFF


def next_out_of_range(queue, guest):
    queue.describe(0, 0x1000, 8, NEXT, queue.size)
    return 0


def indirect_next_out_of_range(queue, guest):
    table = guest.allocate(32)
    queue.describe(0, 0x1000, 8, NEXT, 2, table)
    queue.describe(0, table, 32, INDIRECT)
    return 0


def nested_indirect(queue, guest):
    table = guest.allocate(32)
    queue.describe(0, table, 16, INDIRECT, 0, table)
    queue.describe(0, table, 16, INDIRECT)
    return 0


def indirect_with_next(queue, guest):
    table = guest.allocate(32)
    queue.describe(0, 0x1000, 8, 0, 0, table)
    queue.describe(0, table, 16, INDIRECT | NEXT, 1)
    queue.describe(1, 0x1000, 8)
    return 0


def indirect_of_no_length(queue, guest):
    queue.describe(0, 0x1000, 0, INDIRECT)
    return 0


def indirect_of_odd_length(queue, guest):
    queue.describe(0, 0x1000, 24, INDIRECT)
    return 0


def indirect_outside_ram(queue, guest):
    queue.describe(0, SIZE - 16, 32, INDIRECT)
    return 0


def indirect_that_wraps(queue, guest):
    queue.describe(0, 2**64 - 16, 32, INDIRECT)
    return 0


def huge_indirect(queue, guest):
    queue.describe(0, 0, 0xFFFF_FFF0, INDIRECT)
    return 0


def buffer_outside_ram(queue, guest):
    queue.describe(0, SIZE, 1)
    return 0


def buffer_across_the_end(queue, guest):
    queue.describe(0, SIZE - 8, 9)
    return 0


def buffer_that_wraps(queue, guest):
    queue.describe(0, 2**64 - 4, 8)
    return 0


def buffer_in_a_bar(queue, guest):
    queue.describe(0, queue.driver.structures[1], 8)
    return 0


def buffer_of_all_addresses(queue, guest):
    queue.describe(0, 0, 0xFFFF_FFFF)
    return 0


def buffer_of_no_length(queue, guest):
    queue.describe(0, 0x1000, 0)
    return 0


def readable_after_writable(queue, guest):
    queue.describe(0, 0x1000, 8, WRITE | NEXT, 1)
    queue.describe(1, 0x1000, 8)
    return 0


CRIMES = [loop, self_loop, indirect_loop, overlong, head_out_of_range, far_head, next_out_of_range, indirect_next_out_of_range,
          nested_indirect, indirect_with_next, indirect_of_no_length, indirect_of_odd_length, indirect_outside_ram,
          indirect_that_wraps, huge_indirect, buffer_outside_ram, buffer_across_the_end, buffer_that_wraps, buffer_in_a_bar,
          buffer_of_all_addresses, buffer_of_no_length, readable_after_writable]


@pytest.mark.parametrize("commit", CRIMES, ids=lambda crime: crime.__name__)
@pytest.mark.parametrize("index", [0, 1], ids=["receiveq", "transmitq"])
def test_a_broken_chain_stops_the_device_until_its_reset(console, commit, index):
    queue = console.driver.queues[index]
    console.backend.give(b"input that waits for a buffer")
    queue.offer(commit(queue, console.guest))
    queue.kick(force=True)
    console.driver.await_needs_reset()
    assert queue.word(queue.used + 2) == 0
    queue.kick(force=True)
    assert console.driver.status & NEEDS_RESET
    console.driver.start()
    assert not console.driver.status & NEEDS_RESET
    assert console.works()


def test_what_came_before_the_broken_chain_is_done(console):
    queue = console.output
    console.backend.discard(False)
    queue.post(readable=[b"before"])
    queue.describe(40, SIZE, 8)
    queue.offer(40)
    queue.post(readable=[b"after"])
    queue.kick()
    console.driver.await_needs_reset()
    assert len(queue.collect()) == 1
    assert console.backend.take() == b"before"


@pytest.mark.parametrize("ahead", [65, 0x7FFF, 0xFFFF])
def test_an_index_that_jumps(console, ahead):
    console.output.put_word(console.output.avail + 2, ahead)
    console.output.kick(force=True)
    console.driver.await_needs_reset()


def test_indirect_that_was_not_negotiated(guest):
    console = Console(guest, without=F_INDIRECT)
    console.output.post(readable=[b"x"], indirect=True)
    console.output.kick()
    console.driver.await_needs_reset()


def test_a_buffer_across_two_memory_regions():
    with Guest(LOW_MEMORY_END + (1 << 20)) as guest:
        console = Console(guest)
        console.backend.discard(False)
        guest.memory.write(LOW_MEMORY_END - 4, b"low!")
        guest.memory.write(HIGH_MEMORY_BASE, b"high")
        console.output.post_buffers([(LOW_MEMORY_END - 4, 4, 0), (HIGH_MEMORY_BASE, 4, 0)])
        console.output.kick()
        console.output.wait()
        assert console.backend.take() == b"low!high"
        console.output.post_buffers([(LOW_MEMORY_END - 4, 8, 0)])
        console.output.kick()
        console.driver.await_needs_reset()


@pytest.mark.parametrize(("field", "value"), [
    ("queue_size", 0), ("queue_size", 3), ("queue_size", 128), ("queue_size", 0xFFFF),
    ("queue_desc", 0x10_0008), ("queue_driver", 0x10_0001), ("queue_device", 0x10_0002),
    ("queue_desc", SIZE - 16), ("queue_driver", SIZE - 16), ("queue_device", SIZE - 16),
    ("queue_desc_high", 0xFFFF_FFFF), ("queue_driver_high", 0xFFFF_FFFF), ("queue_device_high", 0xFFFF_FFFF),
    ("queue_desc", 0xFFFF_FFF0), ("queue_desc", 0xC000_0000),
])
@pytest.mark.parametrize("late", [False, True], ids=["before DRIVER_OK", "after DRIVER_OK"])
def test_a_queue_that_cannot_be_enabled(guest, field, value, late):
    driver = guest.plug(VirtioRng("rng0", guest.memory))
    driver.negotiate()
    driver.enable_msix()
    driver.put("config_msix_vector", 0)
    if late:
        driver.set_status(DRIVER_OK)
    queue = Queue(driver, 0)
    for name, address in (("queue_desc", queue.desc), ("queue_driver", queue.avail), ("queue_device", queue.used)):
        driver.put(name, address)
    driver.put(field, value)
    driver.put("queue_enable", 1)
    assert driver.get("queue_enable") == 0
    assert driver.status & NEEDS_RESET
    assert driver.interrupted(0) == late
    queue.notify = driver.structures[2]
    queue.kick(force=True)
    driver.set_status(DRIVER_OK)
    driver.start()
    driver.queues[0].post(writable=[8])
    driver.queues[0].kick()
    assert driver.queues[0].wait()[0].written == 8
