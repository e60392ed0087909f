/* A disk load for `bench blk_guest`, past the page cache: so many requests are kept under way for so long, and the rate is told.
 *
 *     diskload DEVICE SECONDS ROW...
 *
 * A row is a letter and a depth: r, w: 4 KiB at random places; R, W: 1 MiB one after the other. Its line: "ROW r32 12345.6", requests
 * a second. Linux's asynchronous I/O by its system calls (io_submit(2)), which every kernel that we boot has.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SMALL = 4 << 10, LARGE = 1 << 20, DEEPEST = 64 };

static uint64_t place, seed = 88172645463325252u;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

/* Where the next request goes; xorshift for random ones, which begin anew with each start of the program. */
static uint64_t next_place(int is_random, uint64_t size, uint64_t blocks)
{
    if (!is_random)
        return place++ % blocks * size;
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed % blocks * size;
}

static void run(int disk, uint64_t bytes, double seconds, const char *row)
{
    int is_random = row[0] == 'r' || row[0] == 'w', depth = atoi(row + 1), opcode = IOCB_CMD_PWRITE;
    uint64_t size = is_random ? SMALL : LARGE, done = 0;
    struct iocb blocks[DEEPEST], *ready[DEEPEST];
    struct io_event events[DEEPEST];
    aio_context_t context = 0;
    char *memory;
    double start, end;
    int count = depth;
    if (row[0] == 'r' || row[0] == 'R')
        opcode = IOCB_CMD_PREAD;
    if (depth < 1 || depth > DEEPEST || posix_memalign((void **)&memory, SMALL, depth * size) || syscall(SYS_io_setup, DEEPEST, &context))
        die(row);
    memset(memory, 0x5a, depth * size);
    memset(blocks, 0, sizeof(blocks));
    for (int i = 0; i < depth; i++) {
        blocks[i].aio_lio_opcode = opcode;
        blocks[i].aio_fildes = disk;
        blocks[i].aio_buf = (uintptr_t)(memory + i * size);
        blocks[i].aio_nbytes = size;
        ready[i] = &blocks[i];
    }
    start = now();
    do {
        for (int i = 0; i < count; i++)
            ready[i]->aio_offset = next_place(is_random, size, bytes / size);
        if (count && syscall(SYS_io_submit, context, count, ready) != count)
            die("io_submit");
        count = syscall(SYS_io_getevents, context, 1, DEEPEST, events, NULL);
        if (count < 1)
            die("io_getevents");
        for (int i = 0; i < count; i++) {
            if (events[i].res != (int64_t)size)
                die("a request failed");
            ready[i] = (struct iocb *)(uintptr_t)events[i].obj;
        }
        done += count;
        end = now();
    } while (end - start < seconds);
    printf("ROW %s %.1f\n", row, done / (end - start));
    fflush(stdout);
    syscall(SYS_io_destroy, context);        /* waits for the rest */
    free(memory);
}

int main(int argc, char **argv)
{
    uint64_t bytes;
    int disk = argc > 3 ? open(argv[1], O_RDWR | O_DIRECT) : -1;
    if (disk < 0 || ioctl(disk, BLKGETSIZE64, &bytes))
        die(argc > 3 ? argv[1] : "diskload DEVICE SECONDS ROW...");
    for (int i = 3; i < argc; i++)
        run(disk, bytes, atof(argv[2]), argv[i]);
    return 0;
}
