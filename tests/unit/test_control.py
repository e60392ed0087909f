"""The control socket: answers, errors, events, consoles, and clients that misbehave."""
import contextlib
import errno
import json
import os
import socket
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from kvmapp.console import LONGEST_LINE, NOBODY, SCROLLBACK, ConsolePort, LogPort, Sink, open_log, open_sink
from kvmapp.control import BACKLOG_MOST, LINE_MOST, ControlServer, listen
from kvmapp.errors import HostError, KvmappError
from kvmapp.loop import Loop
from tests.descriptors import nothing_left


class FakeBackend:
    """A CharBackend as the control thread sees it."""

    def __init__(self):
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.output = b""
        self.received = b""
        self.room = 1 << 20

    def say(self, data: bytes) -> None:
        self.output += data
        os.eventfd_write(self.fd, 1)

    def take(self) -> bytes:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass
        data, self.output = self.output, b""
        return data

    def give(self, data: bytes) -> int:
        accepted = data[:self.room]
        self.room -= len(accepted)
        self.received += accepted
        return len(accepted)


class Client:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(path)
        self.lines = self.socket.makefile("rb")

    def ask(self, verb, **arguments):
        self.socket.sendall(json.dumps({"id": 7, "verb": verb, **arguments}).encode() + b"\n")
        return json.loads(self.lines.readline())


class Served:
    """A control server in a thread of its own, as a domain's main thread would run it."""

    def __init__(self, path):
        self.path = path
        self.loop = Loop()
        self.backend = FakeBackend()
        self.port = ConsolePort(self.loop, "serial0", self.backend)
        self.server = ControlServer(self.loop, listen(path), {
            "status": lambda connection, request: {"state": "running"},
            "fail": self.fail,
            "defect": lambda connection, request: 1 // 0,
            "subscribe": self.subscribe,
            "count": lambda connection, request: {"files": len(connection.fds)},
            "console": lambda connection, request: self.port.open(connection, bool(request.get("force"))),
        })
        self.thread = threading.Thread(target=self.loop.run)
        self.thread.start()

    def fail(self, _connection, _request):
        raise KvmappError("It does not work", "try another day")

    def subscribe(self, connection, _request):
        connection.subscribed = True
        return {}

    def call(self, function):
        """Runs it in the loop's thread and waits."""
        done = threading.Event()
        self.loop.call(function)
        self.loop.call(done.set)
        assert done.wait(60)

    def close(self):
        self.loop.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()
        self.server.close()
        self.loop.close()


@pytest.fixture
def served(tmp_path):
    served = Served(str(tmp_path / "control.sock"))
    yield served
    served.close()


def test_a_verb_is_answered_with_its_id(served):
    assert Client(served.path).ask("status") == {"id": 7, "ok": {"state": "running"}}


def test_an_error_keeps_its_code_and_hint(served):
    answer = Client(served.path).ask("fail")
    assert answer["id"] == 7
    assert {key: answer["error"][key] for key in ("code", "message", "hint")} == {
        "code": "error", "message": "It does not work", "hint": "try another day"}


@pytest.mark.parametrize("line", [b"nonsense", b"[]", b"{}", b'{"verb": 5}', b'{"id": 1, "verb": "dance"}', b"[" * 100000])
def test_what_is_no_request_gets_an_error_and_the_connection_lives(served, line):
    client = Client(served.path)
    client.socket.sendall(line + b"\n")
    assert json.loads(client.lines.readline())["error"]["code"] == "bad-request"
    assert "ok" in client.ask("status")


def test_a_defect_in_a_verb_ends_neither_the_domain_nor_the_connection(served, capfd):
    client = Client(served.path)
    assert client.ask("defect")["error"]["message"].startswith("An internal error of the domain: ZeroDivisionError: ")
    assert "ok" in client.ask("status")
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_descriptors_come_with_a_request_and_are_closed_when_nobody_takes_them(served, tmp_path):
    client = Client(served.path)
    with open(tmp_path / "sent", "w") as sent:
        for _ in range(3):
            socket.send_fds(client.socket, [b'{"id": 1, "verb": "count"}\n'], [sent.fileno()] * 2)
            assert json.loads(client.lines.readline()) == {"id": 1, "ok": {"files": 2}}
        assert client.ask("count")["ok"] == {"files": 0}
        assert opened(sent.name) == 1


def opened(path):
    """How often this process has the file open; what other threads close meanwhile is none of it."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(f"/proc/self/fd/{fd}") == path
    return count


def test_too_many_descriptors_cost_the_connection(served):
    client = Client(served.path)
    for _ in range(5):
        socket.send_fds(client.socket, [b" "], [0] * 16)
    assert client.lines.readline() == b""
    assert "ok" in Client(served.path).ask("status")


def test_an_endless_line_costs_the_connection_only(served):
    client = Client(served.path)
    with pytest.raises(OSError):
        for _ in range(2 * LINE_MOST // 65536 + 4):
            client.socket.sendall(b"x" * 65536)
        assert client.socket.recv(1) == b""
        raise BrokenPipeError
    assert "ok" in Client(served.path).ask("status")


def test_subscribers_hear_events_and_others_do_not(served):
    subscriber, other = Client(served.path), Client(served.path)
    subscriber.ask("subscribe")
    other.ask("status")
    served.call(lambda: served.server.publish({"state": "paused"}))
    assert json.loads(subscriber.lines.readline()) == {"event": {"state": "paused"}}
    assert other.ask("status")["ok"] == {"state": "running"}


def test_a_subscriber_that_never_reads_is_let_go(served):
    subscriber = Client(served.path)
    subscriber.ask("subscribe")
    event = {"filler": "x" * 100_000}
    served.call(lambda: [served.server.publish(event) for _ in range(2 * BACKLOG_MOST // 100_000)])
    asker = Client(served.path)                        # kept: it hangs up when it is forgotten
    assert "ok" in asker.ask("status")
    assert len(served.server.connections) == 1


def test_a_console_shows_what_was_said_and_carries_both_ways(served):
    served.backend.say(b"login: ")
    served.call(lambda: None)
    client = Client(served.path)
    assert client.ask("console")["ok"] == {"device": "serial0"}
    assert client.lines.read1(100) == b"login: "
    client.socket.sendall(b"root\r")
    served.backend.say(b"root")
    assert client.lines.read1(100) == b"root"
    served.call(lambda: None)
    assert served.backend.received == b"root\r"


def test_a_second_console_is_told_who_has_it_and_may_take_it(served):
    first, second = Client(served.path), Client(served.path)
    first.ask("console")
    refused = second.ask("console")["error"]
    assert refused["code"] == "console-busy"
    assert str(os.getpid()) in refused["message"]
    assert "ok" in second.ask("console", force=True)
    assert b"took this console over" in first.lines.read1(200)
    served.backend.say(b"hello")
    assert second.lines.read1(100) == b"hello"
    second.socket.close()
    second.lines.close()
    for _ in range(100):                                # the server sees the end of file in a round of its own
        third = Client(served.path)
        if "ok" in third.ask("console"):
            break
        third.socket.close()
    else:
        pytest.fail("the console was not given back")


def test_scrollback_is_bounded(served):
    served.backend.say(b"x" * (3 * SCROLLBACK))
    served.call(lambda: None)
    served.call(lambda: None)
    assert len(served.port.scrollback) == SCROLLBACK


def test_a_guest_that_does_not_read_gets_its_input_later(served):
    served.backend.room = 2
    served.call(lambda: served.port.type(b"hello"))
    assert served.backend.received == b"he"
    served.call(lambda: setattr(served.backend, "room", 100))
    served.call(served.port.feed)
    assert served.backend.received == b"hello"


def test_a_stopped_terminal_holds_the_output_and_loses_nothing():
    loop, backend = Loop(), FakeBackend()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    port = ConsolePort(loop, "serial0", backend, Sink(writer))
    said = bytes(range(256)) * 1024
    backend.say(said)
    port.output_ready(0)
    assert backend.fd not in loop.callbacks            # no more is taken until the terminal goes on
    seen = b""
    while len(seen) < len(said):
        seen += os.read(reader, 65536)
        if port.unshown:
            port.push()
    assert seen == said
    assert backend.fd in loop.callbacks


def test_a_sink_that_went_away_is_forgotten():
    loop, backend = Loop(), FakeBackend()
    reader, writer = os.pipe()
    port = ConsolePort(loop, "serial0", backend, Sink(writer))
    os.close(reader)
    port.show(b"anybody there?")
    port.show(b"no")
    assert port.sink.output == NOBODY


def test_a_fifo_as_file_wants_a_reader_and_waits_for_none(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    section: Any = SimpleNamespace(type="file", path=str(path), log=str(path), heading="[serial 0]")
    for opening in (open_sink, open_log):
        with pytest.raises(HostError, match="No such device or address") as caught:
            opening(section)
        assert caught.value.hint == "a FIFO wants somebody who reads it"
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    loop, backend = Loop(), FakeBackend()
    port = ConsolePort(loop, "serial0", backend, open_sink(section), open_log(section))
    port.show(bytes(1 << 20))                          # it reads nothing, so this would wait for ever
    assert port.unshown and backend.fd not in loop.callbacks
    port.drain(0)
    os.close(reader)


def test_a_file_on_a_full_disk_goes_on_when_there_is_room(monkeypatch):
    loop, backend = Loop(), FakeBackend()
    reader, writer = os.pipe()
    port = ConsolePort(loop, "serial0", backend, Sink(writer))
    with monkeypatch.context() as full:
        full.setattr(os, "write", failing(errno.ENOSPC))
        port.show(b"lost")
    assert not port.unshown and backend.fd in loop.callbacks, "the guest waits for no disk"
    port.show(b"kept")
    assert os.read(reader, 100) == b"kept"


def failing(number):
    def fail(*_arguments):
        raise OSError(number, os.strerror(number))
    return fail


def test_a_client_for_whom_no_descriptor_is_left_is_served_later(tmp_path):
    loop, listener = Loop(), listen(str(tmp_path / "s"))
    server = ControlServer(loop, listener, {})
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(tmp_path / "s"))
    with nothing_left():
        server.accept(0)
    assert not server.connections
    assert listener.fileno() not in loop.callbacks, "it would be ready for ever"
    timer = loop.timers[0][2]
    timer()
    loop.callbacks[listener.fileno()](0)
    assert len(server.connections) == 1
    server.close()
    timer()                                            # the server is gone meanwhile
    assert not loop.callbacks.keys() - {loop.wake_fd}


def test_a_stopped_terminal_that_goes_away_holds_nothing_up():
    loop, backend = Loop(), FakeBackend()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    port = ConsolePort(loop, "serial0", backend, Sink(writer))
    port.show(bytes(1 << 20))
    assert writer in loop.callbacks and backend.fd not in loop.callbacks
    os.close(reader)
    loop.callbacks[writer](0)
    assert writer not in loop.callbacks, "it would be ready for ever"
    assert backend.fd in loop.callbacks and port.sink.output == NOBODY and not port.unshown


def test_the_debug_port_writes_whole_lines_to_the_log():
    loop, backend = Loop(), FakeBackend()
    lines: list[str] = []
    port = LogPort(loop, backend, lines.append)
    for said in (b"ok c", b"pu: fine\r\nok smp: ", b"fine\n\x1b[2J\xff\n", b"x" * LONGEST_LINE, b"last words"):
        backend.say(said)
        port.output_ready(0)
    assert lines[:3] == ["debug: ok cpu: fine", "debug: ok smp: fine", "debug: \\x1b[2J\\xff"]
    assert lines[3:] == [f"debug: {'x' * LONGEST_LINE}"]
    port.close()
    assert lines[4:] == ["debug: last words"]
    assert backend.fd not in loop.callbacks


def test_listen_takes_the_place_of_a_dead_socket(tmp_path):
    path = str(tmp_path / "s")
    listen(path).close()
    again = listen(path)
    assert os.stat(path).st_mode & 0o777 == 0o600
    again.close()
