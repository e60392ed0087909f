from libc.stdint cimport uint16_t, uint32_t, uint64_t

from kvmapp.chardev cimport CharBackend, CharUser
from kvmapp.iothread cimport Doorbell
from kvmapp.virtio.device cimport VirtioDevice
from kvmapp.virtio.virtqueue cimport Chain, Virtqueue


cdef packed struct ConsoleConfig:    # struct virtio_console_config (5.3.4)
    uint16_t cols
    uint16_t rows
    uint32_t max_nr_ports
    uint32_t emerg_wr


cdef class VirtioConsole(VirtioDevice):
    cdef CharBackend backend
    cdef Chain chains[2]             # of the queues; under their locks
    cdef ConsoleConfig layout        # guarded by Device.lock
    cdef uint64_t sent               # bytes of the first waiting output that the backend has already; under the queue's lock

    cdef void receive(self, Virtqueue queue) noexcept nogil
    cdef void transmit(self, Virtqueue queue) noexcept nogil
    cdef uint32_t fill(self, Chain* chain) noexcept nogil
    cdef bint empty(self, Chain* chain) noexcept nogil


cdef class ConsoleUser(CharUser):
    cdef Doorbell input
    cdef Doorbell output
