"""Connections to the daemon's sockets, as many of them as are let in: the read-only socket is everybody's, and each connection is a
descriptor that a domain may need. No user but root may have more than half of them, as far as the kernel tells users apart: who has
uids of his own for containers is several.

One beyond the most is answered with an error before it has asked, and closed; so is, without an answer, one that has not asked for
anything in time. A connection that has asked once is kept for as long as its client wants: it may be a stream of events. What it sends
beside that is bounded: who asks much more before there is an answer is cut off, nothing is unpacked, and aiohttp's complaints are few.
"""
from __future__ import annotations

import asyncio
import json
import logging
import time

from aiohttp import web

from kvmapp.daemon.call import peer_user
from kvmapp.daemon.routes import STATUS
from kvmapp.errors import TooManyClients

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = logging.getLogger("kvmapp")
FIRST_REQUEST = 30.0                    # seconds from the connection to the end of its first request
COMPLAINT = 60.0                        # seconds between two lines in the log
AHEAD_MOST = 8                          # requests that wait on one connection: our own clients await each answer
TAIL_MOST = 65536                       # bytes behind a request for another protocol, which we do not speak
WORDS_MOST = 200                        # characters of a complaint of aiohttp's, which repeats what a client sent


class Seldom(logging.Filter):
    """One line a COMPLAINT, and a short one: what goes wrong on a connection is its client's doing."""
    said = -COMPLAINT

    def filter(self, record: logging.LogRecord) -> bool:
        if time.monotonic() - self.said < COMPLAINT:
            return False
        self.said = time.monotonic()
        why = f": {record.exc_info[1]!r}"[:WORDS_MOST] if record.exc_info else ""
        record.msg, record.args, record.exc_info = record.getMessage()[:WORDS_MOST] + why, (), None
        return True


clients_log = logging.getLogger("kvmapp.clients")
clients_log.addFilter(Seldom())


class Connections(web.Server):
    """`most()`: how many there may be at a time; None: as many as come, and they have time."""

    def __init__(self, handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], most: Callable[[], int] | None):
        super().__init__(handle, handler_cancellation=True, access_log=None, auto_decompress=False)
        self.most = most
        self.complained = -COMPLAINT

    def __call__(self) -> web.RequestHandler:
        if self.most is None:
            return super().__call__()
        return Connection(self, self.most)

    def complain(self, most: int) -> None:
        if time.monotonic() - self.complained >= COMPLAINT:
            self.complained = time.monotonic()
            log.warning("the read-only socket has its most clients, or a user's (max_readonly_clients = %d): others are sent away", most)


class Connection(web.RequestHandler):
    __slots__ = ("connections", "deadline", "most", "user")

    def __init__(self, connections: Connections, most: Callable[[], int]):
        super().__init__(connections, loop=asyncio.get_running_loop(), access_log=None, logger=clients_log,    # type: ignore[arg-type]
                         auto_decompress=False)
        self.connections, self.most = connections, most
        self.deadline: asyncio.TimerHandle | None = None
        self.user = -1                      # uid

    def connection_made(self, transport) -> None:
        most, self.user = self.most(), peer_user(transport.get_extra_info("socket"))
        share = most if self.user == 0 else max(1, most // 2)
        others = self.connections.connections
        own = sum(one.user == self.user for one in others if isinstance(one, Connection))
        if len(others) < most and own < share:
            super().connection_made(transport)
            self.deadline = asyncio.get_running_loop().call_later(FIRST_REQUEST, self.force_close)
            return
        self.connections.complain(most)
        transport.write(refusal(f"{own} clients of yours, a user's" if len(others) < most else f"{most} clients, its"))
        transport.close()
        self.force_close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if len(self._messages) > AHEAD_MOST or len(self._message_tail) > TAIL_MOST:
            self.force_close()

    def connection_lost(self, error: BaseException | None) -> None:
        self.has_asked()
        super().connection_lost(error)

    def has_asked(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


def has_asked(request: web.BaseRequest) -> None:
    """The whole request is here."""
    if isinstance(request.protocol, Connection):
        request.protocol.has_asked()


def refusal(has: str) -> bytes:
    """The answer to what is not even read."""
    error = TooManyClients(f"The daemon's read-only socket already has {has} most",
                           "try again later, or use the full socket; max_readonly_clients in kvmapp.conf is the most")
    body = json.dumps({"error": error.to_dict()}).encode()
    head = (f"HTTP/1.1 {STATUS[error.code]} Service Unavailable\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n")
    return head.encode() + body
