"""The modern virtio-pci transport: registers at every width, status and features, interrupts both ways, save and restore."""
import itertools

import pytest

from kvmapp.chardev import CharBackend
from kvmapp.layout import PCI_MMIO32_BASE
from kvmapp.state import StateError
from kvmapp.virtio.console import VirtioConsole
from kvmapp.virtio.rng import VirtioRng
from tests.device.virtio_driver import (
    ACKNOWLEDGE,
    COMMON,
    DRIVER,
    DRIVER_OK,
    F_EVENT_IDX,
    F_INDIRECT,
    F_RING_RESET,
    F_VERSION_1,
    FAILED,
    FEATURES_OK,
    MSI_ADDRESS,
    NO_VECTOR,
    Guest,
    Queue,
)

SIZE = 4 << 20
BAR, BAR_SIZE = 1, 0x8000
COMMAND, MEMORY, MASTER, INTX_DISABLE = 4, 2, 4, 0x400


@pytest.fixture
def guest():
    with Guest(SIZE) as guest:
        yield guest


@pytest.fixture
def driver(guest):
    """An entropy device, found but not yet initialized."""
    return guest.plug(VirtioRng("rng0", guest.memory))


def entropy(driver, count=8):
    """One request, served."""
    queue = driver.queues[0]
    queue.post(writable=[count])
    queue.kick()
    return queue.wait()[0].written == count


# ---- identity

def test_identity(guest, driver):
    assert driver.peek(0, 4) == 0x1044_1AF4
    assert driver.peek(8, 4) == 0x00FF_0001
    assert driver.peek(0x2C, 4) == 0x1100_1AF4
    console = guest.plug(VirtioConsole("hvc0", guest.memory, CharBackend("hvc0")))
    assert console.peek(0, 4) == 0x1043_1AF4
    assert console.peek(8, 4) == 0x0780_0001
    assert set(console.structures) == {1, 2, 3, 4}
    assert set(driver.structures) == {1, 2, 3}, "a device without config space has no structure for it"
    assert console.get("num_queues") == 2


def test_capabilities_lie_inside_the_bar_and_do_not_overlap(guest):
    driver = guest.plug(VirtioConsole("hvc0", guest.memory, CharBackend("hvc0")))
    spans, offset = [], driver.peek(0x34, 1)
    while offset:
        if driver.peek(offset, 1) == 9 and driver.peek(offset + 3, 1) != 5:
            assert driver.peek(offset + 4, 1) == BAR
            spans.append((driver.peek(offset + 8, 4), driver.peek(offset + 12, 4)))
        offset = driver.peek(offset + 1, 1)
    spans.sort()
    assert all(start + length <= after for (start, length), (after, _) in itertools.pairwise(spans))
    assert spans[-1][0] + spans[-1][1] <= BAR_SIZE


# ---- features and status

def test_features_offered(driver):
    assert driver.offered() == F_VERSION_1 | F_INDIRECT | F_EVENT_IDX | F_RING_RESET
    driver.put("device_feature_select", 2)
    assert driver.get("device_feature") == 0


@pytest.mark.parametrize("features", [0, F_INDIRECT, F_VERSION_1 | 1, F_VERSION_1 | 1 << 63, F_VERSION_1 | 1 << 34])
def test_features_that_cannot_be_had_are_refused(driver, features):
    driver.set_status(ACKNOWLEDGE)
    driver.set_status(DRIVER)
    driver.want(features)
    driver.set_status(FEATURES_OK)
    assert driver.status == ACKNOWLEDGE | DRIVER
    driver.set_status(DRIVER_OK)
    assert driver.status == ACKNOWLEDGE | DRIVER
    driver.start()
    assert entropy(driver)


def test_features_are_settled_at_features_ok(driver):
    driver.negotiate(F_VERSION_1 | F_INDIRECT)
    driver.want(F_VERSION_1 | F_EVENT_IDX)
    assert driver.device.features == driver.device.wanted == F_VERSION_1 | F_INDIRECT
    driver.put("driver_feature_select", 0)
    assert driver.get("driver_feature") == F_INDIRECT
    driver.put("driver_feature_select", 7)
    driver.put("driver_feature", 0xFFFF_FFFF)
    assert driver.get("driver_feature") == 0


def test_status_bits_are_only_added(driver):
    driver.start()
    driver.put("device_status", ACKNOWLEDGE)
    assert driver.status == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    driver.put("device_status", 0xFF)
    assert driver.status == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED
    driver.put("device_status", 0)
    assert driver.status == 0


def test_a_reset_forgets_everything(driver):
    fresh = driver.card.save()
    driver.start()
    assert entropy(driver)
    driver.put("device_status", 0)
    after = driver.card.save()
    assert {**after, "pci": None} == {**fresh, "pci": None}


# ---- the common structure

def test_every_width_reads_the_same_bytes(driver):
    driver.start()
    base = driver.structures[1]
    whole = bytes(driver.guest.mmio.read(base + offset, 1) for offset in range(0x48))
    assert whole[0x3C:] == bytes(12)
    for size in (2, 4, 8):
        for offset in range(0x48 - size + 1):
            assert driver.guest.mmio.read(base + offset, size) == int.from_bytes(whole[offset:offset + size], "little")


def test_a_part_of_a_field_cannot_be_stored(driver):
    base = driver.structures[1]
    driver.guest.mmio.write(base + COMMON["queue_desc"][0], 1, 0xFF)
    driver.guest.mmio.write(base + COMMON["queue_desc"][0] + 2, 2, 0xFF)
    driver.guest.mmio.write(base + COMMON["queue_size"][0], 1, 1)
    assert (driver.get("queue_desc"), driver.get("queue_size")) == (0, 64)


def test_a_wide_store_reaches_every_field_it_covers(driver):
    base = driver.structures[1]
    driver.guest.mmio.write(base + COMMON["queue_desc"][0], 8, 0x1234_5678_9ABC_DEF0)
    assert (driver.get("queue_desc"), driver.get("queue_desc_high")) == (0x9ABC_DEF0, 0x1234_5678)
    driver.guest.mmio.write(base + COMMON["queue_size"][0], 4, 1 << 16 | 16)
    assert (driver.get("queue_size"), driver.get("queue_msix_vector")) == (16, 1)


def test_a_queue_that_is_not_there(driver):
    driver.put("queue_select", 1)
    assert driver.get("queue_select") == 1
    for field in COMMON:
        if field.startswith("queue_") and field != "queue_select":
            driver.put(field, 1)
            assert driver.get(field) == 0, field


def test_an_enabled_queue_cannot_be_changed(driver):
    driver.start()
    driver.put("queue_select", 0)
    before = {field: driver.get(field) for field in COMMON}
    for field in COMMON:
        if field.startswith("queue_") and field not in ("queue_select", "queue_msix_vector", "queue_reset"):
            driver.put(field, 0x10)
    driver.put("queue_enable", 0)
    assert {field: driver.get(field) for field in COMMON} == before
    assert entropy(driver)


def test_read_only_fields(driver):
    before = {field: driver.get(field) for field in COMMON}
    for field in ("device_feature", "num_queues", "config_generation", "queue_notify_off", "queue_notify_data"):
        driver.put(field, 0xFFFF_FFFF)
    assert {field: driver.get(field) for field in COMMON} == before


def test_queue_reset_must_be_negotiated(driver):
    driver.start(without=F_RING_RESET)
    driver.put("queue_select", 0)
    driver.put("queue_reset", 1)
    assert driver.get("queue_enable") == 1


# ---- interrupts

@pytest.mark.parametrize("vector", [2, 100, 0xFFFE])
def test_a_vector_that_is_not_there_reads_back_as_none(driver, vector):
    driver.put("config_msix_vector", vector)
    driver.put("queue_msix_vector", vector)
    assert (driver.get("config_msix_vector"), driver.get("queue_msix_vector")) == (NO_VECTOR, NO_VECTOR)


def test_no_vector_means_no_interrupt(driver):
    driver.start()
    driver.put("queue_select", 0)
    driver.put("queue_msix_vector", NO_VECTOR)
    queue = driver.queues[0]
    queue.post(writable=[8])
    queue.kick()
    driver.guest.settle()
    assert len(queue.collect()) == 1
    assert not driver.interrupted(0)
    assert not driver.interrupted(1)
    assert driver.isr() == 0


def test_a_masked_vector_waits(driver):
    driver.start()
    table = driver.bar(BAR) + 0x4000
    driver.guest.mmio.write(table + 16 + 12, 4, 1)
    queue = driver.queues[0]
    queue.post(writable=[8])
    queue.kick()
    driver.guest.settle()
    assert len(queue.collect()) == 1
    assert not driver.interrupted(1)
    assert driver.guest.mmio.read(driver.bar(BAR) + 0x6000, 8) == 2
    driver.guest.mmio.write(table + 16 + 12, 4, 0)
    assert driver.interrupted(1)


def test_the_pin_and_the_isr_without_msix(driver):
    driver.start(msix=False)
    queue = driver.queues[0]
    for _ in range(3):
        queue.put_word(queue.avail + 4 + 2 * queue.size, queue.next_used)
        queue.post(writable=[8])
        queue.kick()
        driver.await_pin()
        assert driver.peek(6, 2) & 8
        assert driver.isr() == 1
        driver.await_pin(False)
        assert driver.isr() == 0
        assert len(queue.collect()) == 1


def test_a_config_change_on_the_pin(guest):
    device = VirtioConsole("hvc0", guest.memory, CharBackend("hvc0"))
    driver = guest.drive(device, msix=False)
    device.resize(100, 30)
    driver.await_pin()
    assert driver.isr() == 2
    device.resize(101, 30)
    driver.put("device_status", 0)
    driver.await_pin(False)
    assert driver.isr() == 0


# ---- the card on its bus

def test_kicks_follow_the_bar(driver):
    driver.start()
    assert entropy(driver)
    driver.poke(0x10 + 4 * BAR, 4, PCI_MMIO32_BASE + 0x10_0000)
    driver.find_structures()
    driver.queues[0].notify = driver.structures[2]
    assert driver.structures[1] == PCI_MMIO32_BASE + 0x10_0000
    assert entropy(driver)


def test_without_bus_mastering_guest_memory_is_left_alone(driver):
    driver.start()
    assert entropy(driver)
    driver.poke(COMMAND, 2, MEMORY)
    queue = driver.queues[0]
    queue.post(writable=[8])
    queue.kick()
    driver.guest.settle()
    assert queue.collect() == []
    driver.poke(COMMAND, 2, MEMORY | MASTER)
    assert queue.wait()[0].written == 8


def test_the_bar_seen_through_config_space(guest):
    driver = guest.plug(VirtioConsole("hvc0", guest.memory, CharBackend("hvc0"), cols=80, rows=25))
    window = driver.windows

    def through(offset, length, value=None):
        driver.poke(window + 4, 1, BAR)
        driver.poke(window + 8, 4, offset)
        driver.poke(window + 12, 4, length)
        if value is None:
            return driver.peek(window + 16, length)
        driver.poke(window + 16, length, value)
        return None

    assert through(0x2000, 2) == 80
    assert through(0x12, 2) == 2
    through(0x14, 1, ACKNOWLEDGE)
    assert driver.status == ACKNOWLEDGE
    through(0x4000, 4, MSI_ADDRESS)
    assert driver.guest.mmio.read(driver.bar(BAR) + 0x4000, 4) == MSI_ADDRESS
    driver.poke(window + 4, 1, 0)
    assert driver.peek(window + 16, 4) == 0
    for offset, length in ((0x14, 3), (0x15, 2), (BAR_SIZE, 4), (0xFFFF_FFFC, 4), (0xFFFF_FFFF, 1), (0x14, 0), (0x14, 2**32 - 1)):
        driver.poke(window + 4, 1, BAR)
        driver.poke(window + 8, 4, offset)
        driver.poke(window + 12, 4, length)
        driver.peek(window + 16, 4)
        driver.poke(window + 16, 4, 0)
    assert driver.status == ACKNOWLEDGE


# ---- save and restore

def moved(old):
    """Another machine with the memory of `old` and the state of its card; the driver goes on there."""
    old.card.pause()
    state = old.card.save()
    guest = Guest(SIZE)
    guest.memory.write(0, old.guest.memory.read(0, SIZE))
    driver = guest.plug(VirtioRng("rng0", guest.memory))
    driver.card.pause()
    driver.card.reset()
    driver.card.restore(state)
    assert driver.card.save() == state
    driver.find_structures()
    guest.free = old.guest.free
    driver.features = old.features
    for queue in old.queues:
        queue.driver, queue.memory = driver, guest.memory
        driver.queues.append(queue)
    return driver


def test_a_live_queue_moves_with_its_requests(driver):
    driver.start()
    assert entropy(driver)
    driver.card.pause()
    queue = driver.queues[0]
    for _ in range(3):
        queue.post(writable=[16])
    queue.kick()
    again = moved(driver)
    try:
        again.card.resume()
        assert [done.written for done in queue.wait(3)] == [16, 16, 16]
        assert again.card.vectors[1].message == (MSI_ADDRESS, 0x41)
        assert entropy(again)
        again.set_status(0)
        again.start()
        assert entropy(again)
    finally:
        again.guest.close()


def test_a_driver_half_way_through_goes_on_elsewhere(driver):
    driver.negotiate()
    driver.enable_msix()
    queue = Queue(driver, 0)
    driver.queues = [queue]
    driver.put("queue_desc", queue.desc)
    driver.put("queue_size", 32)
    again = moved(driver)
    try:
        again.card.resume()
        assert (again.get("queue_desc"), again.get("queue_size")) == (queue.desc, 32)
        queue.size = 32
        queue.enable(vector=1)
        again.set_status(DRIVER_OK)
        assert entropy(again)
    finally:
        again.guest.close()


def within(state, *path, **change):
    """A copy of the state with this change in the dict at `path`."""
    if not path:
        return {**state, **change}
    inner = state[path[0]]
    if isinstance(inner, list):
        return {**state, path[0]: [within(each, *path[1:], **change) for each in inner]}
    return {**state, path[0]: within(inner, *path[1:], **change)}


@pytest.mark.parametrize(("path", "change"), [
    ((), {"version": 2}), ((), {"more": 1}), ((), {"isr": 4}), ((), {"config_vector": 2}), ((), {"queue_vectors": [1, 1]}),
    ((), {"queue_vectors": [7]}), ((), {"queue_select": 1 << 16}), (("pci",), {"config": bytes(4096)}), (("pci",), {"intx": 2}),
    (("virtio",), {"version": 9}), (("virtio",), {"status": 0x10F}), (("virtio",), {"status": 0x2F}),
    (("virtio",), {"status": 7}), (("virtio",), {"driver_features": 1 << 63 | F_VERSION_1}), (("virtio",), {"queues": []}),
    (("virtio",), {"queues": [1]}), (("virtio",), {"device": {}}), (("virtio",), {"device": {"version": 1, "more": 1}}),
    *((("virtio", "queues"), change) for change in (
        {"size": 63}, {"size": 128}, {"desc": SIZE}, {"avail": 2**64 - 2}, {"used": 1 << 64}, {"used": 2}, {"last_avail": 500},
        {"enabled": 1}, {"broken": None}, {"next_used": -1}, {"version": 0})),
])
def test_a_state_it_cannot_trust_changes_nothing(driver, path, change):
    driver.start()
    assert entropy(driver)
    driver.card.pause()
    before = driver.card.save()
    with pytest.raises(StateError, match="rng0"):
        driver.card.restore(within(before, *path, **change))
    assert driver.card.save() == before
    driver.card.resume()
    assert entropy(driver)
