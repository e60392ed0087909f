/* A virtio device over PCI, and its split virtqueues: virtio.c. */
#ifndef VIRTIO_H
#define VIRTIO_H

#include "probe.h"

enum { VIRTIO_NET = 1, VIRTIO_BLK = 2, VIRTIO_CONSOLE = 3, VIRTIO_RNG = 4 };
enum { F_INDIRECT_DESC = 28, F_EVENT_IDX = 29, F_VERSION_1 = 32 };
enum { QUEUE_SIZE = 16 };                               /* at most; a device may have shorter queues */

struct descriptor { u64 address; u32 length; u16 flags, next; };

struct virtqueue {
    struct descriptor table[QUEUE_SIZE] __attribute__((aligned(16)));
    struct descriptor indirect[4];
    struct { u16 flags, index, ring[QUEUE_SIZE + 1]; } available;               /* ring[size] is used_event */
    struct { u16 flags, index; struct { u32 id, length; } ring[QUEUE_SIZE + 1]; } used __attribute__((aligned(4)));
    const struct virtio *device;
    volatile u16 *doorbell;
    u16 number, size, next_descriptor, published, taken;
    u32 interrupts_before;                              /* of its vector, when the device was last notified */
};

struct virtio {
    const struct pci_function *pci;
    struct virtio_common *common;
    volatile u8 *isr;
    u32 notify, notify_multiplier, config;              /* addresses */
    u32 msix_entry, msix_pending;                       /* addresses: entry 0 of the table, the pending bits */
    u32 features[2];
    u32 vector;                                         /* where its interrupts arrive */
    bool msix;
};

struct buffer { const void *at; u32 length; bool device_writes; };

/* Steps in the order of the specification's 3.1.1: reset to FEATURES_OK, a queue at a time, then DRIVER_OK. */
enum verdict virtio_open(struct virtio *device, u32 type, u32 wanted_low, bool want_msix);
enum verdict virtio_queue(struct virtio *device, struct virtqueue *queue, u16 number);
enum verdict virtio_queue_at(struct virtio *device, struct virtqueue *queue, u16 number, const u64 rings[3]);
void virtio_ready(struct virtio *device);
void virtio_close(struct virtio *device);
bool virtio_has(const struct virtio *device, u32 feature);

/* One request a call; `indirect` puts its buffers in a table of their own. Then: notify once for all, wait for all. */
void queue_add(struct virtqueue *queue, const struct buffer *buffers, u32 count, bool indirect);
void queue_notify(struct virtqueue *queue);
enum verdict queue_wait(struct virtqueue *queue, u32 milliseconds);
u32 queue_used_length(const struct virtqueue *queue);   /* of the request that ended last */

#endif
