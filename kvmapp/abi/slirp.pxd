# libslirp: a TCP/IP stack in a library whose other side are sockets of the process (slirp/libslirp.h, version 4).
from libc.stdint cimport int64_t, uint8_t, uint32_t


cdef extern from "<netinet/in.h>" nogil:
    struct in_addr:
        uint32_t s_addr


cdef extern from "<arpa/inet.h>" nogil:
    int inet_aton(const char* text, in_addr* address)


cdef extern from "<slirp/libslirp.h>" nogil:
    ctypedef struct Slirp:
        pass
    int SLIRP_POLL_IN, SLIRP_POLL_OUT, SLIRP_POLL_PRI, SLIRP_POLL_ERR, SLIRP_POLL_HUP
    ctypedef void (*SlirpTimerCb)(void* opaque) noexcept nogil
    ctypedef struct SlirpCb:
        ssize_t (*send_packet)(const void* data, size_t length, void* opaque) noexcept nogil
        void (*guest_error)(const char* message, void* opaque) noexcept nogil
        int64_t (*clock_get_ns)(void* opaque) noexcept nogil
        void* (*timer_new)(SlirpTimerCb call, void* call_opaque, void* opaque) noexcept nogil
        void (*timer_free)(void* timer, void* opaque) noexcept nogil
        void (*timer_mod)(void* timer, int64_t expire_ms, void* opaque) noexcept nogil
        void (*register_poll_fd)(int fd, void* opaque) noexcept nogil
        void (*unregister_poll_fd)(int fd, void* opaque) noexcept nogil
        void (*notify)(void* opaque) noexcept nogil
    ctypedef struct SlirpConfig:
        uint32_t version
        bint in_enabled
        in_addr vnetwork, vnetmask, vhost, vdhcp_start, vnameserver
        const char* vhostname
        bint disable_host_loopback
    Slirp* slirp_new(const SlirpConfig* config, const SlirpCb* callbacks, void* opaque)
    void slirp_cleanup(Slirp* slirp)
    void slirp_pollfds_fill(Slirp* slirp, uint32_t* timeout_ms, int (*add_poll)(int fd, int events, void* opaque) noexcept nogil,
                            void* opaque)
    void slirp_pollfds_poll(Slirp* slirp, int select_error, int (*get_revents)(int index, void* opaque) noexcept nogil, void* opaque)
    void slirp_input(Slirp* slirp, const uint8_t* packet, int length)
    int slirp_add_hostfwd(Slirp* slirp, int is_udp, in_addr host_address, int host_port, in_addr guest_address, int guest_port)
