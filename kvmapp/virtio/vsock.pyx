"""Sockets between guest and host (VIRTIO 1.2, 5.10), with UNIX sockets as the host's side, in Firecracker's manner.

A guest that connects to port P of the host (CID 2) reaches whoever listens at PATH_P. A program of the host connects to PATH, says
"CONNECT P\\n", and when a program of the guest listens at port P, is told "OK HOSTPORT\\n" and talks to it from then on.

The host's sockets hang in an epoll of our own, whose descriptor is one event source of the I/O thread. A connection belongs to the
guest and to a socket, each of which may go first. `table` guards all connections; it comes after the queues' locks. Bytes that a
slow socket does not take are kept up to WINDOW, which is the credit that the guest has. Connections are not saved: a restored
guest is told that its transport was reset. Left out: SEQPACKET, and other CIDs than the host's.
"""
from libc.stdint cimport UINT32_MAX, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from kvmapp.abi.epoll cimport (EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, epoll_create1,
                               epoll_ctl, epoll_event, epoll_wait)
from kvmapp.abi.posix cimport (EAGAIN, close, errno, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
                               pthread_mutex_t, pthread_mutex_unlock)
from kvmapp.abi.socket cimport (AF_UNIX, MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_RD, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM,
                                VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, VIRTIO_VSOCK_OP_CREDIT_REQUEST,
                                VIRTIO_VSOCK_OP_CREDIT_UPDATE, VIRTIO_VSOCK_OP_REQUEST, VIRTIO_VSOCK_OP_RESPONSE,
                                VIRTIO_VSOCK_OP_RST, VIRTIO_VSOCK_OP_RW, VIRTIO_VSOCK_OP_SHUTDOWN, VIRTIO_VSOCK_SHUTDOWN_RCV,
                                VIRTIO_VSOCK_SHUTDOWN_SEND, VIRTIO_VSOCK_TYPE_STREAM, accept4, connect, recv, send, shutdown,
                                sockaddr, sockaddr_un, socket, virtio_vsock_hdr)
from kvmapp.abi.virtio cimport VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_ID_VSOCK
from kvmapp.iothread cimport EventSource
from kvmapp.memory cimport GuestMemory
from kvmapp.virtio.device cimport VirtioDevice
from kvmapp.virtio.virtqueue cimport Chain, Virtqueue, chain_allocate, chain_free, chain_put, chain_take
from kvmapp.virtio.vsock_stream cimport (ASKED, DYING, FREE, GREETING, GREETING_UNFINISHED, LINE_MOST, OPEN, TELL_CREDIT,
                                         TELL_REQUEST, TELL_RESET, TELL_RESPONSE, WINDOW, Connection, credit, end, flush,
                                         greeting, kill, settle, take_bytes, wants)

import os

from kvmapp.state import StateError
from kvmapp.unixsocket import listen

cdef extern from "<stdio.h>" nogil:
    int snprintf(char* target, size_t size, const char* form, ...)

cdef enum:
    RX = 0                           # packets to the guest
    TX = 1
    EVENT = 2
    QUEUE_SIZE = 128
    HOST_CID = 2
    HEADER = 44
    CONNECTIONS = 256
    LISTENER = CONNECTIONS           # as the epoll's data
    RESETS = 64                      # answers to packets of no connection that wait for a buffer
    PIECE = 65536                    # bytes in one packet to the guest
    FIRST_HOST_PORT = 0x40000000
    EVENTS = 64
    PATH_MOST = 96                   # room for "_4294967295" in a socket's address


cdef class VirtioVsock(VirtioDevice):
    """The guest's address is `cid`; `path` is where the host's programs connect, and what the guest's ports are made of."""

    cdef Chain chains[3]
    cdef unsigned long long cid      # little endian, as the config space has it
    cdef Connection* connections
    cdef uint64_t resets[RESETS]     # host port and guest port
    cdef uint32_t reset_count
    cdef uint32_t turn               # which connection is served first
    cdef uint32_t next_port
    cdef bint tell_reset             # of the transport
    cdef pthread_mutex_t table
    cdef SocketEvents events
    cdef int listener
    cdef bint waits                  # somebody, at the listener, until there are descriptors again
    cdef char path[PATH_MOST + 1]
    cdef object file
    cdef unsigned char* piece

    def __cinit__(self, str name not None, GuestMemory memory not None, uint64_t cid, str path not None):
        """Raises HostError where the socket cannot be made."""
        pthread_mutex_init(&self.table, NULL)
        self.listener = -1
        self.device_id = VIRTIO_ID_VSOCK
        self.cid = cid
        self.config, self.config_size = &self.cid, sizeof(self.cid)
        self.next_port = FIRST_HOST_PORT
        self.connections = <Connection*>calloc(CONNECTIONS, sizeof(Connection))
        self.piece = <unsigned char*>malloc(PIECE)
        if self.connections == NULL or self.piece == NULL:
            raise MemoryError
        for i in range(3):
            self.add_queue(QUEUE_SIZE)
            chain_allocate(&self.chains[i], QUEUE_SIZE)
        self.events = SocketEvents(self)
        self.file = listen(name, path, PATH_MOST)
        cdef bytes place = os.fsencode(path)
        memcpy(self.path, <const char*>place, len(place))
        self.listener = self.file.fileno()
        self.events.watch_socket(self.listener, EPOLLIN | EPOLLET, LISTENER)

    def __dealloc__(self):
        cdef int i
        if self.connections != NULL:
            for i in range(CONNECTIONS):
                end(&self.connections[i])
        free(self.connections)
        free(self.piece)
        for i in range(3):
            chain_free(&self.chains[i])
        pthread_mutex_destroy(&self.table)

    def run_on(self, thread, queues=None):
        VirtioDevice.run_on(self, thread, queues)
        if self.events.thread is None:
            thread.add(self.events)

    def close(self):
        VirtioDevice.close(self)
        if self.events.thread is not None:
            self.events.thread.remove(self.events)
        self.forget_connections()
        if self.file is not None:
            self.file.close()
            self.file = None
            try:
                os.unlink(<bytes>self.path)
            except OSError:
                pass                 # the folder belongs to another user than this process became

    def stats(self):
        """{connections: how many there are}"""
        return {"connections": sum(1 for i in range(CONNECTIONS) if self.connections[i].state != FREE)}

    def save_device(self):
        return {"version": 1, "cid": self.cid}

    def check_device(self, reader):
        cid = reader.uint("cid", UINT32_MAX)
        reader.done()
        if cid != self.cid:
            raise StateError(f"{self.name}: the guest knows its CID as {cid}; here it is {self.cid}")

    def restore_device(self, checked):
        self.tell_reset = True

    # ---- hooks

    cdef void deactivate(self) noexcept nogil:
        self.forget_connections()
        self.tell_reset = False

    cdef void kicked(self, Virtqueue queue) noexcept nogil:
        pthread_mutex_lock(&self.table)
        if queue.index == TX:
            self.take_packets(queue)
        elif queue.index == RX:
            self.give_packets(queue)
        elif self.tell_reset and queue.pop(&self.chains[EVENT]) == 1:
            self.tell_reset = False
            self.tell_event(queue)
        if self.waits:
            self.accept_host()
        pthread_mutex_unlock(&self.table)
        self.notify_used(queue)

    cdef void tell_event(self, Virtqueue queue) noexcept nogil:
        """Every connection of the guest's is void (5.10.6.7)."""
        cdef uint32_t event = VIRTIO_VSOCK_EVENT_TRANSPORT_RESET
        queue.push(&self.chains[EVENT], <uint32_t>chain_put(&self.chains[EVENT], &event, sizeof(event)))

    cdef void forget_connections(self) noexcept nogil:
        cdef int i
        pthread_mutex_lock(&self.table)
        for i in range(CONNECTIONS):
            end(&self.connections[i])
        self.reset_count = 0
        pthread_mutex_unlock(&self.table)

    # ---- from the guest

    cdef void take_packets(self, Virtqueue queue) noexcept nogil:
        cdef Chain* chain = &self.chains[TX]
        cdef virtio_vsock_hdr header
        while queue.pop(chain) == 1:
            if chain_take(chain, &header, HEADER) != HEADER or header.len > chain.readable_bytes:
                self.complain(b"packet is shorter than it says, bytes", header.len)
            elif header.src_cid != self.cid or header.dst_cid != HOST_CID:
                self.complain(b"packet for another CID than the host's", header.dst_cid)
            else:
                self.take_packet(chain, &header)
            queue.push(chain, 0)
        (<Virtqueue>self.queue_table[RX]).doorbell.press()

    cdef void take_packet(self, Chain* chain, virtio_vsock_hdr* header) noexcept nogil:
        cdef Connection* connection = self.find(header.dst_port, header.src_port)
        if header.type != VIRTIO_VSOCK_TYPE_STREAM:
            self.refuse(header)
        elif connection == NULL:
            if header.op == VIRTIO_VSOCK_OP_REQUEST:
                self.accept_guest(header)
            elif header.op != VIRTIO_VSOCK_OP_RST:
                self.refuse(header)
        elif header.op == VIRTIO_VSOCK_OP_RST:
            end(connection)
        elif connection.state != DYING:
            connection.guest_window, connection.guest_taken = header.buf_alloc, header.fwd_cnt
            if connection.state == ASKED:
                self.take_answer(connection, header)
            else:
                self.take_open(connection, chain, header)

    cdef void take_answer(self, Connection* connection, virtio_vsock_hdr* header) noexcept nogil:
        """The guest accepts what a program of the host asked for, or breaks the rules."""
        cdef char line[LINE_MOST]
        cdef int length = snprintf(line, sizeof(line), b"OK %u\n", connection.host_port)
        if header.op != VIRTIO_VSOCK_OP_RESPONSE or send(connection.fd, line, length, MSG_NOSIGNAL | MSG_DONTWAIT) != length:
            kill(connection)
        else:
            connection.state = OPEN
            connection.readable = True

    cdef void take_open(self, Connection* connection, Chain* chain, virtio_vsock_hdr* header) noexcept nogil:
        if header.op == VIRTIO_VSOCK_OP_RW:
            if connection.guest_ended or header.len > WINDOW - connection.count:
                self.complain(b"more bytes than the window has room for, or after their end", header.len)
                kill(connection)
            else:
                take_bytes(connection, chain, header.len)
        elif header.op == VIRTIO_VSOCK_OP_CREDIT_REQUEST:
            connection.wishes |= TELL_CREDIT
        elif header.op == VIRTIO_VSOCK_OP_SHUTDOWN:
            connection.guest_ended = connection.guest_ended or header.flags & VIRTIO_VSOCK_SHUTDOWN_SEND
            connection.guest_deaf = connection.guest_deaf or header.flags & VIRTIO_VSOCK_SHUTDOWN_RCV
            if connection.guest_deaf:
                shutdown(connection.fd, SHUT_RD)
            settle(connection)
        elif header.op != VIRTIO_VSOCK_OP_CREDIT_UPDATE:
            self.complain(b"packet that no open connection takes, operation", header.op)
            kill(connection)

    cdef void accept_guest(self, virtio_vsock_hdr* header) noexcept nogil:
        """A program of the guest connects to the host."""
        cdef Connection* connection = self.unused()
        cdef sockaddr_un address
        cdef int fd
        if connection == NULL:
            self.refuse(header)
            return
        memset(&address, 0, sizeof(address))
        address.sun_family = AF_UNIX
        snprintf(address.sun_path, sizeof(address.sun_path), b"%s_%u", self.path, header.dst_port)
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
        if fd >= 0 and connect(fd, <sockaddr*>&address, sizeof(address)) == 0 and self.adopt(connection, fd):
            connection.state = OPEN
            connection.host_port, connection.guest_port = header.dst_port, header.src_port
            connection.guest_window, connection.guest_taken = header.buf_alloc, header.fwd_cnt
            connection.wishes = TELL_RESPONSE
            return
        if fd >= 0:
            close(fd)
        self.refuse(header)

    cdef void refuse(self, virtio_vsock_hdr* header) noexcept nogil:
        """A reset for a packet that belongs to no connection; too many of them at a time are not answered."""
        if self.reset_count < RESETS and header.op != VIRTIO_VSOCK_OP_RST:
            self.resets[self.reset_count] = <uint64_t>header.dst_port << 32 | header.src_port
            self.reset_count += 1

    # ---- to the guest

    cdef void give_packets(self, Virtqueue queue) noexcept nogil:
        """A packet of each connection in turn, as long as there are packets and buffers."""
        cdef Connection* connection
        cdef uint32_t i, first = self.turn
        cdef bint more = True
        while self.reset_count:
            if not self.give_reset(queue):
                return
        while more:
            more = False
            for i in range(<uint32_t>CONNECTIONS):
                connection = &self.connections[(first + i) % CONNECTIONS]
                if wants(connection):
                    if not self.give(queue, connection):
                        self.turn = (first + i) % CONNECTIONS
                        return
                    more = True

    cdef bint give_reset(self, Virtqueue queue) noexcept nogil:
        cdef virtio_vsock_hdr header
        if not self.next_buffer(queue):
            return False
        self.reset_count -= 1
        memset(&header, 0, HEADER)
        header.op = VIRTIO_VSOCK_OP_RST
        header.src_port = <uint32_t>(self.resets[self.reset_count] >> 32)
        header.dst_port = <uint32_t>self.resets[self.reset_count]
        self.put(queue, &header, 0)
        return True

    cdef bint give(self, Virtqueue queue, Connection* connection) noexcept nogil:
        """One packet of the connection's; False when the guest has no buffer for it."""
        cdef virtio_vsock_hdr header
        cdef ssize_t length = 0
        if not self.next_buffer(queue):
            return False
        memset(&header, 0, HEADER)
        header.src_port, header.dst_port = connection.host_port, connection.guest_port
        header.buf_alloc = WINDOW
        header.fwd_cnt = connection.taken
        if connection.wishes & TELL_RESET:
            header.op = VIRTIO_VSOCK_OP_RST
            end(connection)
        elif connection.wishes & TELL_REQUEST:
            header.op = VIRTIO_VSOCK_OP_REQUEST
            connection.wishes &= ~<uint32_t>TELL_REQUEST
        elif connection.wishes & TELL_RESPONSE:
            header.op = VIRTIO_VSOCK_OP_RESPONSE
            connection.wishes &= ~<uint32_t>TELL_RESPONSE
        elif connection.wishes & TELL_CREDIT:
            header.op = VIRTIO_VSOCK_OP_CREDIT_UPDATE
            connection.wishes &= ~<uint32_t>TELL_CREDIT
        else:
            length = self.give_bytes(connection, &header)
            if length < 0:
                queue.unpop(&self.chains[RX])
                return True
        connection.told = header.fwd_cnt                # not sooner: what was not sent, the guest does not know
        self.put(queue, &header, <uint32_t>length)
        return True

    cdef ssize_t give_bytes(self, Connection* connection, virtio_vsock_hdr* header) noexcept nogil:
        """Bytes of the socket, or its end, into `piece` and the header; -1 when there is nothing to say."""
        cdef uint64_t room = min(<uint64_t>credit(connection), self.chains[RX].writable_bytes - HEADER)
        cdef ssize_t length = recv(connection.fd, self.piece, min(room, <uint64_t>PIECE), MSG_DONTWAIT)
        if length < 0 and errno == EAGAIN:
            connection.readable = False
            return -1
        if length > 0:
            header.op = VIRTIO_VSOCK_OP_RW
            header.len = <uint32_t>length
            connection.sent += <uint32_t>length
            return length
        connection.readable = False
        if length < 0:
            kill(connection)
            return -1
        connection.host_ended = True
        header.op = VIRTIO_VSOCK_OP_SHUTDOWN
        header.flags = VIRTIO_VSOCK_SHUTDOWN_SEND
        if connection.hung_up:
            header.flags |= VIRTIO_VSOCK_SHUTDOWN_RCV
        settle(connection)
        return 0

    cdef bint next_buffer(self, Virtqueue queue) noexcept nogil:
        """Pops a buffer with room for a header and a byte; those without are given back empty."""
        while queue.pop(&self.chains[RX]) == 1:
            if self.chains[RX].writable_bytes > HEADER:
                return True
            self.complain(b"receive buffer is too small for a packet, bytes", self.chains[RX].writable_bytes)
            queue.push(&self.chains[RX], 0)
        return False

    cdef void put(self, Virtqueue queue, virtio_vsock_hdr* header, uint32_t length) noexcept nogil:
        """Gives the buffer back with the header and `length` bytes of `piece`."""
        header.src_cid, header.dst_cid = HOST_CID, self.cid
        header.type = VIRTIO_VSOCK_TYPE_STREAM
        chain_put(&self.chains[RX], header, HEADER)
        chain_put(&self.chains[RX], self.piece, length)
        queue.push(&self.chains[RX], HEADER + length)

    # ---- the host's sockets

    cdef void sockets_ready(self) noexcept nogil:
        """Notes what the sockets are ready for; in the I/O thread. The guest is served by the receive queue's kick."""
        cdef epoll_event events[EVENTS]
        cdef int i
        pthread_mutex_lock(&self.table)                  # before the look: what it tells is of connections that stand in the table
        for i in range(epoll_wait(self.events.fd, events, EVENTS, 0)):
            if events[i].data.u64 == LISTENER:
                self.accept_host()
            elif events[i].data.u64 < CONNECTIONS:
                self.socket_ready(&self.connections[events[i].data.u64], events[i].events)
        if self.waits:
            self.accept_host()
        pthread_mutex_unlock(&self.table)
        (<Virtqueue>self.queue_table[RX]).doorbell.press()

    cdef void socket_ready(self, Connection* connection, uint32_t events) noexcept nogil:
        if connection.state == FREE or connection.state == DYING:
            return
        connection.readable = connection.readable or events & (EPOLLIN | EPOLLHUP | EPOLLERR)
        connection.writable = connection.writable or events & (EPOLLOUT | EPOLLERR)
        connection.hung_up = connection.hung_up or events & EPOLLHUP
        if connection.state == GREETING:
            self.greet(connection)
        elif connection.state == ASKED and connection.hung_up:
            kill(connection)
        elif connection.state == OPEN and connection.count:
            flush(connection)

    cdef void accept_host(self) noexcept nogil:
        """Programs of the host connect. Without a driver in the guest, or with too many connections, they are hung up on."""
        cdef Connection* connection
        cdef int fd
        while True:
            fd = accept4(self.listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
            if fd < 0:
                self.waits = errno != EAGAIN
                return
            connection = self.unused()
            if connection == NULL or not self.status_register() & VIRTIO_CONFIG_S_DRIVER_OK or not self.adopt(connection, fd):
                close(fd)
            else:
                connection.state = GREETING

    cdef void greet(self, Connection* connection) noexcept nogil:
        """A program of the host says to which port of the guest's it wants to speak."""
        cdef int64_t port = greeting(connection)
        if port == GREETING_UNFINISHED:
            return
        if port < 0 or not self.name_port(connection, <uint32_t>port):
            end(connection)
            return
        connection.state = ASKED
        connection.wishes = TELL_REQUEST

    cdef bint name_port(self, Connection* connection, uint32_t guest_port) noexcept nogil:
        """A port of the host's that no other connection to this port of the guest's has."""
        cdef int i
        for i in range(CONNECTIONS + 1):
            self.next_port = FIRST_HOST_PORT | (self.next_port + 1)
            if self.find(self.next_port, guest_port) == NULL:
                connection.host_port, connection.guest_port = self.next_port, guest_port
                return True
        return False

    cdef bint adopt(self, Connection* connection, int fd) noexcept nogil:
        """Makes a free connection that of this socket."""
        memset(connection, 0, sizeof(connection[0]))
        if self.events.watch_socket(fd, EPOLLIN | EPOLLOUT | EPOLLET, connection - self.connections) < 0:
            return False
        connection.fd = fd
        connection.writable = True
        return True

    cdef Connection* find(self, uint32_t host_port, uint32_t guest_port) noexcept nogil:
        cdef int i
        cdef Connection* connection
        for i in range(CONNECTIONS):
            connection = &self.connections[i]
            if connection.state >= ASKED and connection.host_port == host_port and connection.guest_port == guest_port:
                return connection
        return NULL

    cdef Connection* unused(self) noexcept nogil:
        cdef int i
        for i in range(CONNECTIONS):
            if self.connections[i].state == FREE:
                return &self.connections[i]
        return NULL


cdef class SocketEvents(EventSource):
    """The epoll of all sockets, as one event source."""
    cdef VirtioVsock device

    def __cinit__(self, VirtioVsock device not None):
        self.device = device
        self.fd = epoll_create1(EPOLL_CLOEXEC)
        if self.fd < 0:
            raise OSError(errno, f"epoll: {os.strerror(errno)}")

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    cdef int watch_socket(self, int fd, uint32_t events, uint64_t number) noexcept nogil:
        cdef epoll_event event
        event.events = events
        event.data.u64 = number
        return epoll_ctl(self.fd, EPOLL_CTL_ADD, fd, &event)

    cdef void ready(self, uint32_t events) noexcept nogil:
        self.device.sockets_ready()
