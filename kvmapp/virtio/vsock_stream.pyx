"""One connection of virtio-vsock (VIRTIO 1.2, 5.10.6): a socket of the host, the guest's window and ours, and what waits on both sides.

Plain functions on a struct, without the GIL; whoever calls them holds the lock of the table that the connection stands in.
"""
from libc.stdint cimport UINT32_MAX
from libc.stdlib cimport free, malloc
from libc.string cimport memmove, memset

from kvmapp.abi.posix cimport EAGAIN, close, errno
from kvmapp.abi.socket cimport MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK, SHUT_WR, recv, send, shutdown
from kvmapp.virtio.virtqueue cimport Chain, chain_take


cdef bint wants(Connection* connection) noexcept nogil:
    """Whether there is something to tell the guest."""
    if connection.wishes:
        return True
    return (connection.state == OPEN and connection.readable and not connection.host_ended and not connection.guest_deaf and
            credit(connection) > 0)


cdef uint32_t credit(Connection* connection) noexcept nogil:
    """Bytes that the guest has room for (5.10.6.3); what it says of itself may make no sense."""
    cdef uint32_t under_way = connection.sent - connection.guest_taken
    return connection.guest_window - under_way if under_way < connection.guest_window else 0


cdef void give_credit(Connection* connection) noexcept nogil:
    """Tells the guest that there is room again, before it has to wait."""
    if connection.taken - connection.told >= WINDOW // 2:
        connection.wishes |= TELL_CREDIT


cdef void take_bytes(Connection* connection, Chain* chain, uint32_t length) noexcept nogil:
    """The guest's to the socket at once as far as it takes them; the rest waits. The window has room for them."""
    cdef ssize_t done
    while length and connection.writable and connection.count == 0 and chain.readable_count:
        done = send(connection.fd, chain.readable.iov_base, min(<size_t>length, <size_t>chain.readable.iov_len),
                    MSG_NOSIGNAL | MSG_DONTWAIT)
        if done < 0:
            if errno != EAGAIN:
                kill(connection)
                return
            connection.writable = False
            break
        chain_take(chain, NULL, done)
        length -= <uint32_t>done
        connection.taken += <uint32_t>done
    if length and not keep(connection, chain, length):
        kill(connection)
    else:
        give_credit(connection)


cdef int64_t greeting(Connection* connection) noexcept nogil:
    """The port of "CONNECT PORT\\n", taken from the socket and not a byte more: what follows is for the guest."""
    cdef char line[LINE_MOST]
    cdef ssize_t length = recv(connection.fd, line, sizeof(line), MSG_PEEK | MSG_DONTWAIT)
    cdef ssize_t i = 0
    if length < 0 and errno == EAGAIN:
        return GREETING_UNFINISHED
    while i < length and line[i] != c"\n":
        i += 1
    if i == length:
        return GREETING_UNFINISHED if 0 < length < LINE_MOST else GREETING_WRONG
    recv(connection.fd, line, i + 1, MSG_DONTWAIT)
    return port_of(line, i)


cdef bint keep(Connection* connection, Chain* chain, uint32_t length) noexcept nogil:
    """Puts bytes of the chain behind those that wait for the socket; there is room in the window."""
    if connection.kept == NULL:
        connection.kept = <unsigned char*>malloc(WINDOW)
        if connection.kept == NULL:
            return False
    if connection.start:
        memmove(connection.kept, connection.kept + connection.start, connection.count)
        connection.start = 0
    connection.count += <uint32_t>chain_take(chain, connection.kept + connection.count, length)
    return True


cdef void flush(Connection* connection) noexcept nogil:
    """Waiting bytes to the socket."""
    cdef ssize_t done
    while connection.count:
        done = send(connection.fd, connection.kept + connection.start, connection.count, MSG_NOSIGNAL | MSG_DONTWAIT)
        if done < 0:
            if errno == EAGAIN:
                connection.writable = False
            else:
                kill(connection)
            break
        connection.start += <uint32_t>done
        connection.count -= <uint32_t>done
        connection.taken += <uint32_t>done
    if connection.state == OPEN:
        give_credit(connection)
        settle(connection)


cdef void settle(Connection* connection) noexcept nogil:
    """When all bytes of a side have gone through, its end does; when both sides are at their end, the connection is."""
    if connection.guest_ended and connection.count == 0:
        if connection.guest_deaf or (connection.host_ended and connection.hung_up):
            kill(connection)
        else:
            shutdown(connection.fd, SHUT_WR)


cdef void kill(Connection* connection) noexcept nogil:
    """The host's side is over; the guest is told when it has a buffer."""
    cdef uint32_t host_port = connection.host_port, guest_port = connection.guest_port
    end(connection)
    connection.host_port, connection.guest_port = host_port, guest_port
    connection.state = DYING
    connection.wishes = TELL_RESET


cdef void end(Connection* connection) noexcept nogil:
    """Nothing is left of it; closing the socket takes it out of the epoll."""
    if connection.state != FREE and connection.state != DYING:
        close(connection.fd)
    free(connection.kept)
    memset(connection, 0, sizeof(connection[0]))


cdef int64_t port_of(const char* line, ssize_t length) noexcept nogil:
    """PORT of "CONNECT PORT"; GREETING_WRONG when it says something else."""
    cdef const char* word = b"CONNECT "
    cdef int64_t port = 0
    cdef ssize_t i
    if length < 9:
        return GREETING_WRONG
    for i in range(length):
        if i < 8:
            if line[i] != word[i]:
                return GREETING_WRONG
        elif not c"0" <= line[i] <= c"9":
            return GREETING_WRONG
        else:
            port = port * 10 + line[i] - c"0"
            if port > UINT32_MAX:
                return GREETING_WRONG
    return port
