# io_uring(7) through liburing 2: what kvmapp uses of it.
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from kvmapp.abi.posix cimport iovec


cdef extern from "<liburing.h>" nogil:
    int IORING_OP_FSYNC, IORING_OP_READ, IORING_OP_READV, IORING_OP_WRITE, IORING_OP_WRITEV
    unsigned int IORING_SETUP_CLAMP, IORING_SETUP_COOP_TASKRUN, IORING_SETUP_CQSIZE, IORING_SETUP_SUBMIT_ALL
    unsigned int IORING_FSYNC_DATASYNC
    uint8_t IOSQE_FIXED_FILE
    struct io_uring_sqe:
        uint8_t flags
        int rw_flags
    struct io_uring_cqe:
        uint64_t user_data
        int32_t res
    struct io_uring_params:
        uint32_t sq_entries
        uint32_t cq_entries
        uint32_t flags
    struct io_uring:
        int ring_fd
    struct io_uring_probe:
        pass
    int io_uring_queue_init_params(unsigned int entries, io_uring* ring, io_uring_params* params)
    void io_uring_queue_exit(io_uring* ring)
    io_uring_probe* io_uring_get_probe_ring(io_uring* ring)
    void io_uring_free_probe(io_uring_probe* probe)
    int io_uring_opcode_supported(const io_uring_probe* probe, int operation)
    int io_uring_register_files(io_uring* ring, const int* files, unsigned int count)
    io_uring_sqe* io_uring_get_sqe(io_uring* ring)
    unsigned int io_uring_sq_ready(const io_uring* ring)
    int io_uring_submit(io_uring* ring)
    unsigned int io_uring_cq_ready(io_uring* ring)
    unsigned int io_uring_peek_batch_cqe(io_uring* ring, io_uring_cqe** cqes, unsigned int count)
    void io_uring_cq_advance(io_uring* ring, unsigned int count)
    void io_uring_sqe_set_data(io_uring_sqe* sqe, void* data)
    void* io_uring_cqe_get_data(const io_uring_cqe* cqe)
    void io_uring_prep_fsync(io_uring_sqe* sqe, int fd, unsigned int flags)
    void io_uring_prep_read(io_uring_sqe* sqe, int fd, void* data, unsigned int length, uint64_t offset)
    void io_uring_prep_readv(io_uring_sqe* sqe, int fd, const iovec* vector, unsigned int count, uint64_t offset)
    void io_uring_prep_write(io_uring_sqe* sqe, int fd, const void* data, unsigned int length, uint64_t offset)
    void io_uring_prep_writev(io_uring_sqe* sqe, int fd, const iovec* vector, unsigned int count, uint64_t offset)
