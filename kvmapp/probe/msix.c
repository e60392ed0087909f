/*
 * MSI-X masks (PCI Local Bus 3.0, 6.8.2.5), as an operating system uses them when it moves an interrupt: a message of a masked
 * vector is not sent but kept as a pending bit, and sent when the mask goes. By entry, then by function; on virtio-rng.
 */
#include "virtio.h"

#define ENTRY_MASKED 1
#define FUNCTION_MASKED 0x40000000

static struct virtio rng;
static struct virtqueue queue;
static u8 bytes[16];

static void mask_entry(bool masked)
{
    store32(rng.msix_entry + 12, masked ? ENTRY_MASKED : 0);
}

static void mask_function(bool masked)
{
    u32 cap = pci_capability(rng.pci, PCI_CAP_MSIX, 0), control = pci_read(rng.pci, cap);
    pci_write(rng.pci, cap, masked ? control | FUNCTION_MASKED : control & ~(u32)FUNCTION_MASKED);
}

static bool await_pending(u32 milliseconds)
{
    for (; milliseconds && !(load32(rng.msix_pending) & 1); milliseconds--)
        sleep_ms(1);
    return load32(rng.msix_pending) & 1;
}

static enum verdict hold_back(void (*mask)(bool), const char *what)
{
    const volatile u32 *count = &interrupts[rng.vector];
    u32 before = *count;
    mask(true);
    queue_add(&queue, &(struct buffer){ bytes, sizeof bytes, true }, 1, false);
    queue_notify(&queue);
    CHECK(await_pending(1000), "%s masked: no pending bit in 1000 ms", what);
    CHECK(*count == before, "%s masked: the interrupt came nevertheless", what);
    mask(false);
    CHECK(wait_for(count, before + 1, 500), "%s unmasked: the pending interrupt did not come in 500 ms", what);
    CHECK(!(load32(rng.msix_pending) & 1), "%s unmasked: the bit is still pending", what);
    return queue_wait(&queue, 1);
}

static enum verdict drive(void)
{
    TRY(virtio_open(&rng, VIRTIO_RNG, 0, true));
    if (!rng.msix)
        return skip("virtio-rng has none");
    TRY(virtio_queue(&rng, &queue, 0));
    virtio_ready(&rng);
    TRY(hold_back(mask_entry, "vector"));
    TRY(hold_back(mask_function, "function"));
    return ok("masked by vector and by function: kept pending, sent when unmasked");
}

enum verdict test_msix(void)
{
    enum verdict verdict = drive();
    if (rng.common)
        virtio_close(&rng);
    return verdict;
}
