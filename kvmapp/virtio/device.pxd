from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmapp.devices cimport Device
from kvmapp.iothread cimport Doorbell
from kvmapp.memory cimport GuestMemory
from kvmapp.virtio.virtqueue cimport Virtqueue

cdef enum:
    MAX_QUEUES = 64                  # of one device


cdef inline uint32_t half(uint64_t whole, bint upper) noexcept nogil:
    """What a 32-bit field shows of a 64-bit value."""
    return <uint32_t>(whole >> 32 if upper else whole)


cdef inline uint64_t with_half(uint64_t whole, bint upper, uint32_t value) noexcept nogil:
    """The 64-bit value after a store to one of its halves."""
    if upper:
        return <uint32_t>whole | <uint64_t>value << 32
    return whole >> 32 << 32 | value


cdef class Transport:
    cdef void queue_interrupt(self, uint32_t queue) noexcept nogil
    cdef int interrupt_fd(self, uint32_t queue) noexcept nogil
    cdef void config_interrupt(self) noexcept nogil


cdef class VirtioDevice(Device):
    cdef readonly GuestMemory memory
    cdef readonly list queues
    cdef Transport transport

    # what the concrete device sets in its __cinit__
    cdef readonly uint32_t device_id
    cdef readonly uint64_t offered   # feature bits
    cdef void* config                # its config space; NULL when it has none
    cdef readonly uint32_t config_size
    cdef uint32_t state_version      # of what `save_device` gives

    # what the driver set
    cdef readonly uint64_t wanted    # feature bits as written
    cdef readonly uint64_t features  # ... as agreed at FEATURES_OK, else 0
    cdef readonly bint legacy        # a driver of 0.9.5 has begun: no FEATURES_OK, and queues run before DRIVER_OK
    cdef uint32_t state              # the status register, atomic: bits are only added until a reset
    cdef uint32_t generation         # of the config space, atomic

    cdef bint paused
    cdef bint held                   # the guest forbids the device to reach its memory
    cdef PyObject* queue_table[MAX_QUEUES]   # borrowed from `queues`
    cdef uint32_t queue_count

    # for concrete devices
    cdef Virtqueue add_queue(self, uint32_t size_max)
    cdef void offer(self, uint32_t feature) noexcept
    cdef bint has(self, uint32_t feature) noexcept nogil
    cdef void notify_used(self, Virtqueue queue) noexcept nogil
    cdef void notify_config(self) noexcept nogil
    cdef void need_reset(self) noexcept nogil

    # hooks, overridden by concrete devices
    cdef void kicked(self, Virtqueue queue) noexcept nogil
    cdef bint accepts(self, uint64_t features) noexcept nogil
    cdef void activate(self) noexcept nogil
    cdef void drain(self, Virtqueue queue) noexcept nogil
    cdef void forget(self, Virtqueue queue) noexcept nogil
    cdef void deactivate(self) noexcept nogil
    cdef void aim(self) noexcept nogil
    cdef uint64_t read_config(self, uint32_t offset, uint32_t size) noexcept nogil
    cdef void write_config(self, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil

    # for transports
    cdef uint32_t status_register(self) noexcept nogil
    cdef void set_status(self, uint32_t value) noexcept nogil
    cdef void set_legacy_status(self, uint32_t value) noexcept nogil
    cdef void begin_legacy(self) noexcept nogil
    cdef uint64_t legacy_offered(self) noexcept nogil
    cdef void want(self, uint32_t word, uint32_t bits) noexcept nogil
    cdef void hold(self, bint held) noexcept nogil
    cdef uint64_t load_config(self, uint32_t offset, uint32_t size) noexcept nogil
    cdef void store_config(self, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil
    cdef void enable_queue(self, Virtqueue queue) noexcept nogil
    cdef void reset_queue(self, Virtqueue queue) noexcept nogil

    # within
    cdef void serve(self, Virtqueue queue) noexcept nogil
    cdef bint look(self, Virtqueue queue) noexcept nogil
    cdef void hush(self, Virtqueue queue, bint quiet) noexcept nogil
    cdef bint agree(self) noexcept nogil
    cdef bint agree_legacy(self) noexcept nogil
    cdef bint is_begun(self) noexcept nogil
    cdef void start(self, Virtqueue queue) noexcept nogil
    cdef void stop(self, Virtqueue queue) noexcept nogil
    cdef void clear(self) noexcept nogil


cdef class QueueDoorbell(Doorbell):
    cdef VirtioDevice device
    cdef Virtqueue queue
