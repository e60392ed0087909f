"""The virtio disk's life: reset, paused, saved, resized, closed; and requests that are under way meanwhile."""
import gc
import os
import threading

import pytest

from kvmapp.errors import GuestImageError
from kvmapp.state import StateError
from tests.device.virtio_blk.machine import IN, IOERR, OK, OUT, SECTORS, Machine


@pytest.mark.parametrize("io", ["threads", "io_uring"])
def test_after_a_reset_the_host_writes_no_guest_memory(tmp_path, io):
    """Reads are under way when the driver resets the device; from then on its buffers are its own."""
    path = tmp_path / "big.img"
    path.write_bytes(b"d" * (16 << 20))
    with Machine(path, io=io, cache="none") as machine:
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
    with Machine(path, io=io, cache="none") as machine:
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
        for change in ({"capacity": SECTORS + 1}, {"capacity": "2048"}, {"writeback": 1}, {"version": 2}, {"more": 1}):
            device = {**state["virtio"]["device"], **change}
            with pytest.raises(StateError, match="vda"):
                machine.driver.card.restore({**state, "virtio": {**state["virtio"], "device": device}})
        assert machine.driver.card.save() == state


def test_a_disk_that_grew_while_its_guest_lay_saved(image):
    """It is as large as the guest knows it, until that is told of it; or begins anew."""
    with Machine(image) as first:
        first.driver.card.pause()
        state = first.driver.card.save()
    with open(image, "r+b") as file:
        file.truncate(2 * SECTORS * 512)
    for tell in (lambda machine: machine.device.resize(), lambda machine: machine.driver.card.reset()):
        with Machine(image, start=False) as second:
            second.driver.card.pause()
            second.driver.card.restore(state)
            assert second.driver.card.save() == state and second.driver.config(0, 8) == SECTORS
            tell(second)
            assert second.driver.card.save()["virtio"]["device"]["capacity"] == 2 * SECTORS
    with open(image, "r+b") as file:
        file.truncate(SECTORS * 512 - 512)
    with Machine(image, start=False) as third:
        third.driver.card.pause()
        with pytest.raises(StateError, match=f"the guest knows {SECTORS}") as caught:
            third.driver.card.restore(state)
        assert caught.value.hint.endswith(f": {SECTORS * 512} bytes")


def test_a_resize_is_told_to_the_guest(machine, image):
    generation = machine.driver.generation()
    assert machine.do(IN, SECTORS, room=512)[0] == IOERR
    assert machine.device.resize(2 * SECTORS * 512) == 2 * SECTORS * 512
    machine.driver.await_vector(0)
    assert machine.driver.generation() != generation
    assert machine.driver.config(0, 4) == 2 * SECTORS
    assert machine.do(IN, SECTORS, room=512) == (OK, bytes(512), 513)
    assert image.stat().st_size == 2 * SECTORS * 512
    with pytest.raises(GuestImageError, match="would be lost"):
        machine.device.resize(512)
    assert machine.driver.config(0, 4) == 2 * SECTORS


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
