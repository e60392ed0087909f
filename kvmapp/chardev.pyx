"""A character stream between a device, which runs without the GIL, and the control thread, which has the console's other end.

Two rings of bytes. The device puts and gets and never waits; the control thread takes and gives when `fd` is readable. Neither
side loses a byte: a full ring accepts less, and the refused side is told when there is room again. What the guest says before
anybody listens waits in the ring; `discard` is for a console that nobody will ever read.

Locks: a device calls `put` and `get` with its own lock held; the backend's lock is a leaf. Callbacks to the device run in the
control thread, without the GIL and with no lock held, and take the device's.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from kvmapp.abi.posix cimport (EFD_CLOEXEC, EFD_NONBLOCK, close, errno, eventfd, pthread_mutex_destroy, pthread_mutex_init,
                               pthread_mutex_lock, pthread_mutex_unlock, read, write)

import os

OUTPUT_SIZE = 64 << 10               # a kernel's boot messages fit
INPUT_SIZE = 4 << 10


cdef class CharUser:
    """The device's end: what the backend calls, in the control thread. Neither call promises that the next `get` finds a byte
    or that `put` has room: the device asks and sees."""

    cdef void input_ready(self) noexcept nogil:
        """There may be something to `get`."""

    cdef void output_space(self) noexcept nogil:
        """A `put` that was cut short may go on."""


cdef class CharBackend:
    """`name` is the domain file's ('serial0'). `fd` is readable when there is output to `take`, or room again after a `give`
    that was cut short; `take` makes it quiet."""

    def __cinit__(self, str name not None, *, uint32_t output_size=OUTPUT_SIZE, uint32_t input_size=INPUT_SIZE):
        pthread_mutex_init(&self.lock, NULL)
        self.name = name
        self.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.fd < 0:
            raise OSError(errno, f"{name}: eventfd: {os.strerror(errno)}")
        for size in (output_size, input_size):
            if size & (size - 1) or not 0 < size <= 1 << 30:
                raise ValueError(f"{name}: a ring cannot have {size} bytes, only a power of two")
        self.output.size, self.input.size = output_size, input_size
        self.output.data = <uint8_t*>malloc(output_size)
        self.input.data = <uint8_t*>malloc(input_size)
        if self.output.data == NULL or self.input.data == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)
        free(self.output.data)
        free(self.input.data)
        pthread_mutex_destroy(&self.lock)

    def connect(self, CharUser user):
        """Tells who shall be called; None when the device is gone. The machine stands still."""
        self.user = user

    def discard(self, bint on):
        """While on, output vanishes instead of waiting: what waits already, too."""
        self.discarding = on
        if on:
            self.take()

    def take(self):
        """All output that waits; b"" when there is none."""
        cdef uint32_t count = used(&self.output)
        cdef bytes data = PyBytes_FromStringAndSize(NULL, count)
        cdef uint8_t* target = <uint8_t*>PyBytes_AS_STRING(data)
        cdef uint64_t events
        cdef bint was_refused
        with nogil:
            pthread_mutex_lock(&self.lock)
            copy_out(&self.output, target, count)
            if used(&self.output) == 0:
                read(self.fd, &events, sizeof(events))
            was_refused = self.refused_output
            self.refused_output = False
            pthread_mutex_unlock(&self.lock)
            if was_refused and self.user is not None:
                self.user.output_space()
        return data

    def give(self, data not None):
        """Input for the guest (bytes or the like); how many of them were accepted. After less than all, `fd` tells when to go on."""
        cdef bytes content = bytes(memoryview(data))
        cdef const uint8_t* source = <const uint8_t*><const char*>content
        cdef uint32_t count = min(len(content), 0x7FFFFFFF)
        cdef uint32_t accepted = 0
        cdef uint32_t step = 1
        with nogil:
            while accepted < count and step:
                pthread_mutex_lock(&self.lock)
                step = copy_in(&self.input, source + accepted, count - accepted)
                self.refused_input = step == 0
                pthread_mutex_unlock(&self.lock)
                accepted += step
                if step and self.user is not None:
                    self.user.input_ready()      # which may make room again
        return accepted

    @property
    def waiting(self):
        """(bytes of output, bytes of input) that lie in the rings."""
        return used(&self.output), used(&self.input)

    cdef uint32_t put(self, const uint8_t* data, uint32_t count) noexcept nogil:
        """The device's output; how much of it was accepted. After less than all, `output_space` tells when to go on."""
        cdef uint32_t accepted
        if self.discarding:
            return count
        pthread_mutex_lock(&self.lock)
        if used(&self.output) == 0:
            self.ring_bell()
        accepted = copy_in(&self.output, data, count)
        if accepted < count:
            self.refused_output = True
        pthread_mutex_unlock(&self.lock)
        return accepted

    cdef uint32_t get(self, uint8_t* data, uint32_t most) noexcept nogil:
        """Input for the device, up to `most` bytes; how many."""
        cdef uint32_t count
        pthread_mutex_lock(&self.lock)
        count = copy_out(&self.input, data, most)
        if count and self.refused_input:
            self.refused_input = False
            self.ring_bell()
        pthread_mutex_unlock(&self.lock)
        return count

    cdef void ring_bell(self) noexcept nogil:
        cdef uint64_t one = 1
        write(self.fd, &one, sizeof(one))


cdef uint32_t used(const Ring* ring) noexcept nogil:
    return ring.head - ring.tail


cdef uint32_t copy_in(Ring* ring, const uint8_t* data, uint32_t count) noexcept nogil:
    """Puts as much as there is room for; how much."""
    cdef uint32_t place = ring.head & (ring.size - 1)
    cdef uint32_t first
    count = min(count, ring.size - used(ring))
    first = min(count, ring.size - place)
    memcpy(ring.data + place, data, first)
    memcpy(ring.data, data + first, count - first)
    ring.head += count
    return count


cdef uint32_t copy_out(Ring* ring, uint8_t* data, uint32_t most) noexcept nogil:
    """Gets as much as there is, up to `most`; how much."""
    cdef uint32_t place = ring.tail & (ring.size - 1)
    cdef uint32_t count = min(most, used(ring))
    cdef uint32_t first = min(count, ring.size - place)
    memcpy(data, ring.data + place, first)
    memcpy(data + first, ring.data, count - first)
    ring.tail += count
    return count
