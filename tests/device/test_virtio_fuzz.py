"""Virtio at random: registers, configuration space, rings and tables. Nothing crashes or hangs, and a reset mends all of it."""
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmapp.chardev import CharBackend
from kvmapp.virtio.balloon import VirtioBalloon
from kvmapp.virtio.console import VirtioConsole
from kvmapp.virtio.rng import VirtioRng
from tests.device.virtio_driver import COMMON, INDIRECT, NEEDS_RESET, NEXT, WRITE, Guest

SIZE = 4 << 20
BAR, BAR_SIZE = 1, 0x8000

FIELDS = [offset for offset, _ in COMMON.values()]
OFFSETS = st.one_of(st.sampled_from(FIELDS), st.sampled_from([0x1000, 0x2000, 0x3000, 0x4000, 0x4010, 0x6000]),
                    st.integers(0, BAR_SIZE - 1))
VALUES = st.one_of(st.integers(0, 0xFF), st.sampled_from([0, 0xF, 0x10_0000, 0xFFFF, 0xFFFF_FFFF, 2**64 - 1]),
                   st.integers(0, 2**64 - 1))
STORES = st.tuples(st.just("bar"), OFFSETS, st.sampled_from([1, 2, 4, 8]), VALUES)
LOADS = st.tuples(st.just("load"), OFFSETS, st.sampled_from([1, 2, 4, 8]), st.none())
CONFIGS = st.tuples(st.just("config"), st.integers(0, 255), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1))


@pytest.fixture(scope="module")
def console():
    with Guest(SIZE) as guest:
        yield guest.plug(VirtioConsole("hvc0", guest.memory, CharBackend("hvc0")))


@settings(max_examples=150, deadline=None)
@given(started=st.booleans(), accesses=st.lists(st.one_of(STORES, LOADS, CONFIGS), max_size=60))
def test_whatever_was_stored_a_reset_mends_the_card(console, started, accesses):
    """Registers and configuration space, at random: what comes of it can be saved and restored, and is gone after a reset."""
    driver, guest = console, console.guest
    guest.free = 1 << 20
    fresh = driver.card.save()
    bar = driver.bar(BAR)
    if started:
        driver.start()
    for kind, offset, size, value in accesses:
        if kind == "bar":
            guest.mmio.write(bar + offset, size, value)
        elif kind == "load":
            assert 0 <= guest.mmio.read(bar + offset, size) < 1 << 8 * size
        else:
            driver.poke(offset, size, value)
    driver.card.pause()
    saved = driver.card.save()
    driver.card.reset()
    driver.card.restore(saved)
    assert driver.card.save() == saved
    driver.card.reset()
    driver.card.resume()
    guest.host.assign_resources()
    assert driver.card.save() == fresh
    driver.find_structures()
    driver.start()
    queue = driver.queues[1]
    queue.post(readable=[b"x"])
    queue.kick()
    queue.wait()
    driver.card.reset()
    guest.host.assign_resources()


# ---- rings

LENGTHS = st.one_of(st.integers(0, 4096), st.sampled_from([16, 32, 160, 2**31, 2**32 - 1]))
ADDRESSES = st.one_of(st.integers(0x10_0000, 0x10_8000), st.sampled_from([0, SIZE - 16, SIZE, 2**64 - 16, 0xC000_0000]))
FLAGS = st.one_of(st.sampled_from([0, WRITE, NEXT, NEXT | WRITE, INDIRECT]), st.integers(0, 0xFFFF))
LINKS = st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF))
TABLES = st.lists(st.tuples(ADDRESSES, LENGTHS, FLAGS, LINKS), min_size=1, max_size=10)
HEADS = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF)), min_size=1, max_size=8)


@pytest.fixture(scope="module", params=[
    lambda memory: VirtioRng("rng0", memory),
    lambda memory: VirtioConsole("hvc0", memory, discarding()),
    lambda memory: VirtioBalloon("balloon0", memory),
], ids=["rng", "console", "balloon"])
def device(request):
    with Guest(SIZE) as guest:
        yield guest.plug(request.param(guest.memory))


def discarding():
    backend = CharBackend("hvc0")
    backend.discard(True)
    return backend


@settings(max_examples=100, deadline=None)
@given(table=TABLES, indirect=TABLES, heads=HEADS, place=st.integers(0x10_0000, 0x10_8000))
def test_whatever_the_rings_hold_the_device_ends_its_round(device, table, indirect, heads, place):
    """Every queue gets these descriptors, and an indirect table where some of them may point. The device takes them all or says
    that it is broken; either way it stops, and works again after its reset."""
    driver, guest = device, device.guest
    guest.free = 2 << 20
    driver.start()
    guest.memory.write(place, b"".join(struct.pack("<QIHH", *entry) for entry in indirect))
    for queue in driver.queues:
        for index, entry in enumerate(table):
            queue.describe(index, *entry)
        for head in heads:
            queue.offer(head)
        queue.kick(force=True)
    guest.settle()
    driver.card.pause()
    saved = driver.card.save()
    driver.card.restore(saved)
    assert driver.card.save() == saved
    for queue, state in zip(driver.queues, saved["virtio"]["queues"], strict=True):
        assert queue.word(queue.used + 2) == state["next_used"] == state["last_avail"] <= len(heads)
        assert not state["broken"] or driver.status & NEEDS_RESET
    driver.card.resume()
    driver.set_status(0)
    assert driver.status == 0
