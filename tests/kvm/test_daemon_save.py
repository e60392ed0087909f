"""save, restore and managedsave through the daemon, with true guests that count."""
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvmapp import errors
from kvmapp.client import of
from tests.device import vhost_user_backend
from tests.kvm.host import needs_root

COUNTER = "steps=none mode=counter period=20"
pytestmark = [pytest.mark.kvm, needs_root]


@pytest.fixture
def daemon(host):
    host.guest("a", COUNTER)
    host.start()
    with host.client() as client:
        client.post(of("a", "start"))
        reach(host, 3)
        yield client


def reach(host, count):
    host.eventually(lambda: len(host.counts("a")) >= count, f"count {count}")


def goes_on_by_one(host):
    counts = host.counts("a")
    return counts == list(range(1, len(counts) + 1))


def test_save_and_restore(host, daemon):
    path = Path(host.root, "a.save")
    assert daemon.post(of("a", "save"), file=str(path))["domain"]["state"] == "shut off"
    assert daemon.get(of("a"))["reason"] == "saved"
    assert path.stat().st_uid == 0
    assert path.stat().st_mode & 0o777 == 0o600
    seen = len(host.counts("a"))
    assert daemon.post("/v1/restore", file=str(path))["domain"]["state"] == "running"
    reach(host, seen + 3)
    assert goes_on_by_one(host)
    with pytest.raises(errors.DomainRunning, match="already active"):
        daemon.post("/v1/restore", file=str(path))


def test_what_was_changed_while_it_ran_comes_back_with_it(host, daemon):
    daemon.post(of("a", "tuning"), settings={"cputune": {"emulatorpin": "0"}}, live=True, config=False)
    daemon.post(of("a", "managedsave"))
    daemon.post(of("a", "start"))
    assert daemon.get(of("a", "config"))["config"]["cputune"]["emulatorpin"] == "0"
    assert daemon.get(of("a", "config"), inactive=True)["config"]["cputune"]["emulatorpin"] is None


def test_managed_save_is_where_the_next_start_goes_on(host, daemon):
    assert daemon.get(of("a"))["managed_save"] is False
    daemon.post(of("a", "managedsave"))
    assert daemon.get(of("a"))["managed_save"] is True
    with pytest.raises(errors.KvmappError, match="cannot rename domain with a managed save image"):
        daemon.post(of("a", "rename"), name="b")
    seen = len(host.counts("a"))
    one = daemon.post(of("a", "start"))["domain"]
    assert (one["state"], one["reason"]) == ("running", "restored")
    reach(host, seen + 3)
    assert goes_on_by_one(host)
    assert daemon.get(of("a"))["managed_save"] is False


RETURNS: list[tuple] = [("paused", {}, {}, "paused"), ("paused", {"paused": False}, {}, "running"),
                        ("running", {"paused": True}, {}, "paused"), ("running", {}, {"paused": True}, "paused")]


@pytest.mark.parametrize(("verb", "now", "asked", "then", "state"), [
    *(("save", *case) for case in RETURNS), ("save", "paused", {}, {"paused": False}, "running"),
    *(("managedsave", *case) for case in RETURNS)])
def test_a_domain_comes_back_paused_or_running(host, daemon, verb, now, asked, then, state):
    """As it was saved, unless one or the other was asked for."""
    if now == "paused":
        daemon.post(of("a", "suspend"))
    file = {"file": os.path.join(host.root, "a.save")} if verb == "save" else {}
    daemon.post(of("a", verb), **file, **asked)
    seen = len(host.counts("a"))
    one = daemon.post("/v1/restore" if verb == "save" else of("a", "start"), **file, **then)["domain"]
    assert (one["name"], one["state"]) == ("a", state) and (state == "running" or len(host.counts("a")) == seen)
    if state == "paused":
        daemon.post(of("a", "resume"))
    reach(host, seen + 3)
    assert goes_on_by_one(host)


def test_managed_save_given_up(host, daemon):
    daemon.post(of("a", "managedsave"))
    assert daemon.post(of("a", "managedsave-remove"))["removed"] is True
    assert daemon.post(of("a", "managedsave-remove"))["removed"] is False
    daemon.post(of("a", "start"))
    reach(host, len(host.counts("a")) + 1)
    assert host.counts("a")[-1] < len(host.counts("a"))                # it counts from 1 again


@pytest.mark.parametrize("verb", ["save", "managedsave"])
def test_a_save_that_is_aborted_leaves_the_guest_running(host, daemon, verb):
    path = Path(host.root, "a.save")
    with pytest.raises(errors.WrongState, match="no job is active on the domain"):
        daemon.post(of("a", "job", "abort"))
    pid = host.domain("a")["pid"]
    os.kill(pid, signal.SIGSTOP)                        # so that it hears of both at once
    with ThreadPoolExecutor() as clients:
        try:
            saved = clients.submit(host.post, "a", verb, **{"file": str(path)} if verb == "save" else {})
            host.eventually(lambda: (host.domain("a")["job"] or {}).get("progress") == "writing its memory")
            with pytest.raises(errors.JobRunning) as caught:
                daemon.post(of("a", "suspend"))
            assert caught.value.hint == "wait for it, or end it with: kvmappctl domjobabort a"
            aborted = clients.submit(host.post, "a", "job/abort")
        finally:
            os.kill(pid, signal.SIGCONT)
        assert aborted.result()["warnings"] == []
        with pytest.raises(errors.KvmappError, match=f"Cannot {verb} domain 'a': that was aborted by root"):
            saved.result()
    host.eventually(lambda: host.domain("a")["state"] == "running")
    reach(host, len(host.counts("a")) + 3)
    one = host.domain("a")
    assert goes_on_by_one(host) and one["pid"] == pid and not one["managed_save"] and one["job"] is None
    assert not path.exists() and not [name for name in os.listdir(host.root) if "a.save" in name]
    daemon.post(of("a", "save"), file=str(path))


def test_a_damaged_image_is_not_started_and_says_the_way_out(host, daemon):
    daemon.post(of("a", "managedsave"))
    image = next(Path(host.root).rglob("save/a.save"))
    image.write_bytes(image.read_bytes()[:-10])
    with pytest.raises(errors.StateError, match="its header says") as refused:
        daemon.post(of("a", "start"))
    assert "managedsave-remove a" in refused.value.hint
    daemon.post(of("a", "start"), force_boot=True)
    assert not image.exists()


def test_a_file_that_cannot_be_written_leaves_the_guest_running(host, daemon):
    for path, error in (("/no/folder/x", "No such file"), ("/proc/x", "Cannot save to"), ("/dev/full/x", "Not a directory")):
        with pytest.raises(errors.KvmappError, match=re.escape(error)):
            daemon.post(of("a", "save"), file=path)
    seen = len(host.counts("a"))
    reach(host, seen + 3)
    assert goes_on_by_one(host)
    with pytest.raises(errors.UsageError, match="not an absolute path"):
        daemon.post(of("a", "save"), file="x")


def test_what_is_no_saved_state(host, daemon):
    for path in ("/no/such", "/dev/null", "/etc/passwd", host.root):
        with pytest.raises(errors.StateError):
            daemon.post("/v1/restore", file=str(path))


def test_a_domain_with_a_shared_folder_is_not_saved_and_goes_on(host):
    """The file server here is no more than its greeting, which is all that the probe guest wants of it."""
    with vhost_user_backend.Listener(os.path.join(host.root, "fs.sock")) as server:
        host.guest("a", COUNTER, rest=f"[filesystem data]\nsocket = {server.path}\n")
        host.start()
        with host.client() as client:
            client.post(of("a", "start"))
            reach(host, 3)
            for verb, more in (("managedsave", {}), ("save", {"file": os.path.join(host.root, "a.save")})):
                with pytest.raises(errors.Unsupported, match="what its guest has open in filesystem 'data'") as caught:
                    client.post(of("a", verb), **more)
                assert caught.value.hint == "shut it down instead, or take the filesystem away"
            assert client.get(of("a"))["state"] == "running"
            reach(host, len(host.counts("a")) + 3)
            assert goes_on_by_one(host)
        assert not os.path.exists(os.path.join(host.root, "a.save"))
