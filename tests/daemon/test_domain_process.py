"""Domain processes and their zygote: killed, not started, lying, or saying nothing; it is told in words and hurts no other domain."""
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvmapp import errors
from kvmapp.daemon.process import start_time_of
from tests.unit.daemon.host import IS_ROOT


def test_zygote_killed(host):
    host.add("a")
    host.add("b")
    host.start()
    pid = host.post("a", "start")["domain"]["pid"]
    with host.client() as client:
        os.kill(client.get("/v1/daemon")["zygote"], signal.SIGKILL)
    assert host.post("b", "start")["domain"]["state"] == "running"
    assert host.domain("a")["pid"] == pid
    os.kill(pid, signal.SIGKILL)                                         # its parent is gone: nobody waits for it but init
    host.eventually(lambda: host.domain("a")["state"] == "shut off")
    assert host.domain("a")["reason"] == "killed"


def test_zygote_killed_in_the_middle_of_a_start(host):
    host.add("slow", "slow-start")
    host.start()
    with ThreadPoolExecutor() as clients:
        starting = clients.submit(host.post, "slow", "start")
        host.eventually(lambda: host.pids())
        with host.client() as client:
            os.kill(client.get("/v1/daemon")["zygote"], signal.SIGKILL)
        assert starting.result()["domain"]["state"] == "running"
    assert host.states() == {"slow": "running"}


@pytest.mark.parametrize(("do", "reason", "words"), [
    (lambda host, pid: os.kill(pid, signal.SIGKILL), "killed", "killed by signal 9"),
    (lambda host, pid: host.tell("a", "test_abort"), "failed", "crashed (signal 6)"),
    (lambda host, pid: host.tell("a", "test_crash"), "crashed", "the guest crashed"),
    (lambda host, pid: host.tell("a", "shutdown"), "shutdown", "the guest powered off")])
def test_ways_to_end_are_told_apart(running, do, reason, words):
    running.add("a")
    connection = do(running, running.post("a", "start")["domain"]["pid"])
    running.eventually(lambda: running.domain("a")["state"] == "shut off")
    one = running.domain("a")
    assert one["reason"] == reason and words in one["ending"]["text"] == one["text"]
    if connection:
        connection.close()
    if reason in ("killed", "failed"):                                  # the daemon speaks for it
        assert f"shut off: {one['text']}" in Path(running.paths.domain_log("a")).read_text()


def test_start_that_fails_leaves_nothing(running):
    running.add("bad", "fail")
    with pytest.raises(errors.KvmappError) as caught:
        running.post("bad", "start")
    assert (caught.value.message, caught.value.hint) == ("Cannot open kernel: it is made of cheese", "take another")
    assert running.domain("bad")["state"] == "shut off" and running.records() == {}
    assert not os.path.lexists(running.paths.control("bad"))


def test_start_that_meets_a_defect_says_where_to_look(running):
    running.add("bad", "raise")
    with pytest.raises(errors.KvmappError) as caught:
        running.post("bad", "start")
    assert caught.value.hint == f"see {running.paths.domain_log('bad')}"
    log = Path(running.paths.domain_log("bad")).read_text()
    assert "RuntimeError: a defect, made for the test" in log and "not started" in log
    assert running.domain("bad")["state"] == "shut off"


def test_mute_domain_shows_as_no_response_and_everything_else_goes_on(host):
    host.options, host.patient = ["--heartbeat", "0.1"], False
    host.add("a")
    host.add("b")
    host.start()
    pid = host.post("a", "start")["domain"]["pid"]
    host.post("b", "start")
    os.kill(pid, signal.SIGSTOP)
    host.eventually(lambda: host.domain("a")["state"] == "no response")
    host.eventually(lambda: host.domain("b")["state"] == "running")     # on a busy machine it may be late as well, for a moment
    host.post("b", "suspend")
    host.post("b", "resume")
    with host.client() as client:
        assert [one["name"] for one in client.get("/v1/stats")["domains"]] == ["a", "b"]
        host.eventually(lambda: client.get("/v1/stats")["domains"][1]["exits"].get("io"))
    os.kill(pid, signal.SIGCONT)
    host.eventually(lambda: host.domain("a")["state"] == "running")
    os.kill(pid, signal.SIGSTOP)
    host.eventually(lambda: host.domain("a")["state"] == "no response")
    host.kill()
    host.start()                                                        # a daemon that never heard it speak
    host.eventually(lambda: host.states() == {"a": "no response", "b": "running"})
    assert host.domain("a")["pid"] == pid
    ended = host.post("a", "destroy")["domain"]
    assert (ended["state"], ended["reason"]) == ("shut off", "destroyed") and not start_time_of(pid)
    assert host.post("a", "start")["domain"]["state"] == "running"


def test_a_domain_that_is_late_with_its_figures_is_not_mute(host):
    host.options, host.patient = ["--heartbeat", "600"], False
    host.add("a")
    host.start()
    pid = host.post("a", "start")["domain"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    with host.client() as client:
        assert client.get("/v1/stats")["domains"][0]["name"] == "a"
    assert host.domain("a")["state"] == "running"
    os.kill(pid, signal.SIGCONT)


def test_verb_to_a_mute_domain_fails_in_words(host):
    host.patient = False
    host.add("a")
    host.start()
    pid = host.post("a", "start")["domain"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(errors.NoResponse) as caught:
        host.post("a", "suspend")
    assert caught.value.message == f"Domain 'a' does not answer (pid {pid})" and "destroy a" in caught.value.hint
    assert host.domain("a")["state"] == "no response"
    with pytest.raises(errors.NoResponse):
        host.post("a", "destroy", graceful=True)
    host.post("a", "destroy")


def test_start_of_a_mute_domain_can_be_destroyed(running):
    running.add("a", "mute")
    with ThreadPoolExecutor() as clients:
        starting = clients.submit(running.post, "a", "start")
        running.eventually(lambda: running.pids())
        job = running.eventually(lambda: running.domain("a")["job"])
        assert (job["verb"], job["progress"]) == ("start", "waiting for its process")
        assert job["who"].startswith("root (pid " if IS_ROOT else "")
        with pytest.raises(errors.JobRunning) as caught:
            running.post("a", "start")
        assert caught.value.verb == "start" and "holds it since" in caught.value.message
        assert running.post("a", "destroy")["domain"]["state"] == "shut off"
        with pytest.raises(errors.KvmappError, match="destroyed meanwhile by") as ended:
            starting.result()
    assert ended.value.code == "job-broken"
    assert running.records() == {}


@pytest.mark.parametrize("text", ["garbage\n", "[1]\n", '{"event": {"state": 5, "reason": [1]}}\n', '{"id": "x", "ok": 1}\n',
                                  '{"event": {"state": "running", "reason": "' + "x" * 200 + '"}}\n', "{" * 3000 + "\n",
                                  '{"event": {"type": "lifecycle", "state": "\\u001b[2J", "reason": "\\u001b[31m"}}\n'])
def test_a_domain_process_that_lies_harms_only_itself(host, text):
    host.options = ["--heartbeat", "0.1"]
    host.add("evil")
    host.add("good")
    host.start()
    host.post("evil", "start")
    host.post("good", "start")
    host.told("evil", "test_garbage", text=text)
    for _ in range(3):
        assert host.states()["good"] == "running"
        assert host.domain("evil")["reason"].isprintable() and len(host.domain("evil")["reason"]) < 64
    host.get("evil", "stats")
    assert host.post("evil", "destroy")["domain"]["state"] == "shut off"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"reason": 5, "text": ["x"], "time": "now", "exit": "x"}', b"\xff" * 100,
                                     b'{"reason": "shutdown", "text": "' + b"x" * 100_000 + b'"}', b'{"text": "\\u001b[2Jevil"}',
                                     pytest.param(b'{"time": 1' + b"0" * 400 + b"}", id="huge"),
                                     b'{"time": Infinity}', b'{"time": NaN}', b'{"time": -1e300}'])
def test_endings_are_not_believed_blindly(host, content):
    host.add("a")
    folder = Path(host.paths.domain_own("a"))
    folder.mkdir(parents=True)
    (folder / "a.end").write_bytes(content)
    host.start()
    one = host.domain("a")
    assert one["state"] == "shut off" and one["reason"] in ("unknown", "shutdown") and (one["text"] or "").isprintable()
    assert one["since"] is None or time.gmtime(one["since"]).tm_year >= 1970


def test_ending_that_is_a_link_is_not_followed(host):
    secret = Path(host.root, "secret")
    secret.write_text('{"reason": "shutdown", "text": "secret"}')
    host.add("a")
    folder = Path(host.paths.domain_own("a"))
    folder.mkdir(parents=True)
    (folder / "a.end").symlink_to(secret)
    host.start()
    assert host.domain("a")["text"] is None
