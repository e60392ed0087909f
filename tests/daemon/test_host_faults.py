"""The host beneath the daemon: files half written or odd, disks full, a clock that jumps, logs that grow."""
import asyncio
import errno
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvmapp import errors
from kvmapp.client import of
from kvmapp.daemon.networks import Networks
from tests.smalldisk import fill, small_disk
from tests.unit.daemon.host import GUEST, IS_ROOT, UUID

root_only = pytest.mark.skipif(not IS_ROOT, reason="needs root")


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
    running.add("b", uuid=UUID)
    assert running.states() == {"b": "shut off"}
    running.add("a", uuid=UUID)                                         # the copy comes first by name, and is the broken one
    assert running.states() == {"a": "broken", "b": "shut off"}
    assert f"uuid = {UUID}: domain 'b' has it already" in running.domain("a")["text"]
    running.file("b").unlink()
    assert running.states() == {"a": "shut off"}


@root_only
def test_full_disk_under_etc(host):
    with small_disk(host.paths.config):
        host.write_settings()
        os.makedirs(host.paths.domains)
        host.add("a", uuid=UUID)
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


def test_a_network_that_cannot_be_put_back_holds_up_no_other():
    def fails(members):
        raise OSError(errno.ENOSPC, "No space left on device")

    seen: list[str] = []
    bad, good = SimpleNamespace(name="bad", put_back=fails, warnings=[]), SimpleNamespace(name="good", put_back=seen.append)
    networks: Any = SimpleNamespace(members=lambda name: name)
    asyncio.run(Networks.put_back(networks, [bad, good], rules=False))      # type: ignore[list-item]
    assert seen == ["good"] and "No space left on device" in bad.warnings[0]


def test_log_is_set_aside_by_size_while_the_domain_runs(host):
    host.options = ["--heartbeat", "0.1"]
    host.write("guest.conf", GUEST + "log_max_size = 64 KiB\nlog_max_backups = 1\n")
    host.add("a")
    host.start()
    host.post("a", "start")
    log = Path(host.paths.domain_log("a"))
    with log.open("ab", buffering=0) as file:                           # in one write: the daemon looks at any time
        file.write(b"x" * 70_000 + b"\n")
    host.eventually(lambda: Path(f"{log}.1").exists() and log.stat().st_size < 60_000)
    assert Path(f"{log}.1").stat().st_size > 70_000
    host.post("a", "destroy")
    assert "id 1" in Path(f"{log}.1").read_text()


@pytest.mark.parametrize("jump", [-3600.0 * 24 * 365, 3600.0 * 24 * 365])
def test_clock_that_jumped_between_start_and_end(running, jump):
    running.add("a")
    running.post("a", "start")
    running.told("a", "test_clock", jump=jump)
    ended = running.post("a", "shutdown", timeout=60)["domain"]
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
