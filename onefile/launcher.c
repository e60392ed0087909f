/* kvmapp, the one file: this static program, and behind it the packed tree of everything else.
 *
 *   kvmappctl VERB     first asks the warm process beside the daemon (quick.c), which costs a millisecond or two
 *   installed          /usr/lib/kvmapp/VERSION/kvmapp is this program without a tree behind it: it starts the one around it
 *   copied             starts the installed tree of the very same build; where there is none, a private copy (unpack.c)
 *
 * The tree has a C library and a loader of its own, so nothing of the host's is needed. PyInstaller's bootloader would set
 * LD_LIBRARY_PATH and start itself a second time; it is told that this was done, since an RPATH does the same and reaches no child.
 */
#include "launcher.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define INSTALLED "/usr/lib/kvmapp"
#define AFTER_ITS_RESTART "-1"              /* PYI_PROCESS_LEVEL_PARENT_NEEDS_RESTART */

const volatile struct seal seal __attribute__((section(".data.seal"))) = { .magic = "kvmapp's seal" };

void die(const char *hint, const char *format, ...)
{
    va_list arguments;
    fflush(stdout);
    fputs("error: ", stderr);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    if (hint)
        fprintf(stderr, "hint: %s\n", hint);
    exit(1);
}

void start(const char *tree, char **argv)
{
    char path[PATH_ROOM];
    snprintf(path, sizeof path, "%s/" RUNTIME, tree);
    setenv("_PYI_ARCHIVE_FILE", path, 1);
    setenv("_PYI_PARENT_PROCESS_LEVEL", AFTER_ITS_RESTART, 1);
    execv(path, argv);
    die("kvmapp setup lays it down again", "Cannot start %s: %s", path, strerror(errno));
}

/* Standard streams that the caller has closed are /dev/null: nothing that is opened later may take their numbers. */
static void fill_streams(void)
{
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) < 0)
            (void)!open("/dev/null", O_RDWR);
}

/* The file that runs, or for a tree without /proc the folder that setup links to. */
static void find_self(char *self)
{
    ssize_t length = readlink("/proc/self/exe", self, PATH_ROOM - 1);
    if (length < 0)
        die("mount -t proc proc /proc", "/proc is not mounted; kvmapp cannot work without it");
    self[length] = 0;
}

static const char *last_part(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* A file that was copied in part says so, before anything else is tried. */
static void check_whole(const char *self)
{
    struct stat status;
    if (stat(self, &status) != 0)
        die(NULL, "Cannot look at %s: %s", self, strerror(errno));
    if ((uint64_t)status.st_size != seal.total)
        die("copy it again, and compare it with kvmapp.sha256", "%s is not whole: it has %llu bytes instead of %llu", self,
            (unsigned long long)status.st_size, (unsigned long long)seal.total);
}

/* The installed tree of this very build, if it is there and root's. */
static bool find_installed(char *tree)
{
    struct stat status;
    char path[PATH_ROOM + sizeof RUNTIME];
    snprintf(tree, PATH_ROOM, INSTALLED "/%s", (const char *)seal.identity);
    snprintf(path, sizeof path, "%s/" RUNTIME, tree);
    return stat(path, &status) == 0 && status.st_uid == 0 && !(status.st_mode & (S_IWGRP | S_IWOTH));
}

int main(int argc, char **argv)
{
    static char no_name[] = "kvmapp", *nothing[] = { no_name, NULL };
    char self[PATH_ROOM], tree[PATH_ROOM];
    fill_streams();
    if (argc < 1)
        argv = nothing;
    const char *verb = argc > 1 ? argv[1] : "";
    if (strncmp(last_part(argv[0]), "kvmappctl", 9) == 0)
        try_quickly(argv + 1);
    else if (strcmp(verb, "ctl") == 0)
        try_quickly(argv + 2);
    find_self(self);
    if (seal.size == 0) {
        *strrchr(self, '/') = 0;
        start(self, argv);
    }
    check_whole(self);
    if (strcmp(verb, "setup") != 0 && find_installed(tree))
        start(tree, argv);
    if (strcmp(verb, "daemon") == 0)
        die("install it first: kvmapp setup", "The daemon is to outlive this file's private copy of its parts");
    run_unpacked(self, argv, strcmp(verb, "setup") == 0);
}
