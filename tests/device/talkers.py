"""What guests and programs of the host say to the devices that carry it: FUSE requests, vsock packets."""
import contextlib
import socket
import struct


def fuse_request(opcode: int, unique: int = 7, rest: bytes = b"") -> bytes:
    """A struct fuse_in_header (linux/fuse.h) and what follows it."""
    return struct.pack("<IIQQIIII", 40 + len(rest), opcode, unique, 1, 0, 0, 1, 0) + rest


def vsock_packet(operation: int, guest_port: int, host_port: int, data: bytes = b"", *, flags: int = 0, window: int = 1 << 16,
                 taken: int = 0, cid: int = 5, to: int = 2, kind: int = 1, length: int | None = None) -> bytes:
    """A packet of the guest's (VIRTIO 1.2, 5.10.6)."""
    return struct.pack("<QQIIIHHIII", cid, to, guest_port, host_port, len(data) if length is None else length, kind, operation,
                       flags, window, taken) + data


def talk(server: socket.socket, path: str, ends: contextlib.ExitStack, data: bytes) -> None:
    """Programs of the host: each call is one that comes, speaks, listens and, at random, goes."""
    talkers = getattr(ends, "talkers", [])
    ends.talkers = talkers                       # type: ignore[attr-defined]
    with contextlib.suppress(BlockingIOError):
        talkers.append(ends.enter_context(server.accept()[0]))
    if data[:1] >= b"\x80":
        talkers.append(ends.enter_context(socket.socket(socket.AF_UNIX)))
        talkers[-1].setblocking(False)
        with contextlib.suppress(OSError):
            talkers[-1].connect(path)
    for end in talkers[-8:]:
        with contextlib.suppress(OSError):       # one that has gone
            end.setblocking(False)
            end.send(data[1:])
        with contextlib.suppress(OSError):
            end.recv(4096)
        if data[:1] > b"\xF0":
            end.close()
    while len(talkers) > 32:
        talkers.pop(0).close()
