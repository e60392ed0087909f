"""What is told of a domain's state: changes, and nothing when a domain merely answers again."""
from types import SimpleNamespace
from typing import Any

from kvmapp.daemon.process import DomainProcess
from kvmapp.daemon.supervisor import Supervisor


def test_each_reboot_is_told_and_none_that_was_not():
    told: list[str] = []
    domain: Any = SimpleNamespace(name="web", uuid=None, id=1, notify=lambda: None, jobs=SimpleNamespace(current=None))
    supervisor: Any = SimpleNamespace(
        events=SimpleNamespace(publish=lambda event, *_, **more: told.append(event)),
        tell=lambda name, type, detail: told.append(type))
    process = domain.process = DomainProcess("web", "/nowhere", lambda: Supervisor.state_changed(supervisor, domain), lambda: None)
    process.take_status({"state": "running", "reason": "booted"})
    assert told == [], "the daemon has just learned of it"
    process.set_silent(True)
    process.set_silent(False)
    assert told == ["domain-broken"]
    for _ in range(2):
        process.hear({"type": "lifecycle", "state": "running", "reason": "booted"})
    process.hear({"type": "lifecycle", "state": "paused", "reason": "user"})
    assert told == ["domain-broken", "reboot", "reboot", "Suspended"]


def test_a_balloon_that_changed_is_told_and_one_that_is_just_learnt_of_is_not():
    told: list[tuple[str, str]] = []
    process = DomainProcess("web", "/nowhere", lambda: None, lambda: None, lambda *event: told.append(event))
    for balloon in (1 << 30, 1 << 30, 1 << 29, "much", None, 1 << 29):
        process.take_status({"state": "running", "reason": "booted", "balloon": balloon})
    assert told == [("balloon-change", str(1 << 29)), ("balloon-change", str(1 << 29))]
