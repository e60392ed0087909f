"""A guest with one virtio disk, and requests by their parts."""
import struct

from kvmapp.virtio.blk import VirtioBlk
from tests.device.disks import open_raw, skip_what_the_host_lacks
from tests.device.virtio_driver import WRITE, Guest

IN, OUT, T_FLUSH, GET_ID, T_DISCARD, T_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
RO, FLUSH, CONFIG_WCE, MQ, DISCARD, ZEROES = (1 << bit for bit in (5, 9, 11, 12, 13, 14))
SECTORS = 2048
UNTOUCHED = 0xEE


class Machine:
    """A guest with one virtio disk on `path`, and requests by their parts."""

    def __init__(self, path, *, serial="", queues=1, start=True, without=0, wiring="pci", power=None, **disk):
        skip_what_the_host_lacks(path, **disk)
        self.guest = Guest(wiring=wiring)
        self.disk = open_raw(path, **disk)
        self.device = VirtioBlk("vda", self.guest.memory, self.disk, serial=serial, queues=queues, power=power)
        self.driver = self.guest.plug(self.device)
        if start:
            self.driver.start(without=without)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.guest.close()

    @property
    def queue(self):
        return self.driver.queues[0]

    def chain(self, readable, writable, queue=None, indirect=False):
        """Posts any chain, its writable bytes UNTOUCHED; (head, where the writable ones are)."""
        queue = queue or self.queue
        buffers = []
        for data in readable:
            buffers.append((self.guest.allocate(len(data), 1), len(data), 0))
            self.guest.memory.write(buffers[-1][0], data)
        for length in writable:
            buffers.append((self.guest.allocate(length, 1), length, WRITE))
            self.guest.memory.write(buffers[-1][0], bytes([UNTOUCHED]) * length)
        return queue.post_buffers(buffers, indirect), [(address, size) for address, size, flags in buffers if flags & WRITE]

    def post(self, kind, sector=0, data=b"", room=0, **options):
        """Posts a request of the usual shape: header, data, status."""
        return self.chain([header(kind, sector), *([data] if data else [])], [*([room] if room else []), 1], **options)

    def run(self, readable, writable, **options):
        """Any one chain to its end: (status, the other writable bytes, what the device says it wrote)."""
        _, places = self.chain(readable, writable, **options)
        self.queue.kick()
        [done] = self.queue.wait()
        memory = b"".join(self.guest.memory.read(*place) for place in places)
        return memory[-1] if memory else None, memory[:-1], done.written

    def do(self, kind, sector=0, data=b"", room=0):
        return self.run([header(kind, sector), *([data] if data else [])], [*([room] if room else []), 1])


def header(kind, sector=0):
    return struct.pack("<IIQ", kind, 0, sector)


def span(sector, count, flags=0):
    return struct.pack("<QII", sector, count, flags)
