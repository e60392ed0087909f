"""Receive rings that hold less than a large frame, under drivers that give more buffers only after they have had some frames."""
import random
import socket
import struct
import threading

import pytest

from kvmapp.net.backend import FrameDescriptor
from kvmapp.virtio.net import VirtioNet
from tests.device.virtio_driver import WRITE, Guest

MAC = bytes.fromhex("5254007f0dcb")
HEADER = 12
BUFFER = 1536
GUEST_TSO = 1 << 7 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 54 | 1 << 55
QUEUE_SIZE = 256
NAPI_BUDGET = 64
FOR_EVER = 10**12                                      # ns
PATTERN = bytes(range(251)) * 262


class Receiver:
    """The receive side of Linux's driver from 6.1 on, on a ring of `size` buffers as after `ethtool -G`."""

    def __init__(self, guest, size, *, patience=FOR_EVER, without=0, given=QUEUE_SIZE):
        ours, self.host = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.card = VirtioNet("net0", guest.memory, FrameDescriptor(fd=ours.detach(), offloads=True), MAC)
        self.card.pairs[0].patience_ns = patience
        self.driver = guest.drive(self.card, without=without)
        self.queue = self.driver.queues[0]
        if size != self.queue.size:
            self.driver.reset_queue(self.queue)
            self.queue = self.driver.queue_kind(self.driver, 0, size)
            self.queue.enable(vector=1)
        self.buffers = [guest.allocate(BUFFER) for _ in range(size)]
        self.under_way: dict[int, int] = {}
        self.parts: list[bytes] = []
        self.refill(given)

    def refill(self, most=QUEUE_SIZE):
        if len(self.queue.free) > min(NAPI_BUDGET, self.queue.size) / 2:
            for _ in range(min(len(self.queue.free), most)):
                address = self.buffers.pop()
                self.under_way[self.queue.post_buffers([(address, BUFFER, WRITE)])] = address
            self.queue.kick()

    def received(self):
        """One interrupt's frames."""
        for done in self.queue.wait():
            self.buffers.append(self.under_way.pop(done.head))
            self.parts.append(done.data)
        frames = []
        while self.parts and struct.unpack_from("<H", self.parts[0], 10)[0] <= len(self.parts):
            count = struct.unpack_from("<H", self.parts[0], 10)[0]
            frames.append(b"".join(self.parts[:count])[HEADER:])
            del self.parts[:count]
        return frames

    def arrives(self, number, size):
        self.host.send(bytes(HEADER) + frame_of(number, size))

    @property
    def dropped(self):
        return self.card.stats()["rx_drop"]


def frame_of(number, size):
    return struct.pack(">I", number) + PATTERN[:size - 4]


def number_of(frame):
    [number] = struct.unpack_from(">I", frame)
    assert frame == frame_of(number, len(frame))
    return number


def mixed_sizes(count):
    chance = random.Random(7)
    return [chance.choice((60, 1514, 9014, 20_000, 30_000, 48_000, 65_500)) for _ in range(count)] + [60]


def run(receiver, sizes, after_frames=lambda: None):
    """Sends frames of these sizes, and gives the numbers of those that arrive, up to the last one of all."""
    def send():
        for number, size in enumerate(sizes):
            receiver.arrives(number, size)
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    heard: list[int] = []
    while not heard or heard[-1] != len(sizes) - 1:
        heard += [number_of(frame) for frame in receiver.received()]
        receiver.refill()
        after_frames()
    sender.join()
    return heard


@pytest.mark.parametrize("wiring", ["pci", "packed"])
@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_no_ring_is_too_small_for_frames_of_any_size(wiring, size):
    sizes = mixed_sizes(400)
    with Guest(wiring=wiring) as guest:
        receiver = Receiver(guest, size)
        heard = run(receiver, sizes)
        assert heard == sorted(set(heard))
        assert receiver.dropped == len(sizes) - len(heard)
        # Half of the ring is what the driver always has there, or gives as soon as it has had what there is.
        assert set(heard) >= {number for number, length in enumerate(sizes) if HEADER + length <= size // 2 * BUFFER}
        assert receiver.card.stats()["rx_bytes"] == sum(sizes[number] for number in heard)


@pytest.mark.parametrize("wiring", ["pci", "packed"])
@pytest.mark.parametrize("size", [32, 256])
def test_a_card_is_saved_and_restored_while_frames_of_any_size_come(wiring, size):
    sizes = mixed_sizes(200)
    with Guest(wiring=wiring) as guest:
        receiver = Receiver(guest, size)
        card = receiver.driver.card

        def save_and_restore():
            card.pause()
            state = card.save()
            card.restore(state)
            assert card.save() == state
            card.resume()
        heard = run(receiver, sizes, save_and_restore)
        assert heard == sorted(set(heard))
        assert receiver.dropped == len(sizes) - len(heard)


@pytest.mark.parametrize("wiring", ["pci", "legacy", "packed"])
def test_a_frame_that_waits_goes_before_all_others_when_there_is_room(wiring):
    with Guest(wiring=wiring) as guest:
        receiver = Receiver(guest, 256, given=20)
        receiver.arrives(1, 65_000)
        receiver.arrives(2, 60)
        guest.settle()
        receiver.refill(10)                            # a kick that brings too little
        guest.settle()
        assert not receiver.queue.collect()
        receiver.refill(20)
        heard: list[int] = []
        while len(heard) < 2:
            heard += [number_of(frame) for frame in receiver.received()]
        assert heard == [1, 2] and receiver.dropped == 0


def test_a_driver_that_gives_more_only_at_the_very_end_gets_what_fits():
    """A rule that the card cannot know of: it gives the large frame up after a while."""
    with Guest() as guest:
        receiver = Receiver(guest, 256, patience=10**6, given=20)
        receiver.arrives(1, 65_000)
        receiver.arrives(2, 60)
        assert [number_of(frame) for frame in receiver.received()] == [2]
        assert receiver.dropped == 1


@pytest.mark.parametrize("wiring", ["pci", "legacy", "packed"])
def test_a_jumbo_frame_passes_to_a_driver_without_offloads_that_knows_no_mtu(wiring):
    with Guest(wiring=wiring) as guest:
        receiver = Receiver(guest, 256, without=GUEST_TSO)
        receiver.arrives(1, 9014)
        receiver.arrives(2, 60)
        heard: list[int] = []
        while len(heard) < 2:
            heard += [number_of(frame) for frame in receiver.received()]
        assert heard == [1, 2]


def test_a_frame_that_waits_is_lost_with_a_reset():
    with Guest() as guest:
        receiver = Receiver(guest, 256, given=20)
        receiver.arrives(1, 65_000)
        guest.settle()
        receiver.driver.start()
        assert receiver.dropped == 1
        queue = receiver.driver.queues[0]
        for _ in range(50):
            queue.post(writable=[BUFFER])
        queue.kick()
        receiver.arrives(2, 60)
        assert number_of(queue.wait()[0].data[HEADER:]) == 2
