"""Disks that come, go and become larger, of the file and of the running domain, and what domblkinfo tells of them."""
import asyncio
import json
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvmapp import errors
from kvmapp.config import DomainConfig
from kvmapp.daemon import diskverbs
from kvmapp.daemon.jobs import JobBroken, Jobs
from kvmapp.imagefile import open_image
from tests.smalldisk import fill, small_disk, sparse

MIB = 1 << 20


def with_disk(host, *behaviour, more=""):
    image = sparse(Path(host.root, "disk.img"), 4 * MIB)
    host.add("web", *behaviour, rest=f"[disk vda]\nsource = {image}\n{more}")
    return image


def image(host, name):
    return str(sparse(Path(host.root, f"{name}.img"), MIB))


def disks(host, inactive=False, name="web"):
    return {disk["name"]: disk["source"] for disk in host.get(name, "config", inactive=int(inactive))["config"]["disks"]}


def test_a_disk_is_attached_to_the_file_to_the_running_domain_or_both(host):
    host.start()
    a, b, c, d = (image(host, name) for name in "abcd")
    with_disk(host)
    host.post("web", "disks", name="vdb", settings={"source": a, "serial": "A", "readonly": ""})
    assert list(disks(host)) == ["vda", "vdb"]
    assert f"[disk vdb]\nsource = {a}\nserial = A\n" in host.file("web").read_text()
    host.post("web", "start")
    host.post("web", "disks", name="vdc", settings={"source": b})
    assert disks(host)["vdc"] == b and "vdc" not in disks(host, inactive=True)
    host.post("web", "disks", name="vdd", settings={"source": c}, persistent=True)
    assert all(disks(host, inactive)["vdd"] == c for inactive in (False, True))
    host.post("web", "disks", name="vde", settings={"source": d}, config=True)
    assert "vde" not in disks(host) and disks(host, inactive=True)["vde"] == d
    assert [disk["name"] for disk in host.domain("web")["disks"]] == ["vda", "vdb", "vdc", "vdd"]
    host.kill()
    host.start()
    assert list(disks(host)) == ["vda", "vdb", "vdc", "vdd"], "the next daemon knows of them"


def test_a_disk_stands_at_the_next_start_where_it_stood_in_the_running_guest(running):
    with_disk(running)
    running.post("web", "start")
    running.post("web", "disks", name="vdb", settings={"source": image(running, "b")}, persistent=True)
    running.post("web", "disks", name="vdc", settings={"source": image(running, "c"), "slot": "30"}, persistent=True)
    running.post("web", "disks", "detach", disk="vda", persistent=True)
    disks = running.get("web", "config", inactive=1)["config"]["disks"]
    assert [(disk["name"], disk["slot"]) for disk in disks] == [("vdb", 8), ("vdc", 30)]


def test_a_slot_that_would_change_the_order_of_disks_is_not_written(running):
    """Guests count them."""
    running.add("web", rest=f"[disk vda]\nsource = {image(running, 'a')}\nslot = 20\n")
    running.post("web", "start")
    running.post("web", "disks", name="vdb", settings={"source": image(running, "b")}, persistent=True)
    disks = running.get("web", "config", inactive=1)["config"]["disks"]
    assert [(disk["name"], disk["slot"]) for disk in disks] == [("vda", 20), ("vdb", None)]


@pytest.mark.parametrize("way", ["kill", "stop"])
@pytest.mark.parametrize("held", ["before", "after"])
def test_a_daemon_that_ends_while_a_disk_is_attached(host, held, way):
    """The next one knows what came of it, whether the domain has the disk or not."""
    host.start()
    with_disk(host, f"attach-held-{held}")
    host.post("web", "start")
    with ThreadPoolExecutor() as clients:
        attach = clients.submit(host.post, "web", "disks", name="vdb", settings={"source": image(host, "b")})
        host.eventually(lambda: os.path.exists(f"{host.paths.domain_own('web')}/held"))
        getattr(host, way)()
        with pytest.raises(errors.KvmappError):
            attach.result()
    Path(host.paths.domain_own("web"), "go").touch()
    host.start()
    had = {one["name"] for one in host.told("web", "status")["devices"]}
    host.eventually(lambda: {*disks(host)} == had)
    assert {disk[0] for disk in host.records()["web"]["disks"]} == had
    host.post("web", "disks", "detach", disk="vda")
    host.eventually(lambda: {*disks(host)} == had - {"vda"})


def test_the_domain_gets_the_file_open_and_locked(running):
    with_disk(running)
    running.post("web", "start")
    source = image(running, "b")
    running.post("web", "disks", name="vdb", settings={"source": source})
    assert f" {source}" in "".join(f" {path}" for path in running.told("web", "test-identity")["fds"])
    with pytest.raises(errors.GuestImageError, match="it is being used by"):
        os.close(open_image("vdb", source))
    running.add("other", rest=f"[disk vda]\nsource = {source}\n")
    with pytest.raises(errors.GuestImageError, match="it is disk 'vdb' of domain 'web', which runs"):
        running.post("other", "start")
    running.post("web", "disks", "detach", disk="vdb")
    os.close(open_image("vdb", source))
    assert running.records()["web"]["disks"] and running.post("other", "start")["domain"]["state"] == "running"
    with pytest.raises(errors.GuestImageError, match="it is disk 'vda' of domain 'other', which runs"):
        running.post("web", "disks", name="vdb", settings={"source": source})
    assert list(disks(running)) == ["vda"]


def test_a_disk_is_detached_when_the_guest_has_let_go(running):
    with_disk(running)
    b = image(running, "b")
    for name, where in (("vdb", "target"), ("vdb", "source")):
        running.post("web", "disks", name=name, settings={"source": b})
        running.post("web", "start")
        assert running.post("web", "disks", "detach", disk=name if where == "target" else b, persistent=True)["warnings"] == []
        assert list(disks(running)) == ["vda"] and "vdb" not in running.file("web").read_text() and os.path.exists(b)
        running.post("web", "destroy")
    with pytest.raises(errors.UsageError, match="No disk found whose source path or target is vdb") as caught:
        running.post("web", "disks", "detach", disk="vdb")
    assert caught.value.hint == "it has: vda; see kvmappctl domblklist web"
    running.post("web", "disks", "detach", disk="vda")
    assert disks(running) == {}


def test_a_disk_of_the_running_domain_alone_is_not_taken_out_of_the_file(running):
    with_disk(running)
    running.post("web", "start")
    running.post("web", "disks", name="vdb", settings={"source": image(running, "b")})
    with pytest.raises(errors.UsageError, match="target is vdb in the domain's file"):
        running.post("web", "disks", "detach", disk="vdb", persistent=True)
    assert list(disks(running)) == ["vda", "vdb"]


def test_a_disk_that_goes_while_no_daemon_hears_of_it_is_gone_for_the_next_one(host):
    host.start()
    with_disk(host)
    host.post("web", "disks", name="vdb", settings={"source": image(host, "b")})
    host.post("web", "start")
    host.kill()
    host.told("web", "detach-disk", device="vdb")
    host.start()
    assert list(disks(host)) == ["vda"] and "vdb" in disks(host, inactive=True)
    assert [disk[0] for disk in host.records()["web"]["disks"]] == ["vda"]


def test_a_guest_that_keeps_its_disk_is_told_of(host):
    host.patient = False
    host.start()
    with_disk(host, "keeps-cards")
    host.post("web", "start")
    source = str(Path(host.root, "disk.img"))
    assert host.post("web", "disks", "detach", disk="vda")["warnings"] == [
        f"the guest has not let go of disk vda ({source}) yet; a guest without ACPI hotplug never does"]
    assert list(disks(host)) == ["vda"]


@pytest.mark.parametrize(("name", "settings", "error", "words"), [
    ("vda", {}, errors.NameInUse, "operation failed: target vda already exists"),
    ("vdb", {"source": "rel.img"}, errors.UsageError, "source is 'rel.img', not an absolute path"),
    ("vdb", {"source": "/nowhere/x.img"}, errors.GuestImageError, r"Cannot open disk 'vdb' \(/nowhere/x.img\): No such file or directory"),
    ("vdb", {"source": "/etc"}, errors.GuestImageError, "it is a directory"),
    ("vdb", {"source": ""}, errors.ConfigError, "source"),
    ("vdb", {"cache": "what"}, errors.ConfigError, r"\[disk vdb\] cache = 'what': expected"),
    ("vdb", {"colour": "red"}, errors.ConfigError, "unknown key"),
    ("sda", {}, errors.ConfigError, "sda"), ("", {}, errors.ConfigError, "disk")])
def test_what_cannot_be_attached(running, name, settings, error, words):
    with_disk(running)
    running.post("web", "start")
    with pytest.raises(error, match=words):
        running.post("web", "disks", name=name, settings={"source": image(running, "b"), **settings}, persistent=True)
    assert list(disks(running)) == list(disks(running, inactive=True)) == ["vda"]
    assert [disk[0] for disk in running.records()["web"]["disks"]] == ["vda"]


@pytest.mark.parametrize(("behaviour", "words"), [("no-hotplug", "no slot is free"), ("old", "Its devices cannot come and go while")])
def test_a_domain_that_takes_no_disk_gives_its_file_back(running, behaviour, words):
    with_disk(running, behaviour)
    running.post("web", "start")
    source = image(running, "b")
    with pytest.raises(errors.KvmappError, match=words):
        running.post("web", "disks", name="vdb", settings={"source": source}, persistent=True)
    assert list(disks(running)) == list(disks(running, inactive=True)) == ["vda"]
    os.close(open_image("vdb", source))


def asked_of(host):
    return json.loads(Path(host.paths.domain_own("web"), "resized").read_text())


def test_the_running_domain_is_told(running):
    image = with_disk(running)
    with pytest.raises(errors.DomainNotRunning, match="domain is not running"):
        running.post("web", "disks", "resize", disk="vda", bytes=8 * MIB)
    running.post("web", "start")
    for disk in "vda", str(image):
        for body in {"bytes": 8 * MIB, "shrink": False}, {"bytes": MIB, "shrink": True}, {"bytes": None, "shrink": False}:
            assert running.post("web", "disks", "resize", disk=disk, **body)["warnings"] == []
            asked = asked_of(running)
            assert {key: asked[key] for key in ("device", "bytes", "shrink")} == {"device": "vda", **body}


def test_a_disk_that_it_does_not_have(running):
    with_disk(running)
    running.post("web", "start")
    for disk in "vdb", "", "/":
        with pytest.raises(errors.UsageError, match=f"invalid path {disk} not assigned to domain") as caught:
            running.post("web", "disks", "resize", disk=disk, bytes=8 * MIB)
        assert caught.value.hint == "it has: vda; see kvmappctl domblklist web"


def test_a_disk_that_is_read_only_has_the_size_of_its_file(running):
    with_disk(running, more="readonly = yes\n")
    running.post("web", "start")
    with pytest.raises(errors.UsageError, match="it is read-only"):
        running.post("web", "disks", "resize", disk="vda", bytes=8 * MIB)
    running.post("web", "disks", "resize", disk="vda", bytes=None)
    assert asked_of(running)["bytes"] is None


@pytest.mark.parametrize(("behaviour", "error", "words"), [
    ("small-host", errors.HostError, "File too large"),
    ("old", errors.Unsupported, "Its disks keep their sizes while domain 'web' runs under this version of kvmapp")])
def test_a_domain_that_refuses(running, behaviour, error, words):
    image = with_disk(running, behaviour)
    running.post("web", "start")
    with pytest.raises(error, match=words):
        running.post("web", "disks", "resize", disk="vda", bytes=8 * MIB)
    assert image.stat().st_size == 4 * MIB and running.domain("web")["state"] == "running"


def test_sizes(running):
    image = with_disk(running, more=f"[disk vdb]\nsource = {running.root}/gone.img\n[disk vdc]\nsource = /dev/null\n")
    os.truncate(image, 4 * MIB - 100)
    with open(image, "r+b") as file:
        file.write(b"w" * 4096)
    vda, vdb, vdc = running.get("web", "disks")["disks"]
    blocks = image.stat().st_blocks * 512
    assert vda == {"name": "vda", "source": str(image), "capacity": 4 * MIB, "allocation": blocks, "physical": 4 * MIB - 100, "error": None}
    assert vdb["capacity"] is None and vdb["error"] == "No such file or directory"
    assert vdc["name"] == "vdc"
    running.add("broken", memory="what")
    with running.client() as client:
        client.post("/v1/daemon/reload")
    assert running.get("broken", "disks") == {"disks": []}


def test_a_server_that_hangs_takes_one_thread_a_file(monkeypatch):
    """However often one asks, and the other disks are told of; it is asked anew when it has answered."""
    hangs, looks = threading.Event(), []

    def sizes(path):
        looks.append(path)
        assert path != "/mnt/web.img" or hangs.wait(60)
        return {"capacity": 512, "allocation": 0, "physical": 512}

    monkeypatch.setattr(diskverbs, "sizes", sizes)
    monkeypatch.setattr(diskverbs, "PATIENCE", 0.01)
    config = DomainConfig.from_dict({"name": "web", "memory": 64 << 20, "disks": [
        {"name": "vda", "source": "/data/web.img"}, {"name": "vdb", "source": "/mnt/web.img"}]})
    domain = SimpleNamespace(name="web", config=config, looks={})

    async def story():
        call: Any = SimpleNamespace(domain=lambda: domain, supervisor=SimpleNamespace(run=lambda work, _: asyncio.create_task(work)))
        for _ in range(5):
            while not (found := (await diskverbs.disk_sizes(call))["disks"])[0]["capacity"]:
                pass                                            # a thread may take longer than that to be begun
            assert found[1]["error"] == "its file server does not answer" and found[1]["capacity"] is None
        assert looks.count("/mnt/web.img") == 1
        under_way = domain.looks["/mnt/web.img"]
        hangs.set()
        await under_way
        monkeypatch.setattr(diskverbs, "PATIENCE", 60)
        for _ in range(2):
            assert [one["capacity"] for one in (await diskverbs.disk_sizes(call))["disks"]] == [512, 512]
        assert looks.count("/mnt/web.img") == 3 and not domain.looks

    asyncio.run(story())


def test_a_disk_whose_file_server_hangs_holds_its_guest_up_only_until_that_is_given_up(monkeypatch):
    hangs, opened = threading.Event(), threading.Event()
    late, closed = socket.socketpair()

    def open_image(*_, **_more):
        opened.set()
        assert hangs.wait(60)
        return late.fileno()
    monkeypatch.setattr(diskverbs, "open_image", open_image)
    asked = []

    async def ask(*words, **_):
        asked.append(words)
    jobs = Jobs("web", lambda job, begins: None)
    config = DomainConfig.from_dict({"name": "web", "memory": 64 << 20})
    process = SimpleNamespace(ask_with_files=ask)
    domain: Any = SimpleNamespace(name="web", jobs=jobs, active=True, live=config, want_active=lambda: process, record=None,
                                  outdated=False)
    body = {"name": "vdb", "settings": {"source": "/dev/null"}, "live": True}
    call: Any = SimpleNamespace(domain=lambda: domain, who="ann", body=body, supervisor=SimpleNamespace(active=list))

    async def story():
        task = asyncio.create_task(diskverbs.disk_attach(call))
        await asyncio.to_thread(opened.wait, 60)
        assert jobs.current and jobs.current.progress == "opening /dev/null"
        await jobs.abort("bob")
        with pytest.raises(JobBroken, match="that was aborted by bob"):
            await task
        assert jobs.current is None and not asked
        hangs.set()
        closed.settimeout(60)
        assert await asyncio.to_thread(closed.recv, 1) == b"", "what the thread opens all the same is closed"
        late.detach()
        closed.close()
    asyncio.run(story())


def test_what_cannot_be_noted_is_noted_later(host):
    """The host's /run is full for a while: the disk is there all the same, and the next daemon knows of it."""
    if os.geteuid() != 0:
        pytest.skip("needs root: NOT TESTED")
    host.options = ["--heartbeat", "0.1"]
    host.start()
    with_disk(host)
    host.post("web", "start")
    source = image(host, "b")
    with small_disk(host.paths.records):
        fill(Path(host.paths.records, "filler"))
        assert host.post("web", "disks", name="vdb", settings={"source": source})["warnings"] == []
        assert list(disks(host)) == ["vda", "vdb"]
        assert "cannot be noted, so the next daemon would not know of it: No space left on device" in Path(host.log).read_text()
    host.eventually(lambda: "vdb" in json.dumps(host.records().get("web")))
    host.kill()
    host.start()
    assert list(disks(host)) == ["vda", "vdb"]
