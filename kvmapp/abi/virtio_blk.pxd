# The virtio block device's numbers as VIRTIO 1.2, 5.2 gives them; Linux's header of that name lacks the newer ones on CentOS 7.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    VIRTIO_BLK_F_SIZE_MAX = 1
    VIRTIO_BLK_F_SEG_MAX = 2
    VIRTIO_BLK_F_RO = 5
    VIRTIO_BLK_F_BLK_SIZE = 6
    VIRTIO_BLK_F_FLUSH = 9
    VIRTIO_BLK_F_TOPOLOGY = 10
    VIRTIO_BLK_F_CONFIG_WCE = 11
    VIRTIO_BLK_F_MQ = 12
    VIRTIO_BLK_F_DISCARD = 13
    VIRTIO_BLK_F_WRITE_ZEROES = 14

    VIRTIO_BLK_T_IN = 0
    VIRTIO_BLK_T_OUT = 1
    VIRTIO_BLK_T_FLUSH = 4
    VIRTIO_BLK_T_GET_ID = 8
    VIRTIO_BLK_T_DISCARD = 11
    VIRTIO_BLK_T_WRITE_ZEROES = 13

    VIRTIO_BLK_S_OK = 0
    VIRTIO_BLK_S_IOERR = 1
    VIRTIO_BLK_S_UNSUPP = 2

    VIRTIO_BLK_ID_BYTES = 20
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 1

cdef packed struct virtio_blk_config:
    uint64_t capacity                # sectors of 512 bytes
    uint32_t size_max
    uint32_t seg_max
    uint16_t cylinders
    uint8_t heads
    uint8_t sectors
    uint32_t blk_size
    uint8_t physical_block_exp
    uint8_t alignment_offset
    uint16_t min_io_size
    uint32_t opt_io_size
    uint8_t writeback
    uint8_t unused0
    uint16_t num_queues
    uint32_t max_discard_sectors
    uint32_t max_discard_seg
    uint32_t discard_sector_alignment
    uint32_t max_write_zeroes_sectors
    uint32_t max_write_zeroes_seg
    uint8_t write_zeroes_may_unmap
    uint8_t unused1[3]

cdef packed struct virtio_blk_outhdr:
    uint32_t type
    uint32_t ioprio
    uint64_t sector

cdef packed struct virtio_blk_discard_write_zeroes:
    uint64_t sector
    uint32_t num_sectors
    uint32_t flags
