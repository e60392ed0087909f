"""A vhost-user back end in Python: a file server that has no files, and one that breaks the protocol where it is told to.

    with Backend() as backend:
        device = VirtioFs("fs0", memory, "share", backend.fd)

It speaks the protocol (QEMU's docs/interop/vhost-user.rst) in a thread of its own, works on split rings, and answers each FUSE request
with `answer(in_header, rest)`: an error number and the bytes of the answer. Whatever a guest has put into its rings makes it skip a
request; it never gives up before the socket is closed.
"""
import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from typing import Self

from tests.device.virtio_driver import barrier

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_NUM, SET_ADDR, SET_BASE, GET_BASE, SET_KICK, SET_CALL, SET_ERR = 8, 9, 10, 11, 12, 13, 14
GET_PROTOCOL, SET_PROTOCOL, GET_QUEUES, ENABLE = 15, 16, 17, 18
F_INDIRECT, F_EVENT_IDX, F_PROTOCOL, F_VERSION_1 = 1 << 28, 1 << 29, 1 << 30, 1 << 32
FEATURES = F_INDIRECT | F_EVENT_IDX | F_PROTOCOL | F_VERSION_1
REPLY, VERSION = 4, 1
NEXT, WRITE, INDIRECT = 1, 2, 4
ENOSYS = 38
REQUEST_MOST = 2 << 20                                   # bytes; FUSE writes a MiB at once, and a wrong length may be gigabytes


def no_files(_header: tuple[int, int, int], _rest: bytes) -> tuple[int, bytes]:
    return ENOSYS, b""


class Ring:
    """What the front end told of one queue."""

    def __init__(self) -> None:
        self.size, self.base, self.enabled = 0, 0, False
        self.desc = self.used = self.avail = 0
        self.files: dict[int, int] = {}                 # SET_KICK, SET_CALL, SET_ERR: descriptors

    def close(self) -> None:
        while self.files:
            os.close(self.files.popitem()[1])


class Backend:
    """`replies` changes answers: {request: function of the honest payload, which gives the raw bytes to send (None: nothing)}."""

    def __init__(self, *, features: int = FEATURES, queues: int = 2, answer: Callable = no_files,
                 replies: dict[int, Callable[[bytes], bytes | None]] | None = None) -> None:
        self.features, self.queues, self.answer, self.replies = features, queues, answer, replies or {}
        self.fd = -1                                    # for the device, which closes it
        self.socket = self.connected()
        self.rings = [Ring() for _ in range(queues)]
        self.regions: list[tuple[int, int, int, mmap.mmap]] = []        # gpa, size, the front end's address, ours
        self.requests: list[int] = []                   # every message that came
        self.agreed = 0
        self.served = 0
        self.hold = threading.Event()                   # cleared: it works on nothing
        self.hold.set()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def connected(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self.fd = theirs.detach()
        return ours

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """Gone, as if it had been killed."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass                                        # the front end was first
        self.hold.set()
        self.thread.join()

    # In its thread.

    def run(self) -> None:
        try:
            while True:
                kicks = {ring.files[SET_KICK]: ring for ring in self.rings if SET_KICK in ring.files}
                ready = select.select([self.socket, *kicks], [], [])[0]
                self.hold.wait()
                if self.socket in ready:                # which may take a ring's descriptors away
                    self.take_message()
                    continue
                for fd in ready:
                    self.take_kick(kicks[fd])
        except (OSError, EOFError, struct.error, IndexError, ValueError):
            pass
        self.socket.close()
        for ring in self.rings:
            ring.close()
        for *_, memory in self.regions:
            memory.close()

    def take_message(self) -> None:
        head, fds, _, _ = socket.recv_fds(self.socket, 12, 8)
        while head and len(head) < 12:
            head += self.socket.recv(12 - len(head))
        if not head:
            raise EOFError
        request, _, size = struct.unpack("<III", head)
        body = b""
        while len(body) < size:
            body += self.socket.recv(size - len(body))
        self.requests.append(request)
        reply = self.obey(request, body, fds)
        if reply is not None:
            whole: bytes | None = struct.pack("<III", request, REPLY | VERSION, len(reply)) + reply
            if request in self.replies:
                whole = self.replies[request](whole or b"")
            self.socket.sendall(whole or b"")

    def obey(self, request: int, body: bytes, fds: list[int]) -> bytes | None:
        """What a message asks for; the payload of its answer."""
        words = {GET_FEATURES: self.features, GET_PROTOCOL: 1, GET_QUEUES: self.queues}
        if request in words:
            return struct.pack("<Q", words[request])
        if request == SET_FEATURES:
            self.agreed = struct.unpack("<Q", body)[0]
        elif request == SET_MEM_TABLE:
            self.map(body, fds)
        elif request in (SET_KICK, SET_CALL, SET_ERR):
            ring = self.rings[body[0]]
            if request in ring.files:
                os.close(ring.files.pop(request))
            ring.files[request] = fds[0]
        elif request == SET_ADDR:
            ring = self.rings[body[0]]
            ring.desc, ring.used, ring.avail = struct.unpack_from("<QQQ", body, 8)
        elif request in (SET_NUM, SET_BASE, ENABLE, GET_BASE):
            index, number = struct.unpack("<II", body)
            return self.set_state(request, self.rings[index], index, number)
        return None

    def set_state(self, request: int, ring: Ring, index: int, number: int) -> bytes | None:
        if request == SET_NUM:
            ring.size = number
        elif request == SET_BASE:
            ring.base = number
        elif request == ENABLE:
            ring.enabled = bool(number)
        else:
            if SET_KICK in ring.files:
                os.close(ring.files.pop(SET_KICK))
            return struct.pack("<II", index, ring.base)
        return None

    def map(self, body: bytes, fds: list[int]) -> None:
        for *_, memory in self.regions:
            memory.close()
        count = struct.unpack_from("<I", body)[0]
        self.regions = []
        for number, fd in zip(range(count), fds, strict=True):
            gpa, size, address, offset = struct.unpack_from("<QQQQ", body, 8 + 32 * number)
            self.regions.append((gpa, size, address, mmap.mmap(fd, size, offset=offset)))
            os.close(fd)

    # Rings.

    def place(self, address: int, length: int, *, guest: bool) -> tuple[mmap.mmap, int]:
        """Where an address of the guest's, or of the front end's, lies in our mappings. Raises ValueError."""
        for gpa, size, theirs, memory in self.regions:
            start = gpa if guest else theirs
            if start <= address and address + length <= start + size:
                return memory, address - start
        raise ValueError("not in memory")

    def load(self, address: int, form: str, *, guest: bool = False) -> tuple[int, ...]:
        memory, at = self.place(address, struct.calcsize(form), guest=guest)
        return struct.unpack_from(form, memory, at)

    def store(self, address: int, data: bytes, *, guest: bool = False) -> None:
        memory, at = self.place(address, len(data), guest=guest)
        memory[at:at + len(data)] = data

    def take_kick(self, ring: Ring) -> None:
        try:
            os.read(ring.files[SET_KICK], 8)
        except BlockingIOError:
            return
        [used] = self.load(ring.used + 2, "<H")
        for _ in range(ring.size + 1):
            if not self.waits(ring):
                break
            [head] = self.load(ring.avail + 4 + 2 * (ring.base % ring.size), "<H")
            ring.base = (ring.base + 1) % 65536
            self.store(ring.used + 4 + 8 * (used % ring.size), struct.pack("<II", head, self.serve(ring, head)))
            used = (used + 1) % 65536
            self.served += 1
        self.store(ring.used + 2, struct.pack("<H", used))       # the round is over when the driver sees it; only the signal follows
        if SET_CALL in ring.files:
            os.write(ring.files[SET_CALL], struct.pack("<Q", 1))

    def waits(self, ring: Ring) -> bool:
        """Whether there is a request; if not, its kick was asked for before we looked."""
        self.store(ring.used + 4 + 8 * ring.size, struct.pack("<H", ring.base))          # the event index
        barrier()
        [waiting] = self.load(ring.avail + 2, "<H")
        return 0 < (waiting - ring.base) % 65536 <= ring.size

    def serve(self, ring: Ring, head: int) -> int:
        """Answers one request; the bytes written."""
        try:
            readable, writable = self.walk(ring, head)
            if sum(length for _, length in readable) > REQUEST_MOST:
                raise ValueError("a request of more than FUSE has")
            data = b"".join(self.bytes_at(*part) for part in readable)
            size, opcode, unique = struct.unpack_from("<IIQ", data)
            error, answer = self.answer((size, opcode, unique), data[40:])
            whole = struct.pack("<IiQ", 16 + len(answer), -error, unique) + answer
            return self.fill(writable, whole)
        except (ValueError, struct.error, IndexError):
            return 0

    def bytes_at(self, address: int, length: int) -> bytes:
        memory, at = self.place(address, length, guest=True)
        return memory[at:at + length]

    def fill(self, writable: list[tuple[int, int]], data: bytes) -> int:
        done = 0
        for address, length in writable:
            piece = data[done:done + length]
            self.store(address, piece, guest=True)
            done += len(piece)
        return done

    def walk(self, ring: Ring, head: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The readable and the writable buffers of a chain."""
        table, count, index, guest = ring.desc, ring.size, head, False
        parts: tuple[list[tuple[int, int]], list[tuple[int, int]]] = [], []
        for _ in range(2 * ring.size):
            if index >= count:
                raise IndexError(index)
            address, length, flags, link = self.load(table + 16 * index, "<QIHH", guest=guest)
            if flags & INDIRECT:
                table, count, index, guest = address, length // 16, 0, True
                continue
            parts[bool(flags & WRITE)].append((address, length))
            if not flags & NEXT:
                return parts
            index = link
        raise IndexError("a loop")


class Listener(Backend):
    """One that waits at a path for its front end."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(1)
        super().__init__()

    def connected(self) -> socket.socket:
        return self.listener

    def run(self) -> None:
        try:
            with self.listener:
                self.socket = self.listener.accept()[0]
        except OSError:
            return                                      # nobody came
        super().run()
