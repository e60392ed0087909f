from cpython.object cimport PyObject
from libc.stdint cimport uint32_t, uint64_t

from kvmapp.hw.pci cimport PciFunction
from kvmapp.virtio.device cimport MAX_QUEUES, Transport, VirtioDevice
from kvmapp.virtio.virtqueue cimport Virtqueue

# The transport's own registers, as the guest sees them.
cdef struct PciTransportState:
    uint32_t device_feature_select
    uint32_t driver_feature_select
    uint32_t queue_select
    uint32_t config_vector           # of MSI-X, or VIRTIO_MSI_NO_VECTOR; read by I/O threads, atomic
    uint32_t queue_vectors[MAX_QUEUES]
    uint32_t isr                     # guarded by `signals`


cdef class VirtioPci(PciFunction):
    cdef readonly VirtioDevice device
    cdef bint modern                 # has the four structures of VIRTIO 1.0
    cdef PciTransportState state
    cdef bint bound[MAX_QUEUES]      # the queue's doorbell hangs at its notify address as an ioeventfd
    cdef uint32_t config_window      # offset of the configuration access capability

    cdef uint64_t read_common(self, uint32_t offset, uint32_t size) noexcept nogil
    cdef uint32_t field_value(self, uint32_t field) noexcept nogil
    cdef uint32_t queue_field_value(self, Virtqueue queue, uint32_t field) noexcept nogil
    cdef void write_common(self, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil
    cdef void set_field(self, uint32_t field, uint32_t value) noexcept nogil
    cdef void set_queue_field(self, Virtqueue queue, uint32_t field, uint32_t value) noexcept nogil
    cdef uint32_t take_isr(self) noexcept nogil
    cdef PyObject* selected(self) noexcept nogil
    cdef uint32_t valid_vector(self, uint32_t vector) noexcept nogil
    cdef void interrupt(self, uint32_t vector, uint32_t isr_bit) noexcept nogil
    cdef void forget(self) noexcept nogil
    cdef void bind(self, Virtqueue queue, bint assign) noexcept nogil
    cdef uint32_t window(self, uint32_t offset, uint32_t size) noexcept nogil


cdef class PciSignals(Transport):
    cdef VirtioPci card
