"""Packed rings in the hands of drivers who know them, and of those who do not keep the rules."""
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmapp.chardev import CharBackend
from kvmapp.state import StateError
from kvmapp.virtio.console import VirtioConsole
from kvmapp.virtio.rng import VirtioRng
from tests.device.virtio_driver import DRIVER_OK, F_EVENT_IDX, F_INDIRECT, INDIRECT, NEXT, WRITE, Guest
from tests.device.virtio_packed import EVENTS_BY_DESC, EVENTS_DISABLED, F_PACKED, USED, PackedQueue

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def guest():
    with Guest(wiring="packed") as guest:
        yield guest


def start(guest, **options):
    driver = guest.drive(VirtioRng("rng0", guest.memory), **options)
    return driver, driver.queues[0]


@pytest.mark.parametrize("size", [1, 3, 7, 16])
@pytest.mark.parametrize("without", [0, F_EVENT_IDX, F_INDIRECT])
def test_the_ring_goes_round_at_any_size(guest, size, without):
    driver, queue = start(guest, size=size, without=without)
    order = random.Random(size)
    for _ in range(6 * size + 5):
        lengths = [[8] * order.randint(1, min(3, size)) for _ in range(max(1, size // 3))]
        while sum(map(len, lengths)) > size:
            lengths.pop()
        for one in lengths:
            queue.post(writable=one, indirect=bool(driver.features & F_INDIRECT) and order.random() < 0.5)
        queue.kick()
        assert [done.written for done in queue.wait(len(lengths))] == [8 * len(one) for one in lengths]


def test_a_driver_that_wants_no_events_gets_none(guest):
    driver, queue = start(guest, size=8, without=F_EVENT_IDX)
    queue.put_word(queue.avail + 2, EVENTS_DISABLED)
    queue.post(writable=[8])
    queue.kick()
    guest.settle()
    assert len(queue.collect()) == 1 and not driver.interrupted(1)
    assert not queue.word(queue.used + 2) & EVENTS_DISABLED                     # the device wants kicks while it is idle


@pytest.mark.parametrize("ahead", [0, 2, 3])
def test_an_event_at_a_descriptor_comes_when_that_one_is_used(guest, ahead):
    driver, queue = start(guest, size=4)
    for _ in range(3):                                                          # so that what follows goes round the ring's end
        queue.post(writable=[8])
        queue.kick()
        queue.wait()
    guest.settle()
    driver.interrupted(1)                                                       # one may have come after `wait` had seen its request
    place = queue.next_used + ahead
    queue.put_word(queue.avail, place % 4 | queue.wrap(place) << 15)
    queue.put_word(queue.avail + 2, EVENTS_BY_DESC)
    for number in range(4):
        queue.post(writable=[8])
        queue.kick()
        guest.settle()
        assert driver.interrupted(1) == (number == ahead)
        assert len(queue.collect()) == 1


def test_what_waits_in_the_ring_is_taken_back_and_given_again(guest):
    """The console pops a buffer, has nothing for it and unpops it, once a kick."""
    guest.wiring = "packed"
    backend = CharBackend("hvc0")
    driver = guest.drive(VirtioConsole("hvc0", guest.memory, backend), size=4)
    queue = driver.queues[0]
    for number in range(9):
        queue.post(writable=[2, 1])
        queue.kick()
        guest.settle()
        backend.give(bytes([number]))
        [done] = queue.wait()
        assert done.data == bytes([number])


def test_a_ring_begins_at_its_beginning_wherever_a_saved_state_says_it_was(guest):
    """A state that somebody wrote: far behind the ring would be somebody else's memory."""
    driver = guest.plug(VirtioRng("rng0", guest.memory))
    driver.negotiate()
    driver.card.pause()
    state = driver.card.save()
    [queue] = state["virtio"]["queues"]
    queue.update(size=0xFFFF, last_avail=0x7000, next_used=0x7000)
    driver.card.reset()
    driver.card.restore(state)
    driver.card.resume()
    queue = PackedQueue(driver, 0, 8)
    queue.enable()
    driver.set_status(DRIVER_OK)
    queue.post(writable=[8])
    queue.kick(force=True)
    guest.settle()
    assert [done.written for done in queue.collect()] == [8]


def breaks(guest, driver):
    driver.await_needs_reset()
    assert not driver.device.queues[0].enabled or driver.device.queues[0].broken
    driver.start(size=8)
    driver.queues[0].post(writable=[8])
    driver.queues[0].kick()
    assert driver.queues[0].wait()[0].written == 8


@pytest.mark.parametrize("descriptors", [
    [(None, 8, 8, WRITE)],                                                      # an id that is not less than the size
    [(None, 8, 0xFFFF, WRITE)],
    [(None, 0, 0, WRITE)],                                                      # no length
    [(1 << 40, 8, 0, WRITE)],                                                   # not in RAM
    [(None, 8, 0, WRITE | NEXT)] * 8,                                           # a chain round the whole ring, and no end
    [(None, 8, 0, WRITE | NEXT), (None, 16, 0, INDIRECT)],                      # an indirect one that is not alone
    [(None, 16, 0, INDIRECT | NEXT)],
    [(None, 24, 0, INDIRECT)],                                                  # a table of one and a half
    [(1 << 40, 16, 0, INDIRECT)],
    [(None, 8, 0, WRITE | NEXT), (None, 8, 0, 0)],                              # readable after writable
])
def test_a_driver_that_breaks_the_rules_breaks_its_ring_only(guest, descriptors):
    driver, queue = start(guest, size=8)
    for position in reversed(range(len(descriptors))):
        address, length, id, flags = descriptors[position]
        place = guest.allocate(64) if address is None else address
        queue.put(position, place, length, id, flags | queue.available(position))
    queue.next_avail = len(descriptors)
    queue.kick(force=True)
    breaks(guest, driver)


def test_an_id_that_is_under_way_cannot_come_again(guest):
    backend = CharBackend("hvc0", output_size=16)
    driver = guest.drive(VirtioConsole("hvc0", guest.memory, backend), size=8)
    queue = driver.queues[1]
    for position in (1, 0):
        queue.put(position, guest.allocate(64), 8, 3, queue.available(position))
    queue.kick(force=True)
    guest.settle()                                                              # used one after the other: nothing wrong
    assert not driver.device.queues[1].broken
    assert backend.take() == bytes(16)


def test_indirect_needs_the_feature(guest):
    driver, queue = start(guest, size=8, without=F_INDIRECT)
    queue.post_buffers([(guest.allocate(8), 8, WRITE)], indirect=True)
    queue.kick(force=True)
    driver.await_needs_reset()


@pytest.mark.parametrize("field", ["desc", "avail", "used"])
@pytest.mark.parametrize("address", [1 << 40, 0x8_0002])
def test_rings_that_cannot_be_are_refused(guest, field, address):
    driver = guest.plug(VirtioRng("rng0", guest.memory))
    driver.negotiate()
    queue = PackedQueue(driver, 0)
    setattr(queue, field, address)
    driver.put("queue_select", 0)
    for name, value in (("queue_desc", queue.desc), ("queue_driver", queue.avail), ("queue_device", queue.used)):
        driver.put(name, value & 0xFFFF_FFFF)
        driver.put(name + "_high", value >> 32)
    driver.put("queue_enable", 1)
    assert driver.get("queue_enable") == 0 and driver.status & 0x40


def test_state_comes_back_in_the_middle_of_the_ring_and_bad_state_does_not(guest):
    driver, queue = start(guest, size=6)
    for _ in range(8):
        queue.post(writable=[4, 4])
        queue.kick()
        queue.wait()
    driver.card.pause()
    guest.thread.pause()
    state = driver.card.save()
    saved = state["virtio"]["queues"][0]
    assert saved["last_avail"] == saved["next_used"] == 16 % 6 | 1 << 15
    driver.card.reset()
    for wrong in ({"last_avail": 3}, {"last_avail": 6, "next_used": 6}, {"size": 0}, {"size": 65535}, {"used": 1 << 40}, {"desc": 8}):
        with pytest.raises(StateError):
            driver.card.restore({**state, "virtio": {**state["virtio"], "queues": [{**saved, **wrong}]}})
    driver.card.restore(state)
    assert driver.card.save() == state
    guest.thread.resume()
    driver.card.resume()
    for _ in range(8):
        queue.post(writable=[4, 4])
        queue.kick()
        assert queue.wait()[0].written == 8


def test_a_queue_that_is_set_up_after_a_restore_begins_like_any(guest):
    """The machine was saved between the driver's agreement to packed rings and its first queue."""
    driver = guest.plug(VirtioRng("rng0", guest.memory))
    driver.negotiate()
    driver.enable_msix()
    state = driver.card.save()
    driver.card.reset()
    driver.card.restore(state)
    assert driver.card.save() == state
    queue = PackedQueue(driver, 0, 4)
    queue.enable(vector=1)
    driver.set_status(DRIVER_OK)
    for _ in range(6):
        queue.post(writable=[8])
        queue.kick(force=True)
        assert queue.wait()[0].written == 8


def test_a_queue_reset_begins_the_ring_anew(guest):
    driver, queue = start(guest, size=3)
    for _ in range(2):
        queue.post(writable=[8])
        queue.kick()
        queue.wait()
    driver.reset_queue(queue)
    driver.queues = [PackedQueue(driver, 0, 3)]
    driver.queues[0].enable(vector=1)
    driver.queues[0].post(writable=[8])
    driver.queues[0].kick()
    assert driver.queues[0].wait()[0].written == 8


def test_packed_rings_are_offered_only_where_asked_for():
    with Guest() as guest:
        assert not guest.plug(VirtioRng("rng0", guest.memory)).offered() & F_PACKED


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 1 << 25) | st.just(1 << 40), st.integers(0, 64),
                          st.integers(0, 9), st.sampled_from([0, 1, 2, 3, 4, 5, 6]), st.booleans(), st.booleans()), max_size=24),
       st.integers(0, 0xFFFF), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_no_ring_does_harm(writes, event, flags):
    with Guest(wiring="packed") as guest:
        driver, queue = start(guest, size=8)
        queue.put_word(queue.avail, event)
        queue.put_word(queue.avail + 2, flags)
        for position, address, length, id, bits, avail, used in writes:
            queue.put(position, address, length, id, bits | avail << 7 | (USED if used else 0))
            queue.kick(force=True)
        guest.settle()
        driver.start(size=8)
        driver.queues[0].post(writable=[8])
        driver.queues[0].kick()
        assert driver.queues[0].wait()[0].written == 8
