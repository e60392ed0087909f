# vhost: virtqueues worked on by the host's kernel (linux/vhost.h).
from libc.stdint cimport uint64_t


cdef extern from "linux/vhost.h" nogil:
    unsigned long VHOST_GET_FEATURES, VHOST_SET_FEATURES, VHOST_SET_OWNER, VHOST_SET_MEM_TABLE
    unsigned long VHOST_SET_VRING_NUM, VHOST_SET_VRING_ADDR, VHOST_SET_VRING_BASE, VHOST_GET_VRING_BASE
    unsigned long VHOST_SET_VRING_KICK, VHOST_SET_VRING_CALL, VHOST_SET_VRING_ERR, VHOST_NET_SET_BACKEND
    struct vhost_vring_state:
        unsigned int index
        unsigned int num
    struct vhost_vring_file:
        unsigned int index
        int fd
    struct vhost_vring_addr:
        unsigned int index
        unsigned int flags
        uint64_t desc_user_addr
        uint64_t used_user_addr
        uint64_t avail_user_addr
        uint64_t log_guest_addr
    struct vhost_memory_region:
        uint64_t guest_phys_addr
        uint64_t memory_size
        uint64_t userspace_addr
        uint64_t flags_padding
