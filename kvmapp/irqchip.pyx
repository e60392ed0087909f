"""The interrupt chips in the kernel (PIC, I/O APIC, LAPICs) as devices drive them. Documentation/virt/kvm/api.rst.

Pins go by KVM_IRQ_LINE, messages by irqfd: each MsiLine's eventfd is bound to a GSI whose route holds the message.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from kvmapp.abi cimport kvm as abi
from kvmapp.abi.kvm cimport kvm_irq_level, kvm_irq_routing_entry, kvm_irqfd
from kvmapp.abi.posix cimport errno, ioctl, pthread_mutex_lock, pthread_mutex_unlock
from kvmapp.devices cimport MAX_MSI, MAX_PINS, Interrupts

import os

from kvmapp.errors import HostError


cdef class KvmInterrupts(Interrupts):
    """The in-kernel PIC, I/O APIC and LAPICs. The routing table is ours: ISA pins to both chips, timer to pin 2, and MSI."""

    def __cinit__(self, int vm_fd):
        self.vm_fd = vm_fd
        self.routing = <abi.kvm_irq_routing*>calloc(
            1, sizeof(abi.kvm_irq_routing) + (2 * MAX_PINS + MAX_MSI) * sizeof(kvm_irq_routing_entry))
        if self.routing == NULL:
            raise MemoryError()
        for gsi in range(16):
            self.add_pin(gsi, abi.KVM_IRQCHIP_PIC_MASTER if gsi < 8 else abi.KVM_IRQCHIP_PIC_SLAVE, gsi % 8)
        for gsi in range(MAX_PINS):
            if gsi != 2:                                       # ISA 2 is the PICs' cascade; I/O APIC pin 2 is the timer's
                self.add_pin(gsi, abi.KVM_IRQCHIP_IOAPIC, gsi or 2)
        if self.commit() < 0:
            raise HostError(f"KVM_SET_GSI_ROUTING: {os.strerror(errno)}")

    def __dealloc__(self):
        free(self.routing)

    def add_pin(self, uint32_t gsi, uint32_t chip, uint32_t pin):
        cdef kvm_irq_routing_entry* entry = &self.routing.entries[self.routing.nr]
        entry.gsi = gsi
        entry.type = abi.KVM_IRQ_ROUTING_IRQCHIP
        entry.u.irqchip.irqchip = chip
        entry.u.irqchip.pin = pin
        self.routing.nr += 1

    cdef void set_pin(self, uint32_t gsi, bint level) noexcept nogil:
        cdef kvm_irq_level request
        request.irq = gsi
        request.level = level
        ioctl(self.vm_fd, abi.KVM_IRQ_LINE, &request)

    cdef int bind_msi(self, uint32_t gsi, int fd) except -1:
        cdef kvm_irqfd request
        memset(&request, 0, sizeof(request))
        request.fd = fd
        request.gsi = gsi
        if ioctl(self.vm_fd, abi.KVM_IRQFD, &request) < 0:
            raise HostError(f"KVM_IRQFD: {os.strerror(errno)}")
        return 0

    cdef void unbind_msi(self, uint32_t gsi, int fd) noexcept nogil:
        cdef kvm_irqfd request
        memset(&request, 0, sizeof(request))
        request.fd = fd
        request.gsi = gsi
        request.flags = abi.KVM_IRQFD_FLAG_DEASSIGN
        ioctl(self.vm_fd, abi.KVM_IRQFD, &request)

    cdef int set_msi_route(self, uint32_t gsi, uint64_t address, uint32_t data) noexcept nogil:
        """A route joins the table when its message is first known: KVM refuses or ignores vectors without one."""
        cdef kvm_irq_routing_entry* entry = NULL
        cdef uint32_t i
        cdef int result
        pthread_mutex_lock(&self.lock)
        for i in range(self.routing.nr):
            if self.routing.entries[i].gsi == gsi and self.routing.entries[i].type == abi.KVM_IRQ_ROUTING_MSI:
                entry = &self.routing.entries[i]
                break
        if entry == NULL:
            entry = &self.routing.entries[self.routing.nr]
            memset(entry, 0, sizeof(kvm_irq_routing_entry))
            entry.gsi = gsi
            entry.type = abi.KVM_IRQ_ROUTING_MSI
            self.routing.nr += 1
        entry.u.msi.address_lo = <uint32_t>address
        entry.u.msi.address_hi = <uint32_t>(address >> 32)
        entry.u.msi.data = data
        result = self.commit()
        pthread_mutex_unlock(&self.lock)
        return result

    cdef int commit(self) noexcept nogil:
        return 0 if ioctl(self.vm_fd, abi.KVM_SET_GSI_ROUTING, self.routing) == 0 else -errno
