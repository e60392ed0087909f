from cpython.object cimport PyObject
from libc.stdint cimport uint32_t, uint64_t

from kvmapp.abi.posix cimport pthread_mutex_t
from kvmapp.devices cimport Bus, Device, MsiLine
from kvmapp.virtio.device cimport MAX_QUEUES, Transport, VirtioDevice
from kvmapp.virtio.virtqueue cimport Virtqueue

cdef struct MmioState:
    uint32_t device_feature_select
    uint32_t driver_feature_select
    uint32_t queue_select
    uint32_t page_size               # that a legacy driver counts in
    uint32_t alignment               # of a legacy driver's used rings
    uint32_t isr                     # causes that the driver has not acknowledged; guarded by `signals`
    uint32_t unseen                  # those among them that came after its last look


cdef class VirtioMmio(Device):
    cdef readonly VirtioDevice device
    cdef readonly bint legacy
    cdef MmioState state
    cdef MsiLine line
    cdef pthread_mutex_t signals     # guards the causes of interrupts; the innermost
    cdef Bus bus                     # where it stands, for ioeventfds
    cdef uint64_t base
    cdef bint bound[MAX_QUEUES]

    cdef uint32_t register_value(self, uint32_t offset) noexcept nogil
    cdef uint32_t queue_value(self, Virtqueue queue, uint32_t offset) noexcept nogil
    cdef void set_register(self, uint32_t offset, uint32_t value) noexcept nogil
    cdef void set_queue_register(self, Virtqueue queue, uint32_t offset, uint32_t value) noexcept nogil
    cdef void set_ready(self, Virtqueue queue, bint ready) noexcept nogil
    cdef void set_ring(self, Virtqueue queue, uint32_t page) noexcept nogil
    cdef void kick(self, uint32_t index) noexcept nogil
    cdef PyObject* selected(self) noexcept nogil
    cdef void forget(self) noexcept nogil
    cdef void bind_all(self, bint assign) noexcept nogil
    cdef void bind(self, Virtqueue queue, bint assign) noexcept nogil
    cdef void interrupt(self, uint32_t isr_bit) noexcept nogil
    cdef uint32_t look(self) noexcept nogil
    cdef void acknowledge(self, uint32_t causes) noexcept nogil


cdef class MmioSignals(Transport):
    cdef VirtioMmio window
