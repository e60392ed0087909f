"""Domains that start with the host: in their order, once a boot, and when their disks are there."""
import asyncio
import errno
import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from kvmapp.config import DomainConfig
from kvmapp.daemon import autostart
from kvmapp.daemon.autostart import Autostart
from kvmapp.daemon.jobs import Jobs
from kvmapp.daemon.starting import start
from kvmapp.errors import DomainNotFound, HostError


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
    host.add("waits", rest=f"[disk vda]\nsource = {image}\n")
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


def test_autostart_tells_what_it_is_still_to_start(host):
    """Until it has started it, or somebody else has: what it has started once is no longer its own."""
    host.add("early", autostart_order=1, autostart_delay=60)
    os.makedirs(host.paths.autostart)
    for name in ("early", "late"):
        os.symlink(f"../{name}.conf", os.path.join(host.paths.autostart, f"{name}.conf"))
    host.add("late")
    host.start()
    host.eventually(lambda: host.states()["early"] == "running" and not host.domain("early")["job"])
    host.post("early", "destroy")
    with host.client() as client:
        assert list(client.get("/v1/autostart")["waiting"]) == ["late"]
    assert host.domain("early")["waiting"] is None and host.domain("late")["waiting"]["missing"] == ["its turn"]
    host.post("late", "start")
    assert host.domain("late")["waiting"] is None


def test_autostart_that_is_stopped_starts_no_further_domain(host, tmp_path):
    """None that waits for its turn, and none that waits for a disk; nor does the next daemon of this boot."""
    image = tmp_path / "late.img"
    host.add("early", autostart_order=1, autostart_delay=60)
    host.add("waits", autostart_order=0, rest=f"[disk vda]\nsource = {image}\n")
    host.add("late")
    os.makedirs(host.paths.autostart)
    for name in ("early", "late", "waits"):
        os.symlink(f"../{name}.conf", os.path.join(host.paths.autostart, f"{name}.conf"))
    host.start()
    host.eventually(lambda: host.states()["early"] == "running" and not host.domain("early")["job"])
    with host.client() as client:
        assert client.post("/v1/autostart/stop") == {"left": ["waits", "late"]}
        assert client.post("/v1/autostart/stop") == {"left": []} and client.get("/v1/autostart")["waiting"] == {}
    image.write_bytes(b"\0" * 512)
    host.kill()
    host.start()
    with host.client() as client:
        host.eventually(lambda: client.get("/v1/autostart")["state"] == "done")
    assert host.states() == {"early": "running", "late": "shut off", "waits": "shut off"} and host.domain("late")["autostart"]


def test_autostart_leaves_a_domain_alone_that_was_defined_anew_and_started(host, tmp_path):
    host.start()
    host.define(f"name = web\nmemory = 64 MiB\n[disk vda]\nsource = {tmp_path}/late.img\n")
    host.post("web", "autostart", enabled=True)
    host.kill()
    os.unlink(os.path.join(host.paths.run, "autostarted"))
    host.start()
    host.eventually(lambda: (host.domain("web")["waiting"] or {}).get("missing") == [f"disk vda ({tmp_path}/late.img)"])
    with host.client() as client:
        client.delete("/v1/domains/web")
    host.define()
    host.post("web", "autostart", enabled=True)
    one = host.post("web", "start")["domain"]
    with host.client() as client:
        done = host.eventually(lambda: (lambda one: one if one["state"] == "done" else None)(client.get("/v1/autostart")))
    assert done["failed"] == {}
    assert host.told("web", "status")["pid"] == one["pid"] == host.records()["web"]["pid"] == host.domain("web")["pid"]
    host.beats_on("web")


def test_a_domain_that_was_replaced_is_not_started():
    stale: Any = SimpleNamespace(name="web")
    supervisor: Any = SimpleNamespace(domains={"web": SimpleNamespace(name="web")})
    with pytest.raises(DomainNotFound, match="'web' was defined anew meanwhile"):
        asyncio.run(start(supervisor, stale, "autostart"))


def test_a_start_that_fails_in_no_known_way_is_no_end_of_the_others(waiting, monkeypatch):
    async def start(supervisor, domain, who):
        if domain.name == "bad":
            raise OSError(errno.EROFS, "Read-only file system")

    config = DomainConfig.from_dict({"name": "x", "memory": 64 << 20, "autostart_delay": 0})
    domains = {name: SimpleNamespace(name=name, uuid=None, active=False, config=config, jobs=Jobs(name, lambda job, begins: None))
               for name in ("bad", "good")}
    waiting.supervisor.domains, waiting.supervisor.store = domains, SimpleNamespace(autostarted={"bad", "good"}, files=domains)
    waiting.supervisor.events = SimpleNamespace(publish=lambda *_, **more: None)
    monkeypatch.setattr(autostart, "start_or_go_on", start)
    asyncio.run(waiting.start_all())
    assert waiting.state == "done" and waiting.started == ["good"] and "Read-only file system" in waiting.failed["bad"]


@pytest.mark.parametrize("moment", ["look", "start"])
def test_autostart_is_stopped_at_any_moment(waiting, monkeypatch, moment):
    """What it is about to start is left off; what it is at comes up."""
    async def look(domain, config):
        if moment == "look":
            waiting.stop()
        return []

    async def start(supervisor, domain, who):
        waiting.stop()

    config = DomainConfig.from_dict({"name": "x", "memory": 64 << 20, "autostart_delay": 0})
    domains = {name: SimpleNamespace(name=name, uuid=None, active=False, config=config) for name in ("first", "second")}
    waiting.supervisor.domains, waiting.supervisor.store = domains, SimpleNamespace(autostarted=set(domains), files=domains)
    waiting.supervisor.events = SimpleNamespace(publish=lambda *_, **more: None)
    monkeypatch.setattr(waiting, "missing_of", look)
    monkeypatch.setattr(autostart, "start_or_go_on", start)
    asyncio.run(waiting.start_all())
    assert (waiting.state, waiting.started, waiting.waiting) == ("done", ["first"] if moment == "start" else [], {})


@pytest.fixture
def waiting(tmp_path):
    supervisor: Any = SimpleNamespace(paths=SimpleNamespace(run=str(tmp_path)), networks=None)
    return Autostart(supervisor)


@pytest.fixture
def domain():
    return SimpleNamespace(name="web", jobs=Jobs("web", lambda job, begins: None))


def test_autostart_waits_for_somebodys_job(waiting, domain):
    """Such as a start by hand: the domain is not said to have failed."""

    async def look():
        with domain.jobs.hold("start", "ann"):
            during = await waiting.missing_of(domain, config)
        return during, await waiting.missing_of(domain, config)

    config = DomainConfig.from_dict({"name": "web", "memory": 64 << 20})
    assert asyncio.run(look()) == (["job 'start' of ann"], [])


def test_autostart_goes_on_while_a_file_server_does_not_answer(waiting, domain, monkeypatch):
    """More of them than there are threads for everybody's work; each is looked at once, until there is an answer."""
    answers, looks = threading.Event(), []

    def look(config):
        looks.append(config)
        answers.wait()
        return []

    async def boot():
        hanging = [SimpleNamespace(name=f"hangs{i}", jobs=domain.jobs) for i in range(100)]
        for one in hanging * 2:
            assert await waiting.missing_of(one, config) == ["an answer from where its files are"]
        assert len(looks) == 100
        await asyncio.to_thread(str)
        answers.set()
        await asyncio.wait(waiting.looks.values())
        assert [await waiting.missing_of(one, config) for one in hanging] == [[]] * 100
        answers.clear()
        assert await waiting.missing_of(domain, config) != []               # the daemon's end does not wait for it

    config = DomainConfig.from_dict({"name": "web", "memory": 64 << 20})
    monkeypatch.setattr(autostart, "what_is_missing", look)
    monkeypatch.setattr(autostart, "LOOK_PATIENCE", 0.01)
    asyncio.run(boot())
    answers.set()


def test_autostart_waits_for_threads_to_look_with(waiting, domain, monkeypatch):
    async def refuse(*_):
        raise HostError("The daemon cannot start a thread")

    monkeypatch.setattr(autostart, "in_own_thread", refuse)
    config = DomainConfig.from_dict({"name": "web", "memory": 64 << 20})
    assert asyncio.run(waiting.missing_of(domain, config)) == ["The daemon cannot start a thread"]


def test_shared_folders_are_waited_for(tmp_path):
    config = DomainConfig.from_dict({"name": "web", "memory": 64 << 20, "filesystems": [{"tag": "a", "source": f"{tmp_path}/mount"},
                                                                    {"tag": "b", "socket": f"{tmp_path}/socket"}]})
    assert autostart.what_is_missing(config) == [f"shared folder a ({tmp_path}/mount)", f"shared folder b ({tmp_path}/socket)"]
    (tmp_path / "mount").mkdir()
    (tmp_path / "socket").touch()
    assert autostart.what_is_missing(config) == []
