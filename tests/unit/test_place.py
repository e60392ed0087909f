"""Where tests run that may want another host (tests/guest/place.py), and that no failure is lost with a nested host that dies."""
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.appliance import conftest as appliance
from tests.guest import place
from tests.lab.commandline import DIED


def item(name, *decorators, path=None) -> Any:
    """As much of a pytest.Item as the plugin looks at."""
    marks = [decorator.mark for decorator in decorators]
    session = SimpleNamespace(_setupstate=SimpleNamespace(teardown_exact=lambda _next: None))
    return SimpleNamespace(nodeid=name, path=path or Path(__file__), location=("", 0, name), session=session,
                           config=SimpleNamespace(stash=pytest.Stash()), iter_markers=lambda kind: (m for m in marks if m.name == kind),
                           get_closest_marker=lambda kind: next((m for m in marks if m.name == kind), None))


def report(name, when="call", outcome="passed", text=None):
    return pytest.TestReport(name, ("", 0, name), {}, outcome, text, when)


@pytest.mark.parametrize(("virtualization", "in_lab", "goes"), [
    (True, False, {"plain", "lacking"}), (False, False, {"guest", "plain", "lacking"}), (True, True, set()), (False, True, set())])
def test_what_goes_to_the_lab(monkeypatch, tmp_path, virtualization, in_lab, goes):
    monkeypatch.setattr(place, "hardware_virtualization", lambda: virtualization)
    monkeypatch.setattr(place, "NESTED_LAB", tmp_path if in_lab else tmp_path / "absent")
    guests = place.GUEST_TESTS / "test_x.py"
    items = [item("unit"), item("guest", path=guests), item("plain", pytest.mark.plain_host, path=guests),
             item("lacking", pytest.mark.lab("VLANs on bridges")), item("here", pytest.mark.lab(None))]
    assert {each.nodeid for each in items if place.goes_to_lab(each)} == goes


class Lab(place.LabRun):
    """Nested hosts that do as they are told, each of `hosts` in its turn: the reports it writes, the status it ends with (None: it stands
    still), and the reports that it writes while it is ended from outside."""

    def __init__(self, hosts, ids):
        self.hosts, self.asked = iter(hosts), []
        hook = SimpleNamespace(pytest_report_from_serializable=lambda config, data: pytest.TestReport._from_json(data))
        config: Any = SimpleNamespace(stash=pytest.Stash(), hook=hook)
        super().__init__(config, ids)

    def start(self, ids):
        reports, status, late = next(self.hosts)
        self.starts += 1
        self.read = self.said = 0
        self.progress = 0 if status is None else float("inf")        # silent for ever
        self.asked.append(ids)
        (self.folder / "output").write_text("")
        (self.folder / "reports").write_text("")
        self.write(reports)
        process: Any = SimpleNamespace(poll=lambda: status, returncode=status, wait=lambda: None, terminate=lambda: self.write(late))
        self.process = process

    def write(self, reports):
        with open(self.folder / "reports", "a") as file:
            file.writelines(json.dumps(each._to_json()) + "\n" for each in reports)


@pytest.fixture
def run_in():
    """run_in(hosts, ids) is a Lab that is closed after the test."""
    labs = []

    def make(*hosts, ids):
        labs.append(Lab(hosts, list(ids)))
        return labs[-1]

    yield make
    for lab in labs:
        lab.close()


def whole(name, outcome="passed", text=None):
    return [report(name, "setup"), report(name, "call", outcome, text), report(name, "teardown")]


def outcomes(lab, name):
    return [each.outcome for each in lab.reports_of(item(name))]


def test_what_a_host_did_not_finish_runs_in_the_next(run_in):
    lab = run_in(([*whole("a"), report("b", "setup")], DIED, []), (whole("b"), 0, []), ids="ab")
    assert outcomes(lab, "a") == outcomes(lab, "b") == ["passed"] * 3
    assert lab.asked == [["a", "b"], ["b"]]


def test_a_host_that_dies_after_its_last_report_is_not_started_anew(run_in):
    """pytest without arguments would run all that there is."""
    lab = run_in((whole("a"), DIED, []), ids="a")
    assert outcomes(lab, "a") == ["passed"] * 3
    assert not lab.look()
    assert lab.asked == [["a"]]


def test_reports_that_come_while_a_silent_host_is_ended_count(run_in):
    lab = run_in(([], None, whole("a", "failed", "wrong")), (whole("b"), 0, []), ids="ab")
    lab.retold = place.RETELLINGS
    assert outcomes(lab, "a") == ["passed", "failed", "passed"]
    assert outcomes(lab, "b") == ["passed"] * 3
    assert lab.asked == [["a", "b"], ["b"]]


def test_a_test_that_is_told_again_is_listed_at_the_end(run_in, capsys):
    lab = run_in((whole("a", "failed", "the reason"), 1, []), (whole("a"), 0, []), ids="a")
    assert outcomes(lab, "a") == ["passed"] * 3
    assert "the reason" in capsys.readouterr().out
    lines = []
    reporter: Any = SimpleNamespace(section=lambda title, **_: lines.append(title), write_line=lines.append)
    place.pytest_terminal_summary(reporter, lab.config)
    assert lines == ["told again in a new nested host", "a"]


def test_a_chapter_that_failed_before_its_host_was_lost_keeps_its_failure(monkeypatch, capsys):
    told = []

    def run(chapter, nextitem, log):
        told.append(chapter.nodeid)
        first = len(told) <= 3
        appliance.PlainHost.lost = first and chapter.nodeid == "c"
        fails = first and chapter.nodeid != "a"
        return whole(chapter.nodeid, "failed", f"why {chapter.nodeid}") if fails else whole(chapter.nodeid)

    monkeypatch.setattr(appliance, "runtestprotocol", run)
    reports = appliance.tell([item(name) for name in "abcd"])
    assert told == [*"abc", *"abcd"]
    assert [name for name, each in reports.items() if any(one.failed for one in each)] == ["b"]
    said = capsys.readouterr().out
    assert "why b" in said and "why c" in said
