"""The MSI-X table and pending bits of one PCI function (PCI Local Bus 3.0, 6.8.2), one MsiLine a vector.

A vector's message is told to KVM only while the vector may be sent; a message for a masked vector waits as a pending bit and is
sent at the unmask. All methods run with the `signals` lock of the function that owns the table. Who writes MsiLine.fd
himself (vhost) asks `open_fd` again after each change here. Left out: plain MSI.
"""
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from kvmapp.devices cimport Interrupts, MsiLine

from kvmapp.state import StateError

cdef enum:
    WORDS = 4                        # of an entry: address, upper address, data, vector control
    ENTRY_SIZE = 16
    ADDRESS_LOW_FORCED = 3           # the two lowest bits of the address read as zero
    CONTROL = 3                      # index of the vector control word
    CONTROL_MASKED = 1


cdef class MsixTable:
    """`count` vectors, all masked, as after a reset."""

    def __cinit__(self, uint32_t count, Interrupts interrupts not None):
        if not 1 <= count <= 2048:
            raise ValueError(f"an MSI-X table has 1 to 2048 vectors, not {count}")
        self.count = count
        self.entries = <uint32_t*>calloc(count, ENTRY_SIZE)
        self.pending = <uint32_t*>calloc(self.pending_words(), sizeof(uint32_t))
        self.lines = <PyObject**>calloc(count, sizeof(PyObject*))
        if self.entries == NULL or self.pending == NULL or self.lines == NULL:
            raise MemoryError
        self.interrupts = interrupts
        self.owned = []
        try:
            while len(self.owned) < count:
                self.owned.append(interrupts.msi())
        except BaseException:
            self.release()
            raise
        for i in range(count):
            self.lines[i] = <PyObject*>self.owned[i]
        self.reset()

    def __dealloc__(self):
        free(self.entries)
        free(self.pending)
        free(self.lines)

    def release(self):
        """Gives the vectors back; the table cannot be used any more."""
        self.enabled = False
        while self.owned:
            self.interrupts.release(self.owned.pop())

    @property
    def vectors(self):
        """The MsiLine of each vector."""
        return list(self.owned)

    def reset(self):
        """Every vector masked, nothing pending, the capability off."""
        cdef uint32_t i
        self.enabled = self.masked = False
        for i in range(self.count * WORDS):
            self.entries[i] = CONTROL_MASKED if i % WORDS == CONTROL else 0
        for i in range(self.pending_words()):
            self.pending[i] = 0

    def save(self):
        """Table and pending bits; enable and function mask stand in the function's config space."""
        return {"version": 1, "table": (<char*>self.entries)[:self.count * ENTRY_SIZE],
                "pending": (<char*>self.pending)[:self.pending_words() * sizeof(uint32_t)]}

    def check(self, reader):
        """The (table, pending) that `restore` takes, read from a StateReader and tried for bits that no table can hold."""
        cdef uint32_t i
        table = reader.data("table", self.count * ENTRY_SIZE, self.count * ENTRY_SIZE)
        pending = reader.data("pending", self.pending_words() * sizeof(uint32_t), self.pending_words() * sizeof(uint32_t))
        reader.done()
        for i in range(self.count):
            entry = table[i * ENTRY_SIZE:(i + 1) * ENTRY_SIZE]
            if entry[0] & ADDRESS_LOW_FORCED or int.from_bytes(entry[12:], "little") & ~CONTROL_MASKED:
                raise StateError(f"{reader.owner}: 'table' has bits in vector {i} that no table has")
        if int.from_bytes(pending, "little") >> self.count:
            raise StateError(f"{reader.owner}: 'pending' names vectors past the {self.count} there are")
        return table, pending

    def restore(self, bytes table not None, bytes pending not None):
        """Takes over what `check` gave; the caller then calls `control`."""
        memcpy(self.entries, <const char*>table, self.count * ENTRY_SIZE)
        memcpy(self.pending, <const char*>pending, self.pending_words() * sizeof(uint32_t))

    def pending_words(self):
        """The pending bits fill whole 64-bit words (6.8.2.10)."""
        return (self.count + 63) // 64 * 2

    cdef uint64_t read(self, uint32_t offset, uint32_t size) noexcept nogil:
        """A load from the table; the caller checked that it lies within."""
        cdef uint64_t value = 0
        memcpy(&value, <char*>self.entries + offset, size)
        return value

    cdef uint64_t read_pending(self, uint32_t offset, uint32_t size) noexcept nogil:
        """A load from the pending bits; the caller checked that it lies within."""
        cdef uint64_t value = 0
        memcpy(&value, <char*>self.pending + offset, size)
        return value

    cdef int write(self, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil:
        """A store to the table; the caller checked that it lies within. Answers 0 or -errno of KVM refusing a message."""
        cdef uint32_t vector
        cdef int result = 0
        memcpy(<char*>self.entries + offset, &value, size)
        for vector in range(offset // ENTRY_SIZE, (offset + size - 1) // ENTRY_SIZE + 1):
            self.entries[vector * WORDS] &= ~<uint32_t>ADDRESS_LOW_FORCED
            self.entries[vector * WORDS + CONTROL] &= CONTROL_MASKED
            result = self.update(vector) or result
        return result

    cdef int control(self, bint enabled, bint masked) noexcept nogil:
        """The capability's enable and function mask bits changed. Answers 0 or -errno of KVM refusing a message."""
        cdef uint32_t vector
        cdef int result = 0
        self.enabled = enabled
        self.masked = masked
        if enabled and not masked:
            for vector in range(self.count):
                result = self.update(vector) or result
        return result

    cdef void signal(self, uint32_t vector) noexcept nogil:
        """Sends the vector's message, at once or at its unmask. A vector that is not there (the guest chose it) is dropped."""
        if vector >= self.count or not self.enabled:
            return
        if self.masked or self.entries[vector * WORDS + CONTROL] & CONTROL_MASKED:
            self.pending[vector >> 5] |= <uint32_t>1 << (vector & 31)
        else:
            (<MsiLine>self.lines[vector]).trigger()

    cdef int open_fd(self, uint32_t vector) noexcept nogil:
        """The vector's eventfd while its message may be sent; else -1."""
        if vector >= self.count or not self.enabled or self.masked or self.entries[vector * WORDS + CONTROL] & CONTROL_MASKED:
            return -1
        return (<MsiLine>self.lines[vector]).fd

    cdef int update(self, uint32_t vector) noexcept nogil:
        """Tells KVM the message of a vector that may be sent, and sends what waited for that. Answers 0 or -errno."""
        cdef uint32_t* entry = &self.entries[vector * WORDS]
        cdef uint32_t bit = <uint32_t>1 << (vector & 31)
        cdef int result
        if not self.enabled or self.masked or entry[CONTROL] & CONTROL_MASKED:
            return 0
        result = (<MsiLine>self.lines[vector]).route(<uint64_t>entry[1] << 32 | entry[0], entry[2])
        if self.pending[vector >> 5] & bit:
            self.pending[vector >> 5] &= ~bit
            (<MsiLine>self.lines[vector]).trigger()
        return result
