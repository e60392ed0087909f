"""A small synchronous client of the daemon's socket and of a domain's control socket, for the command line tools.

    with Client() as daemon:
        for domain in daemon.get("/v1/domains")["domains"]: ...
        daemon.post(of("linuxvm02", "start"))
        for event in daemon.events(): ...
    console = open_console(domain["control"], "serial0")

HTTP/1.1 (RFC 9112) by hand over AF_UNIX, one kept connection. What it knows of HTTP is what the daemon says: Content-Length, or
chunked for the stream of events. Left out: redirects, compression, TLS. docs/openapi.json lists paths and shapes; every failure
is a KvmappError.

The tools must answer as fast as virsh does, so this imports the C halves of socket and json: the Python halves bring re, enum
and selectors, 11 ms of a run of 30. os is 1 ms more, and imported where it is needed.
"""
from __future__ import annotations

from _json import encode_basestring_ascii, make_encoder, make_scanner
from _socket import AF_UNIX, SCM_RIGHTS, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET, socket
from time import monotonic

from kvmapp.errors import ConnectionFailed, KvmappError, NoResponse, error_from_dict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Self

SOCKET = "/run/kvmapp/kvmapp.sock"
READ_ONLY_SOCKET = "/run/kvmapp/kvmapp-sock-ro"
QUERY_TIMEOUT = 30.0                    # seconds: the daemon answers queries at once, whatever else it does
HOW_TO_START = "start it: /etc/init.d/kvmapp start"
HOW_TO_RESTART = "its log may say why; to restart it, which hurts no guest: /etc/init.d/kvmapp restart"
UNRESERVED = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~")
ANSWER_LIMIT = 4 << 20                  # bytes of a domain's answer
ADDRESS_LIMIT = 107                     # bytes of sockaddr_un.sun_path without its NUL, unix(7)


def of(domain: object, *parts: str) -> str:
    """The path of a domain's resource: of("linuxvm02", "start")."""
    return "/".join(("/v1/domains", escape(str(domain)), *parts))


def of_network(network: object, *parts: str) -> str:
    return "/".join(("/v1/networks", escape(str(network)), *parts))


def escape(text: str) -> str:
    return "".join(chr(byte) if byte in UNRESERVED else f"%{byte:02X}" for byte in text.encode("utf-8", "surrogateescape"))


def connect(path: str, timeout: float | None = None) -> socket:
    """A connection to the UNIX socket at `path`, however long that is. Raises OSError."""
    connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    try:
        connection.settimeout(timeout)
        if len(path.encode("utf-8", "surrogateescape")) <= ADDRESS_LIMIT:
            connection.connect(path)
        else:
            connect_by_folder(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def connect_by_folder(connection: socket, path: str) -> None:
    """For a path that is longer than an address may be."""
    import os
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    finally:
        os.close(folder)


class Client:
    """A connection to the daemon; made at the first request, made again when the daemon was restarted in between."""

    def __init__(self, path: str = SOCKET, *, timeout: float | None = None):
        self.path = path
        self.timeout = timeout          # of one answer; None: QUERY_TIMEOUT for queries, and for what changes something as long as it takes
        self.connection: socket | None = None
        self.buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        self.connection, self.buffer = None, b""

    def get(self, path: str, **query: object) -> dict:
        return self.request("GET", path + query_text(query), timeout=self.timeout or QUERY_TIMEOUT)

    def wait(self, path: str, **query: object) -> dict:
        """A query that is answered when something has come true."""
        return self.request("GET", path + query_text(query))

    def post(self, path: str, **body: object) -> dict:
        return self.request("POST", path, body)

    def put(self, path: str, **body: object) -> dict:
        return self.request("PUT", path, body)

    def delete(self, path: str, **query: object) -> dict:
        return self.request("DELETE", path + query_text(query))

    def request(self, method: str, path: str, body: dict | None = None, *, timeout: float | None = None) -> dict:
        """The answer's JSON. Raises what the daemon raised, ConnectionFailed or NoResponse."""
        kept = self.connection is not None
        timeout = timeout or self.timeout
        try:
            self.send(method, path, body, timeout)
            status, headers = self.read_head()
        except ConnectionGone:
            # A kept connection that the daemon had closed before it could read the request; otherwise the request may have run.
            if not kept or method != "GET":
                raise
            self.send(method, path, body, timeout)
            status, headers = self.read_head()
        answer = decode(self.read_exactly(int(headers.get("content-length", "0"))))
        if headers.get("connection") == "close":
            self.close()
        if status >= 400:
            raise error_from_dict(answer.get("error") or {"message": f"The daemon answered with HTTP status {status}"})
        return answer

    def events(self, **query: object) -> Iterator[dict]:
        """What happens from now on, until the daemon ends or the caller stops looking."""
        self.send("GET", "/v1/events" + query_text(query), None, self.timeout)
        status, headers = self.read_head()
        if status >= 400:
            raise error_from_dict(decode(self.read_exactly(int(headers.get("content-length", "0")))).get("error") or {})
        text = b""
        try:
            while size := int(self.read_line().partition(b";")[0], 16):
                text += self.read_exactly(size)
                self.read_line()
                *lines, text = text.split(b"\n")
                yield from (decode(line) for line in lines if line)
        finally:
            self.close()

    def send(self, method: str, path: str, body: dict | None, timeout: float | None) -> None:
        """`timeout`: of this, and of each part of the answer."""
        if self.connection is None:
            self.connection = self.open()
        self.connection.settimeout(timeout)
        data = b"" if body is None else encode(body)
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        try:
            self.connection.sendall(head.encode("ascii") + b"\r\n" + data)
        except OSError:
            return                      # the daemon may have answered before it closed: read_head tells

    def open(self) -> socket:
        try:
            return connect(self.path, self.timeout or QUERY_TIMEOUT)
        except OSError as error:
            hint = HOW_TO_START
            if isinstance(error, PermissionError):
                hint = "only root and members of the socket's group may use it; `--readonly` is for everybody"
            raise ConnectionFailed(f"Failed to connect socket to '{self.path}': {error.strerror or error}", hint) from None

    def read_head(self) -> tuple[int, dict[str, str]]:
        try:
            status = int(self.read_line().split(b" ", 2)[1])
            headers = {}
            while line := self.read_line():
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.strip().lower()] = value.strip()
        except (ValueError, IndexError):
            self.close()
            raise ConnectionFailed(f"What answers at '{self.path}' does not speak HTTP") from None
        return status, headers

    def read_line(self) -> bytes:
        while b"\r\n" not in self.buffer:
            self.receive()
        line, _, self.buffer = self.buffer.partition(b"\r\n")
        return line

    def read_exactly(self, size: int) -> bytes:
        while len(self.buffer) < size:
            self.receive()
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def receive(self) -> None:
        assert self.connection is not None
        try:
            data = self.connection.recv(1 << 18)
        except TimeoutError:
            self.close()
            raise NoResponse(f"The daemon at '{self.path}' does not answer", HOW_TO_RESTART) from None
        except OSError:
            data = b""
        if not data:
            self.close()
            raise ConnectionGone(f"The daemon at '{self.path}' closed the connection",
                                 "it was stopped or restarted: look at what became of the request, then repeat it")
        self.buffer += data


class ConnectionGone(ConnectionFailed):
    """The other side closed while an answer was awaited."""
    code = "connection-gone"


class Scanning:
    """What json.JSONDecoder would tell the C scanner."""
    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, float
    memo: dict = {}                     # noqa: RUF012 (of the scanner, which clears it)


scan = make_scanner(Scanning)           # type: ignore[arg-type]


def decode(data: bytes) -> dict:
    try:
        answer = scan(data.decode().strip(), 0)[0] if data else {}
    except (ValueError, StopIteration):
        answer = None
    if not isinstance(answer, dict):
        raise KvmappError(f"The daemon answered with something that is no JSON object: {data[:60]!r}")
    return answer


def encode(body: object) -> bytes:
    """JSON in one line, in ASCII."""
    return "".join(encode_parts(body, 0)).encode("ascii")


def refuse(value: object) -> object:
    raise TypeError(f"{value!r} has no JSON")


encode_parts = make_encoder(None, refuse, encode_basestring_ascii, None, ": ", ", ", False, False, False)


def query_text(query: dict[str, object]) -> str:
    given = {name: value for name, value in query.items() if value is not None and value is not False}
    texts = [f"{name}={escape('1' if value is True else str(value))}" for name, value in given.items()]
    return "?" + "&".join(texts) if texts else ""


# A domain's own socket: consoles go there, not through the daemon, which may be away.

def ask_domain(control: str, verb: str, *, timeout: float = 5, descriptors: Sequence[int] = (), **arguments: object) -> dict:
    """One verb of control.py's protocol; open `descriptors` go along with it."""
    connection = open_control(control, timeout)
    try:
        return converse(connection, control, verb, arguments, descriptors)[0]
    finally:
        connection.close()


def open_console(control: str, device: str | None = None, *, force: bool = False,
                 timeout: float = 5) -> tuple[socket, dict, bytes]:
    """A connection that carries a console's bytes, what the domain said of it, and the first bytes. `console-busy` names
    who has it.
    """
    connection = open_control(control, timeout)
    try:
        answer, rest = converse(connection, control, "console", {"device": device, "force": force})
    except BaseException:
        connection.close()
        raise
    connection.settimeout(None)
    return connection, answer, rest


def open_control(control: str, timeout: float) -> socket:
    try:
        return connect(control, timeout)
    except OSError as error:
        hint = "only root and members of group kvmapp may use it" if isinstance(error, PermissionError) else None
        raise ConnectionFailed(f"Failed to connect socket to '{control}': {error.strerror or error}", hint) from None


def keep_to(connection: socket, deadline: float | None) -> None:
    """What is sent or received next ends by then. Raises TimeoutError."""
    if deadline is not None:
        left = deadline - monotonic()
        if left <= 0:                           # 0 would mean not to wait at all
            raise TimeoutError
        connection.settimeout(left)


def converse(connection: socket, control: str, verb: str, arguments: dict, descriptors: Sequence[int] = ()) -> tuple[dict, bytes]:
    """The answer, and what came after it. The connection's timeout is that of the whole: a domain process may be hostile, and let its
    answer trickle.
    """
    request, data = encode({"id": 1, "verb": verb, **arguments}) + b"\n", b""
    patience = connection.gettimeout()
    deadline = None if patience is None else monotonic() + patience
    try:
        if descriptors:
            from array import array
            request = request[connection.sendmsg([request], [(SOL_SOCKET, SCM_RIGHTS, array("i", descriptors))]):]
        keep_to(connection, deadline)
        connection.sendall(request)
        while b"\n" not in data:
            keep_to(connection, deadline)
            part = connection.recv(65536)
            if not part:
                raise ConnectionFailed(f"The domain at '{control}' ended")
            data += part
            if len(data) > ANSWER_LIMIT:
                raise ConnectionFailed(f"The domain at '{control}' answers with more than {ANSWER_LIMIT >> 20} MiB")
    except TimeoutError:
        raise NoResponse(f"The domain at '{control}' does not answer", "kvmappctl destroy ends it") from None
    except OSError as error:
        raise ConnectionFailed(f"The domain at '{control}' ended: {error.strerror}") from None
    line, _, rest = data.partition(b"\n")
    answer = decode(line)
    refusal, ok = answer.get("error"), answer.get("ok")
    if isinstance(refusal, dict):
        raise error_from_dict(refusal)
    if not isinstance(ok, dict):
        raise KvmappError(f"The domain at '{control}' answers with something that is no answer")
    return ok, rest
