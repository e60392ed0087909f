from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmapp.hw.e1000_chip cimport Descriptor, E1000Chip
from kvmapp.hw.e1000_frames cimport VLAN_TAG, Context, NetHeader
from kvmapp.net.backend cimport LARGEST_FRAME

cdef enum:                           # of a frame that is being put together; below them the bits of POPTS
    STARTED = 0x100
    SPOILED = 0x200
    SEGMENTED = 0x400
    FRAME_FLAGS = STARTED | SPOILED | SEGMENTED | 3


cdef class Sender:
    cdef E1000Chip chip
    cdef Context contexts[2]         # of sums, of segmentation
    cdef uint32_t flags              # of the frame
    cdef uint32_t length
    cdef uint8_t frame[VLAN_TAG + LARGEST_FRAME]                 # from VLAN_TAG on; a tag goes before it
    cdef readonly uint64_t packets, octets, dropped

    cdef void clear(self) noexcept nogil
    cdef void transmit(self) noexcept nogil
    cdef uint32_t take(self, Descriptor* descriptor) noexcept nogil
    cdef void append(self, uint64_t gpa, uint32_t length) noexcept nogil
    cdef uint32_t finish(self, bint tagged, uint32_t tag) noexcept nogil
    cdef void put_sums(self, NetHeader* header, uint32_t length, uint32_t flags) noexcept nogil
    cdef uint32_t send_large(self, NetHeader* header, uint32_t length, uint32_t flags, bint tagged, uint32_t tag) noexcept nogil
    cdef void send(self, NetHeader* header, uint8_t* frame, uint32_t length, bint tagged, uint32_t tag) noexcept nogil
