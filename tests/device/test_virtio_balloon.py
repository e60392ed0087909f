"""The balloon: pages that go back to the host read as zeroes here, and nothing but the pages named goes."""
import struct

import pytest

from kvmapp.state import StateError
from kvmapp.virtio.balloon import VirtioBalloon
from tests.device.virtio_driver import NEEDS_RESET, WRITE, Guest, Queue

SIZE = 16 << 20
PAGE = 4096
INFLATEQ, DEFLATEQ, STATSQ, HINTQ, REPORTINGQ = range(5)
F_STATS, F_DEFLATE_ON_OOM, F_REPORTING = 1 << 1, 1 << 2, 1 << 5
FILL = b"\xA5" * PAGE


class Balloon:
    def __init__(self, guest, **options):
        self.guest = guest
        self.device = VirtioBalloon("balloon0", guest.memory, **options)
        self.driver = guest.drive(self.device)
        self.queues = self.driver.queues

    def fill(self, first, count):
        """Makes these pages the guest's."""
        for page in range(first, first + count):
            self.guest.memory.write(page * PAGE, FILL)

    def gone(self, first, count):
        """Which of these pages are no longer what `fill` wrote."""
        return [page for page in range(first, first + count) if self.guest.memory.read(page * PAGE, PAGE) != FILL]

    def inflate(self, pages):
        queue = self.queues[INFLATEQ]
        queue.post(readable=[struct.pack(f"<{len(pages)}I", *pages)])
        queue.kick()
        assert queue.wait()[0].written == 0


@pytest.fixture
def guest():
    with Guest(SIZE) as guest:
        yield guest


@pytest.fixture
def balloon(guest):
    return Balloon(guest)


def test_features_and_config(guest):
    driver = guest.plug(VirtioBalloon("balloon0", guest.memory, deflate_on_oom=True))
    assert driver.offered() & 0xFF_FFFF == F_STATS | F_DEFLATE_ON_OOM | F_REPORTING
    assert driver.peek(0, 4) == 0x1045_1AF4
    assert driver.config(0, 8) == 0


def test_memory_that_the_host_is_to_hold_stays():
    with Guest(SIZE, held=True) as guest:
        balloon = Balloon(guest)
        balloon.fill(1000, 2)
        balloon.inflate([1000, 1001])
        assert balloon.gone(1000, 2) == []


@pytest.mark.parametrize("pages", [
    [1000], [1000, 1001, 1002], [1002, 1001, 1000], [1000, 1002, 1004], [1003, 1000, 1001], [1001, 1000, 1002], [1000, 1000],
])
def test_inflated_pages_go_and_no_others(balloon, pages):
    balloon.fill(990, 30)
    balloon.inflate(pages)
    assert balloon.gone(990, 30) == sorted(set(pages))


def test_the_target_reaches_the_guest_and_its_answer_the_host(balloon):
    balloon.device.inflate_to(8 << 20)
    balloon.driver.await_vector(0)
    assert balloon.driver.config(0, 4) == (8 << 20) // PAGE
    balloon.driver.put_config(4, 4, 100)
    assert (balloon.device.target, balloon.device.actual) == (8 << 20, 100 * PAGE)
    balloon.driver.put_config(0, 4, 7)
    assert balloon.device.target == 8 << 20
    with pytest.raises(ValueError, match="balloon0: a balloon of 17 MiB is larger"):
        balloon.device.inflate_to(17 << 20)
    balloon.driver.set_status(0)
    assert (balloon.device.target, balloon.device.actual) == (8 << 20, 0)


@pytest.mark.parametrize("wiring", ["legacy", "legacy-mmio"])
def test_a_legacy_driver_answers_byte_by_byte(wiring):
    """As Linux stores to any legacy config space."""
    with Guest(SIZE, wiring=wiring) as guest:
        balloon = Balloon(guest)
        for place, byte in enumerate((0x1234).to_bytes(4, "little")):
            balloon.driver.put_config(4 + place, 1, byte)
        assert balloon.device.actual == 0x1234 * PAGE
        balloon.driver.put_config(3, 1, 7)
        assert (balloon.device.target, balloon.device.actual) == (0, 0x1234 * PAGE)


def test_deflating_needs_nothing_but_an_answer(balloon):
    queue = balloon.queues[DEFLATEQ]
    balloon.fill(1000, 1)
    queue.post(readable=[struct.pack("<I", 1000)])
    queue.kick()
    queue.wait()
    assert balloon.gone(1000, 1) == []


@pytest.mark.parametrize("index", [HINTQ, REPORTINGQ])
def test_free_pages_are_taken_back_from_either_queue_that_drivers_use(balloon, index):
    balloon.fill(1000, 20)
    queue = balloon.queues[index]
    queue.post_buffers([(1002 * PAGE, 4 * PAGE, WRITE), (1010 * PAGE + 1, 2 * PAGE, WRITE), (1015 * PAGE + 1, 7, WRITE)])
    queue.kick()
    queue.wait()
    assert balloon.gone(1000, 20) == [1002, 1003, 1004, 1005, 1011], "only whole pages"


def test_a_driver_without_reporting_has_three_queues(guest):
    driver = guest.plug(VirtioBalloon("balloon0", guest.memory))
    driver.negotiate(without=F_REPORTING)
    driver.enable_msix()
    for index in range(3):
        Queue(driver, index).enable(vector=index + 1)
    driver.set_status(4)
    assert not driver.status & NEEDS_RESET


def test_statistics_stay_until_newer_ones_are_asked_for(balloon):
    queue = balloon.queues[STATSQ]
    assert balloon.device.statistics() == ({}, 0)
    balloon.device.poll_statistics()                     # nothing to give back yet
    balloon.guest.settle()
    for free in (1000, 2000):
        figures = struct.pack("<HQHQHQ", 4, free, 5, 1 << 30, 999, 5)
        queue.post(readable=[figures])
        queue.kick(force=True)
        balloon.guest.settle()
        assert balloon.device.statistics()[0] == {"free_memory": free, "total_memory": 1 << 30}
        assert queue.collect() == []
        balloon.device.poll_statistics()
        assert len(queue.wait()) == 1


def test_who_asks_for_counters_gets_the_latest_and_makes_the_guest_find_newer_ones(balloon):
    queue = balloon.queues[STATSQ]
    assert balloon.device.stats() == {}
    balloon.guest.settle()
    queue.post(readable=[struct.pack("<HQ", 4, 1000)])
    queue.kick(force=True)
    balloon.guest.settle()
    figures = balloon.device.stats()
    assert figures.pop("age") in range(60) and figures == {"free_memory": 1000}
    assert len(queue.wait()) == 1


def test_deflate_on_oom_is_offered_when_asked_for(guest):
    assert [VirtioBalloon("balloon0", guest.memory, deflate_on_oom=wanted).offered >> 2 & 1 for wanted in (False, True)] == [0, 1]


def test_statistics_move_with_the_guest(balloon):
    queue = balloon.queues[STATSQ]
    queue.post(readable=[struct.pack("<HQ", 0, 77)])
    queue.kick(force=True)
    balloon.guest.settle()
    assert balloon.device.statistics()[0]
    balloon.device.inflate_to(PAGE)
    card = balloon.driver.card
    card.pause()
    state = card.save()
    card.reset()
    assert balloon.device.statistics() == ({}, 0)
    card.restore(state)
    assert card.save() == state
    card.resume()
    balloon.guest.settle()
    assert balloon.device.statistics()[0]
    balloon.device.poll_statistics()
    assert len(queue.wait()) == 1


@pytest.mark.parametrize("change", [{"num_pages": SIZE // PAGE + 1}, {"actual": 1 << 32}, {"actual": "1"}, {"x": 1}])
def test_a_state_it_cannot_trust_changes_nothing(balloon, change):
    balloon.driver.card.pause()
    before = balloon.driver.card.save()
    virtio = before["virtio"]
    with pytest.raises(StateError, match="balloon0"):
        balloon.driver.card.restore({**before, "virtio": {**virtio, "device": {**virtio["device"], **change}}})
    assert balloon.driver.card.save() == before


# ---- hostile drivers

@pytest.mark.parametrize("page", [SIZE // PAGE, 0xC0000, 0xFFFF_FFFF])
def test_pages_that_are_not_ram_are_passed_over(balloon, page):
    balloon.fill(1000, 2)
    balloon.inflate([1000, page, 1001])
    assert balloon.gone(1000, 2) == [1000, 1001]
    assert not balloon.driver.status & NEEDS_RESET


def test_a_run_across_the_end_of_ram_is_passed_over(balloon):
    last = SIZE // PAGE - 1
    balloon.fill(last, 1)
    balloon.inflate([last, last + 1])
    assert balloon.gone(last, 1) == []


def test_a_request_without_end_is_cut(balloon):
    """32 buffers of 12 MiB each would name a hundred million pages."""
    queue = balloon.queues[INFLATEQ]
    balloon.guest.memory.write(0, bytes(12 << 20))
    balloon.guest.free = 12 << 20
    queue.post_buffers([(0, 12 << 20, 0)] * 32)
    queue.kick()
    assert len(queue.wait()) == 1


def test_odd_requests(balloon):
    for queue in balloon.queues:
        queue.post(readable=[b"\x01\x02\x03"])
        queue.kick(force=True)
        queue.post(writable=[8])
        queue.kick(force=True)
    for queue in balloon.queues:
        if queue.index != STATSQ:
            assert len(queue.wait(2)) == 2
    assert not balloon.driver.status & NEEDS_RESET
