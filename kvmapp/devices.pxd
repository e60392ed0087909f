from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from kvmapp.abi.posix cimport pthread_mutex_t

cdef enum:
    MAX_RANGES = 512                 # windows on one bus
    MAX_PINS = 24                    # of the I/O APIC
    MAX_MSI = 1000                   # KVM takes 4096 routes; each line also costs two descriptors

cdef struct Range:
    uint64_t base
    uint64_t size                    # bytes
    uint64_t offset                  # what the device sees as the offset of `base`
    PyObject* device                 # borrowed: Bus.devices keeps every device ever mapped


cdef class Device:
    cdef readonly str name
    cdef char label[64]              # the name for lines written without the GIL
    cdef pthread_mutex_t lock
    cdef uint32_t width
    cdef uint32_t complaints
    cdef int64_t complaint_epoch

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil
    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil
    cdef void complain(self, const char* what, uint64_t value) noexcept nogil
    cdef void report_host(self, const char* what, uint64_t value, int error) noexcept nogil
    cdef bint may_speak(self) noexcept nogil


cdef class Bus:
    cdef readonly str name
    cdef int vm_fd
    cdef bint is_pio
    cdef Range ranges[MAX_RANGES]
    cdef uint32_t count
    cdef uint32_t sequence
    cdef pthread_mutex_t lock
    cdef list devices

    cdef int place(self, uint64_t base, uint64_t size, Device device, uint64_t offset) noexcept nogil
    cdef int remove(self, uint64_t base, uint64_t size) noexcept nogil
    cdef int ring(self, uint64_t address, uint32_t size, int fd, bint match, uint64_t value, bint assign) noexcept nogil
    cdef bint find(self, uint64_t address, Range* hit) noexcept nogil
    cdef uint64_t load(self, uint64_t address, uint32_t size) noexcept nogil
    cdef void store(self, uint64_t address, uint32_t size, uint64_t value) noexcept nogil


cdef class Interrupts:
    cdef pthread_mutex_t lock
    cdef uint32_t asserted[MAX_PINS]
    cdef uint32_t edges[MAX_PINS]
    cdef uint32_t msi_count
    cdef list lines
    cdef list free_gsis              # of released MSI vectors

    cdef void wire(self, uint32_t gsi, bint level) noexcept nogil
    cdef void set_pin(self, uint32_t gsi, bint level) noexcept nogil
    cdef int bind_msi(self, uint32_t gsi, int fd) except -1
    cdef void unbind_msi(self, uint32_t gsi, int fd) noexcept nogil
    cdef int set_msi_route(self, uint32_t gsi, uint64_t address, uint32_t data) noexcept nogil


cdef class IrqLine:
    cdef Interrupts controller
    cdef readonly uint32_t gsi
    cdef bint level

    cdef void set(self, bint level) noexcept nogil


cdef class MsiLine:
    cdef Interrupts controller
    cdef readonly uint32_t gsi
    cdef readonly int fd
    cdef uint64_t address
    cdef uint32_t data

    cdef int route(self, uint64_t address, uint32_t data) noexcept nogil
    cdef void trigger(self) noexcept nogil


cdef enum:                           # PowerEvent for Python
    RUNNING = 0
    POWER_OFF = 1                    # the guest asked for S5
    RESET = 2                        # reset port, reset register or triple fault
    CRASH = 3                        # KVM could not go on
    DEBUG_EXIT = 4                   # isa-debug-exit
    PANIC = 5                        # the guest told that it panicked
    CRASH_KERNEL = 6                 # ... and that a crash kernel of its own goes on
    WATCHDOG = 7                     # the guest did not reload its watchdog in time
    DISK_FULL = 8                    # the host has no room for what the guest writes to a disk


cdef class Power:
    cdef readonly int fd
    cdef uint64_t wish               # the event, and above it the code; atomic

    cdef void request(self, uint32_t event, uint32_t code) noexcept nogil
    cdef bint pending(self) noexcept nogil
