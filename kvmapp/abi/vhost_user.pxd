# The vhost-user protocol (QEMU's docs/interop/vhost-user.rst), which has no kernel header, and messages with descriptors (unix(7)).

cdef enum:
    VHOST_USER_GET_FEATURES = 1
    VHOST_USER_SET_FEATURES = 2
    VHOST_USER_SET_OWNER = 3
    VHOST_USER_SET_MEM_TABLE = 5
    VHOST_USER_SET_VRING_NUM = 8
    VHOST_USER_SET_VRING_ADDR = 9
    VHOST_USER_SET_VRING_BASE = 10
    VHOST_USER_GET_VRING_BASE = 11
    VHOST_USER_SET_VRING_KICK = 12
    VHOST_USER_SET_VRING_CALL = 13
    VHOST_USER_SET_VRING_ERR = 14
    VHOST_USER_GET_PROTOCOL_FEATURES = 15
    VHOST_USER_SET_PROTOCOL_FEATURES = 16
    VHOST_USER_GET_QUEUE_NUM = 17
    VHOST_USER_SET_VRING_ENABLE = 18

    VHOST_USER_F_PROTOCOL_FEATURES = 30          # a bit of the features
    VHOST_USER_PROTOCOL_F_MQ = 0

    VHOST_USER_VERSION = 1                       # of the flags
    VHOST_USER_VERSION_MASK = 3
    VHOST_USER_REPLY = 4

    VHOST_USER_REGIONS = 8                       # the most in one SET_MEM_TABLE


cdef extern from *:
    """
    #include <errno.h>
    #include <string.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    /* One message and up to 8 descriptors, at once or not at all: the bytes that went, or -errno. */
    static ssize_t send_with_fds(int socket, const void *head, size_t head_length, const void *body, size_t body_length, const int *fds,
                                 unsigned count)
    {
        union { struct cmsghdr header; char room[CMSG_SPACE(8 * sizeof(int))]; } control;
        struct iovec vector[2] = { { (void *)head, head_length }, { (void *)body, body_length } };
        struct msghdr message = { .msg_iov = vector, .msg_iovlen = 2 };
        ssize_t sent;
        if (count > 8)
            return -EINVAL;
        if (count) {
            memset(&control, 0, sizeof(control));
            message.msg_control = &control;
            message.msg_controllen = CMSG_SPACE(count * sizeof(int));
            control.header.cmsg_level = SOL_SOCKET;
            control.header.cmsg_type = SCM_RIGHTS;
            control.header.cmsg_len = CMSG_LEN(count * sizeof(int));
            memcpy(CMSG_DATA(&control.header), fds, count * sizeof(int));
        }
        sent = sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        return sent < 0 ? -errno : sent;
    }
    """
    ssize_t send_with_fds(int socket, const void* head, size_t head_length, const void* body, size_t body_length, const int* fds,
                          unsigned int count) noexcept nogil
