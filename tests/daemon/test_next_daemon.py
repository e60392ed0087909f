"""The daemon is stopped or killed, and the next one goes on: no guest noticed, and what the last one left half done has an end."""
import contextlib
import json
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvmapp import errors
from kvmapp.daemon.process import start_time_of
from tests.unit.daemon.host import UUID
from tests.unit.daemon.load import Load

KILLS = int(os.environ.get("KVMAPP_TEST_KILLS", "8"))
# What four clients ask for all the time.
VERBS: list[list[tuple[str, str, dict]]] = [
    [("busy", "start", {}), ("busy", "destroy", {})],
    [("b", "suspend", {}), ("b", "resume", {})],
    [("c", "autostart", {"enabled": True}), ("c", "autostart", {"enabled": False})],
    [("d", "description", {"title": word, "config": True}) for word in ("x", "y")]]


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
    assert host.post("a", "shutdown", timeout=60)["domain"]["reason"] == "shutdown"
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
    """Guests go on while no daemon is there, no process is another one, and every state is right afterwards."""
    names, watched = ["a", "b", "c", "d"], ["a", "c", "d"]
    for name in [*names, "busy"]:
        host.add(name)
    host.start()
    pids = {name: host.post(name, "start")["domain"]["pid"] for name in names}
    with Load(host, VERBS) as load:
        for _ in range(KILLS):
            load.moment()
            host.kill()
            for name in watched:
                host.beats_on(name)
            host.start()
    if host.domain("b")["state"] == "paused":
        host.post("b", "resume")
    states = host.states()
    assert [states[name] for name in names] == ["running"] * 4 and states["busy"] in ("running", "shut off")
    assert {name: host.domain(name)["pid"] for name in names} == pids
    for name in watched:
        assert set(host.beats(name)) == {pids[name]}
    if states["busy"] == "running":
        with contextlib.suppress(errors.DomainNotRunning):              # asked by the load, it may just be ending
            host.post("busy", "destroy")
    host.post("busy", "start")
    assert host.domain("d")["title"] in (None, "x", "y") and host.domain("d")["state"] != "broken"
    assert sorted(os.listdir(host.paths.records)) == sorted(f"{name}.json" for name in [*names, "busy"])


def test_a_domain_that_is_late_is_known_all_the_same(host):
    """The daemon was killed before its zygote had forked the domain, and the next one waits for its first word in vain."""
    host.options, host.patient = ["--heartbeat", "0.1"], False
    host.add("a")
    host.start()
    with host.client() as client:
        zygote = client.get("/v1/daemon")["zygote"]
    os.kill(zygote, signal.SIGSTOP)
    with ThreadPoolExecutor() as clients:
        starting = clients.submit(host.post, "a", "start")
        host.eventually(lambda: (host.domain("a")["job"] or {}).get("progress") == "waiting for its process")
        host.kill()
        assert isinstance(starting.exception(), errors.KvmappError)
    host.start()
    states = host.states()
    os.kill(zygote, signal.SIGCONT)
    assert states == {"a": "no response"}
    pid = host.eventually(lambda: host.domain("a")["pid"], "its pid")
    host.eventually(lambda: host.states() == {"a": "running"})
    host.eventually(lambda: host.pids() == [pid])
    os.kill(pid, signal.SIGKILL)
    host.eventually(lambda: host.domain("a")["reason"] == "killed")


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


def test_rename_that_was_cut_short_is_finished(host):
    host.add("old", uuid=UUID)
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


@pytest.mark.parametrize("why", ["runs", "starts by itself", "is older"])
def test_of_two_files_with_one_uuid_the_copy_stays_the_broken_one(host, why):
    host.add("b", uuid=UUID)
    host.start()
    if why == "runs":
        host.post("b", "start")
    elif why == "starts by itself":
        host.post("b", "autostart", enabled=True)
    host.add("a", uuid=UUID)                                            # it comes first by name
    for name, when in (("a", 2e9 if why == "is older" else 1e9), ("b", 1.5e9)):
        os.utime(host.file(name), (when, when))
    wanted = {"a": "broken", "b": "running" if why == "runs" else "shut off"}
    assert host.states() == wanted
    host.kill()
    host.start()
    assert host.states() == wanted


def test_what_a_killed_writer_left_is_cleared(host):
    host.add("a")
    Path(host.paths.domains, ".kvmapp-tmp-0123456789ab").write_text("half a fi")
    host.start()
    assert sorted(os.listdir(host.paths.domains)) == ["a.conf", "autostart"] and host.states() == {"a": "shut off"}
