"""A domain's life through the daemon: started, asked, stopped, undefined; alone, and beside others."""
import asyncio
import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvmapp import errors, schema
from kvmapp.client import of
from kvmapp.daemon import actions, starting
from kvmapp.daemon.cgroups import Cgroups
from kvmapp.daemon.domain import Domain
from kvmapp.daemon.main import cgroup_name
from kvmapp.daemon.paths import Paths
from kvmapp.settings import is_ahead
from tests.unit.daemon.host import GUEST, IS_ROOT, SOCKET_GROUP, WEB


@pytest.mark.parametrize("name", ["x" * 200, "мой сервер", "server (old) v1.2", "日本語" * 20, "a'b", "100%", "memory.max", "a.conf"])
def test_unusual_names_live_a_whole_life(running, name):
    quoted = f'"{name}"' if "'" in name else name
    running.define(f"name = {quoted}\nmemory = 64\n")
    running.post(name, "start")
    assert running.domain(name)["state"] == "running"
    assert running.get(name, "stats")["exits"]["hlt"] == 3
    running.post(name, "destroy")
    with running.client() as client:
        assert client.delete(of(name))["name"] == name
    assert running.states() == {}


def test_start_gives_a_process_of_its_own(running):
    running.define()
    started = running.post("web", "start")["domain"]
    assert (started["state"], started["reason"]) == ("running", "booted") and started["id"] > 0
    said = running.told("web", "test_identity")
    assert said["sid"] == started["pid"]
    with open(f"/proc/{started['pid']}/comm") as comm, open(f"/proc/{started['pid']}/cmdline") as line:
        assert comm.read() == "kvmapp: web\n" and line.read().rstrip("\0") == "kvmapp: web"
    if IS_ROOT:
        assert said["uid"] != 0 and said["gid"] != 0 and said["groups"] == []
        assert int(said["capabilities"], 16) == 0 and int(said["bounding"], 16) == 0
    assert said["no_new_privs"] == "1"


def test_a_domain_inherits_nothing_that_is_not_its_own(running):
    running.define()
    running.post("web", "start")
    running.define(WEB.replace("web", "mail"))
    running.post("mail", "start")
    opened = running.told("mail", "test_identity")["fds"]
    own = ("/dev/null", "socket:", "anon_inode:", "/proc/", running.paths.domain_log("mail"), running.paths.domain_own("mail"))
    assert [name for name in opened if not name.startswith(own)] == []
    assert sum(name.startswith("socket:") for name in opened) == 3         # its control socket, the daemon, and who asks here


@pytest.mark.skipif(not IS_ROOT, reason="needs root")
def test_guests_are_kept_from_the_daemons_socket(running):
    """A guest that breaks out of its process is user nobody here: it may neither command the daemon nor other domains."""
    running.define()
    started = running.post("web", "start")["domain"]
    status = os.stat(running.paths.control("web"))
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (0, 0, 0o660)
    assert os.stat(running.paths.domain_run("web")).st_uid == 0 and started["pid"]
    running.write("guest.conf", f"user = nobody\ngroup = {SOCKET_GROUP}\n")
    running.add("mail")
    with pytest.raises(errors.ConfigError, match="would command the daemon"):
        running.post("mail", "start")


def test_log_has_the_start_with_the_whole_configuration(running):
    running.define()
    running.post("web", "start")
    first = Path(running.paths.domain_log("web")).read_text().splitlines()[0]
    assert "starting, kvmapp" in first and '"memory": 67108864' in first
    with running.client() as client:
        assert first in client.get(of("web", "log"))["lines"]


def test_ids_grow_and_a_second_start_is_refused(running):
    running.define()
    running.define(WEB.replace("web", "mail"))
    first = running.post("web", "start")["domain"]["id"]
    assert running.post("mail", "start")["domain"]["id"] == first + 1
    with pytest.raises(errors.DomainRunning) as caught:
        running.post("web", "start")
    assert caught.value.message == "Domain is already active"
    running.post("web", "destroy")
    assert running.post("web", "start")["domain"]["id"] == first + 2
    assert running.domain(f"{first + 2}")["name"] == "web" and running.domain(running.domain("web")["uuid"].upper())["name"] == "web"


@pytest.mark.parametrize(("run", "warned"), [("1\n", False), ("0\n", True), (None, True)])
def test_ksm_that_the_host_does_not_do_is_told(tmp_path, monkeypatch, run, warned):
    monkeypatch.setattr(starting, "KSM_RUN", str(tmp_path / "run"))
    if run is not None:
        (tmp_path / "run").write_text(run)
    assert starting.merges_pages() == (not warned)


def test_suspend_resume_reset(running):
    running.define()
    running.post("web", "start")
    assert (lambda one: (one["state"], one["reason"]))(running.post("web", "suspend")["domain"]) == ("paused", "user")
    assert (lambda one: (one["state"], one["reason"]))(running.post("web", "resume")["domain"]) == ("running", "unpaused")
    assert (lambda one: (one["state"], one["reason"]))(running.post("web", "reset")["domain"]) == ("running", "booted")
    assert running.post("web", "reboot")["domain"]["state"] == "running"


def test_a_guest_that_ends_as_soon_as_it_may_go_on(running):
    """What was asked for was done; that there is nobody left to tell of it is no failure."""
    running.add("web", "last-breath")
    running.post("web", "start", paused=True)
    assert running.post("web", "resume")["domain"]["state"] == "shut off"


def test_started_paused(running):
    running.define()
    assert running.post("web", "start", paused=True)["domain"]["state"] == "paused"
    assert running.post("web", "resume")["domain"]["state"] == "running"


def test_shutdown_waits_and_tells_how_it_ended(running):
    running.define()
    running.post("web", "start")
    ended = running.post("web", "shutdown", timeout=60)["domain"]
    assert (ended["state"], ended["reason"], ended["text"], ended["id"]) == ("shut off", "shutdown", "the guest powered off", None)
    assert running.records() == {}
    with pytest.raises(errors.DomainNotRunning):
        running.post("web", "shutdown")


def test_guest_that_ignores_acpi_is_told(running):
    running.add("deaf", "ignore-acpi")
    running.post("deaf", "start")
    with pytest.raises(errors.GuestIgnored) as caught:
        running.post("deaf", "shutdown", timeout=0.1)
    assert "ignores ACPI" in caught.value.message and "destroy" in caught.value.hint
    assert running.domain("deaf")["state"] == "running"
    assert running.post("deaf", "destroy")["domain"]["reason"] == "destroyed"


def test_a_guest_that_ignores_acpi_is_told_in_its_log_too(running):
    running.write("guest.conf", f"{GUEST}shutdown_timeout = 1\n")
    running.add("deaf", "ignore-acpi")
    running.post("deaf", "start")
    log = Path(running.paths.domain_log("deaf"))
    running.post("deaf", "shutdown")
    running.post("deaf", "reset")                           # it runs on a press of another life
    running.post("deaf", "shutdown")
    running.post("deaf", "shutdown")
    running.eventually(lambda: "ignores ACPI" in log.read_text())
    assert log.read_text().count("warning: Domain 'deaf' still runs 1 s after its power button was pressed: the guest ignores ACPI") == 1
    assert "kvmappctl destroy deaf" in log.read_text()
    [warning] = running.domain("deaf")["warnings"]
    assert "ignores ACPI" in warning and "kvmappctl destroy deaf" in warning
    running.post("deaf", "reset")
    assert running.domain("deaf")["warnings"] == []


def test_a_guest_that_ignores_reboot_is_told_as_well(running):
    running.write("guest.conf", f"{GUEST}shutdown_timeout = 1\n")
    running.add("deaf", "ignore-acpi")
    running.post("deaf", "start")
    assert running.post("deaf", "reboot")["domain"]["warnings"] == []
    running.eventually(lambda: running.domain("deaf")["warnings"])
    [warning] = running.domain("deaf")["warnings"]
    assert warning.endswith("to restart it now: kvmappctl reset deaf")


@pytest.mark.parametrize(("meanwhile", "told"), [(lambda domain, process: None, ["guest-ignored"]),
                                                 (lambda domain, process: setattr(process, "since", 2.0), []),
                                                 (lambda domain, process: setattr(domain, "process", None), [])],
                         ids=["nothing", "reset", "end"])
def test_only_a_guest_that_heard_and_did_nothing_ignores_acpi(tmp_path, meanwhile, told):
    published: list[str] = []
    supervisor: Any = SimpleNamespace(guest_defaults=lambda: SimpleNamespace(shutdown_timeout=0.01),
                                      events=SimpleNamespace(publish=lambda event, *_, **more: published.append(event)))
    store: Any = SimpleNamespace(files={})
    domain, process = Domain("web", store, Paths(str(tmp_path)), lambda *_: None), SimpleNamespace(since=1.0)
    domain.process = process                                                        # type: ignore[assignment]

    async def press():
        watch = asyncio.create_task(actions.watch_pressed(supervisor, domain, process, 1.0))    # type: ignore[arg-type]
        await asyncio.sleep(0)
        meanwhile(domain, process)
        domain.notify()
        await watch
    asyncio.run(press())
    assert published == told


def test_each_setting_for_all_guests_is_heeded():
    sources = "".join(path.read_text() for path in Path(actions.__file__).parent.glob("*.py"))
    for name, setting in schema.GUEST.top.settings.items():
        assert is_ahead(setting.since) or re.search(rf"\b(defaults|limits|guest_defaults\(\))\.{name}\b", sources), name


def test_shutdown_without_acpi_says_so(running):
    running.add("old", acpi="no")
    running.post("old", "start")
    with pytest.raises(errors.KvmappError) as caught:
        running.post("old", "shutdown")
    assert caught.value.code == "wrong-state" and caught.value.hint == "acpi = yes"


def test_destroy_goes_through_while_somebody_waits_for_a_shutdown(running):
    running.add("deaf", "ignore-acpi")
    running.post("deaf", "start")
    with ThreadPoolExecutor() as clients:
        shutdown = clients.submit(running.post, "deaf", "shutdown", timeout=60)
        running.eventually(lambda: running.get("deaf", "stats")["exits"].get("power") and not running.domain("deaf")["job"])
        running.post("deaf", "destroy")
        assert shutdown.result()["domain"]["reason"] == "destroyed"


def test_a_guest_that_is_paused_while_it_shuts_down_is_not_waited_for(running):
    """Nobody would let it go on; a host that goes down would wait for ever."""
    running.add("deaf", "ignore-acpi")
    running.post("deaf", "start")
    with ThreadPoolExecutor() as clients:
        shutdown = clients.submit(running.post, "deaf", "shutdown", timeout=60)
        running.eventually(lambda: running.get("deaf", "stats")["exits"].get("power") and not running.domain("deaf")["job"])
        running.post("deaf", "suspend")
        with pytest.raises(errors.WrongState, match=r"Domain 'deaf' was paused while it shut down \(user\)") as caught:
            shutdown.result()
    assert caught.value.hint == "kvmappctl resume deaf lets it go on"
    running.post("deaf", "destroy")


def test_undefine_says_what_it_left(running, tmp_path):
    image = tmp_path / "web.img"
    image.write_bytes(b"\0" * 512)
    running.define(WEB + f"[disk vda]\nsource = {image}\n")
    running.post("web", "autostart", enabled=True)
    with running.client() as client:
        answer = client.delete(of("web"))
    assert answer["left"] == [f"disk vda ({image})"] and "autostart link" in answer["removed"]
    assert image.exists() and os.listdir(running.paths.autostart) == [] and running.states() == {}


def test_undefine_with_storage_keeps_what_is_shared(running, tmp_path):
    own, shared, busy = tmp_path / "own.img", tmp_path / "shared.img", tmp_path / "busy.img"
    for image in (own, shared, busy):
        image.write_bytes(b"\0" * 512)
    disks = f"[disk vda]\nsource = {own}\n[disk vdb]\nsource = {shared}\n[disk vdc]\nsource = {busy}\n"
    running.define(WEB + disks)
    running.define(WEB.replace("web", "mail") + f"[disk vda]\nsource = {shared}\n")
    running.define(WEB.replace("web", "news") + f"[disk vda]\nsource = {busy}\n", transient=True)
    with running.client() as client:
        answer = client.delete(of("web"), remove_all_storage=True)
    assert f"disk vda ({own})" in answer["removed"] and answer["left"] == [
        f"disk vdb ({shared}): domain 'mail' uses it too", f"disk vdc ({busy}): domain 'news' uses it too"]
    assert not own.exists() and shared.exists() and busy.exists()


def test_undefine_of_a_running_domain_leaves_it_transient(running):
    running.define()
    pid = running.post("web", "start")["domain"]["pid"]
    with running.client() as client:
        assert client.delete(of("web"))["still_runs"]
    one = running.domain("web")
    assert not one["persistent"] and one["pid"] == pid
    running.post("web", "destroy")
    assert running.states() == {}


def test_transient_domain_is_gone_when_it_ends(running):
    assert running.define(transient=True)["domain"]["state"] == "running"
    assert not running.file("web").exists() and not running.domain("web")["persistent"]
    with pytest.raises(errors.KvmappError, match="transient"):
        running.post("web", "autostart")
    running.post("web", "shutdown", timeout=60)
    assert running.states() == {}


def test_mac_clash_is_told_and_a_running_one_refused(running):
    card = "[interface 0]\ntype = user\nmac = 52:54:00:00:00:01\n"
    running.define(WEB + card)
    answer = running.define(WEB.replace("web", "mail") + card)
    assert answer["warnings"] == ["MAC 52:54:00:00:00:01 is an interface's of domain 'web' too"]
    running.post("web", "start")
    with pytest.raises(errors.NameInUse, match="runs with the same MAC address"):
        running.post("mail", "start")


def test_disk_of_a_running_domain_is_refused(running, tmp_path):
    image = tmp_path / "web.img"
    image.write_bytes(b"\0" * 512)
    running.define(WEB + f"[disk vda]\nsource = {image}\n")
    running.define(WEB.replace("web", "mail") + f"[disk vda]\nsource = {image}\n")
    running.post("web", "start")
    with pytest.raises(errors.GuestImageError, match="it is disk 'vda' of domain 'web', which runs"):
        running.post("mail", "start")
    assert running.domain("mail")["state"] == "shut off" and list(running.records()) == ["web"]


def test_a_hundred_starts_at_once(host):
    names = [f"d{number:03}" for number in range(100)]
    for name in names:
        host.add(name, uuid=f"00000000-0000-4000-8000-{int(name[1:]):012}")
    host.start()
    host.start_at_once(names)
    assert set(host.states().values()) == {"running"}
    assert sorted(record["id"] for record in host.records().values()) == list(range(1, 101))


@pytest.mark.skipif(not IS_ROOT, reason="needs root")
def test_each_domain_has_a_control_group_that_goes_with_it(running):
    running.define()
    pid = running.post("web", "start")["domain"]["pid"]
    bases = Cgroups(cgroup_name(running.paths)).bases
    if not bases:
        pytest.skip("this host has no control groups that can be written")

    def members():
        groups = [Path(base, "domain-web", "cgroup.procs") for base in bases]
        return [group.read_text().split() if group.exists() else [] for group in groups]
    running.eventually(lambda: members() == [[str(pid)]] * len(bases))
    running.post("web", "destroy")
    running.eventually(lambda: not any(Path(base, "domain-web").exists() for base in bases))


@pytest.mark.skipif(not IS_ROOT, reason="needs root")
@pytest.mark.parametrize("at_once", [True, False])
def test_what_a_domain_left_behind_goes_with_its_group(at_once, monkeypatch):
    """It would hold the domain's disks and taps, and nobody knows of it."""
    groups = Cgroups(f"kvmapp-left-{os.getpid()}")
    if not groups.bases:
        pytest.skip("this host has no control groups that can be written")
    if not at_once:                                      # as before Linux 5.14
        true_open = os.open
        monkeypatch.setattr(os, "open", lambda path, *more: true_open(path.replace("cgroup.kill", "cgroup.none"), *more))
    with subprocess.Popen(["sleep", "1000"]) as left:
        try:
            groups.join("web", left.pid)
            groups.remove("web")
            assert left.wait(20) == -signal.SIGKILL
        finally:
            left.kill()
    assert groups.remove("web")
    groups.close(False)


def test_a_transient_domain_that_runs_keeps_its_name_and_its_uuid(running):
    running.define(transient=True)
    uuid = running.domain("web")["uuid"]
    running.add("mail")
    with pytest.raises(errors.NameInUse, match="domain 'web' already exists"):
        running.post("mail", "rename", name="web")
    for transient in (False, True):
        with pytest.raises(errors.NameInUse, match=f"domain 'web' is already defined with uuid {uuid}"):
            running.define(f"name = news\nuuid = {uuid}\nmemory = 64\n", transient=transient)
    assert running.states() == {"web": "running", "mail": "shut off"}
