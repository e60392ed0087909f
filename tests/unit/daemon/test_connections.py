"""How many may be connected to the read-only socket, and for how long without a word."""
import asyncio
import contextlib
import os
import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvmapp import errors
from kvmapp.client import Client
from kvmapp.daemon import connections
from kvmapp.daemon.events import Events
from kvmapp.daemon.routes import READ_ONLY
from kvmapp.daemon.server import Server
from kvmapp.daemon.sockets import listen
from kvmapp.hostconfig import DaemonConfig
from tests.unit.daemon.host import SOCKET_GROUP


@pytest.fixture
def narrow(running):
    running.write("kvmapp.conf", f"unix_sock_group = {SOCKET_GROUP}\nmax_readonly_clients = 3\n")
    with running.client() as client:
        assert client.post("/v1/daemon/reload")["warnings"] == []
    return running


@pytest.fixture
def uri(narrow):
    return narrow.uri


def test_one_user_cannot_take_all_descriptors(narrow, ctl):
    with contextlib.ExitStack() as stack:
        def connect():
            one = stack.enter_context(socket.socket(socket.AF_UNIX))
            one.connect(narrow.paths.read_only_socket)
            return one
        callers = [connect() for _ in range(3)]
        assert ctl("-r", "list") == (1, "\n", "error: The daemon's read-only socket already has 3 clients, its most\n"
                                     "hint: try again later, or use the full socket; max_readonly_clients in kvmapp.conf is the most\n")
        with pytest.raises(errors.TooManyClients), contextlib.closing(Client(narrow.paths.read_only_socket)) as client:
            next(client.events())
        beyond = connect()
        assert beyond.recv(20).startswith(b"HTTP/1.1 503 ")
        assert ctl("list")[0] == 0, "the full socket is nobody else's"
        callers.pop().close()
        narrow.eventually(lambda: ctl("-r", "list")[0] == 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_one_user_cannot_keep_the_others_out(running):
    running.write("kvmapp.conf", f"unix_sock_group = {SOCKET_GROUP}\nmax_readonly_clients = 4\n")
    with running.client() as client:
        client.post("/v1/daemon/reload")
    with contextlib.ExitStack() as stack:
        def connect(user):
            one = stack.enter_context(socket.socket(socket.AF_UNIX))
            os.seteuid(user)
            try:
                one.connect(running.paths.read_only_socket)
            finally:
                os.seteuid(0)
            return one

        def answered(one):
            with contextlib.suppress(BrokenPipeError):
                one.sendall(request("GET /v1/openapi.json"))
            return one.recv(13)
        ann, bob = 65533, 65534
        first = connect(ann)
        assert answered(first) == answered(connect(ann)) == b"HTTP/1.1 200 "
        beyond = connect(ann)
        assert answered(beyond) == b"HTTP/1.1 503 "
        assert b"already has 2 clients of yours, a user's most" in beyond.recv(1000)
        assert answered(connect(bob)) == b"HTTP/1.1 200 "
        assert answered(connect(0)) == b"HTTP/1.1 200 "
        full = connect(bob)
        assert answered(full) == b"HTTP/1.1 503 " and b"already has 4 clients, its most" in full.recv(1000)
        first.close()
        running.eventually(lambda: answered(connect(bob)) == b"HTTP/1.1 200 ")


def test_who_says_nothing_is_not_kept_and_who_has_asked_is(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "FIRST_REQUEST", 2.0)
    path, daemon = str(tmp_path / "socket"), SimpleNamespace(config=DaemonConfig(), supervisor=SimpleNamespace(events=Events()))

    async def call(text):
        reader, writer = await asyncio.open_unix_connection(path, limit=4 << 20)
        writer.write(text)
        return reader, writer

    async def story():
        server = Server(cast("Any", daemon))
        await server.listen(listen(path, 0o600), READ_ONLY)
        asked = [await call(request(words)) for words in ("GET /v1/events", "GET /v1/openapi.json", "POST /v1/daemon/reload")]
        for (reader, _), status in zip(asked, (200, 200, 403), strict=True):
            assert await reader.readuntil(b" ") and int(await reader.readuntil(b" ")) == status
        silent = [await call(b""), await call(request("GET /v1/openapi.json")[:-2]),
                  await call(request("GET /v1/openapi.json", "Content-Length: 2\r\n") + b"{")]
        for reader, _ in silent:
            assert await asyncio.wait_for(reader.read(), 60) == b""
        for reader, writer in asked[1:]:
            writer.write(request("GET /nowhere"))
            assert await asyncio.wait_for(reader.readuntil(b"The daemon knows no GET /nowhere"), 60)
        daemon.supervisor.events.publish("lifecycle", "web")
        assert await asyncio.wait_for(asked[0][0].readuntil(b'"web"'), 60)
        daemon.supervisor.events.close()
        for _, writer in [*asked, *silent]:
            writer.close()
        await server.close()
    asyncio.run(story())


async def flooded(path, first, flood):
    """Whether who goes on sending is cut off."""
    _, writer = await asyncio.open_unix_connection(path, limit=1 << 16)
    writer.write(first)
    try:
        for _ in range(1000):
            writer.write(flood)
            await asyncio.wait_for(writer.drain(), 60)
    except ConnectionError:
        return True
    finally:
        writer.close()
    return False


@pytest.mark.parametrize(("first", "flood"), [
    ("GET /v1/events", b"GET / HTTP/1.1\r\n\r\n" * 1000),
    ("GET /v1/events HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX: y", bytes(65536))], ids=["requests", "protocol"])
def test_who_does_not_await_his_answers_is_cut_off(tmp_path, first, flood):
    """Else he would fill the daemon's memory."""
    path, daemon = str(tmp_path / "socket"), SimpleNamespace(config=DaemonConfig(), supervisor=SimpleNamespace(events=Events()))

    async def story():
        server = Server(cast("Any", daemon))
        await server.listen(listen(path, 0o600), READ_ONLY)
        assert await flooded(path, request(first) if " HTTP" not in first else f"{first}\r\n\r\n".encode(), flood)
        daemon.supervisor.events.close()
        await server.close()
    asyncio.run(story())


def test_what_a_client_has_packed_is_not_unpacked(tmp_path, monkeypatch):
    import zlib
    packed = zlib.compress(bytes(8 << 20))
    path, daemon = str(tmp_path / "socket"), SimpleNamespace(config=DaemonConfig(), supervisor=SimpleNamespace(events=Events()))
    unpacked: list[int] = []
    monkeypatch.setattr("aiohttp.compression_utils.ZLibDecompressor.decompress_sync", lambda *_: unpacked.append(1))

    async def story():
        server = Server(cast("Any", daemon))
        await server.listen(listen(path, 0o600), READ_ONLY)
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(request("GET /nowhere", f"Content-Encoding: deflate\r\nContent-Length: {len(packed)}\r\n") + packed)
        await asyncio.wait_for(reader.readuntil(b" "), 60)
        writer.close()
        await server.close()
    asyncio.run(story())
    assert unpacked == []


def test_complaints_of_what_clients_send_are_few_and_short(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(connections.Seldom, "said", -connections.COMPLAINT)
    path, daemon = str(tmp_path / "socket"), SimpleNamespace(config=DaemonConfig(), supervisor=SimpleNamespace(events=Events()))

    async def story():
        server = Server(cast("Any", daemon))
        await server.listen(listen(path, 0o600), READ_ONLY)
        for _ in range(5):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(request("GET /v1/openapi.json") + b"GET / HTTP/1.1\r\n" + b"\x01" * 50000)
            await asyncio.wait_for(reader.read(), 60)
            writer.close()
        await server.close()
    asyncio.run(story())
    assert len(caplog.records) <= 1 and len(caplog.text) < 1000
    assert "kvmapp.clients" in caplog.text or not caplog.text


def request(words, more=""):
    return f"{words} HTTP/1.1\r\nHost: x\r\n{more}\r\n".encode()
