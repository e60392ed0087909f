"""System control port A, port 0x92 of the PS/2: the fast ways to the A20 gate and to a reset (IBM PS/2 Hardware Reference).

A20 is always open under KVM; its bit is kept and does nothing. Left out: the password lock, the disk lamp.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmapp.devices cimport RESET, Device, Power

from kvmapp.state import StateReader

cdef enum:
    FAST_RESET = 0x01
    A20_OPEN = 0x02
    WRITABLE = FAST_RESET | A20_OPEN


cdef class Port92(Device):
    """One byte at offset 0; bit 0 rising resets the machine."""
    cdef Power power
    cdef uint8_t value

    def __cinit__(self, str name not None, Power power not None):
        self.rename(name)
        self.width = 1
        self.power = power
        self.value = A20_OPEN

    def reset(self):
        self.value = A20_OPEN

    def save(self):
        return {"version": 1, "value": self.value}

    def restore(self, dict saved not None):
        reader = StateReader(self.name, saved, version=1)
        cdef uint8_t value = reader.bits("value", WRITABLE)
        reader.done()
        self.value = value

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return self.value

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        if value & ~<uint64_t>self.value & FAST_RESET:
            self.power.request(RESET, 0)
        self.value = value & WRITABLE
