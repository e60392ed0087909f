"""The Bochs debug console at port 0x402: what firmware and test kernels write goes to a log; a read answers 0xE9.

There is no flow control on this port: what the log's ring cannot take is lost, and the log says so.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmapp.chardev cimport CharBackend
from kvmapp.devices cimport Device

from kvmapp.state import StateReader

cdef enum:
    PRESENT = 0xE9


cdef class DebugPort(Device):
    """One byte at offset 0; `log` takes the output."""
    cdef CharBackend log

    def __cinit__(self, str name not None, CharBackend log not None):
        self.rename(name)
        self.width = 1
        self.log = log

    def restore(self, dict saved not None):
        StateReader(self.name, saved, version=1).done()

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return PRESENT

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint8_t byte = value & 0xFF
        if self.log.put(&byte, 1) == 0:
            self.complain(b"debug output comes faster than it is read; lost", byte)
