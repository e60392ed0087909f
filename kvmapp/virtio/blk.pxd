from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmapp.abi.posix cimport iovec, pthread_cond_t
from kvmapp.abi.virtio_blk cimport VIRTIO_BLK_ID_BYTES, virtio_blk_config, virtio_blk_outhdr
from kvmapp.block.backend cimport BlockBackend, BlockChannel, BlockClient, BlockQueue, BlockRequest
from kvmapp.devices cimport Power
from kvmapp.virtio.device cimport MAX_QUEUES, VirtioDevice
from kvmapp.virtio.virtqueue cimport Chain, Virtqueue

# One request of the guest's on its way.
cdef struct BlkSlot:
    BlockRequest request             # first: a pointer to it is one to the slot
    Chain chain
    uint8_t* status                  # the guest's status byte
    uint64_t room                    # bytes that the guest left for data before it


cdef class BlkQueue(BlockClient):
    cdef VirtioBlk device
    cdef Virtqueue queue
    cdef BlockChannel channel
    cdef BlkSlot* slots
    cdef iovec* vectors
    cdef BlockRequest* free          # slots at rest, linked by `next`
    cdef uint32_t under_way          # slots that the channel has
    cdef BlockQueue stranded         # slots for whose writes the host has no room
    cdef uint32_t stuck              # atomic: nothing is begun until `try_again`
    cdef bint starved                # requests wait in the ring for a slot
    cdef bint working                # `work` runs, which holds the queue's lock
    cdef pthread_cond_t idle         # under_way became 0; goes with the queue's lock

    cdef void work(self) noexcept nogil
    cdef void await_idle(self) noexcept nogil
    cdef void begin(self, BlkSlot* slot) noexcept nogil
    cdef void begin_transfer(self, BlkSlot* slot, virtio_blk_outhdr* header) noexcept nogil
    cdef void begin_range(self, BlkSlot* slot, uint32_t operation, uint32_t flags, uint32_t most) noexcept nogil
    cdef void submit_at(self, BlkSlot* slot, uint64_t sector) noexcept nogil
    cdef void refuse(self, BlkSlot* slot, const char* what, uint64_t value) noexcept nogil
    cdef void answer(self, BlkSlot* slot, uint8_t status, uint64_t filled) noexcept nogil
    cdef void rest(self, BlkSlot* slot) noexcept nogil
    cdef void forget(self) noexcept nogil
    cdef void try_again(self) noexcept nogil
    cdef void give_up(self) noexcept nogil
    cdef void end_round(self) noexcept nogil


cdef class VirtioBlk(VirtioDevice):
    cdef readonly BlockBackend disk
    cdef Power power                 # None: the guest hears of a full host as of any other error
    cdef list ways                   # a BlkQueue a virtqueue
    cdef PyObject* way_table[MAX_QUEUES]     # borrowed from `ways`
    cdef virtio_blk_config blk
    cdef char serial[VIRTIO_BLK_ID_BYTES]
    cdef uint32_t write_through      # atomic: no write is done before it is on stable storage

    cdef bint waits_for_room(self, BlockRequest* request) noexcept nogil
    cdef void say_failed(self, BlockRequest* request) noexcept nogil
