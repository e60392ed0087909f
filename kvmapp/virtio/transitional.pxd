from libc.stdint cimport uint32_t, uint64_t

from kvmapp.virtio.device cimport MAX_QUEUES
from kvmapp.virtio.pci cimport VirtioPci
from kvmapp.virtio.virtqueue cimport Virtqueue


cdef class TransitionalPci(VirtioPci):
    cdef bint port_bound[MAX_QUEUES]         # the queue's doorbell hangs at the notify port as an ioeventfd

    cdef uint32_t device_config(self) noexcept nogil
    cdef uint64_t read_legacy(self, uint32_t offset, uint32_t size) noexcept nogil
    cdef uint32_t legacy_value(self, uint32_t field) noexcept nogil
    cdef void write_legacy(self, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil
    cdef void set_legacy_field(self, uint32_t field, uint32_t value) noexcept nogil
    cdef void set_ring(self, Virtqueue queue, uint32_t page) noexcept nogil
    cdef void kick(self, uint32_t index) noexcept nogil
    cdef void bind_ports(self, bint assign) noexcept nogil
    cdef void bind_port(self, Virtqueue queue, bint assign) noexcept nogil
