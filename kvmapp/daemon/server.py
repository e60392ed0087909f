"""HTTP/1.1 on the daemon's two sockets, by aiohttp's low-level server: routes.py's table is the only router.

A query is dropped when its client goes away. A verb that changes something runs on to its end whatever becomes of the client, so
that a killed tool leaves a domain in a state that the verb meant.
"""
from __future__ import annotations

import asyncio
import json
import logging
from urllib.parse import unquote

from aiohttp import web

from kvmapp.daemon import actions, cardverbs, diskverbs, hostverbs, netverbs, openapi, queries, saving, tuning
from kvmapp.daemon.call import Call, caller, internal
from kvmapp.daemon.connections import Connections, has_asked
from kvmapp.daemon.routes import FULL, READ_ONLY, ROUTES, STATUS, Route
from kvmapp.errors import KvmappError, PermissionDenied, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from kvmapp.daemon.service import Daemon

    Handler = Callable[[Call], Awaitable[dict]]

log = logging.getLogger("kvmapp")
STOP_TIMEOUT = 5.0                      # for requests under way when the daemon stops
BODY_LIMIT = 1 << 20
ANY = "*"                               # stands for {domain} or {network} in a key


async def describe_api(_call: Call) -> dict:
    return openapi.description()


def handler_of(route: Route) -> Handler:
    if route.name == "openapi":
        return describe_api
    modules = (queries, actions, netverbs, cardverbs, diskverbs, hostverbs, saving, tuning)
    return next(getattr(module, route.name) for module in modules if hasattr(module, route.name))


class Server:
    def __init__(self, daemon: Daemon):
        self.daemon = daemon
        self.runners: list[web.ServerRunner] = []
        self.routes: dict[tuple[str, ...], tuple[Route, Handler | None]] = {}
        for route in ROUTES:
            key = tuple(ANY if part.startswith("{") else part for part in route.path.split("/")[1:])
            self.routes[(route.method, *key)] = route, None if route.name == "events" else handler_of(route)

    async def listen(self, listener: socket.socket, access: str) -> None:
        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            return await self.serve(request, access)
        most = (lambda: self.daemon.config.max_readonly_clients) if access == READ_ONLY else None
        runner = web.ServerRunner(Connections(handle, most), shutdown_timeout=STOP_TIMEOUT)
        await runner.setup()
        await web.SockSite(runner, listener).start()
        self.runners.append(runner)

    async def close(self) -> None:
        """Takes no more requests, and lets those that are under way end."""
        await asyncio.gather(*(runner.cleanup() for runner in self.runners))

    async def serve(self, request: web.BaseRequest, access: str) -> web.StreamResponse:
        try:
            route, handler, reference = self.match(request)
            if access == READ_ONLY and route.access == FULL:
                raise PermissionDenied(f"{route.name} is not for the read-only socket",
                                       "use the full one, as root or as a member of its group")
            transport = request.transport
            call = Call(self.daemon, route, reference, access, caller(transport.get_extra_info("socket") if transport else None))
            call.take_query(request.rel_url.raw_query_string)
            if request.can_read_body:
                call.take_body(await read_body(request))
            has_asked(request)
            if handler is None:
                return await self.stream(request, call)
            return answer(await self.work(call, handler), route.status)
        except KvmappError as error:
            return answer({"error": error.to_dict()}, STATUS.get(error.code, 500))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("%s %s failed", request.method, request.path)
            return answer({"error": internal(error).to_dict()}, 500)
        finally:
            has_asked(request)          # for something that we refuse, too

    def match(self, request: web.BaseRequest) -> tuple[Route, Handler | None, str]:
        path = request.rel_url.raw_path
        parts = path.split("/")[1:]
        for key in (parts, [*parts[:2], ANY, *parts[3:]]) if len(parts) > 2 else (parts,):
            found = self.routes.get((request.method, *key))
            if found is not None:
                return *found, unquote(parts[2], errors="surrogateescape") if ANY in key else ""
        raise UsageError(f"The daemon knows no {request.method} {path[:200]}", "GET /v1/openapi.json lists what it knows")

    async def work(self, call: Call, handler: Handler) -> dict:
        if call.route.method == "GET":
            return await handler(call)
        verb = f"{call.route.name} {call.reference}".strip()
        task = self.daemon.supervisor.run(handler(call), verb)
        try:
            result = await asyncio.shield(task)
        except KvmappError as error:
            log.info("%s by %s: %s", verb, call.who, error)
            raise
        log.info("%s by %s: done", verb, call.who)
        return result

    async def stream(self, request: web.BaseRequest, call: Call) -> web.StreamResponse:
        """Events as they come, until the client or the daemon goes."""
        listener = self.daemon.supervisor.events.listen()
        name = call.query.get("domain")
        try:
            if name is not None:
                name = call.supervisor.find(name).name
            response = web.StreamResponse(headers={"Content-Type": "application/jsonl"})
            response.enable_chunked_encoding()
            await response.prepare(request)
            async for event in listener:
                if name in (None, event["domain"]) and call.query.get("event") in (None, event["event"]):
                    await response.write(json.dumps(event).encode() + b"\n")
            await response.write_eof()
        except ConnectionError:
            pass                        # the client went in the middle of a line
        finally:
            listener.close()
        return response


async def read_body(request: web.BaseRequest) -> bytes:
    if (request.content_length or 0) > BODY_LIMIT:
        raise UsageError(f"The request's body is larger than {BODY_LIMIT >> 10} KiB")
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise UsageError(f"The request's body is larger than {BODY_LIMIT >> 10} KiB") from None


def answer(body: dict, status: int) -> web.Response:
    return web.Response(body=json.dumps(body).encode(), status=status, content_type="application/json")
