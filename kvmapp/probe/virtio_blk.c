/*
 * virtio-blk (5.2): identity, reads, and on a writable disk the last sector: pattern, write-zeroes and discard where
 * offered, then its old content again. Also what must be refused: an unknown request, a sector past the end, a write to a
 * read-only disk. Not here: several queues, topology, configuration changes.
 */
#include "virtio.h"

enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13, T_UNKNOWN = 99 };
enum { S_OK = 0, S_IOERR = 1, S_UNSUPP = 2, S_NONE = 0xFF };
enum { F_RO = 5, F_FLUSH = 9, F_DISCARD = 13, F_WRITE_ZEROES = 14 };
#define WANTED (1U << F_RO | 1U << F_FLUSH | 1U << F_DISCARD | 1U << F_WRITE_ZEROES)
#define SECTOR 512
#define PATIENCE_MS 2000

struct request { u32 type, reserved; u64 sector; volatile u8 status; };
struct range { u64 sector; u32 sectors, flags; };

static struct virtio disk;
static struct virtqueue queue;
static u8 kept[SECTOR], pattern[SECTOR], data[SECTOR];

static void submit(struct request *request, void *at, u32 length)
{
    bool device_writes = request->type == T_IN || request->type == T_GET_ID;
    struct buffer buffers[3] = {
        { request, 16, false }, { at, length, device_writes }, { (const void *)&request->status, 1, true },
    };
    request->status = S_NONE;
    if (!length)
        buffers[1] = buffers[2];
    queue_add(&queue, buffers, length ? 3 : 2, virtio_has(&disk, F_INDIRECT_DESC) && request->type == T_OUT);
}

static enum verdict perform(u32 type, u64 sector, void *at, u32 length, u32 expected)
{
    struct request request = { .type = type, .sector = sector };
    submit(&request, at, length);
    queue_notify(&queue);
    TRY(queue_wait(&queue, PATIENCE_MS));
    CHECK(request.status == expected, "request type %u at sector %u: status %u, expected %u", type, (u32)sector,
          request.status, expected);
    return OK;
}

static bool all_are(u8 value)
{
    u32 word = value * 0x01010101U;
    for (u32 i = 0; i < SECTOR; i += 4)
        if (load32((u32)data + i) != word)
            return false;
    return true;
}

/* Three requests at once, one interrupt asked for. */
static enum verdict read_batch(u64 last)
{
    struct request requests[3] = { { .type = T_IN }, { .type = T_GET_ID }, { .type = T_IN, .sector = last } };
    static char id[21];                 /* a full one has no NUL */
    submit(&requests[0], data, SECTOR);
    submit(&requests[1], id, sizeof id - 1);
    submit(&requests[2], kept, SECTOR);
    queue_notify(&queue);
    TRY(queue_wait(&queue, PATIENCE_MS));
    for (u32 i = 0; i < 3; i++)
        CHECK(requests[i].status == S_OK, "request %u of a batch of 3: status %u", i, requests[i].status);
    say("note virtio-blk: id '%s', sector 0 begins %02x %02x %02x %02x", id, data[0], data[1], data[2], data[3]);
    return OK;
}

static enum verdict zero_out(u32 type, u64 last, const char *what)
{
    struct range range = { last, 1, 0 };
    TRY(perform(type, 0, &range, sizeof range, S_OK));
    TRY(perform(T_IN, last, data, SECTOR, S_OK));
    CHECK(type == T_DISCARD || all_are(0), "the sector is not zero after %s", what);
    return OK;
}

static enum verdict write_last_sector(u64 last)
{
    memset(pattern, 0xC3, SECTOR);
    TRY(perform(T_OUT, last, pattern, SECTOR, S_OK));
    if (virtio_has(&disk, F_FLUSH))
        TRY(perform(T_FLUSH, 0, NULL, 0, S_OK));
    TRY(perform(T_IN, last, data, SECTOR, S_OK));
    CHECK(all_are(0xC3), "read back 0x%02x..0x%02x, wrote 0xc3", data[0], data[SECTOR - 1]);
    if (virtio_has(&disk, F_WRITE_ZEROES))
        TRY(zero_out(T_WRITE_ZEROES, last, "write-zeroes"));
    if (virtio_has(&disk, F_DISCARD))
        TRY(zero_out(T_DISCARD, last, "discard"));
    return perform(T_OUT, last, kept, SECTOR, S_OK);
}

static enum verdict drive(bool msix)
{
    TRY(virtio_open(&disk, VIRTIO_BLK, WANTED, msix));
    TRY(virtio_queue(&disk, &queue, 0));
    virtio_ready(&disk);
    u32 low = load32(disk.config), high = load32(disk.config + 4);
    u64 sectors = (u64)high << 32 | low;
    CHECK(sectors, "capacity of 0 sectors");
    if (!msix) {
        TRY(perform(T_IN, 0, data, SECTOR, S_OK));
        return ok("read by the pin: I/O APIC pin %u, level", disk.vector - VECTOR_IOAPIC);
    }
    TRY(read_batch(sectors - 1));
    TRY(perform(T_IN, sectors, data, SECTOR, S_IOERR));
    TRY(perform(T_UNKNOWN, 0, data, SECTOR, S_UNSUPP));
    bool read_only = virtio_has(&disk, F_RO);
    TRY(read_only ? perform(T_OUT, 0, data, SECTOR, S_IOERR) : write_last_sector(sectors - 1));
    return ok("%u KiB, %s, features%s%s%s%s%s, %s", (u32)(sectors >> 1),
              read_only ? "read-only, a write refused" : "last sector written and restored",
              virtio_has(&disk, F_FLUSH) ? " flush" : "", virtio_has(&disk, F_DISCARD) ? " discard" : "",
              virtio_has(&disk, F_WRITE_ZEROES) ? " write-zeroes" : "", virtio_has(&disk, F_INDIRECT_DESC) ? " indirect" : "",
              virtio_has(&disk, F_EVENT_IDX) ? " event-idx" : "", disk.msix ? "MSI-X" : "INTx");
}

static enum verdict drive_and_close(bool msix)
{
    enum verdict verdict = drive(msix);
    if (disk.common)
        virtio_close(&disk);
    return verdict;
}

enum verdict test_virtio_blk(void) { return drive_and_close(true); }
enum verdict test_virtio_blk_intx(void) { return drive_and_close(false); }
