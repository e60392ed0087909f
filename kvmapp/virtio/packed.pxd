from libc.stdint cimport uint8_t, uint16_t, uint32_t

from kvmapp.abi.virtio cimport vring_desc
from kvmapp.virtio.virtqueue cimport Chain, Virtqueue


cdef class PackedVirtqueue(Virtqueue):
    cdef bint avail_wrap             # the wrap counters of the two positions, `last_avail` and `next_used`
    cdef bint used_wrap
    cdef uint32_t outstanding        # descriptors popped and not yet pushed
    cdef uint16_t* spans             # by buffer id: descriptors of the chain under way with it; 0 when there is none
    cdef uint16_t* order             # buffer ids as they were popped, a ring of `size_max`
    cdef uint32_t popped             # how many ever were
    cdef uint8_t* held               # the first descriptor pushed in this round; its flags are stored last
    cdef uint16_t held_flags
    cdef uint32_t unseen             # descriptors that this round's pushes have moved on

    cdef bint is_available(self, uint32_t index, bint wrap) noexcept nogil
    cdef int take(self, Chain* chain) noexcept nogil
    cdef int take_table(self, Chain* chain, const vring_desc* desc) noexcept nogil
    cdef bint driver_wants(self, uint32_t moved) noexcept nogil
