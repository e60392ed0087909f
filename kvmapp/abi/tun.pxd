# TUN/TAP (linux/if_tun.h, Documentation/networking/tuntap.rst) and what of virtio-net's header travels with each frame.
from libc.stdint cimport uint8_t, uint16_t, uint32_t


cdef extern from "linux/if_tun.h" nogil:
    unsigned long TUNSETIFF, TUNGETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ
    int IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE
    uint32_t TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_UFO


cdef extern from "linux/if.h" nogil:
    int IFNAMSIZ
    struct ifreq:
        char[16] ifr_name
        short ifr_flags


cdef extern from "linux/virtio_net.h" nogil:
    enum:
        VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MTU, VIRTIO_NET_F_MAC
        VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_UFO
        VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_UFO
        VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS
        VIRTIO_NET_S_LINK_UP
