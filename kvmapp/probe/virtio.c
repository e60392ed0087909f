/*
 * virtio 1.2 over PCI (4.1) with split virtqueues (2.7): capabilities, features, queues, MSI-X or the INTx pin. Drives
 * modern devices and the modern half of transitional ones. Not here: legacy registers, packed queues, shared memory.
 */
#include "virtio.h"

#define VENDOR 0x1AF4
#define MODERN 0x1040
enum { CAP_COMMON = 1, CAP_NOTIFY = 2, CAP_ISR = 3, CAP_DEVICE = 4 };
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8, NEEDS_RESET = 64 };
enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4 };
#define NO_VECTOR 0xFFFF
#define MSIX_ENABLE 0x80000000
#define USED_NO_NOTIFY 1

struct virtio_common {
    volatile u32 device_feature_select, device_feature, driver_feature_select, driver_feature;
    volatile u16 config_msix_vector, num_queues;
    volatile u8 device_status, config_generation;
    volatile u16 queue_select, queue_size, queue_msix_vector, queue_enable, queue_notify_off;
    volatile u32 queue_desc[2], queue_driver[2], queue_device[2];
};

static volatile u8 *intx_isr;           /* of the one device that uses its pin now */

static u32 transitional_id(u32 type)
{
    return type == VIRTIO_NET ? 0x1000 : type == VIRTIO_BLK ? 0x1001 : type == VIRTIO_CONSOLE ? 0x1003 : 0x1005;
}

static void find_regions(struct virtio *device)
{
    const struct pci_function *f = device->pci;
    for (u32 cap = pci_capability(f, PCI_CAP_VENDOR, 0); cap; cap = pci_capability(f, PCI_CAP_VENDOR, cap)) {
        u32 type = pci_read(f, cap) >> 24, bar = pci_read(f, cap + 4) & 0xFF;
        if (type < CAP_COMMON || type > CAP_DEVICE || bar > 5)
            continue;
        u32 base = pci_bar(f, bar);
        if (!base)
            continue;
        u32 at = base + pci_read(f, cap + 8);
        if (type == CAP_COMMON && !device->common)
            device->common = (void *)at;
        else if (type == CAP_NOTIFY && !device->notify) {
            device->notify = at;
            device->notify_multiplier = pci_read(f, cap + 16);
        } else if (type == CAP_ISR && !device->isr)
            device->isr = (volatile u8 *)at;
        else if (type == CAP_DEVICE && !device->config)
            device->config = at;
    }
}

static enum verdict negotiate(struct virtio *device, u32 wanted_low)
{
    struct virtio_common *common = device->common;
    u32 wanted[2] = { wanted_low | 1U << F_INDIRECT_DESC | 1U << F_EVENT_IDX, 1U << (F_VERSION_1 - 32) };
    common->device_status = 0;
    for (u32 tries = 0; common->device_status; tries++)
        CHECK(tries < 1000, "reset: device status stays 0x%02x", common->device_status);
    common->device_status = ACKNOWLEDGE | DRIVER;
    for (u32 half = 0; half < 2; half++) {
        common->device_feature_select = half;
        device->features[half] = common->device_feature & wanted[half];
        common->driver_feature_select = half;
        common->driver_feature = device->features[half];
    }
    CHECK(virtio_has(device, F_VERSION_1), "VERSION_1 not offered");
    common->device_status = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    u8 status = common->device_status;
    CHECK(status & FEATURES_OK, "FEATURES_OK refused: device status 0x%02x, features 0x%08x", status, device->features[0]);
    return OK;
}

static void quiet_pin(void)
{
    (void)*intx_isr;                                            /* reading it lowers the line */
}

static enum verdict open_pin(struct virtio *device)
{
    u32 interrupt = pci_read(device->pci, PCI_INTERRUPT), line = interrupt & 0xFF;
    CHECK(interrupt >> 8 & 0xFF, "no interrupt pin");
    CHECK(line && line < 24, "interrupt line %u", line);
    device->vector = VECTOR_IOAPIC + line;
    intx_isr = device->isr;
    on_interrupt(device->vector, quiet_pin);
    ioapic_open(line, true);
    return OK;
}

static enum verdict open_msix(struct virtio *device, u32 cap)
{
    u32 where = pci_read(device->pci, cap + 4), bar = pci_bar(device->pci, where & 7);
    CHECK(bar, "MSI-X table in BAR %u, which is none", where & 7);
    u32 entry = device->msix_entry = bar + (where & ~7U);
    u32 pending = pci_read(device->pci, cap + 8);
    device->msix_pending = pci_bar(device->pci, pending & 7) + (pending & ~7U);
    pci_write(device->pci, cap, pci_read(device->pci, cap) | MSIX_ENABLE);
    store32(entry, 0xFEE00000 | (lapic_read(LAPIC_ID) >> 24) << 12);
    store32(entry + 4, 0);
    store32(entry + 8, VECTOR_MSIX);
    store32(entry + 12, 0);
    device->vector = VECTOR_MSIX;
    device->msix = true;
    return OK;
}

enum verdict virtio_open(struct virtio *device, u32 type, u32 wanted_low, bool want_msix)
{
    memset(device, 0, sizeof *device);
    device->pci = pci_find(VENDOR, (u16)(MODERN + type));
    if (!device->pci)
        device->pci = pci_find(VENDOR, (u16)transitional_id(type));
    if (!device->pci)
        return skip("no device");
    find_regions(device);
    CHECK(device->common && device->notify && device->isr && (device->config || type == VIRTIO_RNG),
          "capabilities: common 0x%x, notify 0x%x, isr 0x%x, device 0x%x", (u32)device->common, device->notify,
          (u32)device->isr, device->config);
    TRY(negotiate(device, wanted_low));
    u32 cap = want_msix ? pci_capability(device->pci, PCI_CAP_MSIX, 0) : 0;
    return cap ? open_msix(device, cap) : open_pin(device);
}

bool virtio_has(const struct virtio *device, u32 feature)
{
    return device->features[feature / 32] >> feature % 32 & 1;
}

enum verdict virtio_queue(struct virtio *device, struct virtqueue *queue, u16 number)
{
    u64 rings[3] = { (u32)queue->table, (u32)&queue->available, (u32)&queue->used };
    return virtio_queue_at(device, queue, number, rings);
}

static void set_address(volatile u32 *halves, u64 address)
{
    halves[0] = (u32)address;
    halves[1] = (u32)(address >> 32);
}

/* `rings` are descriptor table, available ring and used ring; elsewhere than in `queue` only to see what the device does. */
enum verdict virtio_queue_at(struct virtio *device, struct virtqueue *queue, u16 number, const u64 rings[3])
{
    struct virtio_common *common = device->common;
    memset(queue, 0, sizeof *queue);
    queue->device = device;
    queue->number = number;
    CHECK(number < common->num_queues, "queue %u of %u", number, common->num_queues);
    common->queue_select = number;
    queue->size = common->queue_size;
    CHECK(queue->size >= 4 && !(queue->size & (queue->size - 1)), "queue %u has %u entries", number, queue->size);
    if (queue->size > QUEUE_SIZE)
        common->queue_size = queue->size = QUEUE_SIZE;
    if (device->msix) {
        common->queue_msix_vector = 0;
        CHECK(common->queue_msix_vector == 0, "MSI-X vector 0 refused: reads 0x%04x", common->queue_msix_vector);
    }
    set_address(common->queue_desc, rings[0]);
    set_address(common->queue_driver, rings[1]);
    set_address(common->queue_device, rings[2]);
    common->queue_enable = 1;
    CHECK(common->queue_enable == 1, "queue %u cannot be enabled", number);
    queue->doorbell = (volatile u16 *)(device->notify + common->queue_notify_off * device->notify_multiplier);
    return OK;
}

void virtio_ready(struct virtio *device)
{
    device->common->device_status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
}

void virtio_close(struct virtio *device)
{
    device->common->device_status = 0;
    if (device->msix) {
        u32 cap = pci_capability(device->pci, PCI_CAP_MSIX, 0);
        pci_write(device->pci, cap, pci_read(device->pci, cap) & ~MSIX_ENABLE);
    } else {
        ioapic_close(device->vector - VECTOR_IOAPIC);
    }
}

static void fill(struct descriptor *table, u32 size, const struct buffer *buffers, u32 count, u32 first)
{
    for (u32 i = 0; i < count; i++) {
        u32 at = (first + i) % size;
        table[at].address = (u32)buffers[i].at;
        table[at].length = buffers[i].length;
        table[at].flags = (u16)((buffers[i].device_writes ? DESC_WRITE : 0) | (i + 1 < count ? DESC_NEXT : 0));
        table[at].next = (u16)((at + 1) % size);
    }
}

/* Descriptors go round the table: a request has ended long before its place comes again. */
void queue_add(struct virtqueue *queue, const struct buffer *buffers, u32 count, bool indirect)
{
    u32 head = queue->next_descriptor, places = indirect ? 1 : count;
    if (indirect) {
        fill(queue->indirect, LENGTH(queue->indirect), buffers, count, 0);
        queue->table[head].address = (u32)queue->indirect;
        queue->table[head].length = count * sizeof(struct descriptor);
        queue->table[head].flags = DESC_INDIRECT;
    } else {
        fill(queue->table, queue->size, buffers, count, head);
    }
    queue->next_descriptor = (u16)((head + places) % queue->size);
    queue->available.ring[queue->published++ % queue->size] = (u16)head;
}

/* One interrupt is asked for, at the last of the requests; the doorbell rings only if the device asks for it (2.7.10). */
void queue_notify(struct virtqueue *queue)
{
    volatile u16 *index = &queue->available.index, *flags = &queue->used.flags;
    const volatile u16 *available_event = (const volatile u16 *)&queue->used.ring[queue->size];
    u16 before = *index;
    queue->interrupts_before = interrupts[queue->device->vector];
    queue->available.ring[queue->size] = (u16)(queue->published - 1);       /* used_event */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    *index = queue->published;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    bool asked = virtio_has(queue->device, F_EVENT_IDX)
        ? (u16)(queue->published - *available_event - 1) < (u16)(queue->published - before) : !(*flags & USED_NO_NOTIFY);
    if (asked)
        *queue->doorbell = queue->number;
}

enum verdict queue_wait(struct virtqueue *queue, u32 milliseconds)
{
    const struct virtio *device = queue->device;
    const volatile u32 *count = &interrupts[device->vector];
    const volatile u16 *index = &queue->used.index;
    u32 seen = queue->interrupts_before;
    bool came;
    do {
        came = wait_for(count, seen + 1, milliseconds);         /* also when all is done already: it must have told us */
        seen = *count;
    } while (came && *index != queue->published);
    u8 status = device->common->device_status;
    CHECK(!(status & NEEDS_RESET), "queue %u: device needs reset (status 0x%02x)", queue->number, status);
    CHECK(*index == queue->published, "queue %u: %u of %u requests ended in %u ms", queue->number, (u16)(*index - queue->taken),
          (u16)(queue->published - queue->taken), milliseconds);
    CHECK(came, "queue %u: the requests ended, but no interrupt came in %u ms", queue->number, milliseconds);
    queue->taken = *index;
    return OK;
}

u32 queue_used_length(const struct virtqueue *queue)
{
    return queue->used.ring[(queue->taken - 1) % queue->size].length;
}
