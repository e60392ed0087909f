"""What goes wrong: processes killed in the middle, files half written, disks full, domains that lie or say nothing.

After each of them every domain's state is the true one and has a way out, and no guest noticed that the daemon was gone.
"""
import contextlib
import json
import os
import signal
import socket
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from kvmapp import errors
from kvmapp.client import Client, ConnectionGone, of
from kvmapp.daemon.process import start_time_of
from tests.unit.daemon.host import GUEST, IS_ROOT

KILLS = int(os.environ.get("KVMAPP_TEST_KILLS", "8"))
root_only = pytest.mark.skipif(not IS_ROOT, reason="needs root")


def test_running_domains_are_found_by_the_next_daemon(host):
    host.add("a")
    host.add("b")
    host.start()
    before = {name: host.post(name, "start")["domain"] for name in ("a", "b")}
    host.post("b", "suspend")
    host.kill()
    assert start_time_of(before["a"]["pid"]) and start_time_of(before["b"]["pid"])
    host.start()
    assert host.states() == {"a": "running", "b": "paused"}
    for name in ("a", "b"):
        one = host.domain(name)
        assert [one[key] for key in ("pid", "id", "uuid", "started")] == [before[name][key] for key in ("pid", "id", "uuid", "started")]
    assert host.post("b", "resume")["domain"]["state"] == "running"
    assert host.post("a", "shutdown", timeout=10)["domain"]["reason"] == "shutdown"
    host.add("c")
    assert host.post("c", "start")["domain"]["id"] == 3


def test_clean_stop_leaves_guests_running(host):
    host.add("a")
    host.start()
    pid = host.post("a", "start")["domain"]["pid"]
    host.stop()
    assert start_time_of(pid) and not os.path.lexists(host.paths.socket)
    assert host.told("a", "status")["state"] == "running"              # its own socket answers while no daemon is there
    host.start()
    assert host.domain("a")["pid"] == pid


def test_domain_that_ended_while_no_daemon_was_there(host):
    host.add("gentle")
    host.add("killed")
    host.start()
    pids = {name: host.post(name, "start")["domain"]["pid"] for name in ("gentle", "killed")}
    host.kill()
    host.told("gentle", "shutdown")
    os.kill(pids["killed"], signal.SIGKILL)
    for pid in pids.values():
        host.eventually(lambda pid=pid: not start_time_of(pid))
    host.start()
    assert host.states() == {"gentle": "shut off", "killed": "shut off"}
    assert host.domain("gentle")["reason"] == "shutdown" and host.domain("killed")["reason"] == "killed"
    assert host.records() == {}
    host.post("killed", "start")


@pytest.mark.timeout(600)
def test_daemon_killed_again_and_again_under_load(host):
    """No guest's counter ever stops, no process is another one, and every state is right afterwards."""
    names = ["a", "b", "c", "d"]
    for name in [*names, "busy"]:
        host.add(name)
    host.start()
    pids = {name: host.post(name, "start")["domain"]["pid"] for name in names}
    stop = threading.Event()
    loads = [threading.Thread(target=load, args=(host, stop, verbs)) for verbs in
             ((("busy", "start", {}), ("busy", "destroy", {})),
              (("b", "suspend", {}), ("b", "resume", {})), (("c", "autostart", {"enabled": True}), ("c", "autostart", {"enabled": False})),
              (("d", "description", {"title": "x", "config": True}), ("d", "description", {"title": "y", "config": True})))]
    for thread in loads:
        thread.start()
    try:
        for number in range(KILLS):
            time.sleep(0.05 * (number % 4))
            host.kill()
            host.start()
    finally:
        stop.set()
        for thread in loads:
            thread.join(30)
    if host.domain("b")["state"] == "paused":
        host.post("b", "resume")
    states = host.states()
    assert [states[name] for name in names] == ["running"] * 4 and states["busy"] in ("running", "shut off")
    assert {name: host.domain(name)["pid"] for name in names} == pids
    for name in ("a", "c", "d"):
        times, seen = host.beats(name)
        assert seen == {pids[name]}
        assert max(after - before for before, after in pairwise(times)) < 2.0
    if states["busy"] == "running":
        host.post("busy", "destroy")
    host.post("busy", "start")
    assert host.domain("d")["title"] in (None, "x", "y") and host.domain("d")["state"] != "broken"
    assert sorted(os.listdir(host.paths.records)) == sorted(f"{name}.json" for name in [*names, "busy"])


def load(host, stop, verbs):
    while not stop.is_set():
        for name, verb, body in verbs:
            with contextlib.suppress(errors.KvmappError, OSError), Client(host.paths.socket, timeout=20) as client:
                client.post(of(name, verb), **body)
        with contextlib.suppress(errors.KvmappError), Client(host.paths.socket, timeout=20) as client:
            client.get("/v1/domains")
        time.sleep(0.01)


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
    starting = threading.Thread(target=lambda: host.post("slow", "start"))
    starting.start()
    host.eventually(lambda: host.pids())
    with host.client() as client:
        os.kill(client.get("/v1/daemon")["zygote"], signal.SIGKILL)
    starting.join(20)
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
    host.options = ["--heartbeat", "0.1"]
    host.add("a")
    host.add("b")
    host.start()
    pid = host.post("a", "start")["domain"]["pid"]
    host.post("b", "start")
    os.kill(pid, signal.SIGSTOP)
    host.eventually(lambda: host.domain("a")["state"] == "no response")
    assert host.domain("b")["state"] == "running"
    host.post("b", "suspend")
    host.post("b", "resume")
    with host.client() as client:
        stats = client.get("/v1/stats")["domains"]
        assert [one["name"] for one in stats] == ["a", "b"] and stats[1]["exits"]["io"] > 0
    os.kill(pid, signal.SIGCONT)
    host.eventually(lambda: host.domain("a")["state"] == "running")
    os.kill(pid, signal.SIGSTOP)
    host.eventually(lambda: host.domain("a")["state"] == "no response")
    host.kill()
    host.start()                                                        # a daemon that never heard it speak
    assert host.states() == {"a": "no response", "b": "running"} and host.domain("a")["pid"] == pid
    ended = host.post("a", "destroy")["domain"]
    assert (ended["state"], ended["reason"]) == ("shut off", "destroyed") and not start_time_of(pid)
    assert host.post("a", "start")["domain"]["state"] == "running"


def test_verb_to_a_mute_domain_fails_in_words(running):
    running.add("a")
    pid = running.post("a", "start")["domain"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(errors.NoResponse) as caught:
        running.post("a", "suspend")
    assert caught.value.message == f"Domain 'a' does not answer (pid {pid})" and "destroy a" in caught.value.hint
    assert running.domain("a")["state"] == "no response"
    with pytest.raises(errors.NoResponse):
        running.post("a", "destroy", graceful=True)
    running.post("a", "destroy")


def test_start_of_a_mute_domain_can_be_destroyed(running):
    running.add("a", "mute")
    failures = []

    def start():
        try:
            running.post("a", "start")
        except errors.KvmappError as error:
            failures.append(error)
    thread = threading.Thread(target=start)
    thread.start()
    running.eventually(lambda: running.pids())
    job = running.eventually(lambda: running.domain("a")["job"])
    assert (job["verb"], job["progress"]) == ("start", "waiting for its process") and job["who"].startswith("root (pid " if IS_ROOT else "")
    with pytest.raises(errors.JobRunning) as caught:
        running.post("a", "start")
    assert caught.value.verb == "start" and "holds it since" in caught.value.message
    assert running.post("a", "destroy")["domain"]["state"] == "shut off"
    thread.join(20)
    assert failures[0].code == "job-broken" and "destroyed meanwhile by" in failures[0].message
    assert running.records() == {}


def test_two_clients_start_the_same_domain(running):
    running.add("a", "slow-start")
    outcomes = []

    def start():
        try:
            outcomes.append(running.post("a", "start")["domain"]["state"])
        except errors.KvmappError as error:
            outcomes.append(error.code)
    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(outcomes) in (["job-running", "running"], ["domain-running", "running"])


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
    """Whether the verb took effect, wholly; anything between is an error."""
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


@pytest.mark.parametrize("verb", REQUESTS)
def test_daemon_killed_in_the_middle_of(host, verb):
    host.add("a", uuid="00000000-0000-4000-8000-000000000001")
    host.start()
    host.post("a", "autostart", enabled=True)
    for number in range(6):
        host.add("a", uuid="00000000-0000-4000-8000-000000000001")
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


@pytest.mark.parametrize("jump", [-3600.0 * 24 * 365, 3600.0 * 24 * 365])
def test_clock_that_jumped_between_start_and_end(running, jump):
    running.add("a")
    running.post("a", "start")
    running.told("a", "test_clock", jump=jump)
    ended = running.post("a", "shutdown", timeout=10)["domain"]
    assert (ended["reason"], ended["text"]) == ("shutdown", "the guest powered off")


@pytest.mark.parametrize("jump", [-3600 * 24 * 365, 3600 * 24 * 365])
def test_files_from_a_time_when_the_clock_was_wrong(running, jump):
    """They are read when they change, whichever way their time goes, and UUIDs are stored in the end."""
    running.add("a")
    uuid = running.domain("a")["uuid"]
    when = time.time() + jump
    running.file("a").write_text(f"name = a\nuuid = {uuid}\nmemory = 128 MiB\n")
    os.utime(running.file("a"), (when, when))
    assert running.domain("a")["memory"] == 128 << 20
    running.file("b").write_text("name = b\nmemory = 64 MiB\n")
    os.utime(running.file("b"), (when, when))
    assert f"uuid = {running.domain('b')['uuid']}" in running.file("b").read_text()


def test_no_port_is_open(running):
    """Everything goes by UNIX sockets: no TCP, no UDP, neither of the daemon nor of its zygote."""
    with running.client() as client:
        pids = [running.process.pid, client.get("/v1/daemon")["zygote"]]
    mine = {os.readlink(f"/proc/{pid}/fd/{fd}") for pid in pids for fd in os.listdir(f"/proc/{pid}/fd")
            if os.path.lexists(f"/proc/{pid}/fd/{fd}")}
    for table in ("tcp", "tcp6", "udp", "udp6", "raw", "packet"):
        path = Path("/proc/net", table)
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            inode = line.split()[8 if table == "packet" else 9]
            assert f"socket:[{inode}]" not in mine


@pytest.mark.parametrize(("verb", "body"), [("start", {}), ("shutdown", {"timeout": 1}), ("destroy", {})])
def test_client_killed_in_the_middle_of_a_verb(running, verb, body):
    """The verb runs on to its end, or was never begun."""
    running.add("a", *(["slow-start"] if verb == "start" else []))
    if verb != "start":
        running.post("a", "start")
    data = json.dumps(body).encode()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(running.paths.socket)
        client.sendall(f"POST {of('a', verb)} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        running.eventually(lambda: running.domain("a")["job"] or running.domain("a")["state"] != "running")
    wanted = "running" if verb == "start" else "shut off"
    running.eventually(lambda: running.domain("a")["state"] == wanted and not running.domain("a")["job"])
    if verb == "start":
        running.post("a", "destroy")


@pytest.mark.parametrize("moment", [0.0, 0.005, 0.02, 0.05, 0.2, 0.6])
def test_daemon_killed_in_the_middle_of_a_start(host, moment):
    host.add("a", "slow-start")
    host.start()

    def start():
        with contextlib.suppress(errors.KvmappError):
            host.post("a", "start")
    thread = threading.Thread(target=start)
    thread.start()
    time.sleep(moment)
    host.kill()
    thread.join(20)
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
    data = json.dumps({"text": text, "file": "/x.conf"}).encode()
    for number in range(5):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(host.paths.socket)
            client.sendall(f"POST /v1/domains HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
            time.sleep(0.002 * number)
            host.kill()
        host.start()
        assert host.states() in ({}, {"a": "shut off"})
        assert [name for name in os.listdir(host.paths.domains) if name not in ("a.conf", "autostart")] == []


def test_client_learns_that_the_daemon_died_over_its_request(host):
    host.add("a", "mute")
    host.start()
    failures = []

    def start():
        try:
            host.post("a", "start")
        except errors.KvmappError as error:
            failures.append(error)
    thread = threading.Thread(target=start)
    thread.start()
    host.eventually(lambda: host.pids())
    host.kill()
    thread.join(20)
    assert type(failures[0]) is ConnectionGone and "repeat it" in failures[0].hint
    host.start()
    assert host.states() == {"a": "no response"}
    host.post("a", "destroy")


def test_rename_that_was_cut_short_is_finished(host):
    host.add("old", uuid="00000000-0000-4000-8000-000000000001")
    note = Path(host.paths.domains, ".rename")
    note.write_text(json.dumps({"old": "old", "new": "new"}))
    host.start()                                                        # cut before the new file stood: nothing has happened
    assert host.states() == {"old": "shut off"} and not note.exists()
    host.post("old", "autostart", enabled=True)
    with host.client() as client:
        host.eventually(lambda: client.get("/v1/autostart")["state"] == "done")
    host.kill()
    note.write_text(json.dumps({"old": "old", "new": "new"}))
    host.file("new").write_text(host.file("old").read_text().replace("name = old", "name = new"))
    host.start()                                                        # cut after it: the rest is done
    assert host.states() == {"new": "shut off"} and host.domain("new")["autostart"]
    assert not note.exists() and not host.file("old").exists()


def test_what_a_killed_writer_left_is_cleared(host):
    host.add("a")
    Path(host.paths.domains, ".kvmapp-tmp-0123456789ab").write_text("half a fi")
    host.start()
    assert sorted(os.listdir(host.paths.domains)) == ["a.conf", "autostart"] and host.states() == {"a": "shut off"}


@pytest.mark.parametrize("content", ["", "name = a", "name = a\nmemory = 64 M", "\0\0\0", "name = a\n[disk vda\n", "ÿþ", "[" * 5000])
def test_half_written_and_unreadable_files_stop_nobody(running, content):
    running.add("good")
    running.file("a").write_text(content)
    states = running.states()
    assert states["good"] == "shut off" and states["a"] in ("broken", "shut off")
    assert (states["a"] == "shut off") == (content == "name = a\nmemory = 64 M")


def test_odd_files_in_the_folder(running):
    os.mkfifo(running.file("fifo"))
    running.file("dir").mkdir()
    running.file("gone").symlink_to("/nonexistent")
    Path(os.fsdecode(os.path.join(os.fsencode(running.paths.domains), b"caf\xe9.conf"))).write_text("name = x\nmemory = 64\n")
    try:
        states = running.states()
        assert states == {"fifo": "broken", "dir": "broken", "gone": "broken", "caf\\xe9": "broken"}
    finally:
        running.file("dir").rmdir()


def test_two_files_with_one_uuid(running):
    uuid = "00000000-0000-4000-8000-000000000001"
    running.add("b", uuid=uuid)
    assert running.states() == {"b": "shut off"}
    running.add("a", uuid=uuid)                                         # the copy comes first by name, and is the broken one
    assert running.states() == {"a": "broken", "b": "shut off"}
    assert f"uuid = {uuid}: domain 'b' has it already" in running.domain("a")["text"]
    running.file("b").unlink()
    assert running.states() == {"a": "shut off"}


@root_only
def test_full_disk_under_etc(host):
    with small_disk(host.paths.config):
        host.write_settings()
        os.makedirs(host.paths.domains)
        host.add("a", uuid="00000000-0000-4000-8000-000000000001")
        host.start()
        before = host.file("a").read_text()
        fill(Path(host.paths.config, "filler"))
        with host.client() as client:
            for attempt in (lambda: client.post("/v1/domains", text="name = new\nmemory = 64\n" + "# more\n" * 1500, file="/x.conf"),
                            lambda: client.post(of("a", "description"), title="x" * 150, config=True),
                            lambda: client.post(of("a", "rename"), name="b")):
                with pytest.raises(errors.ConfigError) as caught:
                    attempt()
                assert "No space left on device" in str(caught.value)
        assert host.file("a").read_text() == before and host.states() == {"a": "shut off"}
        assert host.post("a", "start")["domain"]["state"] == "running"
        host.post("a", "destroy")
        host.stop()


@root_only
def test_full_disk_under_log(host):
    os.makedirs(host.paths.log)
    with small_disk(host.paths.log):
        fill(Path(host.paths.log, "filler"))
        host.add("a")
        host.start()
        assert host.post("a", "start")["domain"]["state"] == "running"
        host.post("a", "destroy")
        host.stop()


@contextlib.contextmanager
def small_disk(folder):
    import subprocess
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], check=False).returncode:
        pytest.skip("this host lets nobody mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(path):
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)


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
                                     b'{"reason": "shutdown", "text": "' + b"x" * 100_000 + b'"}', b'{"text": "\\u001b[2Jevil"}'])
def test_endings_are_not_believed_blindly(host, content):
    host.add("a")
    folder = Path(host.paths.domain_own("a"))
    folder.mkdir(parents=True)
    (folder / "a.end").write_bytes(content)
    host.start()
    one = host.domain("a")
    assert one["state"] == "shut off" and one["reason"] in ("unknown", "shutdown") and (one["text"] or "").isprintable()


def test_ending_that_is_a_link_is_not_followed(host):
    secret = Path(host.root, "secret")
    secret.write_text('{"reason": "shutdown", "text": "secret"}')
    host.add("a")
    folder = Path(host.paths.domain_own("a"))
    folder.mkdir(parents=True)
    (folder / "a.end").symlink_to(secret)
    host.start()
    assert host.domain("a")["text"] is None


def test_record_is_lost_but_the_domain_is_not(host):
    host.add("a")
    host.start()
    pid = host.post("a", "start")["domain"]["pid"]
    host.kill()
    Path(host.paths.records, "a.json").unlink()
    host.start()
    one = host.domain("a")
    assert one["state"] == "running" and one["pid"] == pid and one["id"] == 2
    assert host.post("a", "destroy")["domain"]["state"] == "shut off"


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"name": "a"}', "\0"])
def test_garbled_records_stop_nobody(host, content):
    host.add("a")
    os.makedirs(host.paths.records)
    Path(host.paths.records, "a.json").write_text(content)
    host.start()
    assert host.states() == {"a": "shut off"}
    host.post("a", "start")


def test_pid_of_a_record_that_is_another_process_by_now(host):
    """A record from before the host's reboot on a /run that outlived it: nobody may be harmed by its number."""
    host.add("a")
    host.start()
    host.post("a", "start")
    record = host.records()["a"]
    host.post("a", "destroy")
    host.kill()
    victim = os.getpid()
    Path(host.paths.records, "a.json").write_text(json.dumps({**record, "pid": victim, "start_time": start_time_of(victim) + 1}))
    host.start()
    assert host.states() == {"a": "shut off"}


def test_stale_socket_and_pid_file_are_cleared(host):
    os.makedirs(host.paths.run)
    Path(host.paths.pid_file).write_text(f"{os.getpid()}\n")               # a number that lives, but no lock
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(host.paths.socket)
    host.start()
    assert host.states() == {}
    assert Path(host.paths.pid_file).read_text() == f"{host.process.pid}\n"


def test_autostart_in_order_once_a_boot(host):
    for name, order in (("late", 200), ("early", 10), ("middle", 100), ("unmarked", 1)):
        host.add(name, autostart_order=order)
    os.makedirs(host.paths.autostart)
    for name in ("late", "early", "middle", "missing"):
        os.symlink(f"../{name}.conf", os.path.join(host.paths.autostart, f"{name}.conf"))
    host.start()
    with host.client() as client:
        done = host.eventually(lambda: (lambda one: one if one["state"] == "done" else None)(client.get("/v1/autostart")))
    assert done["started"] == ["early", "middle", "late"] and done["failed"] == {"missing": "there is no such domain"}
    assert [host.domain(name)["id"] for name in ("early", "middle", "late")] == [1, 2, 3]
    host.post("early", "destroy")
    host.kill()
    host.start()
    with host.client() as client:
        assert client.get("/v1/autostart")["state"] == "none"
    assert host.states()["early"] == "shut off" and host.states()["unmarked"] == "shut off"


def test_autostart_waits_for_a_disk_and_says_so(host, tmp_path):
    image = tmp_path / "late.img"
    host.add("waits")
    with host.file("waits").open("a") as file:
        file.write(f"[disk vda]\nsource = {image}\n")
    host.add("ready", autostart_order=200)
    os.makedirs(host.paths.autostart)
    for name in ("waits", "ready"):
        os.symlink(f"../{name}.conf", os.path.join(host.paths.autostart, f"{name}.conf"))
    host.start()
    host.eventually(lambda: host.states() == {"waits": "shut off", "ready": "running"})
    assert host.domain("waits")["waiting"]["missing"] == [f"disk vda ({image})"]
    host.kill()                                                         # the next daemon goes on with the waiting
    host.start()
    host.eventually(lambda: host.domain("waits")["waiting"])
    image.write_bytes(b"\0" * 512)
    host.eventually(lambda: host.states()["waits"] == "running")
    assert host.domain("waits")["waiting"] is None


def test_log_is_set_aside_by_size_while_the_domain_runs(host):
    host.options = ["--heartbeat", "0.1"]
    host.write("guest.conf", GUEST + "log_max_size = 64 KiB\nlog_max_backups = 1\n")
    host.add("a")
    host.start()
    host.post("a", "start")
    log = Path(host.paths.domain_log("a"))
    with log.open("a") as file:
        file.write("x" * 70_000 + "\n")
    host.eventually(lambda: Path(f"{log}.1").exists() and log.stat().st_size < 60_000)
    assert Path(f"{log}.1").stat().st_size > 70_000
    host.post("a", "destroy")
    assert "id 1" in Path(f"{log}.1").read_text()


def test_event_reader_that_does_not_read_is_dropped(running):
    running.add("a")
    running.post("a", "start")
    with socket.socket(socket.AF_UNIX) as lazy:
        lazy.settimeout(20)
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
