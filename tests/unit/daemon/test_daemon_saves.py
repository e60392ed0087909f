"""Managed saves, as files whose guests are none: when one is void, and what is said of one that cannot be used now."""
import asyncio
import contextlib
import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvmapp import errors, statefile
from kvmapp.config import read_domain
from kvmapp.daemon import saving
from kvmapp.daemon.domain import Domain
from kvmapp.daemon.jobs import JobBroken, Jobs
from kvmapp.daemon.paths import Paths
from kvmapp.daemon.vouching import is_at_its_place, note_place, vouch_for
from tests.unit.daemon.host import UUID, WEB

NO_MEMORY = SimpleNamespace(size=0, runs=lambda granule: [], view=None)


@pytest.fixture
def saved(running):
    """A domain with a managed save."""
    running.define()
    path = Path(running.paths.managed_save("web"))
    write(path, running)
    assert running.domain("web")["managed_save"]
    yield path
    path.unlink(missing_ok=True)


def write(path, host, of="web", **changes):
    """`changes`: of the configuration in it."""
    config = {**read_domain(str(host.file(of))).to_dict(), **changes}
    with statefile.Draft(str(path)) as draft:
        statefile.write(draft.fd, config, {}, NO_MEMORY)
        draft.publish()
    return config


def test_start_goes_on_from_it_and_takes_it_away(running, saved):
    assert running.post("web", "start")["domain"]["state"] == "running"
    assert not saved.exists()


def test_it_is_void_once_the_domain_runs_from_another_file(running, saved, tmp_path):
    """Its memory knows nothing of what the guest has written to its disks since."""
    write(tmp_path / "older", running)
    with running.client() as client:
        client.post("/v1/restore", file=str(tmp_path / "older"))
    assert not saved.exists()


def test_it_is_void_once_the_domain_is_created_anew(running, saved):
    running.define(running.file("web").read_text(), transient=True)
    assert running.states() == {"web": "running"} and not saved.exists()


def test_a_broken_file_is_no_reason_to_give_it_up(running, saved):
    running.file("web").write_text("name = web\nmemory = lots\n")
    with pytest.raises(errors.ConfigError, match="memory = 'lots'"):
        running.post("web", "start")
    assert saved.exists()


def restore(host):
    with host.client() as client:
        client.post("/v1/restore", file=os.path.join(host.root, "older"))


@pytest.mark.parametrize("begin", [lambda host: host.post("web", "start"), lambda host: host.post("web", "start", force_boot=True), restore,
                                   lambda host: host.define(host.file("web").read_text(), transient=True)],
                         ids=["start", "force-boot", "restore", "create"])
def test_no_guest_runs_beside_one_that_cannot_be_taken_away(running, begin):
    """It would be restored weeks later, over disks that the guest has written to since."""
    running.define()
    write(Path(running.root, "older"), running)
    folder, image = running.paths.saved, Path(running.paths.managed_save("web"))
    if subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=False).returncode:
        pytest.skip("this host lets nobody mount")
    try:
        write(image, running)
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        with pytest.raises(errors.HostError, match="Cannot remove the managed save of 'web': Read-only file system"):
            begin(running)
        assert image.exists() and running.states() == {"web": "shut off"} and running.beats("web") == []
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
        begin(running)
        assert not image.exists() and running.states() == {"web": "running"}
        running.beats_on("web")
        running.post("web", "destroy")
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_start_that_fails_keeps_it(running):
    running.add("web", "fail", uuid=UUID)
    image = Path(running.paths.managed_save("web"))
    write(image, running)
    for more in ({}, {"force_boot": True}):
        with pytest.raises(errors.HostError, match="made of cheese"):
            running.post("web", "start", **more)
    assert image.exists()
    image.unlink()


@pytest.mark.parametrize(("verb", "kept"), [("save-end", True), ("test_crash", False), ("shutdown", False)])
def test_the_end_of_a_guest_decides(running, verb, kept):
    running.define()
    running.post("web", "start")
    image = Path(running.paths.managed_save("web"))
    write(image, running)
    running.told("web", verb)
    running.eventually(lambda: running.states() == {"web": "shut off"})
    assert image.exists() == kept
    image.unlink(missing_ok=True)


def test_undefine_says_what_it_could_not_remove(running, saved):
    if subprocess.run(["mount", "--bind", saved, saved], check=False).returncode:
        pytest.skip("this host lets nobody mount")
    try:
        with running.client() as client:
            left = client.delete("/v1/domains/web")["left"]
        assert any("Cannot remove the managed save of 'web': Device or resource busy" in text for text in left)
    finally:
        subprocess.run(["umount", "-l", saved], check=False)


def test_one_whose_guest_is_still_ending_outlives_the_daemon(host):
    """The process has closed its socket and takes its time to give its memory back."""
    host.start()
    host.define()
    pid = host.post("web", "start")["domain"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    image = Path(host.paths.managed_save("web"))
    write(image, host)
    with contextlib.closing(host.tell("web", "save-end")):
        os.unlink(host.paths.control("web"))
        host.kill()
        host.start()
        assert image.exists()
        os.kill(pid, signal.SIGCONT)
        host.eventually(lambda: host.states() == {"web": "shut off"})
    assert host.domain("web")["reason"] == "saved" and image.exists()


def test_one_of_a_guest_that_runs_does_not_outlive_the_daemon(host):
    host.start()
    host.define()
    host.post("web", "start")
    image = Path(host.paths.managed_save("web"))
    write(image, host)
    host.kill()
    host.start()
    assert host.states() == {"web": "running"} and not image.exists()


def test_a_configuration_that_nobody_here_wrote_is_not_obeyed(running, saved, tmp_path):
    """Its domain process may have been its guest's when it wrote the file: root would open what is named there."""
    evil = [{"index": 0, "type": "file", "path": "/etc/passwd", "log": None}]
    write(saved, running, serials=evil)
    with pytest.raises(errors.StateError, match="not from this host's daemon, nor that of a domain here") as caught:
        running.post("web", "start")
    assert "managedsave-remove" in caught.value.hint
    assert saved.exists() and running.states() == {"web": "shut off"}
    file = tmp_path / "web.save"
    write(file, running, title="another")
    with running.client() as client:
        with pytest.raises(errors.StateError) as caught:
            client.post("/v1/restore", file=str(file))
        assert f"--trust {file}" in caught.value.hint
        assert client.post("/v1/restore", file=str(file), trust=True)["domain"]["title"] == "another"


def test_a_configuration_that_the_daemon_had_saved_is_good_after_the_domain_was_edited(running, saved):
    vouch_for(running.paths, write(saved, running, title="as it ran"))
    assert running.post("web", "start")["domain"]["title"] == "as it ran"


def test_a_domain_does_not_come_back_as_another(running, tmp_path):
    """Its process may have written another one's configuration, which is this host's own, into the file that it was given."""
    for name in ("web", "mail"):
        running.define(WEB.replace("web", name))
    file = tmp_path / "web.save"
    link = tmp_path / "link.save"
    link.symlink_to(file)
    note_place(running.paths, str(file), write(file, running))
    write(file, running, of="mail")
    with running.client() as client:
        for path in (file, link):
            with pytest.raises(errors.StateError, match="not the one that this host's daemon had saved there") as caught:
                client.post("/v1/restore", file=str(path))
            assert f"--trust {path}" in caught.value.hint
        assert set(running.states().values()) == {"shut off"}
        write(file, running)
        assert client.post("/v1/restore", file=str(file))["domain"]["name"] == "web"
        note_place(running.paths, str(file), None)
        write(file, running, of="mail")
        assert client.post("/v1/restore", file=str(file))["domain"]["name"] == "mail"       # as one that comes from elsewhere


def live(*disks):
    """A configuration with these disks."""
    return SimpleNamespace(to_dict=lambda: {"disks": disks}, disks=[SimpleNamespace(name=name) for name in disks], interfaces=[])


@pytest.mark.parametrize("stays", [False, True])
def test_each_card_that_goes_as_the_save_begins_costs_another_try(tmp_path, stays):
    """But none that does not go: that is another reason, and would be one for ever."""
    told = []

    async def ask(verb, *_, config=None, **_more):
        told.append(verb if config is None else " ".join(config["disks"]))
        if config and config["disks"]:
            domain.live = live(*config["disks"][:-1]) if not stays else live(*config["disks"])
            raise errors.StateError("disk vdb was not there, is there")

    async def gone(*_):
        return True
    process = SimpleNamespace(ask=ask)
    domain: Any = SimpleNamespace(name="web", live=live("vda", "vdb"), outdated=False, want_active=lambda: process, wait_until=gone)
    paths = Paths(str(tmp_path))
    paths.make_folders()
    job: Any = SimpleNamespace(progress="")
    with pytest.raises(errors.StateError) if stays else contextlib.nullcontext():
        asyncio.run(saving.write(paths, domain, str(tmp_path / "web.save"), job, {}))
    assert told == (["vda vdb"] if stays else ["vda vdb", "vda", "", "save-end"])
    names = [name for name in os.listdir(paths.vouched) if not name.endswith(".place")]
    assert len(names) == len([one for one in told if one != "save-end"])
    assert is_at_its_place(paths, str(tmp_path / "web.save"), {"disks": []}) and \
        is_at_its_place(paths, str(tmp_path / "web.save"), {"disks": ["vda"]}) == stays


@pytest.mark.parametrize("tries", [1, 2])
def test_an_abort_is_told_to_the_domain_whichever_try_it_meets(tmp_path, tries):
    told = []
    asked = asyncio.Event()

    async def ask(verb, *_, **_more):
        told.append(verb)
        if verb == "save" and len(told) < tries:
            domain.live = live()
            raise errors.StateError("interface 1 was not there, is there")
        if verb == "save":
            asked.set()
            await asyncio.sleep(60)
    process = SimpleNamespace(ask=ask)
    domain: Any = SimpleNamespace(name="web", live=live("vda"), outdated=False, want_active=lambda: process)
    paths = Paths(str(tmp_path))
    paths.make_folders()
    jobs = Jobs("web", lambda job, begins: None)

    async def save():
        with jobs.hold("save", "ann") as job:
            await saving.write(paths, domain, str(tmp_path / "web.save"), job, {})

    async def story():
        task = asyncio.create_task(save())
        await asked.wait()
        await jobs.abort("bob")
        with pytest.raises(JobBroken):
            await task
    asyncio.run(story())
    assert told == ["save"] * tries + ["save-cancel"] and "web.save" not in os.listdir(tmp_path)


def test_who_aborts_is_told_where_the_guest_cannot_go_on_yet(monkeypatch):
    """The host is still at the last piece."""
    monkeypatch.setattr(saving, "ABORT_PATIENCE", 0.01)

    async def aborted(_who):
        pass

    async def story(state):
        domain: Any = Domain.__new__(Domain)
        domain.name, domain.jobs, domain.waiters = "web", SimpleNamespace(abort=aborted), []
        domain.process = SimpleNamespace(silent=False, state=state[0], reason=state[1])
        call: Any = SimpleNamespace(domain=lambda: domain, who="bob", changed=lambda _, warnings: warnings)
        return await saving.abort_job(call)
    assert asyncio.run(story(("running", "unpaused"))) == []
    assert asyncio.run(story(("paused", "saving"))) == ["domain 'web' stands still until the host has written what is under way"]
