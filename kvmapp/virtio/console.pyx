"""The virtio console (VIRTIO 1.2, 5.3) with its one port: hvc0 in a Linux guest.

Queue 0 takes input to the guest, queue 1 its output; a CharBackend carries both to the control thread. What the backend does
not take yet stays in the queue, and the guest waits for it. The size of the terminal stands in config space, and a store to its
emergency register writes one character without any queue. Left out: multiple ports (VIRTIO_CONSOLE_F_MULTIPORT).
"""
from libc.stdint cimport UINT16_MAX, UINT32_MAX, uint8_t

from kvmapp.abi.posix cimport pthread_mutex_lock, pthread_mutex_unlock
from kvmapp.abi.virtio cimport VIRTIO_CONSOLE_F_EMERG_WRITE, VIRTIO_CONSOLE_F_SIZE, VIRTIO_ID_CONSOLE
from kvmapp.chardev cimport CharBackend, CharUser
from kvmapp.memory cimport GuestMemory
from kvmapp.virtio.device cimport VirtioDevice
from kvmapp.virtio.virtqueue cimport (QUEUE_SIZE_MAX, Chain, Virtqueue, chain_allocate, chain_free, chain_take)

cdef enum:
    RECEIVEQ = 0
    TRANSMITQ = 1
    QUEUE_SIZE = 64
    EMERG_WR = 8                     # offset in config space


cdef class ConsoleUser(CharUser):
    """The control thread's calls become kicks: the queues' work stays in the I/O thread."""

    def __cinit__(self, Virtqueue receiveq not None, Virtqueue transmitq not None):
        self.input, self.output = receiveq.doorbell, transmitq.doorbell

    cdef void input_ready(self) noexcept nogil:
        self.input.press()

    cdef void output_space(self) noexcept nogil:
        self.output.press()


cdef class VirtioConsole(VirtioDevice):
    """`cols` and `rows` are the terminal's; 0 when nobody looks."""

    def __cinit__(self, str name not None, GuestMemory memory not None, CharBackend backend not None, *,
                  uint16_t cols=0, uint16_t rows=0):
        self.device_id = VIRTIO_ID_CONSOLE
        self.offer(VIRTIO_CONSOLE_F_SIZE)
        self.offer(VIRTIO_CONSOLE_F_EMERG_WRITE)
        self.layout.cols, self.layout.rows = cols, rows
        self.layout.max_nr_ports = 1
        self.config, self.config_size = &self.layout, sizeof(self.layout)
        chain_allocate(&self.chains[RECEIVEQ], QUEUE_SIZE)
        chain_allocate(&self.chains[TRANSMITQ], QUEUE_SIZE)
        self.backend = backend
        backend.connect(ConsoleUser(self.add_queue(QUEUE_SIZE), self.add_queue(QUEUE_SIZE)))

    def __dealloc__(self):
        chain_free(&self.chains[RECEIVEQ])
        chain_free(&self.chains[TRANSMITQ])

    def resize(self, uint16_t cols, uint16_t rows):
        """The terminal has another size now: the guest is told."""
        with nogil:
            pthread_mutex_lock(&self.lock)
            if cols != self.layout.cols or rows != self.layout.rows:
                self.layout.cols, self.layout.rows = cols, rows
                self.notify_config()
            pthread_mutex_unlock(&self.lock)

    def close(self):
        VirtioDevice.close(self)
        self.backend.connect(None)

    def save_device(self):
        return {"version": 1, "cols": self.layout.cols, "rows": self.layout.rows, "sent": self.sent}

    def check_device(self, reader):
        checked = reader.uint("cols", UINT16_MAX), reader.uint("rows", UINT16_MAX), \
            reader.uint("sent", <uint64_t>UINT32_MAX * QUEUE_SIZE_MAX)
        reader.done()
        return checked

    def restore_device(self, checked):
        self.layout.cols, self.layout.rows, self.sent = checked

    cdef void kicked(self, Virtqueue queue) noexcept nogil:
        if queue.index == RECEIVEQ:
            self.receive(queue)
        else:
            self.transmit(queue)

    cdef void receive(self, Virtqueue queue) noexcept nogil:
        """Input into as many buffers as it needs; the rest of the buffers wait for `input_ready`."""
        cdef Chain* chain = &self.chains[RECEIVEQ]
        cdef uint32_t written
        while queue.pop(chain) == 1:
            if chain.writable_count == 0:
                self.complain("input buffer that cannot be written, head", chain.head)
                queue.push(chain, 0)
                continue
            written = self.fill(chain)
            if written == 0:
                queue.unpop(chain)
                break
            queue.push(chain, written)
        self.notify_used(queue)

    cdef uint32_t fill(self, Chain* chain) noexcept nogil:
        """Input into the chain; how many bytes."""
        cdef uint32_t i, got, written = 0
        for i in range(chain.writable_count):
            got = self.backend.get(<uint8_t*>chain.writable[i].iov_base, chain.writable[i].iov_len)
            written += got
            if got < chain.writable[i].iov_len:
                break
        return written

    cdef void transmit(self, Virtqueue queue) noexcept nogil:
        """Output until the backend is full; what is left of a buffer then waits in the queue for `output_space`."""
        cdef Chain* chain = &self.chains[TRANSMITQ]
        while queue.pop(chain) == 1:
            chain_take(chain, NULL, self.sent)
            if not self.empty(chain):
                queue.unpop(chain)
                break
            self.sent = 0
            queue.push(chain, 0)
        self.notify_used(queue)

    cdef bint empty(self, Chain* chain) noexcept nogil:
        """Moves the chain's bytes to the backend; whether it took all."""
        cdef uint32_t took
        while chain.readable_count:
            took = self.backend.put(<uint8_t*>chain.readable.iov_base, chain.readable.iov_len)
            self.sent += took
            if took < chain.readable.iov_len:
                return False
            chain_take(chain, NULL, took)
        return True

    cdef void forget(self, Virtqueue queue) noexcept nogil:
        if queue.index == TRANSMITQ:
            self.sent = 0

    cdef void write_config(self, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint8_t character = value & 0xFF
        if offset != EMERG_WR:
            VirtioDevice.write_config(self, offset, size, value)
            return
        self.backend.put(&character, 1)
