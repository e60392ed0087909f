from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from kvmapp.abi.posix cimport iovec
from kvmapp.iothread cimport EventSource, IoThread, Timer
from kvmapp.net.backend cimport NetBackend
from kvmapp.virtio.device cimport VirtioDevice
from kvmapp.virtio.vhost cimport VhostNet
from kvmapp.virtio.virtqueue cimport Chain, Virtqueue

cdef enum:
    POSTED_MOST = 128                # receive buffers taken from the ring ahead of frames
    POSTED_VECTORS = 1023            # of them together; one more makes IOV_MAX, what the kernel takes

cdef struct Posted:
    uint16_t head
    uint32_t vectors
    uint64_t size                    # bytes


cdef class FrameReader(EventSource):
    cdef QueuePair pair


cdef class Patience(Timer):
    cdef QueuePair pair


cdef class QueuePair:
    cdef VirtioDevice device
    cdef readonly NetBackend backend
    cdef readonly VhostNet vhost
    cdef FrameReader reader
    cdef Patience patience
    cdef Virtqueue receiver
    cdef Virtqueue transmitter
    cdef bint link                   # the cable is in
    cdef bint watching               # the reader waits for frames; under the receive queue's lock
    cdef bint mergeable
    cdef uint32_t header             # bytes before each frame
    cdef uint64_t frame_room         # bytes that the largest frame for this driver takes, with its header

    # Receive buffers popped and not yet filled: `posted` of them, their vectors in a row.
    cdef Posted posts[POSTED_MOST]
    cdef iovec vectors[POSTED_VECTORS + 1]
    cdef uint32_t posted
    cdef uint32_t vector_count
    cdef uint64_t room               # bytes
    cdef Chain chain
    cdef Chain outgoing              # of its own: a backend that answers has `receive` run within `send`

    # A frame for which there was no room waits in `spill`, `kept` bytes with its header; only while the queue is live.
    cdef uint8_t* spill
    cdef uint64_t kept
    cdef public int64_t patience_ns  # ... and not longer than this

    cdef readonly uint64_t rx_packets, rx_bytes, rx_dropped
    cdef readonly uint64_t tx_packets, tx_bytes, tx_dropped

    cdef int settle(self, uint64_t features, uint32_t offloads, bint mergeable, uint32_t header, uint64_t frame_room) noexcept nogil
    cdef void begin(self, Virtqueue queue) noexcept nogil
    cdef void drain(self, Virtqueue queue) noexcept nogil
    cdef void aim(self) noexcept nogil
    cdef void aim_queue(self, uint32_t index, Virtqueue queue) noexcept nogil
    cdef void kicked(self, Virtqueue queue) noexcept nogil
    cdef void frames_ready(self) noexcept nogil
    cdef void receive(self, Virtqueue queue) noexcept nogil
    cdef int post(self, Virtqueue queue, uint64_t wanted) noexcept nogil
    cdef void keep(self, uint64_t length) noexcept nogil
    cdef bint settle_kept(self, Virtqueue queue) noexcept nogil
    cdef void drop_kept(self) noexcept nogil
    cdef void patience_ends(self) noexcept nogil
    cdef void deliver(self, Virtqueue queue, uint64_t length) noexcept nogil
    cdef void mark_buffers(self, uint16_t count) noexcept nogil
    cdef void unpost(self, Virtqueue queue) noexcept nogil
    cdef void watch_frames(self, bint wanted) noexcept nogil
    cdef void transmit(self, Virtqueue queue) noexcept nogil
    cdef void send(self, Chain* chain) noexcept nogil
