"""A domain's control socket: one JSON object a line, answered in the control thread, so that nothing ever waits for a lock.

    → {"id": 1, "verb": "status"}                              ← {"id": 1, "ok": {...}}
    → {"id": 2, "verb": "setmem", "bytes": 268435456}          ← {"id": 2, "error": {"code": ..., "message": ..., "hint": ...}}
    → {"id": 3, "verb": "subscribe"}                           ← {"id": 3, "ok": {}}, then {"event": {...}} lines
    → {"id": 4, "verb": "console", "device": "serial0"}        ← {"id": 4, "ok": {...}}, then bytes of the console both ways
    → {"id": 5, "verb": "save"}, with a descriptor             ← {"id": 5, "ok": {...}}, when it is done: a verb may answer later

Descriptors may come with a request (SCM_RIGHTS, sent with its bytes); its verb takes them from `Connection.fds`, the rest is closed.

The daemon and the CLI's console are its clients. A client that leaves too much unread loses its connection; it never holds the
domain up. Left out: who may connect is a matter of the socket file's owner and mode.
"""
import json
import os
import select
import socket
import struct
import traceback

from kvmapp.errors import NOTHING_LEFT, BadRequest, KvmappError
from kvmapp.loop import READ, WRITE, Loop

LINE_MOST = 1 << 20                 # bytes of one request
FDS_MOST = 64                       # descriptors that may come with a request
BACKLOG_MOST = 4 << 20              # bytes that a client may leave unread
LOOK_AGAIN = 0.5                    # seconds until a client is accepted whom the host had no descriptor for


class ControlServer:
    """Accepts clients on a listening UNIX socket and calls `verbs[verb](connection, request) -> dict`; None: it answers later."""

    def __init__(self, loop: Loop, listener: socket.socket, verbs: dict):
        self.loop = loop
        self.listener = listener
        self.verbs = verbs
        self.connections: set[Connection] = set()
        listener.setblocking(False)
        loop.watch(listener.fileno(), self.accept)

    def publish(self, event: dict) -> None:
        """Sends an event to every subscriber."""
        for connection in [connection for connection in self.connections if connection.subscribed]:
            connection.send({"event": event})

    def close(self) -> None:
        """Hands out what is still unsent as far as it goes, and closes every connection."""
        self.loop.unwatch(self.listener.fileno())
        for connection in list(self.connections):
            connection.flush()
            connection.close()
        self.listener.close()

    def accept(self, _events: int) -> None:
        try:
            client, _ = self.listener.accept()
        except OSError as error:        # gone again, or it waits until there are descriptors for it
            if error.errno in NOTHING_LEFT:
                self.loop.unwatch(self.listener.fileno())
                self.loop.later(LOOK_AGAIN, self.accept_again)
            return
        self.connections.add(Connection(self, client))

    def accept_again(self) -> None:
        if self.listener.fileno() >= 0:
            self.loop.watch(self.listener.fileno(), self.accept)


class Connection:
    """One client. After `attach` its bytes belong to a console port and are no longer lines."""

    def __init__(self, server: ControlServer, client: socket.socket):
        self.server = server
        self.socket = client
        self.fd = client.fileno()
        self.input = bytearray()
        self.output = bytearray()
        self.subscribed = False
        self.port = None
        self.fds: list[int] = []        # came with a request (SCM_RIGHTS) and not yet taken
        self.on_close = None            # called once when the client is gone
        client.setblocking(False)
        self.peer = peer_of(client)
        server.loop.watch(self.fd, self.ready)

    def deserted(self) -> bool:
        """Whether the client has hung up, maybe behind a request that is only served now."""
        poll = select.poll()
        poll.register(self.fd, 0)
        return bool(poll.poll(0))

    def send(self, message: dict) -> None:
        self.send_bytes(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def answer(self, number, ok: dict | None = None, error: KvmappError | None = None) -> None:
        """Answers a request whose verb answered None."""
        self.send({"id": number, "error": error.to_dict()} if error else {"id": number, "ok": ok or {}})

    def take_fd(self) -> int:
        """The descriptor that came with the request, the caller's from now on. Raises BadRequest."""
        if not self.fds:
            raise BadRequest("no descriptor came with the request")
        return self.fds.pop(0)

    def send_bytes(self, data: bytes) -> None:
        """Sends now what the client takes, keeps the rest; a client that leaves too much unread is let go."""
        self.output += data
        self.flush()
        if len(self.output) > BACKLOG_MOST:
            self.close()

    def attach(self, port) -> None:
        """From now on the connection carries a console."""
        self.port = port
        if self.input:
            port.type(bytes(self.input))
            self.input.clear()

    def close(self) -> None:
        """A second call does nothing."""
        if self in self.server.connections:
            self.server.connections.discard(self)
            self.server.loop.unwatch(self.fd)
            self.socket.close()
            self.drop_fds()
            if self.port:
                self.port.detach(self)
            if self.on_close:
                self.on_close()

    def drop_fds(self) -> None:
        while self.fds:
            os.close(self.fds.pop())

    def ready(self, events: int) -> None:
        if events & WRITE:
            self.flush()
        if events & ~WRITE:
            self.receive()

    def receive(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self.socket, 65536, FDS_MOST, socket.MSG_CMSG_CLOEXEC)
            self.fds += fds
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
        elif self.port:
            self.drop_fds()
            self.port.type(data)
        else:
            self.input += data
            self.serve_lines()

    def serve_lines(self) -> None:
        while self.port is None and (end := self.input.find(b"\n")) >= 0:
            line = bytes(self.input[:end])
            del self.input[:end + 1]
            if line.strip():
                self.serve(line)
        if len(self.input) > LINE_MOST or len(self.fds) > FDS_MOST:
            self.close()

    def serve(self, line: bytes) -> None:
        number = None
        try:
            request = parse(line)
            number = request.get("id")
            verb = self.server.verbs.get(request["verb"])
            if verb is None:
                raise BadRequest(f"unknown verb {request['verb']!r}", f"known: {', '.join(sorted(self.server.verbs))}")
            answer = verb(self, request)
        except KvmappError as error:
            self.answer(number, error=error)
            return
        except Exception as error:      # a defect of ours costs whoever asked his answer, never the guest its run
            traceback.print_exc()
            self.answer(number, error=KvmappError(f"An internal error of the domain: {type(error).__name__}: {error}",
                                                  "its log has more; this is a defect of kvmapp"))
            return
        finally:
            self.drop_fds()             # a verb that wants them has taken them
        if answer is None:
            return
        port = answer.pop("attach", None)
        self.answer(number, answer)
        if port:
            port.attach(self)
            self.attach(port)

    def flush(self) -> None:
        try:
            while self.output:
                del self.output[:self.socket.send(self.output)]
        except BlockingIOError:
            pass
        except OSError:
            self.output.clear()         # the client is gone; `receive` sees it and closes
        if self in self.server.connections:
            self.server.loop.watch(self.fd, self.ready, READ | WRITE if self.output else READ)


def parse(line: bytes) -> dict:
    """One request. Raises BadRequest."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise BadRequest("not a JSON object a line") from None
    if not isinstance(request, dict) or not isinstance(request.get("verb"), str):
        raise BadRequest("a request is a JSON object with a 'verb'")
    return request


def peer_of(client: socket.socket) -> dict:
    """{pid, uid} of the process at the other end (SO_PEERCRED, socket(7))."""
    pid, uid, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return {"pid": pid, "uid": uid}


def listen(path: str, mode: int = 0o600) -> socket.socket:
    """A listening socket at `path`, in the place of a dead one. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if os.path.exists(path):
            os.unlink(path)
        listener.bind(path)
        os.chmod(path, mode)
        listener.listen(64)
    except OSError:
        listener.close()
        raise
    return listener
