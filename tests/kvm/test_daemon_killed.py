"""The daemon killed with -9 a hundred times under load, with true guests whose counters are watched.

A guest's counter is read where the guest prints it (its console's log), so nothing of ours stands between: it must go on while no
daemon is there, each number once and in order. A reset guest would begin at 0 again, a paused one would stop.
"""
import contextlib
import re
from pathlib import Path

import pytest

from kvmapp import errors
from tests.kvm.host import needs_root
from tests.unit.daemon.load import Load

KILLS = 100
WATCHED = ["one", "two"]
SAME = ("pid", "id", "uuid", "started")
# What three clients ask for all the time.
VERBS: list[list[tuple[str, str, dict]]] = [
    [("busy", "start", {}), ("busy", "suspend", {}), ("busy", "resume", {}), ("busy", "destroy", {})],
    [("one", "autostart", {"enabled": True}), ("one", "autostart", {"enabled": False})],
    [("two", "description", {"title": word, "config": True}) for word in ("x", "y")]]

pytestmark = [pytest.mark.kvm, needs_root]


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


@pytest.mark.timeout(900)
def test_a_hundred_kills_under_load(host):
    counters = [Counter(host, name) for name in [*WATCHED, "busy"]]
    for counter in counters:
        counter.add()
    watched = counters[:-1]
    host.start()
    before = {name: host.post(name, "start")["domain"] for name in WATCHED}
    with Load(host, VERBS) as load:
        for _ in range(KILLS):
            load.moment()
            host.kill()
            for counter in watched:
                counter.moves()
            host.start()
            assert {name: host.domain(name)["state"] for name in WATCHED} == dict.fromkeys(WATCHED, "running")
    for verbs, answered in zip(VERBS, load.answered, strict=True):
        assert set(answered) == {verb for _, verb, _ in verbs}          # there was a load
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
        with contextlib.suppress(errors.DomainNotRunning):              # asked by the load, it may just be ending
            host.post("busy", "destroy")
    assert host.post("busy", "start")["domain"]["state"] == "running"
    Counter(host, "busy").moves()
    host.post("busy", "destroy")
    for name in WATCHED:
        host.post(name, "destroy")
    assert host.states() == {"one": "shut off", "two": "shut off", "busy": "shut off"} and host.records() == {}
    left = [path.name for path in Path(host.paths.domains).iterdir() if path.name.startswith(".")]
    assert left == [] and host.domain("two")["title"] in ("x", "y")
