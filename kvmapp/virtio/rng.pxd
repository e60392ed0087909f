from libc.stdint cimport uint32_t

from kvmapp.virtio.device cimport VirtioDevice
from kvmapp.virtio.virtqueue cimport Chain


cdef class VirtioRng(VirtioDevice):
    cdef int source                  # a descriptor that gives random bytes
    cdef Chain chain

    cdef uint32_t fill(self) noexcept nogil
