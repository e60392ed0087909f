"""Python's way into a disk, for tools and tests: one call a request, or many in flight.

    with DiskSession(disk) as session:
        data = session.read(0, 512)
        tickets = [session.start(BLOCK_WRITE, offset, block) for ...]
        results = session.wait()                   {ticket: 0 or -errno}

It is its own thread's channel: used by one Python thread at a time.
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from kvmapp.abi.posix cimport iovec
from kvmapp.block.backend cimport (BLOCK_DISCARD, BLOCK_FLUSH, BLOCK_FUA, BLOCK_MAY_UNMAP, BLOCK_READ, BLOCK_WRITE,
                                   BLOCK_WRITE_ZEROES, BlockBackend, BlockChannel, BlockClient, BlockQueue, BlockRequest,
                                   block_push, block_take_all)

import os

# One request and the Python memory that it works on.
cdef struct Ticket:
    BlockRequest request             # first: a pointer to it is one to the ticket
    uint64_t number
    uint32_t buffer_count
    iovec* vector
    Py_buffer* buffers


cdef class DiskSession(BlockClient):
    """A channel of its own into `disk`."""
    cdef readonly BlockChannel channel
    cdef BlockQueue back
    cdef uint64_t last_number
    cdef dict results

    def __init__(self, BlockBackend disk not None):
        self.results = {}
        self.channel = disk.open_channel(None, self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def read(self, uint64_t offset, uint64_t length):
        """`length` bytes. Raises OSError."""
        data = bytearray(length)
        self.do(BLOCK_READ, offset, data)
        return bytes(data)

    def write(self, uint64_t offset, data, *, bint fua=False):
        """Raises OSError, as all these do."""
        self.do(BLOCK_WRITE, offset, data, flags=BLOCK_FUA if fua else 0)

    def flush(self):
        self.do(BLOCK_FLUSH)

    def discard(self, uint64_t offset, uint64_t length):
        self.do(BLOCK_DISCARD, offset, length=length)

    def write_zeroes(self, uint64_t offset, uint64_t length, *, bint may_unmap=False):
        self.do(BLOCK_WRITE_ZEROES, offset, length=length, flags=BLOCK_MAY_UNMAP if may_unmap else 0)

    def do(self, uint32_t operation, uint64_t offset=0, *buffers, length=None, uint32_t flags=0):
        """One request to its end. Raises OSError."""
        ticket = self.start(operation, offset, *buffers, length=length, flags=flags)
        self.settle()
        result = self.results.pop(ticket)
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    def start(self, uint32_t operation, uint64_t offset=0, *buffers, length=None, uint32_t flags=0):
        """Sends a request on its way (with `wait` at the latest) and gives its ticket. Buffers: memory of its length in all."""
        cdef Ticket* ticket = <Ticket*>calloc(1, sizeof(Ticket))
        cdef int access = PyBUF_WRITABLE if operation == BLOCK_READ else PyBUF_SIMPLE
        if ticket == NULL:
            raise MemoryError
        ticket.vector = <iovec*>calloc(max(len(buffers), 1), sizeof(iovec))
        ticket.buffers = <Py_buffer*>calloc(max(len(buffers), 1), sizeof(Py_buffer))
        try:
            if ticket.vector == NULL or ticket.buffers == NULL:
                raise MemoryError
            for i, memory in enumerate(buffers):
                PyObject_GetBuffer(memory, &ticket.buffers[i], access)
                ticket.buffer_count += 1
                ticket.vector[i].iov_base = ticket.buffers[i].buf
                ticket.vector[i].iov_len = ticket.buffers[i].len
                ticket.request.length += ticket.buffers[i].len
            if length is not None:
                ticket.request.length = length
        except BaseException:
            self.drop(ticket)
            raise
        self.last_number += 1
        ticket.number = self.last_number
        ticket.request.operation = operation
        ticket.request.flags = flags
        ticket.request.offset = offset
        ticket.request.vector = ticket.vector
        ticket.request.vector_count = ticket.buffer_count
        self.channel.submit(&ticket.request)
        return self.last_number

    def commit(self):
        """Starts what was given to `start` and takes in what is done, without waiting."""
        with nogil:
            self.channel.commit()
        self.take_back()

    def wait(self):
        """Waits for all in flight: {ticket: 0 or -errno} of every request done since the last call."""
        self.settle()
        results, self.results = self.results, {}
        return results

    def close(self):
        """Waits for all in flight."""
        self.settle()
        self.channel.close()

    cdef int settle(self) except -1:
        with nogil:
            self.channel.settle()
        self.take_back()
        return 0

    cdef int take_back(self) except -1:
        cdef BlockRequest* request = block_take_all(&self.back)
        cdef BlockRequest* after
        while request != NULL:
            after = request.next
            self.results[(<Ticket*>request).number] = request.result
            self.drop(<Ticket*>request)
            request = after
        return 0

    cdef void drop(self, Ticket* ticket) noexcept:
        cdef uint32_t i
        for i in range(ticket.buffer_count):
            PyBuffer_Release(&ticket.buffers[i])
        free(ticket.buffers)
        free(ticket.vector)
        free(ticket)

    cdef void completed(self, BlockRequest* requests) noexcept nogil:
        cdef BlockRequest* after
        while requests != NULL:
            after = requests.next
            block_push(&self.back, requests)
            requests = after
