# What kvmapp uses of POSIX and Linux below libc's Cython declarations: descriptors, threads, polling, vectors.
from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.types cimport off_t


cdef extern from "<errno.h>" nogil:
    int errno
    int EINTR, EAGAIN, EPERM, EINVAL, EIO, ENOSPC, ENOTSUP, EOPNOTSUPP, EEXIST, ENOENT, ENOMEM, EBADF, EMFILE, EPIPE, ENOSYS, ENODEV
    int EBUSY, ECANCELED, EDQUOT, ENOTTY, ERANGE, EROFS, ESHUTDOWN
    int EPROTO, ECONNRESET, ETIMEDOUT, ENOTCONN


cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void* data, size_t length)
    ssize_t write(int fd, const void* data, size_t length)
    ssize_t pread(int fd, void* data, size_t length, off_t offset)
    ssize_t pwrite(int fd, const void* data, size_t length, off_t offset)
    int close(int fd)
    int fdatasync(int fd)
    int dup(int fd)


cdef extern from "<fcntl.h>" nogil:
    int FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
    int fallocate(int fd, int mode, off_t offset, off_t length)


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len
    ssize_t readv(int fd, const iovec* vector, int count)
    ssize_t writev(int fd, const iovec* vector, int count)
    ssize_t preadv(int fd, const iovec* vector, int count, off_t offset)
    ssize_t pwritev(int fd, const iovec* vector, int count, off_t offset)


cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)


cdef extern from "<sys/mman.h>" nogil:
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_SHARED, MAP_ANONYMOUS, MAP_NORESERVE, MAP_FIXED, MAP_HUGETLB, MAP_POPULATE
    int MADV_HUGEPAGE, MADV_MERGEABLE, MADV_DONTNEED, MADV_DONTDUMP, MADV_REMOVE
    void* MAP_FAILED
    void* mmap(void* address, size_t length, int prot, int flags, int fd, off_t offset)
    int munmap(void* address, size_t length)
    int madvise(void* address, size_t length, int advice)
    int mlock(const void* address, size_t length)


cdef extern from *:
    """
    #include <sys/syscall.h>
    #include <unistd.h>
    static inline int own_thread_number(void) { return (int)syscall(SYS_gettid); }
    """
    int own_thread_number() noexcept nogil        # gettid, which glibc has only from 2.30 on


cdef extern from *:
    """
    #include <stdint.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    static inline int bind_memory(void* address, size_t length, int policy, const uint64_t* nodes, unsigned long bits) {
        return (int)syscall(SYS_mbind, address, length, policy, nodes, bits, 0);
    }
    """
    int bind_memory(void* address, size_t length, int policy, const uint64_t* nodes, unsigned long bits) nogil    # mbind(2)


cdef extern from "<sys/eventfd.h>" nogil:
    int EFD_CLOEXEC, EFD_NONBLOCK
    int eventfd(unsigned int value, int flags)


cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    short POLLIN, POLLOUT, POLLERR, POLLHUP
    int poll(pollfd* fds, unsigned long count, int timeout)


cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    struct tm:
        int tm_sec, tm_min, tm_hour, tm_mday, tm_mon, tm_year, tm_wday, tm_yday, tm_isdst
    int CLOCK_MONOTONIC, CLOCK_REALTIME
    int clock_gettime(int clock, timespec* now)
    int nanosleep(const timespec* duration, timespec* left)
    tm* gmtime_r(const long* seconds, tm* broken)
    long timegm(tm* broken)


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef struct pthread_attr_t:
        pass
    int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*) noexcept nogil, void* argument)
    int pthread_join(pthread_t thread, void** result)
    int pthread_attr_init(pthread_attr_t* attributes)
    int pthread_attr_destroy(pthread_attr_t* attributes)
    int pthread_attr_setstacksize(pthread_attr_t* attributes, size_t bytes)
    int pthread_mutex_init(pthread_mutex_t* mutex, void* attributes)
    int pthread_mutex_destroy(pthread_mutex_t* mutex)
    int pthread_mutex_lock(pthread_mutex_t* mutex)
    int pthread_mutex_trylock(pthread_mutex_t* mutex)
    int pthread_mutex_unlock(pthread_mutex_t* mutex)
    int pthread_cond_init(pthread_cond_t* cond, void* attributes)
    int pthread_cond_destroy(pthread_cond_t* cond)
    int pthread_cond_wait(pthread_cond_t* cond, pthread_mutex_t* mutex)
    int pthread_cond_timedwait(pthread_cond_t* cond, pthread_mutex_t* mutex, const timespec* deadline)
    int pthread_cond_signal(pthread_cond_t* cond)
    int pthread_cond_broadcast(pthread_cond_t* cond)
    pthread_t pthread_self()
    int pthread_kill(pthread_t thread, int signal)
    int pthread_setname_np(pthread_t thread, const char* name)


cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    struct sigaction_t "sigaction":
        void (*sa_handler)(int) noexcept nogil
        sigset_t sa_mask
        int sa_flags
    int SIGRTMIN, SIG_BLOCK, SIG_UNBLOCK, SIG_SETMASK
    int sigemptyset(sigset_t* signals)
    int sigfillset(sigset_t* signals)
    int sigaddset(sigset_t* signals, int signal)
    int sigdelset(sigset_t* signals, int signal)
    int sigaction(int signal, const sigaction_t* action, sigaction_t* old)
    int pthread_sigmask(int how, const sigset_t* signals, sigset_t* old)


cdef extern from "<string.h>" nogil:
    const char* strerror(int number)


cdef extern from "<stdio.h>" nogil:
    int dprintf(int fd, const char* form, ...)


# The GNU atomics: for what one thread writes while another reads without a lock.
cdef extern from *:
    """
    #define atomic_load_u32(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define atomic_store_u32(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define atomic_load_u64(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define atomic_store_u64(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define atomic_exchange_u32(p, v) __atomic_exchange_n((p), (v), __ATOMIC_ACQ_REL)
    #define atomic_exchange_u64(p, v) __atomic_exchange_n((p), (v), __ATOMIC_ACQ_REL)
    #define atomic_swap_u64(p, old, v) __atomic_compare_exchange_n((p), (old), (v), 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)
    #define atomic_or_u32(p, v) __atomic_fetch_or((p), (v), __ATOMIC_ACQ_REL)
    #define atomic_fence_release() __atomic_thread_fence(__ATOMIC_RELEASE)
    #define atomic_fence_acquire() __atomic_thread_fence(__ATOMIC_ACQUIRE)
    #define atomic_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    #define cpu_relax() __builtin_ia32_pause()
    """
    uint32_t atomic_load_u32(const uint32_t* p) noexcept nogil
    void atomic_store_u32(uint32_t* p, uint32_t v) noexcept nogil
    uint64_t atomic_load_u64(const uint64_t* p) noexcept nogil
    void atomic_store_u64(uint64_t* p, uint64_t v) noexcept nogil
    uint32_t atomic_exchange_u32(uint32_t* p, uint32_t v) noexcept nogil
    uint64_t atomic_exchange_u64(uint64_t* p, uint64_t v) noexcept nogil
    bint atomic_swap_u64(uint64_t* p, uint64_t* old, uint64_t v) noexcept nogil     # False: `old` is what stood there instead
    uint32_t atomic_or_u32(uint32_t* p, uint32_t v) noexcept nogil
    void atomic_fence_release() noexcept nogil
    void atomic_fence_acquire() noexcept nogil
    void atomic_fence() noexcept nogil
    void cpu_relax() noexcept nogil      # in a loop that waits for another thread: lets the core's other thread run
