/* virtio-rng (5.4): sixty-four bytes, twice; they must not be alike. */
#include "virtio.h"

static struct virtio rng;
static struct virtqueue queue;
static u8 bytes[2][64];

static enum verdict drive(void)
{
    TRY(virtio_open(&rng, VIRTIO_RNG, 0, true));
    TRY(virtio_queue(&rng, &queue, 0));
    virtio_ready(&rng);
    for (u32 i = 0; i < 2; i++) {
        queue_add(&queue, &(struct buffer){ bytes[i], sizeof bytes[i], true }, 1, false);
        queue_notify(&queue);
        TRY(queue_wait(&queue, 2000));
        u32 length = queue_used_length(&queue);
        CHECK(length >= 1 && length <= sizeof bytes[i], "%u bytes in a buffer of 64", length);
    }
    CHECK(memcmp(bytes[0], bytes[1], sizeof bytes[0]) != 0, "the same bytes twice");
    return ok("%u bytes, %02x %02x %02x %02x ...", queue_used_length(&queue), bytes[0][0], bytes[0][1], bytes[0][2], bytes[0][3]);
}

enum verdict test_virtio_rng(void)
{
    enum verdict verdict = drive();
    if (rng.common)
        virtio_close(&rng);
    return verdict;
}
