from kvmapp.abi.kvm cimport kvm_coalesced_mmio_ring
from kvmapp.abi.posix cimport pthread_mutex_t
from kvmapp.devices cimport Bus


cdef class CoalescedRing:
    cdef kvm_coalesced_mmio_ring* ring
    cdef pthread_mutex_t lock
    cdef Bus pio
    cdef Bus mmio

    cdef void drain(self) noexcept nogil
