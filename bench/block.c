/* The peer of bench/block.py: the same load on the same file by the plainest C there is, io_uring or preadv/pwritev in threads.
 *
 *   block FILE read|write uring|sync direct|cached DEPTH BLOCK random|sequential NANOSECONDS
 *
 * prints requests done, nanoseconds taken and nanoseconds of CPU (all threads), since the ring or the threads were there. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static int file, writes, sequential;
static unsigned depth, block;
static uint64_t blocks, place, duration, start, cpu, end, done;
static char *memory;
static pthread_barrier_t all_there;

static uint64_t now(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static void fail(const char *what, int error)
{
    fprintf(stderr, "block: %s: %s\n", what, strerror(error));
    exit(1);
}

static uint64_t next_place(uint64_t *seed)
{
    if (sequential)
        return __atomic_add_fetch(&place, 1, __ATOMIC_RELAXED) % blocks * block;
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed % blocks * block;
}

static void start_one(struct io_uring *ring, unsigned i, uint64_t *seed)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
    char *data = memory + (uint64_t)i * block;
    if (writes)
        io_uring_prep_write(sqe, 0, data, block, next_place(seed));
    else
        io_uring_prep_read(sqe, 0, data, block, next_place(seed));
    sqe->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data64(sqe, i);
}

/* What comes before is no request's. */
static void begin(void)
{
    cpu = now(CLOCK_PROCESS_CPUTIME_ID);
    start = now(CLOCK_MONOTONIC);
    end = start + duration;
}

static void run_uring(void)
{
    struct io_uring ring;
    uint64_t seed = 88172645463325252ull;
    unsigned in_flight = depth, i, count;
    int result = io_uring_queue_init(depth, &ring, 0);
    if (result < 0)
        fail("io_uring", -result);
    io_uring_register_files(&ring, &file, 1);
    begin();
    for (i = 0; i < depth; i++)
        start_one(&ring, i, &seed);
    while (in_flight) {
        struct io_uring_cqe *cqes[64];
        int more;
        io_uring_submit_and_wait(&ring, 1);
        count = io_uring_peek_batch_cqe(&ring, cqes, 64);
        more = now(CLOCK_MONOTONIC) < end;
        for (i = 0; i < count; i++) {
            unsigned slot = io_uring_cqe_get_data64(cqes[i]);
            if (cqes[i]->res != (int)block)
                fail("request", cqes[i]->res < 0 ? -cqes[i]->res : EIO);
            done++;
            if (more)
                start_one(&ring, slot, &seed);
            else
                in_flight--;
        }
        io_uring_cq_advance(&ring, count);
    }
}

static void *run_sync(void *number)
{
    uint64_t seed = 88172645463325252ull + (uintptr_t)number, mine = 0;
    char *data = memory + (uintptr_t)number * block;
    pthread_barrier_wait(&all_there);
    do {
        ssize_t count = writes ? pwrite(file, data, block, next_place(&seed)) : pread(file, data, block, next_place(&seed));
        if (count != block)
            fail("request", count < 0 ? errno : EIO);
        mine++;
    } while (now(CLOCK_MONOTONIC) < end);
    __atomic_add_fetch(&done, mine, __ATOMIC_RELAXED);
    return NULL;
}

int main(int argc, char **argv)
{
    struct stat status;
    if (argc != 9)
        fail("arguments", EINVAL);
    writes = !strcmp(argv[2], "write");
    file = open(argv[1], O_RDWR | (strcmp(argv[4], "direct") ? 0 : O_DIRECT));
    if (file < 0 || fstat(file, &status) < 0)
        fail(argv[1], errno);
    depth = atoi(argv[5]);
    block = atoi(argv[6]);
    blocks = status.st_size / block;
    sequential = !strcmp(argv[7], "sequential");
    if (posix_memalign((void **)&memory, 4096, (size_t)depth * block))
        fail("memory", ENOMEM);
    memset(memory, 1, (size_t)depth * block);
    duration = strtoull(argv[8], NULL, 10);
    if (!strcmp(argv[3], "uring")) {
        run_uring();
    } else {
        pthread_t threads[depth];
        pthread_barrier_init(&all_there, NULL, depth + 1);
        for (uintptr_t i = 0; i < depth; i++)
            pthread_create(&threads[i], NULL, run_sync, (void *)i);
        begin();
        pthread_barrier_wait(&all_there);
        for (unsigned i = 0; i < depth; i++)
            pthread_join(threads[i], NULL);
    }
    printf("%llu %llu %llu\n", (unsigned long long)done, (unsigned long long)(now(CLOCK_MONOTONIC) - start),
           (unsigned long long)(now(CLOCK_PROCESS_CPUTIME_ID) - cpu));
    return 0;
}
