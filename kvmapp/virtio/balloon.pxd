from libc.stdint cimport int64_t, uint32_t, uint64_t

from kvmapp.virtio.device cimport VirtioDevice
from kvmapp.virtio.virtqueue cimport Chain, Virtqueue

cdef enum:
    QUEUES = 5
    STATS_NR = 32                    # kinds of figures that are kept; Linux knows 16

cdef packed struct BalloonConfig:    # struct virtio_balloon_config (5.5.4), as far as the offered features go
    uint32_t num_pages               # that the host wants
    uint32_t actual                  # that the guest gave


cdef class VirtioBalloon(VirtioDevice):
    cdef BalloonConfig layout        # guarded by Device.lock
    cdef Chain chains[QUEUES]        # of the queues; under their locks
    cdef uint32_t polling            # the statistics were asked for, atomic
    cdef uint64_t figures[STATS_NR]  # by tag; guarded by the statistics queue's lock
    cdef uint64_t known              # a bit for each figure that the guest tells
    cdef int64_t figures_time        # seconds of CLOCK_MONOTONIC

    cdef void inflate(self, Chain* chain) noexcept nogil
    cdef void give_back(self, uint64_t first, uint32_t count) noexcept nogil
    cdef void report(self, Chain* chain) noexcept nogil
    cdef void serve_statistics(self, Virtqueue queue, Chain* chain) noexcept nogil
    cdef void note(self, Chain* chain) noexcept nogil
