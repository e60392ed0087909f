"""A tap of the host as a card's other end (Documentation/networking/tuntap.rst): frames go in and out by readv and writev,
straight from and to guest memory, with checksums and segmentation left to whoever does them best.

The tap is made by others (the daemon, an administrator); here it is only used. Left out: several queues (one is opened).
"""
from libc.stdint cimport uint32_t
from libc.string cimport memcpy, memset

from kvmapp.abi.posix cimport EBUSY, EINVAL, EPERM, errno, ioctl
from kvmapp.abi.tun cimport (IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, TUN_F_CSUM,
                             TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_UFO, TUN_F_USO4, TUN_F_USO6, TUNGETIFF, TUNSETIFF,
                             TUNSETOFFLOAD, TUNSETQUEUE, TUNSETVNETHDRSZ, ifreq)
from kvmapp.net.backend cimport NET_HEADER

import os

from kvmapp.errors import HostError

NAME_MOST = 15                       # IFNAMSIZ less the NUL


cdef class Tap(FrameDescriptor):
    """The existing tap `name`, or the already opened and attached descriptor `fd`, which then belongs to this object."""

    def __cinit__(self, str name=None, *, int fd=-1):
        """Raises HostError that says what is wrong with which tap, and how to mend it."""
        if fd >= 0:
            self.name = self.attached_name()
        else:
            self.name = name
            self.attach(name)
            os.set_blocking(self.fd, False)
        self.configure()

    cdef int attach(self, str name) except -1:
        if not os.path.exists(f"/sys/class/net/{name}"):        # TUNSETIFF would make one
            raise HostError(f"Cannot use tap '{name}': No such device",
                            f"make it: ip tuntap add {name[:NAME_MOST]} mode tap vnet_hdr; ip link set {name[:NAME_MOST]} up")
        cdef bytes label = name.encode()
        cdef ifreq request
        memset(&request, 0, sizeof(request))
        memcpy(request.ifr_name, <const char*>label, min(len(label), NAME_MOST))
        try:
            self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"Cannot open /dev/net/tun: {error.strerror}", "modprobe tun, and run as root") from None
        for flags in (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE):
            request.ifr_flags = flags
            if ioctl(self.fd, TUNSETIFF, &request) == 0:
                return 0
            code = errno
            if code != EINVAL:                                  # EINVAL: the other kind of tap, or none at all
                break
        hints = {EBUSY: "another guest or program has it open", EPERM: "run as root, or give the tap to this user",
                 EINVAL: "it is not a tap"}
        raise HostError(f"Cannot use tap '{name}': {os.strerror(code)}", hints.get(code))

    def attached_name(self):
        cdef ifreq request
        memset(&request, 0, sizeof(request))
        if ioctl(self.fd, TUNGETIFF, &request) < 0:
            raise HostError(f"Descriptor {self.fd} is not an attached tap: {os.strerror(errno)}")
        name = request.ifr_name.decode(errors="replace")
        if not request.ifr_flags & IFF_VNET_HDR:
            raise HostError(f"Cannot use tap '{name}': it was opened without vnet_hdr")
        return name

    cdef int configure(self) except -1:
        """Long headers, and which offloads this kernel takes."""
        cdef uint32_t flags = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN
        if self.set_header(NET_HEADER) < 0:
            raise HostError(f"Cannot use tap '{self.name}': TUNSETVNETHDRSZ: {os.strerror(errno)}")
        self.has_offloads = ioctl(self.fd, TUNSETOFFLOAD, <unsigned long>flags) == 0
        self.has_ufo = self.has_offloads and ioctl(self.fd, TUNSETOFFLOAD, <unsigned long>(flags | TUN_F_UFO)) == 0
        flags |= TUN_F_USO4 | TUN_F_USO6
        self.has_uso = self.has_offloads and ioctl(self.fd, TUNSETOFFLOAD, <unsigned long>flags) == 0
        ioctl(self.fd, TUNSETOFFLOAD, <unsigned long>0)
        return 0

    cdef int enable(self, bint used) noexcept nogil:
        """A queue of a multi-queue tap takes part or not; to be told the same again is an error for the kernel only."""
        cdef ifreq request
        memset(&request, 0, sizeof(request))
        request.ifr_flags = IFF_ATTACH_QUEUE if used else IFF_DETACH_QUEUE
        return 0 if ioctl(self.fd, TUNSETQUEUE, &request) == 0 else -errno

    cdef int set_offloads(self, uint32_t flags) noexcept nogil:
        return 0 if ioctl(self.fd, TUNSETOFFLOAD, <unsigned long>flags) == 0 else -errno

    cdef int set_header(self, uint32_t length) noexcept nogil:
        cdef int header = length
        return 0 if ioctl(self.fd, TUNSETVNETHDRSZ, &header) == 0 else -errno
