"""I/O threads that poll: while requests come in quick succession nobody kicks, and none is lost when the polling ends."""
import os

import pytest

from kvmapp.block.raw import RawDisk
from kvmapp.iothread import IoThread
from kvmapp.virtio.blk import VirtioBlk
from kvmapp.virtio.rng import VirtioRng
from tests.device.virtio_driver import F_EVENT_IDX, Guest
from tests.device.virtio_packed import EVENTS_DISABLED
from tests.device.virtio_wirings import ALL
from tests.waiting import until

SIZE = 4 << 20
LONG = 100_000_000                       # ns: a driver in Python is back sooner
SHORT = 50_000                           # ... or not
READ, WRITE = 0, 1


@pytest.fixture(params=ALL)
def wiring(request):
    return request.param


def exchange(queue):
    """One request, to its end; whether the device wanted a kick for it."""
    queue.driver.guest.free = 1 << 21
    queue.post(writable=[8])
    kicked = queue.kick()
    [done] = queue.wait()
    assert done.written == 8
    return kicked


def warm(queue):
    """Request after request, until the device's thread looks for them by itself."""
    until(lambda: not exchange(queue))


def wants_kicks(queue):
    if hasattr(queue, "described"):      # a packed ring's wish
        return queue.word(queue.used + 2) != EVENTS_DISABLED
    if queue.event_idx:
        return queue.word(queue.used + 4 + 8 * queue.size) == queue.next_avail % 0x10000
    return not queue.word(queue.used) & 1


@pytest.mark.parametrize("without", [0, F_EVENT_IDX])
def test_requests_need_no_kick_while_the_thread_polls(wiring, without):
    with Guest(SIZE, wiring=wiring, poll=LONG) as guest:
        queue = guest.drive(VirtioRng("rng0", guest.memory), without=without).queues[0]
        warm(queue)
        until(lambda: wants_kicks(queue) and exchange(queue))    # it sleeps, unless a kick that came late has just woken it
        warm(queue)


@pytest.mark.parametrize("without", [0, F_EVENT_IDX])
def test_no_request_is_lost_when_the_polling_ends(wiring, without):
    with Guest(SIZE, wiring=wiring, poll=SHORT) as guest:
        queue = guest.drive(VirtioRng("rng0", guest.memory), without=without).queues[0]
        for pause in range(10_000):
            exchange(queue)
            for _ in range(pause % 100 * 20):    # up to about SHORT
                pass


def test_a_queue_that_moves_to_a_thread_that_does_not_poll_asks_for_kicks(wiring):
    with Guest(SIZE, wiring=wiring, poll=LONG) as guest:
        driver = guest.drive(VirtioRng("rng0", guest.memory))
        warm(driver.queues[0])
        other = IoThread("other")
        other.resume()
        try:
            driver.device.run_on(other)
            until(lambda: wants_kicks(driver.queues[0]))
            until(lambda: all([exchange(driver.queues[0]) for _ in range(10)]))      # unless a kick of before was still on its way
        finally:
            driver.card.pause()
            driver.device.leave_thread(driver.device.queues[0])
            other.close()


def test_a_paused_thread_polls_no_more_and_goes_on(wiring):
    with Guest(SIZE, wiring=wiring, poll=LONG) as guest:
        driver = guest.drive(VirtioRng("rng0", guest.memory))
        for _ in range(3):
            warm(driver.queues[0])
            driver.card.pause()
            guest.thread.pause()
            state = driver.card.save()
            driver.card.restore(state)
            guest.thread.resume()
            driver.card.resume()


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_a_disk_keeps_what_is_written_to_it(tmp_path, engine):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    with Guest(SIZE, poll=LONG) as guest:
        disk = RawDisk(os.open(path, os.O_RDWR), name="vda", io=engine)
        queue = guest.drive(VirtioBlk("vda", guest.memory, disk)).queues[0]

        def request(kind, sector, **buffers):
            guest.free = 1 << 21
            queue.post(readable=[kind.to_bytes(4, "little") + bytes(4) + sector.to_bytes(8, "little"), *buffers.get("data", [])],
                       writable=[*buffers.get("room", []), 1])
            kicked = queue.kick()
            [done] = queue.wait()
            assert done.data[-1] == 0
            return kicked, done.data[:-1]

        def round_trip():
            blocks = [os.urandom(4096) for _ in range(8)]
            kicks = [request(WRITE, 8 * place, data=[block])[0] for place, block in enumerate(blocks)]
            assert [request(READ, 8 * place, room=[4096])[1] for place in range(8)] == blocks
            return kicks

        until(lambda: not all(round_trip()))
