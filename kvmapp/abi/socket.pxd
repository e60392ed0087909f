# UNIX stream sockets (unix(7)), and the packets of virtio-vsock (linux/virtio_vsock.h).
from libc.stdint cimport uint16_t, uint32_t, uint64_t


cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    struct sockaddr:
        pass
    int AF_UNIX, SOCK_STREAM, SOCK_NONBLOCK, SOCK_CLOEXEC
    int MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK
    int SHUT_RD, SHUT_WR, SHUT_RDWR
    int socket(int domain, int kind, int protocol)
    int accept4(int fd, sockaddr* address, socklen_t* length, int flags)
    int connect(int fd, const sockaddr* address, socklen_t length)
    ssize_t recv(int fd, void* data, size_t length, int flags)
    ssize_t send(int fd, const void* data, size_t length, int flags)
    int shutdown(int fd, int how)


cdef extern from "<sys/un.h>" nogil:
    struct sockaddr_un:
        unsigned short sun_family
        char sun_path[108]


cdef extern from "linux/virtio_vsock.h" nogil:
    enum:
        VIRTIO_VSOCK_TYPE_STREAM
        VIRTIO_VSOCK_OP_REQUEST, VIRTIO_VSOCK_OP_RESPONSE, VIRTIO_VSOCK_OP_RST, VIRTIO_VSOCK_OP_SHUTDOWN, VIRTIO_VSOCK_OP_RW
        VIRTIO_VSOCK_OP_CREDIT_UPDATE, VIRTIO_VSOCK_OP_CREDIT_REQUEST
        VIRTIO_VSOCK_SHUTDOWN_RCV, VIRTIO_VSOCK_SHUTDOWN_SEND
        VIRTIO_VSOCK_EVENT_TRANSPORT_RESET
    struct virtio_vsock_hdr:
        uint64_t src_cid
        uint64_t dst_cid
        uint32_t src_port
        uint32_t dst_port
        uint32_t len
        uint16_t type
        uint16_t op
        uint32_t flags
        uint32_t buf_alloc
        uint32_t fwd_cnt
