"""A host that has no room for what the guest writes: the write waits until it has, and nothing is lost or done twice."""
import os
import select

import pytest

from kvmapp.devices import Power, PowerEvent
from kvmapp.errors import HostError
from tests.device.virtio_blk.machine import IN, IOERR, OK, OUT, T_FLUSH, T_ZEROES, Machine, header, span
from tests.device.virtio_driver import NEXT
from tests.device.virtio_wirings import ALL
from tests.smalldisk import make_room, small_disk, sparse
from tests.waiting import TIMEOUT

BLOCK = 64 << 10
ROOM = 4                                # blocks
WHOLE = 16


class SmallHost:
    """A file system with room for ROOM blocks, and a guest with a sparse disk of WHOLE blocks on it."""

    def __init__(self, folder, pauses=True, **options):
        self.folder = folder
        self.image = sparse(folder / "disk.img", WHOLE * BLOCK)
        self.power = Power()
        self.machine = Machine(self.image, power=self.power if pauses else None, **options)
        self.card = self.machine.driver.card
        self.queue = self.machine.queue

    def write(self, *blocks, size=BLOCK):
        for block in blocks:
            self.machine.post(OUT, block * BLOCK // 512, bytes([block + 1]) * size)
        self.queue.kick()

    def await_wish(self):
        """The machine does what it was asked for."""
        assert self.asked()
        assert self.power.take()[0] == PowerEvent.DISK_FULL
        self.card.pause()

    def asked(self):
        return select.select([self.power.fd], [], [], TIMEOUT)[0]

    def make_room(self):
        make_room(self.folder)

    def content(self):
        """The number of each block, None where it is not one number's."""
        data = self.image.read_bytes()
        blocks = [set(data[at:at + BLOCK]) for at in range(0, len(data), BLOCK)]
        return [block.pop() if len(block) == 1 else None for block in blocks]


@pytest.fixture
def small(tmp_path):
    """A maker of small hosts."""
    made = []

    def make(**options):
        made.append(SmallHost(tmp_path, **options))
        return made[-1]

    with small_disk(tmp_path, ROOM * BLOCK):
        yield make
        for one in made:
            one.machine.guest.close()


@pytest.mark.parametrize("io", ["threads", "io_uring"])
@pytest.mark.parametrize("wiring", ALL)
def test_what_has_no_room_is_written_when_there_is_some(small, io, wiring):
    host = small(io=io, wiring=wiring)
    host.write(*range(8))
    host.await_wish()
    assert host.machine.device.is_full
    answered = len(host.queue.collect())
    assert answered < 8
    host.make_room()
    host.card.resume()
    assert all(done.data == bytes([OK]) for done in host.queue.wait(8 - answered))
    assert host.content() == [*range(1, 9), *[0] * 8] and not host.machine.device.is_full
    host.write(15)
    assert host.queue.wait()[0].data == bytes([OK]) and host.content()[15] == 16


@pytest.mark.parametrize("io", ["threads", "io_uring"])
def test_a_write_goes_on_where_the_room_ended(small, io):
    """One request of which the host took a part: not a byte is skipped, though memory says something else by then."""
    host = small(io=io)
    data = os.urandom(8 * BLOCK)
    host.machine.post(OUT, 0, data)
    host.queue.kick()
    host.await_wish()
    assert host.image.stat().st_blocks * 512 == ROOM * BLOCK
    host.make_room()
    host.card.resume()
    assert host.queue.wait()[0].data == bytes([OK])
    assert host.image.read_bytes()[:8 * BLOCK] == data


def test_zeroes_that_have_no_room_are_written_when_there_is_some(small):
    host = small()
    host.machine.chain([header(T_ZEROES), span(0, 8 * BLOCK // 512)], [1])
    host.queue.kick()
    host.await_wish()
    host.make_room()
    host.card.resume()
    assert host.queue.wait()[0].data == bytes([OK])
    assert host.image.stat().st_blocks * 512 >= 8 * BLOCK


def test_a_host_that_is_still_full_asks_again(small):
    host = small()
    host.write(*range(8))
    host.await_wish()
    before = len(host.queue.collect())
    for _ in range(3):
        host.card.resume()
        host.await_wish()
        assert host.queue.collect() == []
    host.make_room()
    host.card.resume()
    host.queue.wait(8 - before)
    assert host.content()[:8] == list(range(1, 9))


def test_until_it_goes_on_nothing_new_is_begun(small):
    """vCPUs run for a moment until they hear of the pause."""
    host = small()
    host.write(*range(8))
    assert host.asked()
    seen = len(host.queue.collect())
    host.machine.post(IN, 0, room=512)
    host.queue.kick(force=True)
    host.card.pause()
    assert host.queue.collect() == []
    host.make_room()
    host.card.resume()
    assert len(host.queue.wait(9 - seen)) == 9 - seen


@pytest.mark.parametrize("how", ["driver", "host", "queue"])
def test_after_a_reset_nobody_waits_for_it(small, how):
    host = small()
    host.write(*range(8))
    host.await_wish()
    if how == "host":
        host.machine.device.reset()
    host.card.resume()
    if how == "driver":
        host.machine.driver.set_status(0)
    elif how == "queue":
        host.machine.driver.reset_queue(host.queue)
    assert not host.machine.device.is_full
    host.machine.driver.set_status(0)
    before = host.content()
    host.make_room()
    host.machine.driver.start()
    assert host.machine.do(IN, 0, room=512) == (OK, bytes([before[0]]) * 512, 513)
    assert host.content() == before                              # what was given up is not written late


def test_it_is_not_saved_without_what_it_could_not_write(small):
    host = small()
    host.write(*range(8))
    host.await_wish()
    before = len(host.queue.collect())
    with pytest.raises(HostError, match="no room for what it has written to disk 'vda'"):
        host.card.save()
    host.make_room()
    host.card.resume()
    host.queue.wait(8 - before)
    host.card.pause()
    host.card.save()


def test_it_is_not_saved_either_between_a_resume_and_the_next_try(small):
    """Its thread has not got to it when the machine is paused again."""
    host = small()
    host.write(*range(8))
    host.await_wish()
    before = len(host.queue.collect())
    host.machine.guest.thread.pause()
    host.card.resume()
    host.card.pause()
    host.machine.guest.thread.resume()
    assert not host.machine.device.is_full
    with pytest.raises(HostError, match="no room for what it has written to disk 'vda'"):
        host.card.save()
    host.make_room()
    host.card.resume()
    host.queue.wait(8 - before)
    assert host.content()[:8] == list(range(1, 9))


@pytest.mark.parametrize("io", ["threads", "io_uring"])
def test_on_a_ring_that_its_driver_broke_nothing_waits_for_room(small, io):
    """Nothing would begin it again, and the guest could never be saved."""
    host = small(io=io)
    head = host.queue.free[-1]
    for block in range(8):
        host.machine.post(OUT, block * BLOCK // 512, bytes(BLOCK))
    host.queue.describe(head, 0x1000, 8, NEXT, head)
    host.queue.offer(head)
    host.queue.kick()
    host.machine.driver.await_needs_reset()
    host.machine.guest.settle()
    host.card.pause()
    assert not host.machine.device.is_full
    host.card.save()
    results = {done.data[0] for done in host.queue.collect()}
    assert results == {OK, IOERR}


def test_error_policy_report_tells_the_guest(small):
    host = small(pauses=False)
    host.write(*range(8))
    results = [done.data[0] for done in host.queue.wait(8)]
    assert set(results) == {OK, IOERR} and not host.machine.device.is_full
    assert host.power.take()[0] == PowerEvent.RUNNING
    assert host.machine.do(T_FLUSH)[0] == OK
