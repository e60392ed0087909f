/* A private copy of the packed tree for one run of a copied file, which leaves nothing behind.
 *
 * Root has a mount namespace for it: a tmpfs over a folder of /proc that nobody here needs, seen by this process and its children
 * alone, gone with the last of them however it ends, and executable whatever /tmp is. `setup` starts the daemon, which must not live
 * there, and others may not make one: they have a folder of their own in the first place that takes it, removed by a process that
 * waits for the end. What a killed one left is removed by the next.
 */
#define _GNU_SOURCE
#include "launcher.h"

#include <dirent.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <zstd.h>

#define NAME "kvmapp-unpacked-"
#define LOCK "lock"
#define LOADER "lib/ld-linux-x86-64.so.2"
#define STALE_SECONDS 60

struct entry {                              /* before each file of the packed tree; its name and its content follow */
    uint32_t mode, name_length;             /* no name: the end */
    uint64_t size;
};

/* Reading the packed tree. */

static struct {
    int fd;
    uint64_t left;                          /* of the packed bytes in the file */
    ZSTD_DStream *stream;
    ZSTD_inBuffer in;
    char room[1 << 17];
} packed;

static void open_packed(const char *self)
{
    packed.fd = open(self, O_RDONLY | O_CLOEXEC);
    packed.stream = ZSTD_createDStream();
    packed.in = (ZSTD_inBuffer){ packed.room, 0, 0 };
    packed.left = seal.size;
    if (packed.fd < 0 || !packed.stream || lseek(packed.fd, (off_t)seal.offset, SEEK_SET) < 0)
        die(NULL, "Cannot read %s: %s", self, strerror(errno));
}

static void take(void *to, size_t size)
{
    ZSTD_outBuffer out = { to, size, 0 };
    while (out.pos < size) {
        if (packed.in.pos == packed.in.size && packed.left) {
            size_t want = packed.left < sizeof packed.room ? packed.left : sizeof packed.room;
            ssize_t got = read(packed.fd, packed.room, want);
            if (got <= 0)
                die(NULL, "Cannot read the packed part of this file: %s", got ? strerror(errno) : "it ends too early");
            packed.in.size = (size_t)got;
            packed.in.pos = 0;
            packed.left -= (uint64_t)got;
        }
        size_t before = packed.in.pos, done = out.pos;
        size_t result = ZSTD_decompressStream(packed.stream, &out, &packed.in);
        if (ZSTD_isError(result) || (packed.in.pos == before && out.pos == done && !packed.left))
            die("copy it again, and compare it with kvmapp.sha256", "This file is damaged: its packed part cannot be read");
    }
}

/* Writing it. */

static void make_parents(int folder, char *name)
{
    static char last[PATH_ROOM];            /* names are sorted: most stand where the one before them does */
    size_t length = (size_t)(strrchr(name, '/') ? strrchr(name, '/') - name + 1 : 0);
    if (length == strlen(last) && memcmp(name, last, length) == 0)
        return;
    memcpy(last, name, length);
    last[length] = 0;
    for (char *slash = strchr(name, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        if (mkdirat(folder, name, 0755) != 0 && errno != EEXIST)
            die(NULL, "Cannot make the folder %s of a private copy: %s", name, strerror(errno));
        *slash = '/';
    }
}

static void unpack_one(int folder, char *name, const struct entry *entry)
{
    static char room[1 << 18];
    make_parents(folder, name);
    int fd = openat(folder, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, entry->mode & 0777);
    for (uint64_t left = entry->size; fd >= 0 && left;) {
        size_t size = left < sizeof room ? left : sizeof room;
        take(room, size);
        if (write(fd, room, size) != (ssize_t)size)
            fd = -1;
        left -= size;
    }
    if (fd < 0)
        die("TMPDIR may name a folder with more room", "Cannot write %s of a private copy: %s", name, strerror(errno));
    close(fd);
}

/* The kernel wants the loader's whole path in the program: build.py left room for it. */
static void name_loader(int folder, const char *tree)
{
    Elf64_Ehdr head;
    Elf64_Phdr part;
    char path[PATH_ROOM] = "";
    snprintf(path, sizeof path, "%s/runtime/" LOADER, tree);
    int fd = openat(folder, RUNTIME, O_RDWR | O_CLOEXEC);
    if (fd < 0 || pread(fd, &head, sizeof head, 0) != sizeof head)
        die(NULL, "Cannot read %s/" RUNTIME ": %s", tree, strerror(errno));
    for (int number = 0; number < head.e_phnum; number++) {
        off_t at = (off_t)(head.e_phoff + (uint64_t)number * sizeof part);
        if (pread(fd, &part, sizeof part, at) != sizeof part || part.p_type != PT_INTERP)
            continue;
        if (strlen(path) >= part.p_filesz)
            die("TMPDIR may name a shorter one", "The path %s is too long", tree);
        if (pwrite(fd, path, part.p_filesz, (off_t)part.p_offset) != (ssize_t)part.p_filesz)
            die(NULL, "Cannot write %s/" RUNTIME ": %s", tree, strerror(errno));
    }
    close(fd);
}

static void unpack(const char *self, const char *tree)
{
    static char name[PATH_ROOM];
    struct entry entry;
    int folder = open(tree, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0)
        die(NULL, "Cannot open %s: %s", tree, strerror(errno));
    open_packed(self);
    for (take(&entry, sizeof entry); entry.name_length; take(&entry, sizeof entry)) {
        if (entry.name_length >= sizeof name)
            die("copy it again", "This file is damaged: a name in it is too long");
        take(name, entry.name_length);
        name[entry.name_length] = 0;
        unpack_one(folder, name, &entry);
    }
    close(packed.fd);
    ZSTD_freeDStream(packed.stream);
    name_loader(folder, tree);
    close(folder);
}

/* Root's way. */

static const char *mount_private(void)
{
    static const char *const unused[] = { "/proc/fs", "/proc/driver", "/proc/tty", "/proc/bus" };
    if (geteuid() != 0 || unshare(CLONE_NEWNS) != 0)
        return NULL;
    if (mount(NULL, "/proc", NULL, MS_PRIVATE, NULL) != 0)      /* and nothing else: what the host mounts is still seen */
        return NULL;
    for (size_t number = 0; number < sizeof unused / sizeof *unused; number++)
        if (mount("kvmapp", unused[number], "tmpfs", MS_NOSUID | MS_NODEV, "mode=755") == 0)
            return unused[number];
    return NULL;
}

/* Everybody's way. */

static int remove_one(const char *path, const struct stat *status, int kind, struct FTW *place)
{
    (void)status, (void)kind, (void)place;
    return remove(path);
}

static void remove_folder(const char *path)
{
    nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
}

/* Whether the folder is ours and nobody holds its lock. */
static bool is_stale(int place, const char *name)
{
    struct stat status;
    char path[512];
    if (fstatat(place, name, &status, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISDIR(status.st_mode) || status.st_uid != geteuid())
        return false;
    snprintf(path, sizeof path, "%s/" LOCK, name);
    int lock = openat(place, path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    bool stale = lock < 0 ? status.st_mtime + STALE_SECONDS < time(NULL) : flock(lock, LOCK_EX | LOCK_NB) == 0;
    if (lock >= 0)
        close(lock);
    return stale;
}

static void remove_stale(const char *place)
{
    DIR *folder = opendir(place);
    for (struct dirent *one; folder && (one = readdir(folder));) {
        char path[PATH_ROOM];
        if (strncmp(one->d_name, NAME, strlen(NAME)) != 0 || !is_stale(dirfd(folder), one->d_name))
            continue;
        snprintf(path, sizeof path, "%s/%s", place, one->d_name);
        remove_folder(path);
    }
    if (folder)
        closedir(folder);
}

/* A folder in `place` that is locked as long as this process lives; false where it cannot be, or nothing may be run from there. */
static bool make_folder(const char *place, char *path)
{
    struct statvfs room;
    if (!place || place[0] != '/' || statvfs(place, &room) != 0 || (room.f_flag & ST_NOEXEC))
        return false;
    if ((uint64_t)room.f_bavail * room.f_frsize < seal.unpacked + (seal.unpacked >> 3))
        return false;
    remove_stale(place);
    snprintf(path, PATH_ROOM, "%s/" NAME "XXXXXX", place);
    if (!mkdtemp(path))
        return false;
    char lock[PATH_ROOM + sizeof LOCK];
    snprintf(lock, sizeof lock, "%s/" LOCK, path);
    int fd = open(lock, O_RDONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0 || flock(fd, LOCK_EX | LOCK_NB) != 0) {
        remove_folder(path);
        return false;
    }
    return true;
}

static void find_folder(const char *self, char *path)
{
    static char beside[PATH_ROOM];
    snprintf(beside, sizeof beside, "%s", self);
    *strrchr(beside, '/') = 0;
    const char *const places[] = { getenv("TMPDIR"), getenv("XDG_RUNTIME_DIR"), "/run", "/dev/shm", "/tmp", "/var/tmp",
                                   *beside ? beside : "/" };
    for (size_t number = 0; number < sizeof places / sizeof *places; number++)
        if (make_folder(places[number], path))
            return;
    die("TMPDIR may name a folder that is writable, not mounted noexec, and has the room; root needs none",
        "Neither /run, /dev/shm, /tmp, /var/tmp nor the folder of this file can take a private copy of its parts (%llu MiB)",
        (unsigned long long)(seal.unpacked >> 20));
}

static pid_t child;

static void hand_on(int number)
{
    if (child > 0)
        kill(child, number);
}

/* Starts the program and waits for its end; signals of a terminal reach it anyway, those for this process are handed on. */
static void wait_for(const char *tree, char **argv)
{
    static const int handed[] = { SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 };
    int status = 0;
    struct sigaction action = { .sa_handler = hand_on, .sa_flags = SA_RESTART };
    sigset_t all, before;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, &before);
    pid_t parent = getpid();
    child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            _exit(1);
        sigprocmask(SIG_SETMASK, &before, NULL);
        start(tree, argv);
    }
    for (size_t number = 0; number < sizeof handed / sizeof *handed; number++)
        sigaction(handed[number], &action, NULL);
    signal(SIGINT, SIG_IGN);
    signal(SIGQUIT, SIG_IGN);
    sigprocmask(SIG_SETMASK, &before, NULL);
    if (child > 0)
        while (waitpid(child, &status, 0) < 0 && errno == EINTR)
            ;
    int failure = child < 0 ? errno : 0;
    remove_folder(tree);
    if (failure)
        die(NULL, "Cannot fork: %s", strerror(failure));
    if (WIFSIGNALED(status)) {
        signal(WTERMSIG(status), SIG_DFL);
        raise(WTERMSIG(status));
    }
    exit(WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
}

static char unfinished[PATH_ROOM];

static void remove_unfinished(void)
{
    if (*unfinished)
        remove_folder(unfinished);
}

void run_unpacked(const char *self, char **argv, bool beside)
{
    const char *tree = beside ? NULL : mount_private();
    if (tree) {
        unpack(self, tree);
        start(tree, argv);
    }
    find_folder(self, unfinished);
    atexit(remove_unfinished);              /* where unpacking fails */
    unpack(self, unfinished);
    wait_for(unfinished, argv);
    exit(1);
}
