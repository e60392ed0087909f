/* virtio-console (5.3): one line out of port 0, which Linux calls hvc0. No input, no second port. */
#include "virtio.h"

enum { RECEIVE = 0, TRANSMIT = 1 };

static struct virtio console;
static struct virtqueue receive, transmit;
static const char line[] = "probe: hello on hvc0\r\n";

static enum verdict drive(void)
{
    TRY(virtio_open(&console, VIRTIO_CONSOLE, 0, true));
    TRY(virtio_queue(&console, &receive, RECEIVE));
    TRY(virtio_queue(&console, &transmit, TRANSMIT));
    virtio_ready(&console);
    queue_add(&transmit, &(struct buffer){ line, sizeof line - 1, false }, 1, false);
    queue_notify(&transmit);
    TRY(queue_wait(&transmit, 1000));
    return ok("a line of %u bytes on port 0", sizeof line - 1);
}

enum verdict test_virtio_console(void)
{
    enum verdict verdict = drive();
    if (console.common)
        virtio_close(&console);
    return verdict;
}
