"""pvpanic, by which a guest tells that it panicked (QEMU's docs/specs/pvpanic.rst): one port, an event a bit.

Linux finds it as ACPI's QEMU0001 (boot/dsdt.py) or not at all. Left out: the PCI form, and the event of an orderly shutdown.
"""
from libc.stdint cimport uint32_t, uint64_t

from kvmapp.devices cimport CRASH_KERNEL, PANIC, Device, Power

from kvmapp.state import StateReader

cdef enum:
    PANICKED = 0x01
    CRASH_LOADED = 0x02              # panicked too, but a crash kernel of the guest's own goes on
    EVENTS = PANICKED | CRASH_LOADED


cdef class Pvpanic(Device):
    """One byte at offset 0: a load tells which events are known, a store says what happened."""
    cdef Power power

    def __cinit__(self, str name not None, Power power not None):
        self.rename(name)
        self.width = 1
        self.power = power

    def restore(self, dict saved not None):
        StateReader(self.name, saved, version=1).done()

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return EVENTS

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        if value & PANICKED:
            self.power.request(PANIC, 0)
        elif value & CRASH_LOADED:
            self.power.request(CRASH_KERNEL, 0)
        if value & ~<uint64_t>EVENTS:
            self.complain(b"an event that is not known here", value)
