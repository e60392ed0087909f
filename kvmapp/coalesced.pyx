"""Stores that need no answer at once: KVM notes them in a ring and lets the guest go on (KVM_REGISTER_COALESCED_MMIO, api.rst).

They reach their devices, in order, before the next exit of any vCPU is handled and before the machine stands still. It fits a
register whose store has no effect until something else is accessed, as the address half of an index and data pair. `drain` is for any
thread.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

from kvmapp.abi.kvm cimport (KVM_REGISTER_COALESCED_MMIO, KVM_UNREGISTER_COALESCED_MMIO, kvm_coalesced_mmio,
                             kvm_coalesced_mmio_zone)
from kvmapp.abi.posix cimport (atomic_load_u32, atomic_store_u32, ioctl, pthread_mutex_destroy,
                               pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock)

cdef enum:
    PAGE_SIZE = 4096

cdef uint32_t ENTRIES = (PAGE_SIZE - sizeof(kvm_coalesced_mmio_ring)) // sizeof(kvm_coalesced_mmio)


cdef class CoalescedRing:
    """The ring of one VM; all its vCPUs share it. Without one (`ring` NULL) every store is an exit."""

    def __cinit__(self, Bus pio not None, Bus mmio not None):
        pthread_mutex_init(&self.lock, NULL)
        self.pio = pio
        self.mmio = mmio

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)

    def add(self, int vm_fd, uint64_t address, uint32_t size, bint is_pio):
        """Stores to these bytes need no exit from now on; whether this KVM agrees."""
        return self.ring != NULL and self.tell(vm_fd, KVM_REGISTER_COALESCED_MMIO, address, size, is_pio)

    def remove(self, int vm_fd, uint64_t address, uint32_t size, bint is_pio):
        """They need one again, and what was noted has been carried out."""
        self.tell(vm_fd, KVM_UNREGISTER_COALESCED_MMIO, address, size, is_pio)
        with nogil:
            self.drain()

    cdef bint tell(self, int vm_fd, unsigned long request, uint64_t address, uint32_t size, bint is_pio):
        cdef kvm_coalesced_mmio_zone zone
        memset(&zone, 0, sizeof(zone))
        zone.addr = address
        zone.size = size
        zone.pio = is_pio
        return ioctl(vm_fd, request, &zone) == 0

    cdef void drain(self) noexcept nogil:
        """Carries the noted stores out. One vCPU does it at a time: who finds the ring empty knows that all before are done."""
        cdef kvm_coalesced_mmio* entry
        cdef uint32_t first
        cdef uint64_t value
        if self.ring == NULL or atomic_load_u32(&self.ring.first) == atomic_load_u32(&self.ring.last):
            return
        pthread_mutex_lock(&self.lock)
        first = self.ring.first
        while first != atomic_load_u32(&self.ring.last):
            entry = &self.ring.coalesced_mmio[first]
            value = 0
            memcpy(&value, entry.data, entry.len)
            if entry.pio:
                self.pio.store(entry.phys_addr, entry.len, value)
            else:
                self.mmio.store(entry.phys_addr, entry.len, value)
            first = (first + 1) % ENTRIES
            atomic_store_u32(&self.ring.first, first)
        pthread_mutex_unlock(&self.lock)
