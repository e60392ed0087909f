"""Requests: their client or the daemon is killed in the middle of them, two ask for the same, one does not read what it asked for.

After each of them every domain's state is the true one and has a way out.
"""
import contextlib
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvmapp import errors
from kvmapp.client import ConnectionGone, of
from tests.unit.daemon.host import UUID

REQUESTS = {
    "define": ("POST", "/v1/domains", {"text": "name = b\nmemory = 64 MiB\n", "file": "/x.conf"}),
    "undefine": ("DELETE", of("a"), None),
    "edit": ("PUT", of("a", "config"), {"text": "name = a\nmemory = 128 MiB\n"}),
    "shutdown": ("POST", of("a", "shutdown"), {}),
}


def whole_request(method, path, body):
    data = b"" if body is None else json.dumps(body).encode()
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def leftovers(host):
    """Files that no domain has: while one is written, or for ever when its writer was killed."""
    return [name for name in os.listdir(host.paths.domains) if not name.endswith(".conf") and name != "autostart"]


def is_done(host, verb):
    """Whether the verb took effect, wholly; anything between is an error, but for a process that is just ending and has no socket
    any more."""
    host.eventually(lambda: "no response" not in host.states().values())
    states = host.states()
    assert set(states) <= {"a", "b"} and set(states.values()) <= {"shut off", "running"}
    if verb == "define":
        return "b" in states
    if verb == "undefine":
        return "a" not in states
    if verb == "edit":
        memory = host.domain("a")["memory"]
        assert memory in (64 << 20, 128 << 20)
        return memory == 128 << 20
    return states["a"] == "shut off"


@pytest.mark.parametrize("verb", REQUESTS)
def test_client_killed_when_it_had_asked_for(running, verb):
    running.add("a")
    if verb == "shutdown":
        running.post("a", "start")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(running.paths.socket)
        client.sendall(whole_request(*REQUESTS[verb]))
    running.eventually(lambda: is_done(running, verb) and not leftovers(running))


@pytest.mark.parametrize("verb", ["define", "edit"])
def test_client_killed_before_it_had_asked_wholly(running, verb):
    running.add("a")
    data = whole_request(*REQUESTS[verb])
    for length in (1, 40, len(data) - 30, len(data) - 1):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(running.paths.socket)
            client.sendall(data[:length])
        assert not is_done(running, verb) and not leftovers(running)


@pytest.mark.parametrize(("verb", "body"), [("start", {}), ("shutdown", {"timeout": 1}), ("destroy", {})])
def test_client_killed_in_the_middle_of_a_verb(running, verb, body):
    """The verb runs on to its end."""
    running.add("a", *(["slow-start"] if verb == "start" else []))
    if verb != "start":
        running.post("a", "start")
    wanted = "running" if verb == "start" else "shut off"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(running.paths.socket)
        client.sendall(whole_request("POST", of("a", verb), body))
        running.eventually(lambda: running.domain("a")["job"] or running.domain("a")["state"] == wanted)
    running.eventually(lambda: running.domain("a")["state"] == wanted and not running.domain("a")["job"])
    if verb == "start":
        running.post("a", "destroy")


@pytest.mark.parametrize("verb", REQUESTS)
def test_daemon_killed_in_the_middle_of(host, verb):
    host.add("a", uuid=UUID)
    host.start()
    host.post("a", "autostart", enabled=True)
    for number in range(6):
        host.add("a", uuid=UUID)
        host.file("b").unlink(missing_ok=True)
        if verb == "shutdown" and host.states()["a"] == "shut off":
            host.post("a", "start")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(host.paths.socket)
            client.sendall(whole_request(*REQUESTS[verb]))
            time.sleep(0.0015 * number)
            host.kill()
        host.start()
        is_done(host, verb)
        assert not leftovers(host)
    if "a" in host.states() and host.states()["a"] == "running":
        host.post("a", "destroy")


@pytest.mark.parametrize("moment", [0.0, 0.005, 0.02, 0.05, 0.2, 0.6])
def test_daemon_killed_in_the_middle_of_a_start(host, moment):
    host.add("a", "slow-start")
    host.start()
    with ThreadPoolExecutor() as clients:
        starting = clients.submit(host.post, "a", "start")
        time.sleep(moment)
        host.kill()
        with contextlib.suppress(errors.KvmappError):
            starting.result()
    host.start()
    host.eventually(lambda: host.domain("a")["state"] in ("running", "shut off"))
    state = host.domain("a")["state"]
    if state == "running":
        assert host.domain("a")["pid"] and host.records()["a"]["pid"] == host.domain("a")["pid"]
        host.post("a", "destroy")
    assert host.records() == {}
    assert host.post("a", "start")["domain"]["state"] == "running"


def test_daemon_killed_between_define_and_answer(host):
    host.start()
    text = "name = a\nmemory = 64 MiB\n"
    for number in range(5):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(host.paths.socket)
            client.sendall(whole_request("POST", "/v1/domains", {"text": text, "file": "/x.conf"}))
            time.sleep(0.002 * number)
            host.kill()
        host.start()
        assert host.states() in ({}, {"a": "shut off"})
        assert not leftovers(host)


def test_client_learns_that_the_daemon_died_over_its_request(host):
    host.patient = False
    host.add("a", "mute")
    host.start()
    with ThreadPoolExecutor() as clients:
        starting = clients.submit(host.post, "a", "start")
        host.eventually(lambda: host.pids())
        host.kill()
        with pytest.raises(ConnectionGone) as caught:
            starting.result()
    assert "repeat it" in caught.value.hint
    host.start()
    assert host.states() == {"a": "no response"}
    host.post("a", "destroy")


def test_two_clients_start_the_same_domain(running):
    running.add("a", "slow-start")
    with ThreadPoolExecutor() as clients:
        starting = [clients.submit(running.post, "a", "start") for _ in range(2)]
    refused, started = sorted(starting, key=lambda one: one.exception() is None)
    assert started.result()["domain"]["state"] == "running"
    with pytest.raises(errors.KvmappError) as caught:
        refused.result()
    assert caught.value.code in ("job-running", "domain-running")


def test_event_reader_that_does_not_read_is_dropped(running):
    running.add("a")
    running.post("a", "start")
    with socket.socket(socket.AF_UNIX) as lazy:
        lazy.settimeout(60)
        lazy.connect(running.paths.socket)
        lazy.sendall(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        lazy.recv(15)
        with running.client() as client:
            for _ in range(1500):
                client.post(of("a", "vcpus"), count=1, live=True)           # two events: the job begins, the job ends
        assert running.states() == {"a": "running"}
        data = b""
        while not data.endswith(b"\r\n0\r\n\r\n"):                        # the end of the stream
            data += lazy.recv(65536)
        assert data.count(b'"event": "lost"') == 1


def test_no_port_is_open(running):
    """Everything goes by UNIX sockets: no TCP, no UDP, neither of the daemon nor of its zygote."""
    with running.client() as client:
        pids = [running.process.pid, client.get("/v1/daemon")["zygote"]]
    mine = set()
    for pid in pids:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):                # closed while we look
                mine.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    for table in ("tcp", "tcp6", "udp", "udp6", "raw", "packet"):
        path = Path("/proc/net", table)
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            inode = line.split()[8 if table == "packet" else 9]
            assert f"socket:[{inode}]" not in mine
