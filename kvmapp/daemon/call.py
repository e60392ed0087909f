"""One request as the handlers see it: who asks for what, checked against the route's shapes."""
from __future__ import annotations

import json
import socket
import struct
from urllib.parse import parse_qsl

from kvmapp.daemon import shapes
from kvmapp.daemon.routes import Route
from kvmapp.errors import KvmappError, UsageError
from kvmapp.hostinfo import user_name
from kvmapp.values import is_label

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.daemon.domain import Domain
    from kvmapp.daemon.network import Network
    from kvmapp.daemon.service import Daemon
    from kvmapp.daemon.supervisor import Supervisor


class Call:
    """`who` is for job records and logs; `reference` is the {domain} or {network} of the path."""
    __slots__ = ("access", "body", "daemon", "query", "reference", "route", "who")

    def __init__(self, daemon: Daemon, route: Route, reference: str, access: str, who: str):
        self.daemon, self.route, self.reference, self.access, self.who = daemon, route, reference, access, who
        self.query: dict = {}
        self.body: dict = {}

    @property
    def supervisor(self) -> Supervisor:
        return self.daemon.supervisor

    def domain(self) -> Domain:
        """Raises DomainNotFound."""
        return self.supervisor.find(self.reference)

    def network(self) -> Network:
        """Raises NetworkNotFound."""
        return self.supervisor.networks.find(self.reference)

    def take_query(self, text: str) -> None:
        for name, value in parse_qsl(text, keep_blank_values=True):
            shape = self.route.query.get(name)
            if shape is None:
                raise UsageError(f"{self.route.name}: {name} is not known here",
                                 f"known: {', '.join(self.route.query)}" if self.route.query else None)
            self.query[name] = typed(name, value, shape["type"])
            if wrong := shapes.complaint(shape, self.query[name], name):
                raise UsageError(f"{self.route.name}: {wrong}")

    def take_body(self, data: bytes) -> None:
        """Unknown fields are refused: a misspelt one must not be taken for left out."""
        if not data:
            return
        try:
            self.body = json.loads(data)
        except (ValueError, RecursionError):
            raise UsageError(f"{self.route.name}: the request's body is not JSON") from None
        wrong = shapes.complaint(self.route.request or shapes.options(), self.body)
        if wrong:
            raise UsageError(f"{self.route.name}: {wrong}")

    def changed(self, domain: Domain, warnings: list[str] | None = None) -> dict:
        """What a verb answers that changes a domain."""
        return {"domain": domain.summary(), "warnings": warnings or []}


def typed(name: str, text: str, kind: str) -> object:
    """A query's text as its shape says."""
    try:
        if kind == "boolean":
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text]
        return {"integer": int, "number": float, "string": str}[kind](text)
    except (KeyError, ValueError):
        raise UsageError(f"{name} = {text!r}: expected a {kind}") from None


def caller(connection: socket.socket | None) -> str:
    """User, pid and program at the other end, as the kernel knows them: root (pid 42, kvmappctl)."""
    if connection is None:
        return "unknown"
    pid, uid, _ = credentials(connection)
    try:
        with open(f"/proc/{pid}/comm", "rb") as comm:           # 15 bytes, which may end within a letter
            program = comm.read().decode("utf-8", "replace").strip()
    except OSError:
        program = ""
    program = program if is_label(program) else ""
    return f"{user_name(uid)} (pid {pid}{', ' if program else ''}{program})"


def peer_user(connection: socket.socket) -> int:
    """The uid at the other end."""
    return credentials(connection)[1]


def credentials(connection: socket.socket) -> tuple[int, int, int]:
    """pid, uid and gid of who connected."""
    pid, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid, gid


def internal(error: BaseException) -> KvmappError:
    """A defect of ours, as an error that a user can report."""
    failure = KvmappError(f"An internal error of the daemon: {type(error).__name__}: {error}",
                          "this is a defect of kvmapp; the daemon's log has more")
    failure.code = "internal"
    return failure


