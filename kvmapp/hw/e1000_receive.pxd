from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmapp.hw.e1000_chip cimport CRC, LONG_FRAME_MOST, E1000Chip, Ring
from kvmapp.hw.e1000_frames cimport NetHeader
from kvmapp.iothread cimport EventSource


cdef class Receiver:
    cdef E1000Chip chip
    cdef FrameReader reader
    cdef bint running
    cdef bint watching               # the reader waits for frames
    cdef NetHeader header
    cdef uint8_t frame[LONG_FRAME_MOST + 2 * CRC]                # with room for a CRC; one byte more tells of a frame too long
    cdef readonly uint64_t packets, octets, dropped

    cdef void frames_ready(self) noexcept nogil
    cdef void receive(self) noexcept nogil
    cdef uint32_t sort(self, Ring* ring, uint32_t length) noexcept nogil
    cdef bint is_wanted(self, const uint8_t* frame, bint is_tagged, uint32_t vlan) noexcept nogil
    cdef void count_received(self, const uint8_t* frame, uint32_t length) noexcept nogil
    cdef uint32_t deliver(self, Ring* ring, uint8_t* frame, uint32_t length, uint32_t status) noexcept nogil
    cdef void watch_frames(self, bint wanted) noexcept nogil


cdef class FrameReader(EventSource):
    cdef Receiver receiver
