"""A disk whose bytes are a host file's or block device's bytes: format raw, and what formats lie on.

A file whose length is no multiple of 512 is rounded up: the missing end reads as zeroes and comes into being when it is written.
The guest sees sectors of 512 bytes whatever the host's are, so that an image stays readable when it moves to another host; with
cache=none on larger ones, writes of less than a block read it first.
"""
from libc.stdint cimport uint32_t, uint64_t, uint8_t
from libc.stdlib cimport free

from kvmapp.abi.blockdev cimport BLKGETSIZE64, BLKPBSZGET, BLKROGET
from kvmapp.abi.posix cimport EINVAL, close, errno, ioctl, pread, pthread_mutex_destroy, pthread_mutex_init
from kvmapp.block.backend cimport BLOCK_SECTOR, BlockChannel
from kvmapp.block.file cimport FileChannel
from kvmapp.block.transfer cimport flush
from kvmapp.block.uring cimport UringChannel
from kvmapp.iothread cimport IoThread

import fcntl
import logging
import os
import stat
import warnings

from kvmapp.errors import GuestImageError, HostError

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void** memory, size_t alignment, size_t size)

log = logging.getLogger(__name__)

CACHE_MODES = ("writeback", "none", "unsafe", "writethrough", "directsync")
IO_ENGINES = ("auto", "io_uring", "threads")
LARGEST_BLOCK = 4096


cdef class RawDisk(BlockBackend):
    """Takes over `fd`, an open file or block device (imagefile.py gives one), and closes it in the end.

    cache: writeback; writethrough (no write is done before it is on stable storage); none and directsync, the same past the
    host's page cache; unsafe (flushes do nothing). io: which engine carries requests. alignment: the least to keep with O_DIRECT,
    where trying does not tell. Raises GuestImageError, HostError; the descriptor is then still the caller's.
    """

    def __cinit__(self, *args, **kwargs):
        self.file.fd = -1
        pthread_mutex_init(&self.file.rewriting, NULL)
        pthread_mutex_init(&self.file.flushing, NULL)

    def __init__(self, int fd, *, str name not None="disk", str path=None, bint read_only=False, str cache not None="writeback",
                 str io not None="auto", bint discard=True, uint32_t alignment=BLOCK_SECTOR):
        if cache not in CACHE_MODES or io not in IO_ENGINES:
            raise ValueError(f"{name}: cache={cache}, io={io}")
        self.file.fd = fd
        self.name = name
        self.path = path or os.readlink(f"/proc/self/fd/{fd}")
        self.read_only = read_only
        self.io = io
        self.direct = cache in ("none", "directsync")
        self.write_cache = cache not in ("writethrough", "directsync")
        self.file.ignore_flush = cache == "unsafe"
        self.file.write_through = not self.write_cache
        self.file.discard = discard and not read_only
        self.file.alignment = 1
        try:
            self.adopt(alignment)
        except BaseException:
            self.file.fd = -1
            raise

    def __dealloc__(self):
        if self.file.fd >= 0:
            close(self.file.fd)
        pthread_mutex_destroy(&self.file.rewriting)
        pthread_mutex_destroy(&self.file.flushing)

    def __del__(self):
        if not self.closed and self.file.fd >= 0:
            warnings.warn(f"disk '{self.name}' was not closed", ResourceWarning, source=self)
            self.close()

    @property
    def alignment(self):
        """What O_DIRECT asks of memory, offsets and lengths; 1 through the page cache."""
        return self.file.alignment

    def flush(self):
        """What the guest has written is on stable storage when this returns; for a disk that nobody works on. Raises HostError."""
        cdef int result
        with nogil:
            result = flush(&self.file)
        if result < 0:
            raise HostError(f"Cannot flush disk '{self.name}' ({self.path}): {os.strerror(-result)}",
                            "see the host's kernel log; what is lost stays so: start the domain anew, and check its file systems")

    def adopt(self, uint32_t alignment):
        """Looks at the descriptor and sets it up."""
        cdef uint32_t block = 0
        fd = self.file.fd
        status = os.fstat(fd)
        self.file.is_device = stat.S_ISBLK(status.st_mode)
        self.take_length(self.look_at_length())
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if flags & os.O_ACCMODE == os.O_RDONLY and not self.read_only:
            raise GuestImageError(f"Cannot use disk '{self.name}' ({self.path}) read-write: it was opened read-only")
        flags &= ~(os.O_NONBLOCK | os.O_DIRECT | os.O_APPEND)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | (os.O_DIRECT if self.direct else 0))
        except OSError as error:
            raise GuestImageError(f"Cannot open disk '{self.name}' ({self.path}) past the page cache: {error.strerror}",
                                  "its file system has no O_DIRECT: set cache = writeback") from None
        if self.direct:
            self.find_alignment(alignment)
        block = status.st_blksize
        self.physical_block = min(max(block, <uint32_t>BLOCK_SECTOR), <uint32_t>LARGEST_BLOCK)
        if self.file.is_device and ioctl(fd, BLKPBSZGET, &block) == 0:
            self.physical_block = max(block, <uint32_t>BLOCK_SECTOR)
        if self.file.discard:
            self.discard_granularity = self.physical_block

    cdef uint64_t look_at_length(self) except 0:
        """Of the file or device, as it is now."""
        cdef uint64_t length = 0
        cdef int locked = 0
        fd = self.file.fd
        if not self.file.is_device:
            length = os.fstat(fd).st_size
        elif ioctl(fd, BLKGETSIZE64, &length) < 0 or ioctl(fd, BLKROGET, &locked) < 0:
            raise GuestImageError(f"Cannot read the size of disk '{self.name}' ({self.path}): {os.strerror(errno)}")
        if locked and not self.read_only:
            raise GuestImageError(f"Cannot use disk '{self.name}' ({self.path}) read-write: the device is read-only",
                                  "set readonly = yes, or blockdev --setrw")
        if length == 0:
            raise GuestImageError(f"Cannot use disk '{self.name}' ({self.path}): it is empty",
                                  "no medium" if self.file.is_device else f"give it a size: truncate -s 20G {self.path}")
        return length

    cdef int take_length(self, uint64_t length) except -1:
        self.file.end = length
        self.size = self.file.size = (length + BLOCK_SECTOR - 1) // BLOCK_SECTOR * BLOCK_SECTOR
        if length % BLOCK_SECTOR:
            log.warning("disk '%s' (%s): %d bytes are no multiple of %d; the guest sees zeroes up to %d", self.name, self.path,
                        length, BLOCK_SECTOR, self.size)
        return 0

    cdef int find_alignment(self, uint32_t alignment) except -1:
        """The least that O_DIRECT accepts, by trying from `alignment` up."""
        cdef uint8_t* memory = NULL
        cdef int result = -EINVAL
        if posix_memalign(<void**>&memory, 2 * LARGEST_BLOCK, 2 * LARGEST_BLOCK) != 0:
            raise MemoryError
        while alignment <= LARGEST_BLOCK:
            with nogil:
                result = 0 if pread(self.file.fd, memory + alignment, alignment, 0) >= 0 else -errno
            if result != -EINVAL:
                break
            alignment *= 2
        free(memory)
        if result < 0:
            raise GuestImageError(f"Cannot read disk '{self.name}' ({self.path}): {os.strerror(-result)}")
        self.file.alignment = alignment
        self.check_end(self.file.end)
        return 0

    cdef int check_end(self, uint64_t length) except -1:
        """Whether O_DIRECT reaches all of a disk that is this long."""
        if not self.read_only and (length + BLOCK_SECTOR - 1) // BLOCK_SECTOR * BLOCK_SECTOR % self.file.alignment:
            raise GuestImageError(f"Cannot use disk '{self.name}' ({self.path}) with O_DIRECT: its {length} bytes are no "
                                  f"multiple of {self.file.alignment}",
                                  f"make it longer (truncate -s %{self.file.alignment} {self.path}) or set cache = writeback")
        return 0

    def resize(self, size=None, *, bint shrink=False):
        cdef uint64_t length, before = self.size
        what = f"Cannot resize disk '{self.name}' ({self.path})"
        if self.closed:
            raise GuestImageError(f"{what}: it is closed")
        if size is None or self.file.is_device:
            length = self.look_at_length()
            if size is not None and size != length:
                raise GuestImageError(f"{what} to {size} bytes: the device has {length}",
                                      "give the device itself another size first (lvextend, or where it comes from)")
        else:
            self.check_new_size(what, size, shrink)
            length = size
        self.check_end(length)
        self.drain()
        if size is not None and not self.file.is_device:
            try:
                os.ftruncate(self.file.fd, length)
            except OSError as error:
                raise HostError(f"{what} to {size} bytes: {error.strerror}") from None
        self.take_length(length)
        log.info("disk '%s' (%s): %d bytes, were %d", self.name, self.path, self.size, before)

    def check_new_size(self, str what, size, bint shrink):
        if self.read_only:
            raise GuestImageError(f"{what}: it is read-only")
        unit = max(<uint32_t>BLOCK_SECTOR, self.file.alignment)
        if not 0 < size < 1 << 63 or size % unit:
            raise GuestImageError(f"{what}: {size} bytes are no multiple of {unit}" if size % unit else f"{what} to {size} bytes")
        has = max(self.file.end, self.look_at_length())         # somebody may have made it longer
        if size < has and not shrink:
            raise GuestImageError(f"{what} to {size} bytes: it has {has}, and what is at its end would be lost",
                                  "make its file systems smaller first, in the guest; then --shrink")

    cdef BlockChannel make_channel(self, IoThread thread):
        """By io_uring where the kernel has it, unless told otherwise."""
        cdef FileChannel channel
        if self.io != "threads":
            channel = UringChannel()
            try:
                channel.attach(self, &self.file, thread)
                return channel
            except OSError as error:
                if self.io == "io_uring":
                    raise HostError(f"Cannot use io_uring for disk '{self.name}': {error.strerror}",
                                    "set io = auto, or see sysctl kernel.io_uring_disabled") from None
                log.info("disk '%s': threads carry its requests: %s", self.name, error.strerror)
        channel = FileChannel()
        channel.attach(self, &self.file, thread)
        return channel

    def close(self):
        BlockBackend.close(self)
        if self.file.fd >= 0:
            close(self.file.fd)
            self.file.fd = -1
