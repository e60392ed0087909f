"""Disks that become larger while the domain runs, and what domblkinfo tells of them."""
import asyncio
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvmapp import errors
from kvmapp.config import DomainConfig
from kvmapp.daemon import diskverbs
from tests.smalldisk import sparse

MIB = 1 << 20


def with_disk(host, *behaviour, more=""):
    image = sparse(Path(host.root, "disk.img"), 4 * MIB)
    host.add("web", *behaviour, rest=f"[disk vda]\nsource = {image}\n{more}")
    return image


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


def test_a_server_that_hangs_takes_one_thread_a_domain(monkeypatch):
    """However often one asks; and it is asked anew when it has answered."""
    hangs, looks = threading.Event(), []

    def stat(_path):
        looks.append(threading.current_thread())
        assert hangs.wait(60)
        return {"capacity": 512, "allocation": 0, "physical": 512}

    monkeypatch.setattr(diskverbs, "sizes", stat)
    monkeypatch.setattr(diskverbs, "PATIENCE", 0.01)
    config = DomainConfig.from_dict({"name": "web", "memory": 64 << 20, "disks": [{"name": "vda", "source": "/mnt/web.img"}]})
    domain = SimpleNamespace(name="web", config=config, measuring=None)

    async def story():
        call: Any = SimpleNamespace(domain=lambda: domain, supervisor=SimpleNamespace(run=lambda work, _: asyncio.create_task(work)))
        for _ in range(5):
            with pytest.raises(errors.HostError, match="their file server does not answer") as caught:
                await diskverbs.disk_sizes(call)
            assert caught.value.hint == "it has: /mnt/web.img"
        assert len(looks) == 1
        under_way = domain.measuring
        hangs.set()
        await under_way
        monkeypatch.setattr(diskverbs, "PATIENCE", 60)
        for _ in range(2):
            assert (await diskverbs.disk_sizes(call))["disks"][0]["capacity"] == 512
        assert len(looks) == 3

    asyncio.run(story())
