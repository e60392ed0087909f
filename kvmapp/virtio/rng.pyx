"""The virtio entropy device (VIRTIO 1.2, 5.4): one queue, whose buffers are filled with random bytes from the host's kernel.

The kernel writes straight into the guest's buffers. A request gets at most REQUEST_LIMIT bytes, which the specification allows
(5.4.6.1), so that no guest keeps its I/O thread from the other devices for long. It has no features, no config space, and no
state but its queue. Left out: a limit on bytes a second.
"""
from kvmapp.abi.posix cimport close, readv
from kvmapp.abi.virtio cimport VIRTIO_ID_RNG
from kvmapp.memory cimport GuestMemory
from kvmapp.virtio.device cimport VirtioDevice
from kvmapp.virtio.virtqueue cimport Virtqueue, chain_allocate, chain_clip, chain_free

import os

from kvmapp.errors import HostError

cdef enum:
    QUEUE_SIZE = 64
    REQUEST_LIMIT = 16 << 10         # bytes


cdef class VirtioRng(VirtioDevice):
    """`source` is the host's file of random bytes."""

    def __cinit__(self, str name not None, GuestMemory memory not None, str source not None="/dev/urandom"):
        self.source = -1
        self.device_id = VIRTIO_ID_RNG
        self.add_queue(QUEUE_SIZE)
        chain_allocate(&self.chain, QUEUE_SIZE)
        try:
            self.source = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise HostError(f"Cannot open entropy source '{source}' of '{name}': {error.strerror}",
                            hint="leave the source out to use /dev/urandom") from error

    def __dealloc__(self):
        chain_free(&self.chain)
        if self.source >= 0:
            close(self.source)

    cdef void kicked(self, Virtqueue queue) noexcept nogil:
        while queue.pop(&self.chain) == 1:
            queue.push(&self.chain, self.fill())
        self.notify_used(queue)

    cdef uint32_t fill(self) noexcept nogil:
        """Random bytes for the request at hand; how many."""
        cdef ssize_t got
        chain_clip(&self.chain, REQUEST_LIMIT)
        if self.chain.writable_count == 0:
            self.complain("entropy request without a writable buffer, head", self.chain.head)
            return 0
        got = readv(self.source, self.chain.writable, self.chain.writable_count)
        return got if got > 0 else 0
