/* A network load for `bench net`: the same static program in guests and on the host, each told over TCP what to do.
 *
 *     netload PORT [DEVICE ADDRESS [GATEWAY]]      serves; a guest's has its card brought up first (a /24)
 *
 * A connection begins with one line:
 *     ping                                 is answered "pong"
 *     end                                  ends the server
 *     drive KIND ADDRESS PORT SECONDS      loads the server there; told are "start", "stop", and "count N": what arrived there
 *     tcp, udp, rr                         what `drive` says to that server: swallow the stream and tell its bytes; tell a UDP port,
 *                                          and how many datagrams came, now and then and at the stream's end; send each byte back
 * At most WINDOW datagrams are under way, so that none is lost, and a flood does not take the CPUs from those who carry it.
 * The seconds are this machine's; who wants exact ones takes the times at which "start" and "stop" arrive.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

enum {
    CHUNK = 128 << 10,
    DATAGRAM = 64,
    BATCH = 32,                     /* datagrams a system call */
    WINDOW = 32 * BATCH,            /* fewer than a tap and a socket queue */
    ROOM = 2 << 20,                 /* bytes that a socket queues */
    PATIENCE = 200                  /* ms until datagrams count as lost */
};

static char chunk[CHUNK];
static volatile sig_atomic_t is_over;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void ring(int number)
{
    (void)number;
    is_over = 1;
}

/* From now on `is_over` after so many seconds, and whatever blocks then returns. It rings on, lest it fall between test and call. */
static void set_alarm(double seconds)
{
    struct sigaction action = {.sa_handler = ring};
    struct itimerval timer = {.it_interval = {0, 50000}, .it_value = {(long)seconds, (long)((seconds - (long)seconds) * 1e6)}};
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &timer, NULL);
}

static void clear_alarm(void)
{
    struct itimerval never = {{0, 0}, {0, 0}};
    setitimer(ITIMER_REAL, &never, NULL);
}

/* A line of at most 127 characters, byte by byte: what follows it is not ours to read. */
static int read_line(int fd, char line[128])
{
    int length = 0;
    while (length < 127 && read(fd, line + length, 1) == 1) {
        if (line[length] == '\n') {
            line[length] = 0;
            return 1;
        }
        length++;
    }
    return 0;
}

static struct sockaddr_in place(const char *address, int port)
{
    struct sockaddr_in there = {.sin_family = AF_INET, .sin_port = htons(port)};
    if (!inet_aton(address, &there.sin_addr))
        die(address);
    return there;
}

static void send_at_once(int fd)
{
    int yes = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
}

/* -- the loads */

/* The latest count that the peer told, waiting for one if so wished; `known` when none came in time. */
static uint64_t read_count(int peer, uint64_t known, int timeout)
{
    uint64_t counts[64];
    struct pollfd told = {.fd = peer, .events = POLLIN};
    while (poll(&told, 1, timeout) == 1) {
        ssize_t got = recv(peer, counts, sizeof(counts), MSG_PEEK);
        if (got < (ssize_t)sizeof(counts[0]) || (got = recv(peer, counts, got & ~7, 0)) <= 0)
            break;
        known = counts[got / 8 - 1];
        timeout = 0;
    }
    return known;
}

/* Datagrams as fast as they arrive; the port is the peer's first line. How many arrived in all. */
static uint64_t drive_udp(int peer, const char *address)
{
    struct mmsghdr messages[BATCH];
    struct iovec datagram = {chunk, DATAGRAM};
    struct sockaddr_in there;
    uint64_t sent = 0, arrived = 0, lost = 0;
    char line[128];
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    if (fd < 0 || !read_line(peer, line))
        die("udp");
    there = place(address, atoi(line));
    if (connect(fd, (struct sockaddr *)&there, sizeof(there)))
        die("connect");
    memset(messages, 0, sizeof(messages));
    for (int i = 0; i < BATCH; i++) {
        messages[i].msg_hdr.msg_iov = &datagram;
        messages[i].msg_hdr.msg_iovlen = 1;
    }
    while (!is_over) {
        int is_full = sent + BATCH > arrived + lost + WINDOW, done = 0;
        uint64_t before = arrived;
        arrived = read_count(peer, arrived, is_full ? PATIENCE : 0);
        if (is_full && arrived == before && !is_over)
            lost = sent - arrived;
        else if (!is_full && (done = sendmmsg(fd, messages, BATCH, 0)) > 0)
            sent += done;
    }
    clear_alarm();
    shutdown(peer, SHUT_WR);
    while (read(peer, &arrived, sizeof(arrived)) == sizeof(arrived))
        ;
    return arrived;
}

static uint64_t drive_rr(int peer)
{
    uint64_t count = 0;
    char byte = 'x';
    while (!is_over && write(peer, &byte, 1) == 1) {
        ssize_t got;
        do
            got = read(peer, &byte, 1);
        while (got < 0 && errno == EINTR);
        if (got != 1)
            break;
        count++;
    }
    return count;
}

static uint64_t drive_tcp(int peer)
{
    char line[128];
    while (!is_over)
        if (write(peer, chunk, CHUNK) < 0 && errno != EINTR)
            return 0;
    clear_alarm();
    shutdown(peer, SHUT_WR);
    return read_line(peer, line) ? strtoull(line, NULL, 10) : 0;
}

/* One load against the server at that address, told of on `out`: "stop" comes when all has arrived. */
static void drive(int out, const char *kind, const char *address, int port, double seconds)
{
    struct sockaddr_in there = place(address, port);
    uint64_t count;
    int peer = socket(AF_INET, SOCK_STREAM, 0);
    if (peer < 0 || connect(peer, (struct sockaddr *)&there, sizeof(there)))
        die("connect");
    send_at_once(peer);
    dprintf(peer, "%s\n", kind);
    dprintf(out, "start\n");
    set_alarm(seconds);
    count = !strcmp(kind, "tcp") ? drive_tcp(peer) : !strcmp(kind, "udp") ? drive_udp(peer, address) : drive_rr(peer);
    dprintf(out, "stop\ncount %llu\n", (unsigned long long)count);
    close(peer);
}

/* -- their other ends */

static void swallow(int fd)
{
    unsigned long long count = 0;
    ssize_t got;
    while ((got = read(fd, chunk, CHUNK)) > 0)
        count += got;
    dprintf(fd, "%llu\n", count);
}

static void echo(int fd)
{
    char byte;
    while (read(fd, &byte, 1) == 1 && write(fd, &byte, 1) == 1)
        ;
}

/* Datagrams, until the stream that asked for them ends and no more wait. */
static void count_datagrams(int stream)
{
    struct sockaddr_in here = {.sin_family = AF_INET};
    socklen_t length = sizeof(here);
    struct mmsghdr messages[BATCH];
    struct iovec datagrams[BATCH];
    uint64_t count = 0, told = 0;
    int room = ROOM, fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&here, sizeof(here)) || getsockname(fd, (struct sockaddr *)&here, &length))
        die("udp");
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room)))
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &room, sizeof(room));
    memset(messages, 0, sizeof(messages));
    for (int i = 0; i < BATCH; i++) {
        datagrams[i] = (struct iovec){chunk + i * DATAGRAM, DATAGRAM};
        messages[i].msg_hdr.msg_iov = &datagrams[i];
        messages[i].msg_hdr.msg_iovlen = 1;
    }
    dprintf(stream, "%d\n", ntohs(here.sin_port));
    for (;;) {
        struct pollfd ends[2] = {{.fd = fd, .events = POLLIN}, {.fd = stream, .events = POLLIN}};
        int got = recvmmsg(fd, messages, BATCH, 0, NULL);
        if (got > 0)
            count += got;
        if (count >= told + BATCH && write(stream, &count, sizeof(count)) > 0)
            told = count;
        if (got <= 0 && (poll(ends, 2, -1) < 0 || (ends[1].revents && !ends[0].revents)))
            break;
    }
    if (write(stream, &count, sizeof(count)) < 0)
        perror("count");
}

/* -- the server */

static void serve(int fd)
{
    char line[128], kind[8], address[32];
    int port;
    double seconds;
    send_at_once(fd);
    if (!read_line(fd, line))
        return;
    if (!strcmp(line, "ping"))
        dprintf(fd, "pong\n");
    else if (!strcmp(line, "end"))
        kill(getppid(), SIGTERM);
    else if (!strcmp(line, "tcp"))
        swallow(fd);
    else if (!strcmp(line, "udp"))
        count_datagrams(fd);
    else if (!strcmp(line, "rr"))
        echo(fd);
    else if (sscanf(line, "drive %7s %31s %d %lf", kind, address, &port, &seconds) == 4)
        drive(fd, kind, address, port, seconds);
}

/* The card up with this address, a /24, and the way out by `gateway`. */
static void bring_up(const char *device, const char *address, const char *gateway)
{
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    struct ifreq request;
    struct sockaddr_in words[3] = {place(address, 0), place("255.255.255.0", 0), place("0.0.0.0", 0)};
    memset(&request, 0, sizeof(request));
    strncpy(request.ifr_name, device, IFNAMSIZ - 1);
    memcpy(&request.ifr_addr, &words[0], sizeof(words[0]));
    if (fd < 0 || ioctl(fd, SIOCSIFADDR, &request))
        die(device);
    memcpy(&request.ifr_netmask, &words[1], sizeof(words[1]));
    if (ioctl(fd, SIOCSIFNETMASK, &request))
        die("netmask");
    if (ioctl(fd, SIOCGIFFLAGS, &request) || (request.ifr_flags |= IFF_UP, ioctl(fd, SIOCSIFFLAGS, &request)))
        die("up");
    if (gateway) {
        struct rtentry route;
        struct sockaddr_in there = place(gateway, 0);
        memset(&route, 0, sizeof(route));
        memcpy(&route.rt_gateway, &there, sizeof(there));
        memcpy(&route.rt_dst, &words[2], sizeof(words[2]));
        memcpy(&route.rt_genmask, &words[2], sizeof(words[2]));
        route.rt_flags = RTF_UP | RTF_GATEWAY;
        if (ioctl(fd, SIOCADDRT, &route))
            die("route");
    }
    close(fd);
}

int main(int argc, char **argv)
{
    int listener, yes = 1;
    struct sockaddr_in here;
    if (argc < 2)
        return 2;
    signal(SIGPIPE, SIG_IGN);
    signal(SIGCHLD, SIG_IGN);
    if (argc >= 4)
        bring_up(argv[2], argv[3], argc > 4 ? argv[4] : NULL);
    listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    here = place("0.0.0.0", atoi(argv[1]));
    if (listener < 0 || setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes)) ||
        bind(listener, (struct sockaddr *)&here, sizeof(here)) || listen(listener, 16))
        die("listen");
    printf("NETLOAD %s\n", argv[1]);
    fflush(stdout);
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0)
            continue;
        if (fork() == 0) {
            close(listener);
            serve(fd);
            _exit(0);
        }
        close(fd);
    }
}
