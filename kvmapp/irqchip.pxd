from kvmapp.abi.kvm cimport kvm_irq_routing
from kvmapp.devices cimport Interrupts


cdef class KvmInterrupts(Interrupts):
    cdef int vm_fd
    cdef kvm_irq_routing* routing

    cdef int commit(self) noexcept nogil
