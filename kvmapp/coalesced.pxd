from libc.stdint cimport uint32_t, uint64_t

from kvmapp.abi.kvm cimport kvm_coalesced_mmio_ring
from kvmapp.abi.posix cimport pthread_mutex_t
from kvmapp.devices cimport Bus


cdef class CoalescedRing:
    cdef kvm_coalesced_mmio_ring* ring
    cdef pthread_mutex_t lock
    cdef Bus pio
    cdef Bus mmio

    cdef bint tell(self, int vm_fd, unsigned long request, uint64_t address, uint32_t size, bint is_pio)
    cdef void drain(self) noexcept nogil
