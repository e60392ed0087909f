/* The launcher: the static program that kvmapp, the one file, begins with. launcher.c has the whole story. */
#ifndef LAUNCHER_H
#define LAUNCHER_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define RUNTIME "runtime/kvmapp"            /* in a tree: PyInstaller's program */
#define PATH_ROOM 4096

/* What onefile/build.py writes into the finished file: where the packed tree stands behind this program. */
struct seal {
    char magic[16];
    char identity[64];                      /* version and build, the name of the tree's folder when it is installed */
    uint64_t offset, size, total;           /* of the packed tree; of the whole file */
    uint64_t unpacked;                      /* bytes of the tree */
};
extern const volatile struct seal seal;

__attribute__((noreturn, format(printf, 2, 3))) void die(const char *hint, const char *format, ...);
__attribute__((noreturn)) void start(const char *tree, char **argv);   /* becomes the tree's program */

/* unpack.c: runs the packed program from a private copy of its tree, which is gone afterwards. */
__attribute__((noreturn)) void run_unpacked(const char *self, char **argv, bool beside);

/* quick.c: the daemon's warm process answers; returns when the whole program has to. */
void try_quickly(char **words);

#endif
