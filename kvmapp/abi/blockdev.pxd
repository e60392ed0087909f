# Block devices (linux/fs.h) and reads and writes that would rather fail than wait (preadv2(2), Linux 4.14).
from libc.stdint cimport uint64_t
from posix.types cimport off_t

from kvmapp.abi.posix cimport iovec


cdef extern from "<linux/fs.h>" nogil:
    unsigned long BLKDISCARD, BLKGETSIZE64, BLKPBSZGET, BLKROGET, BLKSSZGET
    int RWF_DSYNC, RWF_NOWAIT


# By number: glibc has wrappers since 2.26 only, and kvmapp runs on 2.17.
cdef extern from *:
    """
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <unistd.h>
    static inline ssize_t kvmapp_preadv2(int fd, const struct iovec *vector, int count, off_t offset, int flags)
    {
        return syscall(SYS_preadv2, fd, vector, (long)count, (long)offset, 0L, flags);
    }
    static inline ssize_t kvmapp_pwritev2(int fd, const struct iovec *vector, int count, off_t offset, int flags)
    {
        return syscall(SYS_pwritev2, fd, vector, (long)count, (long)offset, 0L, flags);
    }
    """
    ssize_t preadv2 "kvmapp_preadv2"(int fd, const iovec* vector, int count, off_t offset, int flags) nogil
    ssize_t pwritev2 "kvmapp_pwritev2"(int fd, const iovec* vector, int count, off_t offset, int flags) nogil
