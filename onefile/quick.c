/* kvmappctl's quick way: a warm process beside the daemon runs the verb (kvmapp/cli/quick.py has the other end and the protocol).
 *
 * This process connects to the daemon with its own rights and hands that connection over, so that the warm process, which has no
 * rights at all, can do for a caller exactly what the caller could. Whatever is out of the ordinary (no daemon, options that it does
 * not know, a verb that wants files or a terminal) is left to the whole program, which also has the words for every error.
 */
#define _GNU_SOURCE
#include "launcher.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#define FOLDER "/run/kvmapp"
#define FULL "kvmapp.sock"
#define READ_ONLY "kvmapp-sock-ro"
#define QUICK "kvmapp-sock-quick"
#define URI "kvmapp:///system?socket="
#define REQUEST_LIMIT 60000
#define BROKEN_PIPE 141
#define INTERRUPTED 130

enum { OUT = 1, ERR = 2, EXIT = 3, DECLINED = 4 };
enum { ERR_IS_TERMINAL = 1 };

struct frame {
    uint32_t kind, size;                    /* of EXIT: the status in place of a size */
};

static int connect_to(const char *folder, const char *name)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    if ((size_t)snprintf(address.sun_path, sizeof address.sun_path, "%s/%s", folder, name) >= sizeof address.sun_path)
        return -1;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
        close(fd);
        return -1;
    }
    if (fd >= 0)                            /* a full backlog must not keep us; an answer may take as long as it takes */
        fcntl(fd, F_SETFL, 0);
    return fd;
}

/* The options that may stand before the verb; false for any other. */
static bool understand(char **words, bool *read_only)
{
    static const char *const harmless[] = { "-q", "--quiet", "--json", "-t", "--timing" };
    for (; *words && **words == '-'; words++) {
        bool known = strcmp(*words, "-r") == 0 || strcmp(*words, "--readonly") == 0;
        *read_only = *read_only || known;
        for (size_t number = 0; number < sizeof harmless / sizeof *harmless; number++)
            known = known || strcmp(*words, harmless[number]) == 0;
        if (!known)
            return false;
    }
    return *words != NULL;
}

/* The folder of the daemon's sockets; false when the environment asks for something that is not so simple. */
static bool find_sockets(char *folder, size_t room)
{
    const char *uri = getenv("KVMAPP_DEFAULT_URI");
    const char *path = FOLDER "/" FULL;
    if (uri && *uri) {
        if (strncmp(uri, URI "/", strlen(URI) + 1) != 0 || strpbrk(uri + strlen(URI), "%&"))
            return false;
        path = uri + strlen(URI);
    }
    const char *slash = strrchr(path, '/');
    if (strcmp(slash + 1, FULL) != 0 || (size_t)(slash - path) >= room)
        return false;
    memcpy(folder, path, (size_t)(slash - path));
    folder[slash - path] = 0;
    return true;
}

static size_t add(char *request, size_t used, const char *word)
{
    size_t size = strlen(word) + 1;
    if (used + size > REQUEST_LIMIT)
        return REQUEST_LIMIT + 1;
    memcpy(request + used, word, size);
    return used + size;
}

/* The whole request in one message, with the connection to the daemon at its first byte. */
static bool send_request(int quick, int daemon, char **words)
{
    static char request[REQUEST_LIMIT];
    uint32_t head[2] = { 0, isatty(2) ? ERR_IS_TERMINAL : 0 };
    size_t used = sizeof head;
    const char *uri = getenv("KVMAPP_DEFAULT_URI"), *zone = getenv("TZ");
    used = add(request, used, uri ? uri : "");
    used = used > REQUEST_LIMIT ? used : add(request, used, zone ? zone : "");
    for (; *words && used <= REQUEST_LIMIT; words++)
        used = add(request, used, *words);
    if (used > REQUEST_LIMIT)
        return false;
    head[0] = (uint32_t)(used - sizeof head[0]);
    memcpy(request, head, sizeof head);

    union { char room[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control = { { 0 } };
    struct iovec vector = { request, used };
    struct msghdr message = { .msg_iov = &vector, .msg_iovlen = 1, .msg_control = control.room,
                              .msg_controllen = sizeof control.room };
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof daemon);
    memcpy(CMSG_DATA(rights), &daemon, sizeof daemon);
    return sendmsg(quick, &message, MSG_NOSIGNAL) == (ssize_t)used;
}

static bool receive(int quick, void *to, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t got = recv(quick, (char *)to + done, size - done, 0);
        if (got <= 0 && !(got < 0 && errno == EINTR))
            return false;
        done += got > 0 ? (size_t)got : 0;
    }
    return true;
}

static void hand_out(int fd, const char *data, size_t size)
{
    while (size) {
        ssize_t wrote = write(fd, data, size);
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote < 0) {
            if (fd == 1 && errno == EPIPE)
                _exit(BROKEN_PIPE);
            if (fd == 1)
                die(NULL, "Cannot write the output: %s", strerror(errno));
            return;
        }
        data += wrote;
        size -= (size_t)wrote;
    }
}

static void interrupted(int number)
{
    (void)number;
    _exit(INTERRUPTED);
}

/* Shows what comes; returns when the verb was declined. */
static void show(int quick)
{
    static char room[1 << 16];
    struct frame frame;
    while (receive(quick, &frame, sizeof frame)) {
        if (frame.kind == DECLINED)
            return;
        if (frame.kind == EXIT)
            _exit((int)frame.size);
        while (frame.size) {
            size_t part = frame.size < sizeof room ? frame.size : sizeof room;
            if (!receive(quick, room, part))
                break;
            hand_out(frame.kind == OUT ? 1 : 2, room, part);
            frame.size -= (uint32_t)part;
        }
    }
    die("it was stopped or restarted: look at what became of the request, then repeat it", "The daemon closed the connection");
}

void try_quickly(char **words)
{
    char folder[sizeof(((struct sockaddr_un *)0)->sun_path)];
    bool read_only = false;
    if (!understand(words, &read_only) || !find_sockets(folder, sizeof folder))
        return;
    int daemon = connect_to(folder, read_only ? READ_ONLY : FULL);
    int quick = daemon < 0 ? -1 : connect_to(folder, QUICK);
    if (quick >= 0 && send_request(quick, daemon, words)) {
        void (*on_interrupt)(int) = signal(SIGINT, interrupted), (*on_pipe)(int) = signal(SIGPIPE, SIG_IGN);
        if (on_interrupt == SIG_IGN)
            signal(SIGINT, SIG_IGN);
        close(daemon);
        show(quick);
        signal(SIGINT, on_interrupt);
        signal(SIGPIPE, on_pipe);
    } else if (daemon >= 0) {
        close(daemon);
    }
    if (quick >= 0)
        close(quick);
}
