"""The daemon killed with -9 a hundred times under load, with true guests whose counters are watched.

A guest's counter is read where the guest prints it (its console's log), so nothing of ours stands between: it must go on while no
daemon is there, each number once and in order. A reset guest would begin at 0 again, a paused one would stop.
"""
import contextlib
import re
import shutil
import tempfile
import threading
from pathlib import Path

import pytest

from kvmapp import errors
from kvmapp.client import Client, of
from kvmapp.probe import IMAGE
from tests.unit.daemon.host import IS_ROOT, Host

KILLS = 100
DAEMON = ("--domain-module", "kvmapp.vmprocess")
WATCHED = ["one", "two"]
SAME = ("pid", "id", "uuid", "started")
# What three clients ask for all the time.
VERBS: list[list[tuple[str, str, dict]]] = [
    [("busy", "start", {}), ("busy", "suspend", {}), ("busy", "resume", {}), ("busy", "destroy", {})],
    [("one", "autostart", {"enabled": True}), ("one", "autostart", {"enabled": False})],
    [("two", "description", {"title": word, "config": True}) for word in ("x", "y")]]

pytestmark = [pytest.mark.kvm, pytest.mark.skipif(not IS_ROOT, reason="domain processes change their user: needs root")]


@pytest.fixture
def host():
    root = tempfile.mkdtemp(prefix="kvmapp-")
    one = Host(root)
    shutil.copy(IMAGE, root)
    try:
        yield one
    finally:
        one.clean_up()
        shutil.rmtree(root)


class Counter:
    """What a guest printed."""

    def __init__(self, host, name):
        self.file = Path(host.root, f"{name}.out")
        self.host = host

    def add(self):
        self.host.file(self.file.stem).write_text(
            f"name = {self.file.stem}\nmemory = 32 MiB\n[boot]\nkernel = {self.host.root}/probe.elf\n"
            f"cmdline = mode=counter period=20\n[serial 0]\ntype = file\npath = {self.file}\n")

    def numbers(self):
        text = self.file.read_text() if self.file.exists() else ""
        return [int(found) for found in re.findall(r"^count (\d+)\s*\n", text, re.MULTILINE)]

    def moves(self):
        """Waits for two more numbers: the first may have been on its way."""
        seen = len(self.numbers())
        self.host.eventually(lambda: len(self.numbers()) >= seen + 2, f"two more numbers of {self.file.stem}")


def load(host, stop, done, verbs):
    """Verbs again and again, whether or not somebody answers; a verb that was cut off is repeated as its hint says."""
    while not stop.is_set():
        for name, verb, body in verbs:
            with contextlib.suppress(errors.KvmappError, OSError), Client(host.paths.socket, timeout=20) as client:
                client.post(of(name, verb), **body)
                done.append(verb)


@pytest.mark.timeout(900)
def test_a_hundred_kills_under_load(host):
    counters = [Counter(host, name) for name in [*WATCHED, "busy"]]
    for counter in counters:
        counter.add()
    watched = counters[:-1]
    host.start(*DAEMON)
    before = {name: host.post(name, "start")["domain"] for name in WATCHED}
    stop = threading.Event()
    done: list[list[str]] = [[] for _ in VERBS]              # what each client saw answered
    loads = [threading.Thread(target=load, args=(host, stop, *each)) for each in zip(done, VERBS, strict=True)]
    for thread in loads:
        thread.start()
    try:
        for number in range(KILLS):
            client = done[number % len(done)]
            wanted = len(client) + number % 4               # at once, or in the middle of what is asked next
            host.eventually(lambda client=client, wanted=wanted: len(client) >= wanted, "what a client asked for")
            host.kill()
            for counter in watched:
                counter.moves()
            host.start(*DAEMON)
            assert {name: host.domain(name)["state"] for name in WATCHED} == dict.fromkeys(WATCHED, "running")
    finally:
        stop.set()
        for thread in loads:
            thread.join(60)
    assert {verb for client in done for verb in client} == {verb for verbs in VERBS for _, verb, _ in verbs}    # there was a load
    for counter in watched:
        numbers = counter.numbers()
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) > 2 * KILLS
    for name in WATCHED:
        one = host.domain(name)
        assert [one[key] for key in SAME] == [before[name][key] for key in SAME]
        assert one["job"] is None and one["state"] == "running"
    everything_is_in_order(host)


def everything_is_in_order(host):
    """The domain that was started and destroyed all the time has a way on, and nothing lies about."""
    host.eventually(lambda: host.domain("busy")["job"] is None)
    if host.domain("busy")["state"] != "shut off":
        host.post("busy", "destroy")
    assert host.post("busy", "start")["domain"]["state"] == "running"
    Counter(host, "busy").moves()
    host.post("busy", "destroy")
    for name in WATCHED:
        host.post(name, "destroy")
    assert host.states() == {"one": "shut off", "two": "shut off", "busy": "shut off"} and host.records() == {}
    left = [path.name for path in Path(host.paths.domains).iterdir() if path.name.startswith(".")]
    assert left == [] and host.domain("two")["title"] in ("x", "y")
