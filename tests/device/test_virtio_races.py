"""Virtqueues whose driver does not stand still: kicks at the wrong instant, resets in the middle, tables that change under the device."""
import os
import struct
import threading

import pytest

from kvmapp.layout import PCI_ECAM_BASE
from kvmapp.memory import GuestMemory
from kvmapp.virtio.fs import VirtioFs
from kvmapp.virtio.rng import VirtioRng
from tests.device.vhost_user_backend import SET_ERR, SET_KICK, Backend
from tests.device.virtio_driver import F_EVENT_IDX, INDIRECT, NEEDS_RESET, NEXT, WRITE, Guest, Queue
from tests.device.virtio_wirings import ALL
from tests.waiting import until

SIZE = 4 << 20


@pytest.fixture
def guest():
    with Guest(SIZE) as guest:
        yield guest


@pytest.mark.parametrize("without", [0, F_EVENT_IDX])
@pytest.mark.parametrize("wiring", ALL)
def test_no_kick_is_lost_at_the_end_of_a_round(wiring, without):
    """The second request comes while the device finds its ring empty and asks for kicks: sooner or later at the very instant between
    its look and its wish."""
    with Guest(SIZE, wiring=wiring) as guest:
        queue = guest.drive(VirtioRng("rng0", guest.memory), without=without).queues[0]
        start = guest.free
        for pause in range(10_000):
            guest.free = start
            queue.post(writable=[8])
            queue.kick()
            for _ in range(pause % 100 * 4):
                pass
            queue.post(writable=[8])
            queue.kick()
            assert [done.written for done in queue.wait(2)] == [8, 8]


def test_a_driver_that_never_stops_cannot_keep_the_device_from_pausing(guest):
    """The ring is always full again: without a bound on a round the I/O thread would never let go of the queue."""
    driver = guest.drive(VirtioRng("rng0", guest.memory), without=F_EVENT_IDX)
    queue = driver.queues[0]
    address = guest.allocate(4)
    for index in range(queue.size):
        queue.describe(index, address, 4, WRITE)
    stop = threading.Event()

    def flood():
        while not stop.is_set():
            queue.put_word(queue.avail + 2, queue.word(queue.used + 2) + queue.size)
            guest.mmio.write(queue.notify, 2, 0)

    flooder = threading.Thread(target=flood)
    flooder.start()
    try:
        for _ in range(20):
            driver.await_vector(1)
            driver.card.pause()
            used = queue.word(queue.used + 2)
            guest.settle()
            assert queue.word(queue.used + 2) == used
            driver.card.resume()
        assert not driver.status & NEEDS_RESET
    finally:
        stop.set()
        flooder.join()


@pytest.mark.parametrize("field", ["device_status", "queue_reset"])
def test_a_reset_in_the_middle_of_work_leaves_guest_memory_alone(guest, field):
    driver = guest.drive(VirtioRng("rng0", guest.memory))
    for _ in range(30):
        queue = driver.queues[0]
        for _ in range(queue.size // 4):
            queue.post(writable=[4096, 4096])
        queue.kick()
        driver.put("queue_select", 0)
        driver.put(field, 0 if field == "device_status" else 1)
        after = guest.memory.read(0, SIZE)
        assert driver.get("queue_enable") == 0
        queue.kick(force=True)
        driver.card.pause()
        assert guest.memory.read(0, SIZE) == after
        driver.card.resume()
        guest.free = 1 << 20
        driver.start()


def test_a_queue_works_again_after_its_reset(guest):
    driver = guest.drive(VirtioRng("rng0", guest.memory))
    for _ in range(3):
        driver.queues[0].post(writable=[8])
        driver.queues[0].kick()
        assert driver.queues[0].wait()[0].written == 8
        driver.put("queue_select", 0)
        driver.put("queue_reset", 1)
        assert (driver.get("queue_reset"), driver.get("queue_enable")) == (0, 0)
        driver.queues[0] = Queue(driver, 0, 16)
        driver.queues[0].enable(vector=1)


def test_descriptors_that_change_under_the_device_do_no_harm(guest):
    """A second vCPU rewrites the tables all the while; the device may break, the host may not."""
    driver = guest.drive(VirtioRng("rng0", guest.memory), without=F_EVENT_IDX)
    stop = threading.Event()

    def scribble():
        flip = 0
        while not stop.is_set():
            queue = driver.queues[0]
            flip += 1
            entry = struct.pack("<QIHH", (0x1000, SIZE - 2, 2**64 - 1)[flip % 3], (4, 0, 0xFFFF_FFFF)[flip // 3 % 3],
                                (WRITE, WRITE | NEXT, INDIRECT, 0xFFFF)[flip % 4], flip % 70)
            guest.memory.write(queue.desc, entry * queue.size)

    scribbler = threading.Thread(target=scribble)
    scribbler.start()
    try:
        rounds = broken = 0
        while rounds < 200 or not broken:                    # the other one may have come to a stop where its tables are good ones
            rounds += 1
            queue = driver.queues[0]
            for head in range(8):
                queue.offer(head)
            queue.kick(force=True)
            driver.await_vector(0, 1)
            if driver.status & NEEDS_RESET:
                broken += 1
                guest.free = 1 << 20
                driver.start(without=F_EVENT_IDX)
        assert broken
    finally:
        stop.set()
        scribbler.join()


@pytest.mark.parametrize("before", [True, False])
def test_a_fault_that_is_heard_of_after_a_reset_leaves_the_status_alone(before):
    """Its driver waits until the status is 0, and would for ever."""
    with Guest(32 << 20) as guest, Backend() as backend:
        guest.memory = GuestMemory(32 << 20, shared=True)
        driver = guest.drive(VirtioFs("fs0", guest.memory, "share", backend.fd))
        until(lambda: all(SET_KICK in ring.files for ring in backend.rings))
        faults = [ring.files[SET_ERR] for ring in backend.rings]
        guest.thread.pause()                             # it has much to do elsewhere
        for step in ("fault", "reset") if before else ("reset", "fault"):
            if step == "reset":
                driver.set_status(0)
                continue
            for fault in faults:
                os.write(fault, (1).to_bytes(8, "little"))
        guest.thread.resume()
        guest.settle()
        assert driver.status == 0
        driver.start()
        assert not driver.status & NEEDS_RESET
        until(lambda: all(SET_KICK in ring.files for ring in backend.rings))
        os.write(backend.rings[1].files[SET_ERR], (1).to_bytes(8, "little"))
        driver.await_needs_reset()


def test_an_interrupt_comes_the_one_way_or_the_other_while_the_driver_switches(guest):
    """MSI-X goes on and off all the while: each interrupt is a message, or stands in the ISR register."""
    driver = guest.drive(VirtioRng("rng0", guest.memory), without=F_EVENT_IDX)
    queue, start = driver.queues[0], guest.free
    control, write = PCI_ECAM_BASE + (driver.slot << 15) + driver.msix + 2, guest.mmio.write
    for _ in range(10_000):
        guest.free = start
        queue.post(writable=[8])
        queue.kick()
        while not queue.collect():
            for _ in range(8):
                write(control, 2, 0x8000)
                write(control, 2, 0)
        until(lambda: driver.interrupted(1) or driver.isr())
