# TUN/TAP (linux/if_tun.h, Documentation/networking/tuntap.rst) and what of virtio-net's header travels with each frame.
from libc.stdint cimport uint8_t, uint16_t, uint32_t


cdef extern from "<errno.h>" nogil:
    int EBADFD                       # a queue that is detached from its tap


cdef extern from "linux/if_tun.h" nogil:
    """
    #define KVMAPP_TUN_F_USO4 0x20                    /* from Linux 6.2 on, as the features below */
    #define KVMAPP_TUN_F_USO6 0x40
    """
    unsigned long TUNSETIFF, TUNGETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ, TUNSETQUEUE
    int IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE, IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE
    uint32_t TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_UFO
    uint32_t TUN_F_USO4 "KVMAPP_TUN_F_USO4"
    uint32_t TUN_F_USO6 "KVMAPP_TUN_F_USO6"


cdef extern from "linux/if.h" nogil:
    int IFNAMSIZ
    struct ifreq:
        char[16] ifr_name
        short ifr_flags


cdef extern from "linux/virtio_net.h" nogil:
    """
    #define KVMAPP_NET_F_GUEST_USO4 54
    #define KVMAPP_NET_F_GUEST_USO6 55
    #define KVMAPP_NET_F_HOST_USO 56
    """
    enum:
        VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MTU, VIRTIO_NET_F_MAC
        VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_UFO
        VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_UFO
        VIRTIO_NET_F_GUEST_USO4 "KVMAPP_NET_F_GUEST_USO4"
        VIRTIO_NET_F_GUEST_USO6 "KVMAPP_NET_F_GUEST_USO6"
        VIRTIO_NET_F_HOST_USO "KVMAPP_NET_F_HOST_USO"
        VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_F_MQ
        VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_MAC_ADDR
        VIRTIO_NET_S_LINK_UP
