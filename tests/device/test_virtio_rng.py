"""The entropy device, and with it the whole way of a request: driver, PCI card, queue, I/O thread, interrupt."""
import pytest

from kvmapp.errors import HostError
from kvmapp.virtio.rng import VirtioRng
from tests.device.virtio_driver import F_EVENT_IDX, F_INDIRECT


def test_a_buffer_is_filled(guest):
    driver = guest.drive(VirtioRng("rng0", guest.memory))
    queue = driver.queues[0]
    queue.post(writable=[64])
    queue.kick()
    [done] = queue.wait()
    assert done.written == 64
    assert done.data != bytes(64)


@pytest.mark.parametrize("without", [0, F_EVENT_IDX, F_INDIRECT, F_EVENT_IDX | F_INDIRECT])
def test_many_requests_come_back_each_once(guest, without):
    driver = guest.drive(VirtioRng("rng0", guest.memory), without=without)
    queue = driver.queues[0]
    for _ in range(40):
        heads = [queue.post(writable=[16, 1, 15], indirect=queue.indirect) for _ in range(20)]
        queue.kick()
        done = queue.wait(len(heads))
        assert sorted(each.head for each in done) == sorted(heads)
        assert all(each.written == 32 for each in done)
    assert len({each.data for each in done}) == len(done)


def test_a_request_is_bounded(guest):
    queue = guest.drive(VirtioRng("rng0", guest.memory)).queues[0]
    queue.post(writable=[10 << 10, 10 << 10])
    queue.kick()
    assert queue.wait()[0].written == 16 << 10


def test_a_request_without_room_comes_back_empty(guest):
    queue = guest.drive(VirtioRng("rng0", guest.memory)).queues[0]
    queue.post(readable=[b"nothing to fill"])
    queue.post(writable=[8])
    queue.kick()
    assert [done.written for done in queue.wait(2)] == [0, 8]


def test_a_source_that_is_not_there(guest):
    with pytest.raises(HostError, match="Cannot open entropy source '/nonexistent' of 'rng0': No such file"):
        VirtioRng("rng0", guest.memory, "/nonexistent")
