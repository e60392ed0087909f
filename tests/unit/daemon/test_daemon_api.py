"""The daemon's API: its queries, refusals in words, the read-only socket, and events as they happen."""
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvmapp import errors
from kvmapp.client import Client, of
from tests.unit.daemon.host import WEB


def test_every_query_answers_as_described(running):
    running.define()
    running.post("web", "start")
    with running.client() as client:
        for path in ("/v1/version", "/v1/daemon", "/v1/node", "/v1/node/memstats", "/v1/capabilities", "/v1/autostart", "/v1/stats",
                     "/v1/domains", of("web"), of("web", "stats"), of("web", "vcpus"), of("web", "config")):
            client.get(path)
        assert len(client.get("/v1/node/cpustats", all=True)["cpus"]) > 1
        assert client.get("/v1/openapi.json")["openapi"] == "3.1.0"
        assert client.get("/v1/stats")["domains"][0]["exits"]["hlt"] == 3
        assert client.post("/v1/daemon/reload")["domains"] == 1


@pytest.mark.parametrize(("method", "path", "body", "words"), [
    ("GET", "/v2/domains", None, "The daemon knows no GET /v2/domains"),
    ("PATCH", "/v1/domains", None, "The daemon knows no PATCH"),
    ("DELETE", "/v1/domains", None, "The daemon knows no DELETE /v1/domains"),
    ("PUT", "/v1", None, "The daemon knows no PUT /v1"),
    ("GET", "/v1/domains?nam=x", None, "nam is not known here"),
    ("GET", "/v1/node/cpustats?cpu=x", None, "cpu = 'x': expected a integer"),
    ("POST", "/v1/domains", {"txt": "x"}, "txt is not known here (known: text"),
    ("POST", "/v1/domains", {}, "either text or config is wanted"),
    ("POST", "/v1/domains", {"text": 5}, "text is 5, not string"),
    ("POST", "/v1/domains", {"text": "x" * (2 << 20)}, "larger than 1024 KiB"),
    ("POST", "/v1/domains", {"text": "#" * 300_000}, "larger than 256 KiB"),
    ("POST", "/v1/domains/x/start", [1], "it is [1], not object")])
def test_bad_requests_are_refused_in_words(running, method, path, body, words):
    with pytest.raises(errors.KvmappError) as caught, Client(running.paths.socket) as client:
        client.request(method, path, body)
    assert words in str(caught.value)


def test_unknown_domain_is_told_with_the_nearest(running):
    running.define()
    with pytest.raises(errors.DomainNotFound) as caught:
        running.domain("wev")
    assert caught.value.message == "failed to get domain 'wev'" and caught.value.hint == "did you mean web?"


def test_read_only_socket_looks_and_touches_nothing(running):
    running.define()
    with running.client(read_only=True) as client:
        assert client.get("/v1/domains")["domains"][0]["name"] == "web"
        assert client.get("/v1/daemon")["access"] == "read-only"
        for attempt in (lambda: client.post(of("web", "start")), lambda: client.delete(of("web")), lambda: client.get(of("web", "log")),
                        lambda: client.post("/v1/domains", text=WEB)):
            with pytest.raises(errors.PermissionDenied):
                attempt()
    assert running.states() == {"web": "shut off"}
    assert os.stat(running.paths.socket).st_mode & 0o777 == 0o660
    assert os.stat(running.paths.read_only_socket).st_mode & 0o777 == 0o666


def test_events_tell_a_life(running):
    with running.client() as listener:
        stream = listener.events()
        listener_ready = threading.Event()
        seen = []

        def listen():
            for event in stream:
                listener_ready.set()
                if event["domain"] == "web" and event["event"] == "lifecycle":
                    seen.append((event["type"], event["detail"]))
                if event["event"] in ("watchdog", "device-added", "device-removed"):
                    seen.append((event["event"], event["detail"]))
                if event["type"] == "Undefined":
                    return
        thread = threading.Thread(target=listen)
        thread.start()
        running.add("knock")
        while not listener_ready.wait(0.05):                # the stream is open when the first event arrives
            running.file("knock").touch()
            running.states()
        running.define()
        running.post("web", "start")
        running.post("web", "suspend")
        running.post("web", "resume")
        mac = running.post("web", "interfaces", settings={"type": "user"})["interface"]["mac"]
        running.post("web", "interfaces", "detach", interface=mac)
        running.told("web", "test_watchdog", action="none")
        running.told("web", "test_watchdog", action="x" * 64)           # no word of ours: dropped
        running.post("web", "shutdown", timeout=60)
        with running.client() as client:
            client.delete(of("web"))
        thread.join(60)
    assert seen == [("Defined", "Added"), ("Started", "Booted"), ("Suspended", "Paused"), ("Resumed", "Unpaused"),
                    ("device-added", "net0"), ("device-removed", "net0"), ("watchdog", "none"), ("Stopped", "Shutdown"),
                    ("Undefined", "Removed")]


def test_wait_answers_when_the_state_comes(running):
    running.define()
    with running.client() as client:
        assert client.get(of("web", "wait"), state="running", timeout=0.05)["reached"] is False
    with ThreadPoolExecutor() as clients:
        waiting = clients.submit(running.get, "web", "wait", state="running,crashed", timeout=60)
        running.post("web", "start")
        answer = waiting.result()
    assert answer["reached"] and answer["domain"]["state"] == "running"
    with running.client() as client, pytest.raises(errors.UsageError):
        client.get(of("web", "wait"), state="nonsense")
