# distutils: libraries = slirp
"""User mode: a network of the guest's own, 10.0.2.0/24, behind sockets of the domain process. It needs no privileges and no bridge.

libslirp is the router 10.0.2.2, a DHCP server (the guest gets 10.0.2.15) and a DNS relay 10.0.2.3. The guest reaches what the process
may reach, by TCP, UDP and ICMP echo; nothing reaches the guest but by a forward. libslirp runs in the card's I/O thread, for which its
Router does the waiting: a frame goes from the guest's ring into a socket, or the other way, without another thread in between. The
host's 127.0.0.1 is not a guest's to reach. libslirp opens a socket for each of the guest's flows, without end, and keeps those of UDP for
minutes; with so many open that they would take what the process needs for itself, frames that begin another flow are dropped. It also
keeps each fragment for half a minute, without end: of those it gets some thousands. And what only old ones of it take wrongly it does
not get: urgent data of TCP is plain data here, TCP in fragments and other protocols than ARP and IPv4 are dropped. Left out: IPv6,
offloads, TFTP.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove, memset

from kvmapp.abi.epoll cimport EPOLLIN
from kvmapp.abi.posix cimport (EAGAIN, EFD_CLOEXEC, EFD_NONBLOCK, EINTR, EMFILE, POLLERR, POLLHUP, POLLIN, POLLOUT, atomic_load_u32,
                               atomic_store_u32, close, errno, eventfd, iovec, poll, pollfd, read, write)
from kvmapp.abi.slirp cimport (SLIRP_POLL_ERR, SLIRP_POLL_HUP, SLIRP_POLL_IN, SLIRP_POLL_OUT, SLIRP_POLL_PRI, SlirpCb,
                               SlirpConfig, SlirpTimerCb, in_addr, inet_aton, slirp_add_hostfwd, slirp_cleanup, slirp_input,
                               slirp_new, slirp_pollfds_fill, slirp_pollfds_poll)
from kvmapp.iothread cimport monotonic_ns
from kvmapp.net.backend cimport NET_HEADER

import os
import resource

from kvmapp.errors import HostError
from kvmapp.values import Forward

cdef enum:
    STORE = 4 << 20                  # bytes of frames that may wait for the guest
    CROWDED = 1 << 20                # ... with so many no more are fetched from the sockets
    LENGTH = 4                       # bytes before each that tell its length
    OWN_POLLS = 1                    # the thread's other descriptors
    SOME_POLLS = 16
    UNTOLD = -2                      # stands for a socket of which libslirp does not tell, as up to 4.7 for a forward of UDP
    LONGEST_SLEEP = 3600 * 1000      # ms
    SHARE = 4                        # of the process's descriptors the sockets take one in so many
    IPV4_HEADER = 20
    ETHERTYPE = 12                   # offsets in a frame: of its type, of its packet, and of an IPv4 packet's fields
    PACKET = 14
    FRAGMENT = PACKET + 6
    PROTOCOL = PACKET + 9
    SOURCE = PACKET + 12
    TARGET = PACKET + 16
    ICMP = 1
    TCP = 6
    UDP = 17
    ECHO = 8
    TCP_FLAGS = 13
    TCP_CHECKSUM = 16
    TCP_HEADER = 20
    TCP_SYN = 2
    TCP_ACK = 16
    TCP_URG = 32
    FRAGMENTS_MOST = 16384           # of any size, in FRAGMENT_LIFE

# What a frame needs of libslirp's sockets, unless it is a datagram: those with the same source share one, which `flow_of` names.
cdef uint64_t NO_SOCKET = 0
cdef uint64_t NEW_SOCKET = 1
cdef uint64_t FRAGMENT_LIFE = 30_000_000_000         # ns: so long libslirp waits for the others of a packet

cdef uint8_t EMPTY_HEADER[NET_HEADER]
memset(EMPTY_HEADER, 0, NET_HEADER)


cdef class UserNet(NetBackend):
    """`forwards`: texts as in a domain's file, values.Forward. Runs while an I/O thread waits by its `waiter`, until `close`."""

    def __cinit__(self, *, list forwards=None):
        self.header = NET_HEADER
        self.name = "user mode"
        self.waiter = self.router = Router(forwards or [])
        self.fd = self.router.bell

    def close(self):
        """Ends every connection of the guest."""
        self.router.close()

    cdef int set_header(self, uint32_t length) noexcept nogil:
        atomic_store_u32(&self.header, length)
        return 0

    cdef ssize_t send(self, const iovec* vector, int count) noexcept nogil:
        cdef uint8_t* frame = self.router.frame
        cdef size_t length = 0
        cdef uint32_t header = atomic_load_u32(&self.header)
        cdef uint64_t flow
        cdef int i
        if self.router.slirp == NULL:
            return 0
        for i in range(count):                      # a copy: what lies in guest memory changes while libslirp looks
            if vector[i].iov_len > FRAME_MOST - length:
                return 0                            # larger than any packet
            memcpy(frame + length, vector[i].iov_base, vector[i].iov_len)
            length += vector[i].iov_len
        if length > header and passes(frame + header, length - header):
            if is_fragment(frame + header) and (frame[header + PROTOCOL] == TCP or not self.router.keeps_fragment()):
                return -EMFILE
            flow = flow_of(frame + header, length - header)
            if not self.router.has_room(flow):
                return -EMFILE
            self.router.calls = self.answers
            self.router.fed = True
            self.router.flow = flow
            slirp_input(self.router.slirp, frame + header, <int>(length - header))
            self.router.flow = NO_SOCKET
            self.router.present(self.answers)
        return length

    cdef ssize_t receive(self, const iovec* vector, int count) noexcept nogil:
        return self.router.take(vector, count, atomic_load_u32(&self.header))


cdef class Router(Waiter):
    """libslirp, and the frames that it has for the guest. All but `close` runs in one I/O thread."""

    def __cinit__(self, list forwards not None):
        self.bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.bell < 0:
            raise OSError(errno, f"eventfd: {os.strerror(errno)}")
        self.store = <uint8_t*>malloc(STORE)        # its pages are not there before they are used
        self.polls = <pollfd*>malloc(SOME_POLLS * sizeof(pollfd))
        if self.store == NULL or self.polls == NULL:
            raise MemoryError
        self.poll_room = SOME_POLLS
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.sockets_most = SOCKETS_MOST if most == resource.RLIM_INFINITY else min(most // SHARE, SOCKETS_MOST)
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
        for text in forwards:
            self.forward(text)

    def __dealloc__(self):
        if self.slirp != NULL:
            slirp_cleanup(self.slirp)
        if self.bell >= 0:
            close(self.bell)
        free(self.polls)
        free(self.store)

    def close(self):
        """No thread waits by it any more; a second call does nothing."""
        if self.slirp != NULL:
            slirp_cleanup(self.slirp)
            self.slirp = NULL

    cdef int forward(self, str text) except -1:
        """A port of the host that leads to the guest. Raises HostError when it is taken."""
        protocol, address, port, to_port = Forward.split(text)
        cdef in_addr host, guest
        cdef bytes host_text = address.encode()
        inet_aton(host_text, &host)
        inet_aton(b"10.0.2.15", &guest)
        before = self.socket_count
        self.flow = datagram_flow(<uint8_t*>&guest.s_addr, to_port) if protocol == "udp" else NO_SOCKET
        if slirp_add_hostfwd(self.slirp, protocol == "udp", host, port, guest, to_port) < 0:
            raise HostError(f"Cannot forward {protocol} port {port} of {address} to the guest: {os.strerror(errno)}",
                            f"see who has it: ss -lnp 'sport = {port}'; or choose another port")
        if self.socket_count == before:
            self.opened(UNTOLD)
        self.flow = NO_SOCKET
        return 0

    cdef void wait(self, int epoll) noexcept nogil:
        """Waits and lets libslirp work; not when the guest leaves too many frames lying, for then it waits as a whole.

        After frames of the guest's it works at once: what it holds back until it knows the guest's address, for one, goes only then.
        """
        cdef uint32_t timeout = LONGEST_SLEEP
        cdef bint works = self.slirp != NULL and not self.is_crowded()
        cdef int done
        self.poll_count = 0
        self.watch(epoll, POLLIN)
        if works:
            slirp_pollfds_fill(self.slirp, &timeout, add_poll, <void*>self)
            self.polled = self.poll_count - OWN_POLLS
            timeout = 0 if self.fed else timeout
            self.fed = False
        done = poll(self.polls, self.poll_count, <int>min(timeout, <uint32_t>LONGEST_SLEEP))
        if works:
            self.calls = True
            slirp_pollfds_poll(self.slirp, done < 0 and errno != EINTR, get_revents, <void*>self)
            self.present(True)

    cdef bint is_crowded(self) noexcept nogil:
        return self.end - self.first >= CROWDED

    cdef bint keeps_fragment(self) noexcept nogil:
        """Whether libslirp may have one more; not while it does no work, for then it forgets none."""
        cdef uint64_t now = monotonic_ns()
        if now - self.fragments_since > FRAGMENT_LIFE:
            self.fragments_since, self.fragments = now, 0
        if self.fragments >= FRAGMENTS_MOST or self.is_crowded():
            return False
        self.fragments += 1
        return True

    cdef bint has_room(self, uint64_t flow) noexcept nogil:
        """Whether libslirp may have a frame of this flow, which may make it open a socket."""
        cdef int i
        if flow == NO_SOCKET or max(self.socket_count, self.polled) < self.sockets_most:
            return True
        for i in range(self.socket_count):
            if self.flows[i] == flow and flow != NEW_SOCKET:
                return True
        return False

    cdef void opened(self, int fd) noexcept nogil:
        """One more of libslirp's sockets. Those that others open, by a forward, may be more than there is room for."""
        if self.socket_count < SOCKETS_MOST:
            self.sockets[self.socket_count] = fd
            self.flows[self.socket_count] = self.flow
            self.socket_count += 1

    cdef void closed(self, int fd) noexcept nogil:
        cdef int i
        for i in range(self.socket_count):
            if self.sockets[i] == fd:
                self.socket_count -= 1
                self.sockets[i] = self.sockets[self.socket_count]
                self.flows[i] = self.flows[self.socket_count]
                return

    cdef void present(self, bint calls) noexcept nogil:
        """libslirp is done for now: the card takes what frames there are, at once when it may be called, else when the bell rings."""
        cdef uint64_t one = 1
        if self.kept and calls and self.reader is not None:
            self.reader.ready(EPOLLIN)
        if self.kept and not self.rung:
            self.rung = True
            write(self.bell, &one, sizeof(one))
        self.calls = False

    cdef int watch(self, int fd, short events) noexcept nogil:
        """One more descriptor for the next poll; its index, or -1 when there is no memory."""
        cdef pollfd* grown
        if self.poll_count == self.poll_room:
            grown = <pollfd*>realloc(self.polls, self.poll_room * 2 * sizeof(pollfd))
            if grown == NULL:
                return -1
            self.polls, self.poll_room = grown, self.poll_room * 2
        self.polls[self.poll_count].fd = fd
        self.polls[self.poll_count].events = events
        self.polls[self.poll_count].revents = 0
        self.poll_count += 1
        return self.poll_count - 1

    cdef void give(self, const void* data, uint32_t length) noexcept nogil:
        """A frame for the guest. One for which there is no room is dropped; TCP sends it again."""
        if self.end + LENGTH + length > STORE:
            memmove(self.store, self.store + self.first, self.end - self.first)
            self.end -= self.first
            self.first = 0
            if self.end + LENGTH + length > STORE:
                return
        memcpy(self.store + self.end, &length, LENGTH)
        memcpy(self.store + self.end + LENGTH, data, length)
        self.end += LENGTH + length
        self.kept += 1
        if self.calls and self.reader is not None:
            self.reader.ready(EPOLLIN)

    cdef ssize_t take(self, const iovec* vector, int count, uint32_t header) noexcept nogil:
        """The next frame for the guest, behind an empty header, as NetBackend.receive."""
        cdef uint64_t rings
        cdef uint32_t length, done
        cdef uint8_t* frame = self.store + self.first + LENGTH
        if self.first == self.end:
            self.first = self.end = 0               # the next frames lie where these lay, in the CPU's cache
            if self.rung:
                self.rung = False
                read(self.bell, &rings, sizeof(rings))
            return -EAGAIN
        memcpy(&length, self.store + self.first, LENGTH)
        self.first += LENGTH + length
        self.kept -= 1
        done = scatter(vector, count, 0, EMPTY_HEADER, header)
        return done + scatter(vector, count, done, frame, length)


cdef uint32_t scatter(const iovec* vector, int count, uint32_t skip, const uint8_t* data, uint32_t length) noexcept nogil:
    """`data` into the buffers from their byte `skip` on; how much of it there was room for."""
    cdef uint32_t done = 0
    cdef size_t step
    cdef int i
    for i in range(count):
        if skip >= vector[i].iov_len:
            skip -= <uint32_t>vector[i].iov_len
            continue
        step = min(<size_t>(length - done), vector[i].iov_len - skip)
        memcpy(<uint8_t*>vector[i].iov_base + skip, data + done, step)
        done += <uint32_t>step
        skip = 0
        if done == length:
            break
    return done


cdef bint passes(uint8_t* frame, ssize_t length) noexcept nogil:
    """Whether libslirp gets the frame, which is ours to change: ARP, and IPv4 but to 127.0.0.0/8 or 0.0.0.0/8, where no packet on a wire
    may go (RFC 1122, 3.2.1.3), while libslirp would connect to the host."""
    cdef ssize_t start
    if length < PACKET or frame[ETHERTYPE] != 0x08 or frame[ETHERTYPE + 1] not in (0, 6):
        return False
    if frame[ETHERTYPE + 1] == 6:
        return True
    if length < PACKET + IPV4_HEADER or frame[TARGET] in (0, 127):
        return False
    start = PACKET + (frame[PACKET] & 15) * 4
    if frame[PROTOCOL] != TCP or is_fragment(frame):
        return True
    if length < start + TCP_HEADER:
        return False
    if frame[start + TCP_FLAGS] & TCP_URG:
        make_plain(frame + start)
    return True


cdef bint is_fragment(const uint8_t* frame) noexcept nogil:
    """Of an IPv4 packet: more of them come, or it has an offset."""
    return frame[ETHERTYPE + 1] == 0 and (frame[FRAGMENT] & 0x3F or frame[FRAGMENT + 1])


cdef void make_plain(uint8_t* segment) noexcept nogil:
    """Takes URG out of a TCP header, and out of its sum (RFC 1624, 3)."""
    cdef uint32_t total = ~(<uint32_t>segment[TCP_CHECKSUM] << 8 | segment[TCP_CHECKSUM + 1]) & 0xFFFF
    total += 0xFFFF - TCP_URG                       # the word less the bit: ~m + m'
    total = (total & 0xFFFF) + (total >> 16)
    total = ~total & 0xFFFF
    segment[TCP_FLAGS] &= 0xFF - TCP_URG
    segment[TCP_CHECKSUM] = <uint8_t>(total >> 8)
    segment[TCP_CHECKSUM + 1] = <uint8_t>total


cdef uint64_t flow_of(const uint8_t* frame, ssize_t length) noexcept nogil:
    """NO_SOCKET: libslirp opens none for the frame; NEW_SOCKET: one of its own; else it opens one unless this flow has one.

    A fragment is as bad as any: what it is a part of shows only when libslirp has put it together.
    """
    cdef ssize_t start
    if frame[ETHERTYPE + 1] != 0:
        return NO_SOCKET
    if is_fragment(frame):
        return NEW_SOCKET
    start = PACKET + (frame[PACKET] & 15) * 4
    if length < start + 8:
        return NO_SOCKET                                             # no whole header
    if frame[PROTOCOL] == TCP:
        return NEW_SOCKET if frame[start + TCP_FLAGS] & (TCP_SYN | TCP_ACK) == TCP_SYN else NO_SOCKET
    if frame[PROTOCOL] == ICMP:
        return NEW_SOCKET if frame[start] == ECHO and not is_for_router(frame) else NO_SOCKET
    return datagram_flow(frame + SOURCE, frame[start] << 8 | frame[start + 1]) if frame[PROTOCOL] == UDP else NO_SOCKET


cdef bint is_for_router(const uint8_t* frame) noexcept nogil:
    """An IPv4 packet to 10.0.2.2 or 10.0.2.3, where libslirp itself answers to an echo."""
    cdef const uint8_t* target = frame + TARGET
    return target[0] == 10 and target[1] == 0 and target[2] == 2 and target[3] in (2, 3)


cdef uint64_t datagram_flow(const uint8_t* address, uint32_t port) noexcept nogil:
    """libslirp knows a UDP socket by the guest's address, of 4 bytes, and port alone."""
    cdef uint32_t source
    memcpy(&source, address, sizeof(source))
    return <uint64_t>1 << 63 | <uint64_t>source << 16 | port


# What libslirp calls, in our thread. Its only timer is that of IPv6 advertisements, which are off.

cdef ssize_t send_packet(const void* data, size_t length, void* opaque) noexcept nogil:
    (<Router>opaque).give(data, <uint32_t>length)
    return <ssize_t>length


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


cdef void register_poll_fd(int fd, void* opaque) noexcept nogil:
    (<Router>opaque).opened(fd)


cdef void unregister_poll_fd(int fd, void* opaque) noexcept nogil:
    (<Router>opaque).closed(fd)


cdef void notify(void* opaque) noexcept nogil:
    pass


cdef int add_poll(int fd, int events, void* opaque) noexcept nogil:
    cdef short wanted = 0
    if events & (SLIRP_POLL_IN | SLIRP_POLL_PRI):
        wanted |= POLLIN
    if events & SLIRP_POLL_OUT:
        wanted |= POLLOUT
    return (<Router>opaque).watch(fd, wanted)


cdef int get_revents(int index, void* opaque) noexcept nogil:
    cdef short found
    cdef int events = 0
    if index < OWN_POLLS:                            # there was no memory for it
        return 0
    found = (<Router>opaque).polls[index].revents
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
CALLBACKS.register_poll_fd = register_poll_fd
CALLBACKS.unregister_poll_fd = unregister_poll_fd
CALLBACKS.notify = notify
