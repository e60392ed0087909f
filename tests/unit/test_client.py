"""The tools' client against a peer that says exactly what the test wants, the worst included."""
import contextlib
import json
import socket
import threading

import pytest

from kvmapp import client, errors


class Peer:
    """Accepts connections one after another; each gets the next script: bytes to send after a request was read."""

    def __init__(self, path, *scripts):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(8)
        self.requests = []
        self.thread = threading.Thread(target=self.serve, args=(scripts,), daemon=True)
        self.thread.start()

    def serve(self, scripts):
        for script in scripts:
            connection, _ = self.listener.accept()
            with connection:
                for answer in script:
                    self.requests.append(connection.recv(65536))
                    with contextlib.suppress(BrokenPipeError):      # the client has heard enough
                        connection.sendall(answer)
        self.listener.close()


def answer(body, status="200 OK", extra=""):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n{extra}\r\n".encode() + data


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s"


def test_get_with_query(path):
    peer = Peer(path, [answer({"a": [1, 2.5, None, "ü\n"]})])
    with client.Client(str(path)) as daemon:
        assert daemon.get("/v1/x", name="a b&c", live=True, force=False, none=None) == {"a": [1, 2.5, None, "ü\n"]}
    assert peer.requests[0].startswith(b"GET /v1/x?name=a%20b%26c&live=1 HTTP/1.1\r\n")


def test_post_carries_json_on_a_kept_connection(path):
    peer = Peer(path, [answer({}), answer({"n": 2})])
    with client.Client(str(path)) as daemon:
        daemon.post(client.of("linuxvm02", "start"), paused=True)
        assert daemon.post(client.of("x")) == {"n": 2}
    head, _, body = peer.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/domains/linuxvm02/start HTTP/1.1\r\n") and json.loads(body) == {"paused": True}
    assert peer.requests[1].endswith(b"\r\n\r\n{}")


def test_names_are_escaped():
    assert client.of("a/b ?#é%", "stats") == "/v1/domains/a%2Fb%20%3F%23%C3%A9%25/stats"


def test_error_is_the_daemons(path):
    error = errors.JobRunning("Domain 'a' is busy", "wait", verb="start", who="root", since=5.0)
    Peer(path, [answer({"error": error.to_dict()}, "409 Conflict")])
    with client.Client(str(path)) as daemon, pytest.raises(errors.JobRunning) as caught:
        daemon.post(client.of("a", "start"))
    assert caught.value.to_dict() == error.to_dict()


def test_answer_in_pieces(path):
    text = answer({"long": "x" * 5000})

    class Slow(Peer):
        def serve(self, scripts):
            connection, _ = self.listener.accept()
            connection.recv(65536)
            for start in range(0, len(text), 700):
                connection.sendall(text[start:start + 700])
            connection.close()
    Slow(path)
    with client.Client(str(path)) as daemon:
        assert daemon.get("/")["long"] == "x" * 5000


def test_events_are_lines_however_the_chunks_fall(path):
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    lines = [{"event": "lifecycle", "domain": "a"}, {"event": "daemon", "domain": None}]
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (data[:7], data[7:40], data[40:])) + b"0\r\n\r\n"
    Peer(path, [head + chunks])
    with client.Client(str(path)) as daemon:
        assert list(daemon.events()) == lines


def test_nobody_listens(path):
    with pytest.raises(errors.ConnectionFailed) as caught:
        client.Client(str(path)).get("/v1/version")
    assert str(caught.value) == f"Failed to connect socket to '{path}': No such file or directory"
    assert "/etc/init.d/kvmapp start" in caught.value.hint


def test_query_is_repeated_when_the_daemon_was_restarted_in_between(path):
    peer = Peer(path, [answer({"n": 1})], [answer({"n": 2})])
    with client.Client(str(path)) as daemon:
        assert daemon.get("/")["n"] == 1
        assert daemon.get("/")["n"] == 2
    assert len(peer.requests) == 2


def test_a_verb_is_not_repeated_when_the_daemon_dies_over_it(path):
    peer = Peer(path, [answer({}), b""], [answer({})])
    with client.Client(str(path)) as daemon:
        daemon.post("/v1/domains/a/start")
        with pytest.raises(client.ConnectionGone):
            daemon.post("/v1/domains/a/start")
    assert len(peer.requests) == 2


def test_time_out(path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    with listener, pytest.raises(errors.NoResponse):
        client.Client(str(path), timeout=0.05).get("/")


def test_queries_wait_less_for_a_daemon_that_hangs_than_what_changes_something(path):
    peer = Peer(path, [answer({})] * 3, [b""])
    with client.Client(str(path)) as daemon:
        for ask, timeout in ((daemon.post, None), (daemon.get, client.QUERY_TIMEOUT), (daemon.wait, None)):
            ask("/v1/domains/a/wait")
            assert daemon.connection.gettimeout() == timeout
    assert len(peer.requests) == 3


def test_a_daemon_that_hangs_is_told_with_what_to_do(path, monkeypatch):
    monkeypatch.setattr(client, "QUERY_TIMEOUT", 0.05)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    with listener, pytest.raises(errors.NoResponse) as caught:
        client.Client(str(path)).get("/v1/domains")
    assert "/etc/init.d/kvmapp restart" in caught.value.hint


@pytest.mark.parametrize("garbage", [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", answer(b"{"), answer(b"[]"),
                                     answer(b"\xff\xfe"), answer(b'"text"'), answer(b"nul")])
def test_garbage_is_an_error_not_a_traceback(path, garbage):
    Peer(path, [garbage])
    with pytest.raises(errors.KvmappError):
        client.Client(str(path)).get("/")


def test_long_socket_path(tmp_path):
    folder = tmp_path / ("d" * 150)
    folder.mkdir()
    (tmp_path / "short").symlink_to(folder)
    Peer(tmp_path / "short" / "s", [answer({"n": 1})])
    assert client.Client(str(folder / "s")).get("/") == {"n": 1}


def test_domain_verb_and_console(tmp_path):
    Peer(tmp_path / "1", [b'{"id": 1, "ok": {"state": "running"}}\n'])
    assert client.ask_domain(str(tmp_path / "1"), "status") == {"state": "running"}
    Peer(tmp_path / "2", [b'{"id": 1, "ok": {"device": "serial0"}}\nlogin: '])
    connection, said, first = client.open_console(str(tmp_path / "2"), "serial0")
    assert said == {"device": "serial0"} and first == b"login: "
    connection.close()


@pytest.mark.parametrize(("script", "error"), [
    (b'{"id": 1, "error": {"code": "unsupported", "message": "no", "hint": null}}\n', errors.Unsupported),
    (b"", errors.ConnectionFailed), (b"garbage\n", errors.KvmappError)])
def test_domain_that_refuses_or_ends(tmp_path, script, error):
    Peer(tmp_path / "1", [script])
    with pytest.raises(error):
        client.open_console(str(tmp_path / "1"))


def test_client_is_light():
    """The tools start with it: none of the slow standard modules may come along."""
    import subprocess
    import sys
    slow = ("re", "enum", "json", "socket", "http", "asyncio")
    program = f"import sys, kvmapp.client; print(*(name for name in {slow} if name in sys.modules))"
    assert subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.mark.parametrize("said", [b"x" * (5 << 20), b'{"error": "x"}\n', b'{"ok": [1]}\n'])
def test_what_a_domain_says_is_bounded_and_not_believed(tmp_path, said):
    """A guest may have taken its process over; the daemon asks it as well."""
    Peer(tmp_path / "s", [said])
    try:
        assert client.ask_domain(str(tmp_path / "s"), "status", timeout=60) == {}
    except errors.KvmappError as error:
        assert "answers" in error.message


def test_a_domain_whose_answer_trickles_is_none_that_answers(tmp_path):
    """Each byte came in time, and held a thread of the daemon for ever."""
    gone = threading.Event()

    def trickle(listener):
        peer, _ = listener.accept()
        with peer, contextlib.suppress(OSError):
            while not gone.wait(0.05):
                peer.sendall(b" ")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        thread = threading.Thread(target=trickle, args=(listener,), daemon=True)
        thread.start()
        with pytest.raises(errors.NoResponse):
            client.ask_domain(str(tmp_path / "s"), "status", timeout=0.5)
        gone.set()
        thread.join()
