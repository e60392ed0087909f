from kvmapp.coalesced cimport CoalescedRing
from kvmapp.devices cimport Bus, Power
from kvmapp.irqchip cimport KvmInterrupts
from kvmapp.memory cimport GuestMemory
from kvmapp.vcpu cimport Gate


cdef class Kvm:
    cdef readonly int fd
    cdef readonly size_t run_size    # bytes of a vCPU's shared page


cdef class Vm:
    cdef readonly Kvm kvm
    cdef readonly int fd
    cdef readonly GuestMemory memory
    cdef readonly KvmInterrupts interrupts
    cdef readonly Bus pio
    cdef readonly Bus mmio
    cdef readonly Power power
    cdef readonly CoalescedRing coalesced
    cdef readonly Gate gate
    cdef readonly list vcpus
    cdef object initial
