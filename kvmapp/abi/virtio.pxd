# Virtio as Linux's headers spell it (linux/virtio_*.h): ring layouts, feature bits, status bits. Little endian, as every x86 guest.
from libc.stdint cimport uint16_t, uint32_t, uint64_t


cdef extern from "linux/virtio_config.h" nogil:
    enum:
        VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK
        VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_CONFIG_S_FAILED
        VIRTIO_F_NOTIFY_ON_EMPTY, VIRTIO_F_ANY_LAYOUT, VIRTIO_F_VERSION_1, VIRTIO_F_RING_PACKED


cdef extern from *:
    """
    #define KVMAPP_VIRTIO_F_RING_RESET 40      /* not in the headers of CentOS 7 and 8 */
    """
    enum:
        VIRTIO_F_RING_RESET "KVMAPP_VIRTIO_F_RING_RESET"


cdef extern from "linux/virtio_ring.h" nogil:
    enum:
        VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX
        VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_DESC_F_INDIRECT
        VRING_USED_F_NO_NOTIFY, VRING_AVAIL_F_NO_INTERRUPT
    struct vring_desc:
        uint64_t addr
        uint32_t len
        uint16_t flags
        uint16_t next
    struct vring_used_elem:
        uint32_t id
        uint32_t len


# Rings lie in memory that the guest changes at any time: each word is loaded exactly once, then judged, then used.
cdef extern from *:
    """
    #include <linux/virtio_ring.h>
    typedef unsigned long long __attribute__((may_alias, aligned(1))) ring_word;
    static inline unsigned short ring_load_u16(const void *p) { return __atomic_load_n((const unsigned short *)p, __ATOMIC_ACQUIRE); }
    static inline void ring_store_u16(void *p, unsigned short v) { __atomic_store_n((unsigned short *)p, v, __ATOMIC_RELEASE); }
    static inline void ring_load_desc(struct vring_desc *to, const void *from) {
        const volatile ring_word *word = from;
        ((ring_word *)to)[0] = word[0];
        ((ring_word *)to)[1] = word[1];
    }
    """
    uint16_t ring_load_u16(const void* p) noexcept nogil
    void ring_store_u16(void* p, uint16_t v) noexcept nogil
    void ring_load_desc(vring_desc* to, const void* source) noexcept nogil


cdef extern from "linux/virtio_ids.h" nogil:
    enum:
        VIRTIO_ID_NET, VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_RNG, VIRTIO_ID_BALLOON, VIRTIO_ID_VSOCK, VIRTIO_ID_SCSI, VIRTIO_ID_9P


cdef extern from *:
    """
    #define KVMAPP_VIRTIO_ID_FS 26                    /* not in the headers of CentOS 7 and 8 */
    """
    enum:
        VIRTIO_ID_FS "KVMAPP_VIRTIO_ID_FS"


cdef extern from "linux/virtio_pci.h" nogil:
    enum:
        VIRTIO_PCI_CAP_COMMON_CFG, VIRTIO_PCI_CAP_NOTIFY_CFG, VIRTIO_PCI_CAP_ISR_CFG, VIRTIO_PCI_CAP_DEVICE_CFG
        VIRTIO_PCI_CAP_PCI_CFG, VIRTIO_MSI_NO_VECTOR


cdef extern from "linux/virtio_console.h" nogil:
    enum:
        VIRTIO_CONSOLE_F_SIZE, VIRTIO_CONSOLE_F_EMERG_WRITE


cdef extern from "linux/virtio_balloon.h" nogil:
    """
    #define KVMAPP_VIRTIO_BALLOON_F_REPORTING 5       /* not in the headers of CentOS 7 and 8 */
    """
    enum:
        VIRTIO_BALLOON_F_STATS_VQ, VIRTIO_BALLOON_F_DEFLATE_ON_OOM
        VIRTIO_BALLOON_F_REPORTING "KVMAPP_VIRTIO_BALLOON_F_REPORTING"
