"""What a network card's host side is: frames out and in, each behind a virtio_net_hdr_v1 (VIRTIO 1.2, 5.1.6) of NET_HEADER bytes,
or behind a legacy driver's of LEGACY_HEADER bytes.

`fd` is readable when `receive` has a frame. Calls come from one I/O thread at a time.
"""
from libc.stdint cimport uint32_t

from kvmapp.abi.posix cimport EAGAIN, close, errno, iovec, readv, writev

import os


cdef class NetBackend:
    """Leads nowhere; subclasses override `send`, `receive`, `set_offloads` and `close`."""

    def __cinit__(self, *args, **kwargs):
        self.fd = -1
        self.name = "nowhere"

    def close(self):
        """Gives the host's resources back; a second call does nothing."""

    cdef ssize_t send(self, const iovec* vector, int count) noexcept nogil:
        """One header and frame; its bytes, or -errno (-EAGAIN: later)."""
        return 0

    cdef ssize_t receive(self, const iovec* vector, int count) noexcept nogil:
        """The next header and frame into these buffers, cut to their length; its bytes, or -errno (-EAGAIN: none now)."""
        return -EAGAIN

    cdef int set_offloads(self, uint32_t flags) noexcept nogil:
        """What `receive` may leave to the guest, as TUN_F_... flags; 0 or -errno."""
        return 0

    cdef int enable(self, bint used) noexcept nogil:
        """Whether frames come to this one of a card's several backends; 0 or -errno."""
        return 0

    cdef int set_header(self, uint32_t length) noexcept nogil:
        """How long the header before each frame is from now on; 0 or -errno. Here the other end has to know by itself."""
        return 0


cdef class FrameDescriptor(NetBackend):
    """A descriptor that keeps frames apart, header and all: a tap, or a datagram socket whose other end speaks the same.

    `offloads` says that the other end takes frames larger than the MTU and sums that are not computed.
    """

    def __cinit__(self, *args, int fd=-1, bint offloads=False, **kwargs):
        self.fd = fd
        self.has_offloads = self.has_ufo = self.has_uso = offloads
        self.name = f"descriptor {fd}"
        if fd >= 0:
            os.set_blocking(fd, False)

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    def close(self):
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    cdef ssize_t send(self, const iovec* vector, int count) noexcept nogil:
        cdef ssize_t done = writev(self.fd, vector, count)
        return done if done >= 0 else -errno

    cdef ssize_t receive(self, const iovec* vector, int count) noexcept nogil:
        cdef ssize_t done = readv(self.fd, vector, count)
        return done if done >= 0 else -errno
