from cpython.object cimport PyObject
from libc.stdint cimport uint32_t, uint64_t

from kvmapp.devices cimport Bus, Device, Interrupts
from kvmapp.hw.pci cimport PciFunction

cdef enum:
    SLOTS = 32
    FUNCTIONS = 8                    # a slot


cdef class PciHost(Device):
    cdef readonly PciFunction bridge
    cdef Bus pio
    cdef Bus mmio
    cdef Interrupts interrupts
    cdef Device reset_control
    cdef list windows                # (base, size) of the I/O, 32-bit and 64-bit windows
    cdef dict attached               # (slot, number): function
    cdef PyObject* functions[SLOTS * FUNCTIONS]
    cdef uint32_t address

    cdef uint64_t config_read(self, uint32_t bus, uint32_t devfn, uint32_t offset, uint32_t size) noexcept nogil
    cdef void config_write(self, uint32_t bus, uint32_t devfn, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil
