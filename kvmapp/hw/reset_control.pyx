"""The reset control register at port 0xCF9, also ACPI's reset register (Intel ICH9 datasheet, 13.7.5).

The port lies within the dword of PCI's configuration address; PciHost passes byte accesses on to this chip.
Left out: the difference between a CPU-only, a hard and a full reset: each is a reset of the whole machine.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmapp.devices cimport RESET, Device, Power

from kvmapp.state import StateReader

cdef enum:
    SYSTEM_RESET = 0x02
    RESET_CPU = 0x04
    FULL_RESET = 0x08
    WRITABLE = SYSTEM_RESET | RESET_CPU | FULL_RESET


cdef class ResetControl(Device):
    """One byte at offset 0; bit 2 rising resets the machine."""
    cdef Power power
    cdef uint8_t value

    def __cinit__(self, str name not None, Power power not None):
        self.rename(name)
        self.width = 1
        self.power = power

    def reset(self):
        self.value = 0

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
        if value & ~<uint64_t>self.value & RESET_CPU:
            self.power.request(RESET, 0)
        self.value = value & WRITABLE
