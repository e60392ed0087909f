# distutils: libraries = slirp
"""User mode: a network of the guest's own, 10.0.2.0/24, behind sockets of the domain process. It needs no privileges and no bridge.

libslirp is the router 10.0.2.2, a DHCP server (the guest gets 10.0.2.15) and a DNS relay 10.0.2.3. The guest reaches what the process
may reach, by TCP, UDP and ICMP echo; nothing reaches the guest but by a forward. libslirp runs in one thread; a socket pair leads from
it to the card, as a tap would, so each side has its own pace. The host's 127.0.0.1 is not a guest's to reach. Left out: IPv6, offloads,
TFTP.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from kvmapp.abi.posix cimport (EFD_CLOEXEC, EFD_NONBLOCK, EINTR, POLLERR, POLLHUP, POLLIN, POLLOUT, SIG_BLOCK, atomic_load_u32,
                               atomic_store_u32, close, errno, eventfd, iovec, poll, pollfd, pthread_self, pthread_setname_np,
                               pthread_sigmask, read, sigfillset, sigset_t, write, writev)
from kvmapp.abi.slirp cimport (SLIRP_POLL_ERR, SLIRP_POLL_HUP, SLIRP_POLL_IN, SLIRP_POLL_OUT, SLIRP_POLL_PRI, SlirpCb,
                               SlirpConfig, SlirpTimerCb, in_addr, inet_aton, slirp_add_hostfwd, slirp_cleanup, slirp_input,
                               slirp_new, slirp_pollfds_fill, slirp_pollfds_poll)
from kvmapp.iothread cimport monotonic_ns
from kvmapp.net.backend cimport NET_HEADER

import os
import socket
import threading

from kvmapp.errors import HostError
from kvmapp.values import Forward

cdef enum:
    BATCH = 64                       # frames taken from the guest before the sockets have their turn
    BUFFER = 1 << 20                 # bytes asked for between libslirp and the card; the host's wmem_max may give less
    PATIENCE = 50                    # ms that a guest which does not take its frames may hold up libslirp, once
    OWN_POLLS = 2                    # the card's frames, and the end
    LONGEST_SLEEP = 3600 * 1000      # ms
    ETHERTYPE = 12                   # offsets in a frame: of its type, and of the target's address in IPv4
    TARGET = 14 + 16

cdef uint8_t EMPTY_HEADER[NET_HEADER]
memset(EMPTY_HEADER, 0, NET_HEADER)


cdef class UserNet(FrameDescriptor):
    """`forwards`: texts as in a domain's file, values.Forward. Runs from now until `close`."""

    def __cinit__(self, *, list forwards=None):
        self.inner = self.stop = -1
        self.header = NET_HEADER
        card, inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in (card, inner):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        self.fd, self.inner = card.detach(), inner.detach()
        self.name = "user mode"
        self.stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.stop < 0:
            raise OSError(errno, f"eventfd: {os.strerror(errno)}")
        cdef SlirpConfig config
        memset(&config, 0, sizeof(config))
        config.version = 1
        config.in_enabled = True
        config.vhostname = b"guest"
        config.disable_host_loopback = True
        inet_aton(b"10.0.2.0", &config.vnetwork)
        inet_aton(b"255.255.255.0", &config.vnetmask)
        inet_aton(b"10.0.2.2", &config.vhost)
        inet_aton(b"10.0.2.3", &config.vnameserver)
        inet_aton(b"10.0.2.15", &config.vdhcp_start)
        self.slirp = slirp_new(&config, &CALLBACKS, <void*>self)
        if self.slirp == NULL:
            raise HostError("Cannot start user mode networking: libslirp refuses")
        for text in forwards or ():
            self.forward(text)
        self.runner = threading.Thread(target=self.run, name="user net", daemon=True)
        self.runner.start()

    def __dealloc__(self):
        if self.slirp != NULL:
            slirp_cleanup(self.slirp)
        for fd in (self.inner, self.stop):
            if fd >= 0:
                close(fd)
        free(self.polls)

    def close(self):
        """Ends the thread and every connection of the guest."""
        cdef uint64_t one = 1
        if self.runner is not None:
            write(self.stop, &one, sizeof(one))
            self.runner.join()
            self.runner = None
        if self.slirp != NULL:
            slirp_cleanup(self.slirp)
            self.slirp = NULL
        FrameDescriptor.close(self)

    cdef int forward(self, str text) except -1:
        """A port of the host that leads to the guest. Raises HostError when it is taken."""
        protocol, address, port, to_port = Forward.split(text)
        cdef in_addr host, guest
        cdef bytes host_text = address.encode()
        inet_aton(host_text, &host)
        inet_aton(b"10.0.2.15", &guest)
        if slirp_add_hostfwd(self.slirp, protocol == "udp", host, port, guest, to_port) < 0:
            raise HostError(f"Cannot forward {protocol} port {port} of {address} to the guest: {os.strerror(errno)}",
                            f"see who has it: ss -lnp 'sport = {port}'; or choose another port")
        return 0

    def run(self):
        """The thread's body: signals are for the control thread, so all are blocked here."""
        cdef sigset_t all_signals
        with nogil:
            sigfillset(&all_signals)
            pthread_sigmask(SIG_BLOCK, &all_signals, NULL)
            pthread_setname_np(pthread_self(), b"user net")
            self.loop()

    cdef void loop(self) noexcept nogil:
        cdef uint32_t timeout
        cdef int done
        cdef bint more = False
        while True:
            self.poll_count = 0
            if self.watch(self.inner, POLLIN) < 0 or self.watch(self.stop, POLLIN) < 0:
                return                              # no memory: the guest's network stands still
            timeout = LONGEST_SLEEP
            slirp_pollfds_fill(self.slirp, &timeout, add_poll, <void*>self)
            done = poll(self.polls, self.poll_count, 0 if more else <int>min(timeout, <uint32_t>LONGEST_SLEEP))
            if self.polls[1].revents:
                return
            slirp_pollfds_poll(self.slirp, done < 0 and errno != EINTR, get_revents, <void*>self)
            more = self.take_frames()

    cdef int set_header(self, uint32_t length) noexcept nogil:
        atomic_store_u32(&self.header, length)
        return 0

    cdef bint take_frames(self) noexcept nogil:
        """The guest's frames to libslirp; whether there may be more."""
        cdef ssize_t length
        cdef uint32_t header
        cdef int number
        for number in range(BATCH):
            length = read(self.inner, self.frame, sizeof(self.frame))
            if length < 0:
                return False
            header = atomic_load_u32(&self.header)
            if length > header and not is_for_loopback(self.frame + header, length - header):
                slirp_input(self.slirp, self.frame + header, <int>(length - header))
        return True

    cdef int watch(self, int fd, short events) noexcept nogil:
        """One more descriptor for the next poll; its index, or -1."""
        cdef pollfd* grown
        if self.poll_count == self.poll_room:
            grown = <pollfd*>realloc(self.polls, (self.poll_room * 2 + 16) * sizeof(pollfd))
            if grown == NULL:
                return -1
            self.polls, self.poll_room = grown, self.poll_room * 2 + 16
        self.polls[self.poll_count].fd = fd
        self.polls[self.poll_count].events = events
        self.polls[self.poll_count].revents = 0
        self.poll_count += 1
        return self.poll_count - 1

    cdef ssize_t give(self, const void* data, size_t length) noexcept nogil:
        """A frame for the guest. One that it does not take in time is dropped; TCP sends it again."""
        cdef iovec vector[2]
        cdef pollfd room
        cdef ssize_t done
        vector[0].iov_base, vector[0].iov_len = EMPTY_HEADER, atomic_load_u32(&self.header)
        vector[1].iov_base, vector[1].iov_len = <void*>data, length
        done = writev(self.inner, vector, 2)
        if done < 0 and not self.congested:
            room.fd, room.events, room.revents = self.inner, POLLOUT, 0
            poll(&room, 1, PATIENCE)
            done = writev(self.inner, vector, 2)
        self.congested = done < 0
        return <ssize_t>length


cdef bint is_for_loopback(const uint8_t* frame, ssize_t length) noexcept nogil:
    """IPv4 to 127.0.0.0/8 or 0.0.0.0/8: no packet on a wire may be (RFC 1122, 3.2.1.3), and libslirp would connect to the host."""
    return length > TARGET and frame[ETHERTYPE] == 0x08 and frame[ETHERTYPE + 1] == 0 and frame[TARGET] in (0, 127)


# What libslirp calls, in our thread. Its only timer is that of IPv6 advertisements, which are off.

cdef ssize_t send_packet(const void* data, size_t length, void* opaque) noexcept nogil:
    return (<UserNet>opaque).give(data, length)


cdef void guest_error(const char* message, void* opaque) noexcept nogil:
    pass


cdef int64_t clock_get_ns(void* opaque) noexcept nogil:
    return monotonic_ns()


cdef void* timer_new(SlirpTimerCb call, void* call_opaque, void* opaque) noexcept nogil:
    return opaque


cdef void timer_free(void* timer, void* opaque) noexcept nogil:
    pass


cdef void timer_mod(void* timer, int64_t expire_ms, void* opaque) noexcept nogil:
    pass


cdef void poll_fd(int fd, void* opaque) noexcept nogil:
    pass


cdef void notify(void* opaque) noexcept nogil:
    pass


cdef int add_poll(int fd, int events, void* opaque) noexcept nogil:
    cdef short wanted = 0
    if events & (SLIRP_POLL_IN | SLIRP_POLL_PRI):
        wanted |= POLLIN
    if events & SLIRP_POLL_OUT:
        wanted |= POLLOUT
    return (<UserNet>opaque).watch(fd, wanted)


cdef int get_revents(int index, void* opaque) noexcept nogil:
    cdef short found
    cdef int events = 0
    if index < OWN_POLLS:                            # there was no memory for it
        return 0
    found = (<UserNet>opaque).polls[index].revents
    if found & POLLIN:
        events |= SLIRP_POLL_IN
    if found & POLLOUT:
        events |= SLIRP_POLL_OUT
    if found & POLLERR:
        events |= SLIRP_POLL_ERR
    if found & POLLHUP:
        events |= SLIRP_POLL_HUP
    return events


cdef SlirpCb CALLBACKS
memset(&CALLBACKS, 0, sizeof(CALLBACKS))
CALLBACKS.send_packet = send_packet
CALLBACKS.guest_error = guest_error
CALLBACKS.clock_get_ns = clock_get_ns
CALLBACKS.timer_new = timer_new
CALLBACKS.timer_free = timer_free
CALLBACKS.timer_mod = timer_mod
CALLBACKS.register_poll_fd = CALLBACKS.unregister_poll_fd = poll_fd
CALLBACKS.notify = notify
