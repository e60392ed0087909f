from libc.stdint cimport uint32_t, uint64_t

from kvmapp.abi.posix cimport iovec
from kvmapp.iothread cimport Waiter

cdef enum:
    NET_HEADER = 12                  # bytes of virtio_net_hdr_v1 before each frame
    LEGACY_HEADER = 10               # ... without num_buffers, before VIRTIO 1.0
    LARGEST_FRAME = 65535 + 18       # a GSO frame with its Ethernet and VLAN headers


cdef class NetBackend:
    cdef readonly str name
    cdef int fd
    cdef readonly Waiter waiter      # what its I/O thread waits by, or None
    cdef bint answers                # `send` may call the waiter's reader
    cdef readonly bint has_offloads
    cdef readonly bint has_ufo
    cdef readonly bint has_uso

    cdef ssize_t send(self, const iovec* vector, int count) noexcept nogil
    cdef ssize_t receive(self, const iovec* vector, int count) noexcept nogil
    cdef int set_offloads(self, uint32_t flags) noexcept nogil
    cdef int enable(self, bint used) noexcept nogil
    cdef int set_header(self, uint32_t length) noexcept nogil


cdef class FrameDescriptor(NetBackend):
    pass
