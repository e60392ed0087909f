/*
 * On request: what a hostile driver does to a virtio disk. Wild addresses, lengths, indices and chains, then queues laid where
 * no memory is, then BARs moved over other things. After each misdeed the device is reset, and must read sector 0 again: a
 * misdeed may cost the guest its request or its device, never the machine.
 */
#include "virtio.h"

#define SECTOR 512
#define OUTSIDE 0xFFFFFFFFFFFFF000ULL
#define SETTLE_MS 5                     /* for what the device may do with it */
enum { NEXT = 1, WRITE = 2, INDIRECT = 4 };

static struct virtio disk;
static struct virtqueue queue;
static struct { u32 type, reserved; u64 sector; } header;
static u8 data[SECTOR];
static volatile u8 status;

static void describe(u32 at, u64 address, u32 length, u16 flags, u16 next)
{
    queue.table[at] = (struct descriptor){ address, length, flags, next };
}

/* A sound read of sector 0 in descriptors 0, 1, 2, for a misdeed to spoil. */
static void describe_read(void)
{
    describe(0, (u32)&header, sizeof header, NEXT, 1);
    describe(1, (u32)data, SECTOR, NEXT | WRITE, 2);
    describe(2, (u32)&status, 1, WRITE, 0);
}

static void address_outside_memory(void) { queue.table[1].address = OUTSIDE; }
static void header_outside_memory(void) { queue.table[0].address = OUTSIDE; }
static void status_outside_memory(void) { queue.table[2].address = OUTSIDE; }
static void address_that_wraps(void) { queue.table[1].address = 0xFFFFFFFFFFFFFFFFULL; }
static void four_gib_long(void) { queue.table[1].length = 0xFFFFFFFF; }
static void zero_long(void) { queue.table[1].length = 0; }
static void header_too_short(void) { queue.table[0].length = 3; }
static void header_not_readable(void) { queue.table[0].flags |= WRITE; }
static void no_status(void) { queue.table[1].flags = 0; }
static void readable_after_writable(void) { queue.table[2].flags = 0; }
static void chain_in_a_circle(void) { queue.table[2].flags = NEXT | WRITE; queue.table[2].next = 1; }
static void next_outside_table(void) { queue.table[1].next = 0xFFF0; }
static void indirect_nowhere(void) { describe(0, OUTSIDE, 64, INDIRECT, 0); }
static void indirect_of_odd_length(void) { describe(0, (u32)queue.indirect, 17, INDIRECT, 0); }
static void indirect_of_no_length(void) { describe(0, (u32)queue.indirect, 0, INDIRECT, 0); }
static void indirect_four_gib_long(void) { describe(0, (u32)queue.indirect, 0xFFFFFFF0, INDIRECT, 0); }
static void indirect_in_indirect(void)
{
    queue.indirect[0] = (struct descriptor){ (u32)queue.indirect, 64, INDIRECT, 0 };
    describe(0, (u32)queue.indirect, 64, INDIRECT, 0);
}
static void head_outside_table(void) { queue.available.ring[0] = 0xFFFF; }
static void index_far_ahead(void) { queue.published = 40000; }

static void (*const misdeeds[])(void) = {
    address_outside_memory, header_outside_memory, status_outside_memory, address_that_wraps, four_gib_long, zero_long,
    header_too_short, header_not_readable, no_status, readable_after_writable, chain_in_a_circle, next_outside_table,
    indirect_nowhere, indirect_of_odd_length, indirect_of_no_length, indirect_four_gib_long, indirect_in_indirect,
    head_outside_table, index_far_ahead,
};

static enum verdict start(void)
{
    TRY(virtio_open(&disk, VIRTIO_BLK, 0, true));
    TRY(virtio_queue(&disk, &queue, 0));
    virtio_ready(&disk);
    return OK;
}

static enum verdict commit_misdeed(void (*misdeed)(void))
{
    TRY(start());
    describe_read();
    queue.published = 1;
    misdeed();
    queue_notify(&queue);
    *queue.doorbell = 0;                                        /* whether it asked or not */
    sleep_ms(SETTLE_MS);
    virtio_close(&disk);
    return OK;
}

/* Ring addresses are the driver's word: one after the other goes where no memory is. A device may refuse such a queue at once. */
static enum verdict lay_rings_nowhere(u32 which)
{
    TRY(virtio_open(&disk, VIRTIO_BLK, 0, true));
    u64 rings[3] = { (u32)queue.table, (u32)&queue.available, (u32)&queue.used };
    rings[which] = OUTSIDE;
    if (virtio_queue_at(&disk, &queue, 0, rings) == OK) {
        virtio_ready(&disk);
        queue.published = 1;
        queue_notify(&queue);
        *queue.doorbell = 0;
        sleep_ms(SETTLE_MS);
    }
    virtio_close(&disk);
    return OK;
}

/* Over memory, the interrupt chips, the ECAM window and the top of the address space; then back. By ports: ECAM may be hidden. */
static void move_bars(void)
{
    static const u32 places[] = { 0x00000000, 0x00100000, 0xFEE00000, 0xFEC00000, 0xE0000000, 0xFFFFF000 };
    u32 ecam = platform.ecam_base;
    platform.ecam_base = 0;
    for (u32 bar = 0; bar < 6; bar++) {
        u32 offset = PCI_BAR + bar * 4, home = pci_read(disk.pci, offset);
        for (u32 i = 0; i < LENGTH(places); i++)
            pci_write(disk.pci, offset, places[i]);
        pci_write(disk.pci, offset, home);
    }
    platform.ecam_base = ecam;
}

static enum verdict still_reads(const char *after, u32 number)
{
    TRY(start());
    describe_read();
    status = 0xFF;
    queue.published = 1;
    queue_notify(&queue);
    enum verdict verdict = queue_wait(&queue, 1000);
    virtio_close(&disk);
    TRY(verdict);
    CHECK(status == 0, "after %s %u a sound read ends with status %u", after, number, status);
    return OK;
}

enum verdict test_hostile(void)
{
    for (u32 i = 0; i < LENGTH(misdeeds); i++) {
        TRY(commit_misdeed(misdeeds[i]));
        TRY(still_reads("misdeed", i));
    }
    for (u32 which = 0; which < 3; which++) {
        TRY(lay_rings_nowhere(which));
        TRY(still_reads("rings nowhere", which));
    }
    move_bars();
    TRY(still_reads("moved BARs", 0));
    return ok("%u spoilt requests, 3 rings nowhere, BARs over everything: the disk reads on", LENGTH(misdeeds));
}
