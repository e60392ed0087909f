"""The driver's side of a packed virtqueue (VIRTIO 1.2, 2.8), behind the names of virtio_driver.Queue."""
import struct

from tests.device.virtio_driver import INDIRECT, NEXT, WRITE, Completion, Driver, Queue, barrier

AVAIL, USED = 1 << 7, 1 << 15
EVENTS_ENABLED, EVENTS_DISABLED, EVENTS_BY_DESC = 0, 1, 2
F_PACKED = 1 << 34


class PackedQueue(Queue):
    """`avail` is where the driver's event suppression structure lies, `used` where the device's."""

    def __init__(self, driver: Driver, index: int, size: int = 0):
        super().__init__(driver, index, size)
        assert driver.features & F_PACKED
        self.avail, self.used = driver.guest.allocate(4, 4), driver.guest.allocate(4, 4)
        self.described = 0
        self.next_avail = self.next_used = 0             # positions that go on counting: position % size, wrap = position // size

    def wrap(self, position: int) -> int:
        return 1 - position // self.size % 2

    def flags_at(self, position: int) -> int:
        return self.word(self.desc + 16 * (position % self.size) + 14)

    def available(self, position: int) -> int:
        """The flags that make the descriptor at this position available."""
        return AVAIL if self.wrap(position) else USED

    def put(self, position: int, address: int, length: int, id: int, flags: int) -> None:
        """Writes one descriptor of the ring, its flags last."""
        place = self.desc + 16 * (position % self.size)
        self.memory.write(place, struct.pack("<QIH", address, length, id))
        self.put_word(place + 14, flags)

    def describe(self, index: int, address: int, length: int, flags: int = 0, link: int = 0, table: int | None = None) -> None:
        """One more descriptor of what `offer` will make available, at the ring's next position whatever `index` is; `link` is its id."""
        if table is not None:
            super().describe(index, address, length, flags, link, table)
            return
        position = self.next_avail + self.described
        self.put(position, address, length, link & 0xFFFF, flags & 0xFFFF | self.available(position))
        self.described += 1

    def offer(self, head: int) -> None:
        self.next_avail += self.described
        self.described = 0

    def post_buffers(self, buffers: list[tuple[int, int, int]], indirect: bool = False) -> int:
        writable = [(address, length) for address, length, flags in buffers if flags & WRITE]
        if indirect:
            table = self.driver.guest.allocate(16 * len(buffers))
            for place, (address, length, flags) in enumerate(buffers):
                self.memory.write(table + 16 * place, struct.pack("<QIHH", address, length, 0, flags))
            buffers = [(table, 16 * len(buffers), INDIRECT)]
        first, id = self.next_avail, self.free[0]
        slots = [self.free.pop(0) for _ in buffers]      # only the first is the id; the others keep count of the ring's room
        for place in reversed(range(len(buffers))):
            address, length, flags = buffers[place]
            more = NEXT if place < len(buffers) - 1 else 0
            self.put(first + place, address, length, id, flags | more | self.available(first + place))
        self.next_avail += len(buffers)
        self.pending[id] = slots, writable
        return id

    def kick(self, force: bool = False) -> bool:
        old, self.kicked = self.kicked, self.next_avail
        barrier()
        flags, event = self.word(self.used + 2), self.word(self.used)
        wanted = flags != EVENTS_DISABLED
        if flags == EVENTS_BY_DESC:
            wanted = any(position % self.size | self.wrap(position) << 15 == event for position in range(old, self.next_avail))
        if wanted or force:
            self.driver.ring(self)
        return wanted

    def collect(self) -> list[Completion]:
        seen = []
        while self.flags_at(self.next_used) & (AVAIL | USED) == (AVAIL | USED if self.wrap(self.next_used) else 0):
            length, id = struct.unpack("<IH", self.memory.read(self.desc + 16 * (self.next_used % self.size) + 8, 6))
            if id not in self.pending:                   # a ring that was never used looks so when its wrap counter is 0
                break
            slots, writable = self.pending.pop(id)
            assert bool(self.flags_at(self.next_used) & WRITE) == bool(length)
            self.free += slots
            data = b"".join(self.memory.read(address, size) for address, size in writable)
            seen.append(Completion(id, length, data[:length]))
            self.next_used += len(slots)
        return seen

    def want_event(self) -> None:
        """Asks for an interrupt at the next used descriptor."""
        self.put_word(self.avail, self.next_used % self.size | self.wrap(self.next_used) << 15)
        self.put_word(self.avail + 2, EVENTS_BY_DESC)

    def wait(self, count: int = 1) -> list[Completion]:
        done = self.collect()
        while len(done) < count:
            if self.event_idx:
                self.want_event()
                barrier()
                more = self.collect()
                if more:
                    done += more
                    continue
            self.driver.await_vector(self.index + 1)
            done += self.collect()
        return done
