/*
 * virtio-net (5.1): asks by ARP who has an address, and listens for the answer. arp=A.B.C.D on the command line names the
 * address and makes an answer from it a must; without it 10.0.2.2 is asked and silence is no failure.
 * from=A.B.C.D is the probe's own address (10.0.2.15). Not here: offloads, control queue, several queue pairs.
 */
#include "virtio.h"

enum { F_MAC = 5 };
enum { RECEIVE = 0, TRANSMIT = 1 };
#define ARP_TYPE 0x0608                 /* as the bytes 08 06 read in a little-endian word */
#define ARP_REPLY 0x0200

struct net_header { u8 flags, segmentation; u16 header_length, segment_size, checksum_start, checksum_offset, buffers; };
struct arp_frame {
    u8 to[6], from[6]; u16 type, hardware, protocol; u8 sizes[2]; u16 operation;
    u8 sender_mac[6], sender[4], target_mac[6], target[4], padding[18];
} __attribute__((packed));

static struct virtio nic;
static struct virtqueue receive, transmit;
static struct { struct net_header header; u8 bytes[1514]; } __attribute__((packed)) incoming;
static struct { struct net_header header; struct arp_frame frame; } __attribute__((packed)) outgoing;

static void parse_address(const char *text, u8 address[4])
{
    for (u32 i = 0; i < 4; i++) {
        address[i] = (u8)word_number(text);
        while (*text >= '0' && *text <= '9')
            text++;
        text += *text == '.';
    }
}

static void compose(const u8 *mac)
{
    static const u8 request[] = { 0x08, 0x06, 0x00, 0x01, 0x08, 0x00, 0x06, 0x04, 0x00, 0x01 };
    const char *asked = word("arp"), *own = word("from");
    struct arp_frame *frame = &outgoing.frame;
    memset(&outgoing, 0, sizeof outgoing);
    memset(frame->to, 0xFF, 6);
    memcpy(frame->from, mac, 6);
    memcpy(&frame->type, request, sizeof request);
    memcpy(frame->sender_mac, mac, 6);
    parse_address(own ? own : "10.0.2.15", frame->sender);
    parse_address(asked ? asked : "10.0.2.2", frame->target);
}

static void offer_buffer(void)
{
    queue_add(&receive, &(struct buffer){ &incoming, sizeof incoming, true }, 1, false);
    queue_notify(&receive);
}

static bool is_answer(u32 length)
{
    const struct arp_frame *frame = (const void *)incoming.bytes;
    return length >= sizeof(struct net_header) + 42 && frame->type == ARP_TYPE && frame->operation == ARP_REPLY &&
           memcmp(frame->sender, outgoing.frame.target, 4) == 0;
}

/* A host says other things too on a link that has just come up: the answer is waited for among them. */
static enum verdict await_answer(void)
{
    bool must = word("arp") != NULL;
    const u8 *asked = outgoing.frame.target;
    for (u32 frames = 0; frames < 50; frames++) {
        enum verdict came = queue_wait(&receive, must ? 1000 : 50);
        if (came != OK && !must)
            return ok("an ARP request sent; %u frames came back, no answer", frames);
        TRY(came);
        u32 length = queue_used_length(&receive);
        CHECK(length > sizeof(struct net_header) && length <= sizeof incoming, "a frame of %u bytes with its header", length);
        if (is_answer(length))
            return ok("an ARP request sent, answered by a frame of %u bytes", length - sizeof(struct net_header));
        offer_buffer();
    }
    return fail("50 frames came, none an ARP reply from %u.%u.%u.%u", asked[0], asked[1], asked[2], asked[3]);
}

static enum verdict drive(void)
{
    u8 mac[6];
    TRY(virtio_open(&nic, VIRTIO_NET, 1U << F_MAC, true));
    TRY(virtio_queue(&nic, &receive, RECEIVE));
    TRY(virtio_queue(&nic, &transmit, TRANSMIT));
    virtio_ready(&nic);
    for (u32 i = 0; i < 6; i++)
        mac[i] = ((volatile u8 *)nic.config)[i];
    CHECK(virtio_has(&nic, F_MAC), "MAC not offered");
    CHECK(!(mac[0] & 1), "MAC %02x:... is a multicast address", mac[0]);
    say("note virtio-net: MAC %02x:%02x:%02x:%02x:%02x:%02x", mac[0], mac[1], mac[2], mac[3], mac[4], mac[5]);
    compose(mac);
    offer_buffer();
    queue_add(&transmit, &(struct buffer){ &outgoing, sizeof outgoing, false }, 1, false);
    queue_notify(&transmit);
    TRY(queue_wait(&transmit, 1000));
    return await_answer();
}

enum verdict test_virtio_net(void)
{
    enum verdict verdict = drive();
    if (nic.common)
        virtio_close(&nic);
    return verdict;
}
