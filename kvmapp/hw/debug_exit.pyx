"""isa-debug-exit, as QEMU has it at port 0xF4: a store ends the machine with a code. For test kernels, only when configured."""
from libc.stdint cimport uint32_t, uint64_t

from kvmapp.devices cimport DEBUG_EXIT, Device, Power

from kvmapp.state import StateReader


cdef class DebugExit(Device):
    """Four bytes; a store of any width from offset 0 ends the machine with its value as the code."""
    cdef Power power

    def __cinit__(self, str name not None, Power power not None):
        self.rename(name)
        self.width = 4
        self.power = power

    def restore(self, dict saved not None):
        StateReader(self.name, saved, version=1).done()

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return 0

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        if offset == 0:
            self.power.request(DEBUG_EXIT, <uint32_t>value)
