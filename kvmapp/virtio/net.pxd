from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from kvmapp.virtio.device cimport VirtioDevice
from kvmapp.virtio.virtqueue cimport Chain, Virtqueue

cdef enum:
    MAX_PAIRS = 16

cdef packed struct NetConfig:        # virtio_net_config (5.1.4)
    uint8_t mac[6]
    uint16_t status
    uint16_t max_virtqueue_pairs
    uint16_t mtu


cdef class VirtioNet(VirtioDevice):
    cdef readonly list pairs
    cdef PyObject* pair_table[MAX_PAIRS]     # borrowed from `pairs`
    cdef uint32_t pair_count
    cdef readonly uint32_t pairs_used        # by the driver
    cdef NetConfig net_config
    cdef uint8_t own_mac[6]                  # what the driver may change until its next reset
    cdef Chain chain                         # of the control queue

    cdef bint is_control(self, Virtqueue queue) noexcept nogil
    cdef void use_pairs(self, uint32_t count) noexcept nogil
    cdef uint32_t offloads(self) noexcept nogil
    cdef void control(self, Virtqueue queue) noexcept nogil
    cdef bint obey(self) noexcept nogil
    cdef bint obey_mac(self, uint8_t command) noexcept nogil
    cdef bint skip_table(self) noexcept nogil
