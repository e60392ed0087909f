from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from kvmapp.abi.posix cimport pthread_mutex_t
from kvmapp.devices cimport Bus, Device, IrqLine
from kvmapp.hw.msix cimport MsixTable

cdef enum:
    CONFIG_SIZE = 4096
    MAX_BARS = 6

    PCI_COMMAND = 0x04
    PCI_COMMAND_IO = 0x001
    PCI_COMMAND_MEMORY = 0x002
    PCI_COMMAND_MASTER = 0x004
    PCI_COMMAND_INTX_DISABLE = 0x400

cdef enum:                           # BarKind for Python
    BAR_IO = 0
    BAR_MEM32 = 1
    BAR_MEM64 = 2                    # takes two BAR registers
    BAR_MEM64_PREFETCH = 3

cdef struct Window:
    uint64_t base
    uint64_t size                    # bytes; 0: no such window

cdef struct Windows:                 # where BARs may stand
    Window io
    Window mem32
    Window mem64

cdef struct Bar:
    uint64_t size                    # bytes, a power of two; 0: no BAR starts at this register
    uint64_t offset                  # of its first byte in the function's register space
    uint64_t address                 # where it is mapped
    uint32_t kind
    bint mapped


cdef class PciFunction(Device):
    cdef uint8_t config[CONFIG_SIZE]
    cdef uint8_t initial[CONFIG_SIZE]        # after a reset
    cdef uint8_t writable[CONFIG_SIZE]       # bits that the guest may change
    cdef Bar bars[MAX_BARS]
    cdef Bus pio
    cdef Bus mmio
    cdef tuple known_to                      # the buses that keep the function alive
    cdef Windows windows
    cdef pthread_mutex_t signals             # guards intx, its level, and the MSI-X table; after Device.lock
    cdef IrqLine intx
    cdef bint intx_level
    cdef MsixTable msix
    cdef uint32_t msix_capability            # its offset in config space
    cdef uint64_t msix_table
    cdef uint64_t msix_pending
    cdef uint32_t last_capability
    cdef uint32_t free_capability

    cdef uint64_t config_read(self, uint32_t offset, uint32_t size) noexcept nogil
    cdef void config_write(self, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil
    cdef void bar_moved(self, uint32_t index, uint64_t address, bint mapped) noexcept nogil
    cdef void command_changed(self) noexcept nogil
    cdef bint is_bus_master(self) noexcept nogil
    cdef bint is_msix_enabled(self) noexcept nogil
    cdef void signal(self, uint32_t vector) noexcept nogil
    cdef int vector_fd(self, uint32_t vector) noexcept nogil
    cdef void set_intx(self, bint level) noexcept nogil
    cdef uint32_t field(self, uint32_t offset, uint32_t size) noexcept nogil
    cdef bint wanted(self, uint32_t index, uint64_t* address) noexcept nogil
    cdef void move_bars(self) noexcept nogil
    cdef void unmap_bars(self) noexcept nogil
    cdef void map_bar(self, uint32_t index, uint64_t address) noexcept nogil
    cdef void unmap_bar(self, uint32_t index) noexcept nogil
    cdef void apply_msix_control(self) noexcept nogil
    cdef void drive_intx(self) noexcept nogil
