"""The saving of a domain: what comes before its file is whole."""
import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from kvmapp import snapshot, statefile
from kvmapp.errors import HostError, WrongState
from kvmapp.loop import Loop
from kvmapp.saving import Saving
from tests.unit.idle_domain import domain


@pytest.mark.parametrize("fails", [False, True])
def test_disks_are_flushed_before_the_file_gets_its_name(tmp_path, monkeypatch, fails):
    done: list[str] = []

    def flush():
        done.append("flushed")
        if fails:
            raise HostError("Cannot flush disk 'vda'")
    disk = SimpleNamespace(disk=SimpleNamespace(read_only=False, flush=flush))
    machine: Any = SimpleNamespace(disks=lambda: {"vda": disk}, memory=None, config=None)
    monkeypatch.setattr(snapshot, "describe", lambda *_: ({}, {}))

    def write(fd, *_):
        done.append("written")
        os.write(fd, b"x")
    monkeypatch.setattr(statefile, "write", write)
    loop, path = Loop(), tmp_path / "saved"

    def over(error):
        done.append(str(error))
        loop.stop()
    Saving(machine, loop, over, str(path))
    loop.run()
    loop.close()
    assert done == (["flushed", "Cannot flush disk 'vda'"] if fails else ["flushed", "written", "None"])
    assert os.listdir(tmp_path) == ([] if fails else ["saved"])


@pytest.mark.parametrize("when", ["before a piece", "after all", "after the file has its name"])
@pytest.mark.parametrize("named", [True, False])
def test_a_saving_that_is_cancelled(tmp_path, monkeypatch, when, named):
    """The file does not get its name; or it has it already, and the domain is saved."""
    done: list[str] = []
    at: dict[str, Any] = {"before a piece": lambda: None, "after all": lambda: None}
    machine: Any = SimpleNamespace(disks=dict, memory=None, config=None)
    monkeypatch.setattr(snapshot, "describe", lambda *_: ({}, {}))

    def write(fd, config, state, memory, progress):
        at["before a piece"]()
        progress(1)
        at["after all"]()
    monkeypatch.setattr(statefile, "write", write)
    loop, path = Loop(), tmp_path / "saved"

    def over(error):
        done.append(getattr(error, "code", "saved"))
        loop.stop()
    saving: Saving
    began = threading.Event()

    def cancel():
        assert began.wait(60)
        saving.cancel()
    at[when] = cancel
    saving = Saving(machine, loop, over, str(path)) if named else Saving(machine, loop, over, fd=os.open(path, os.O_RDWR | os.O_CREAT))
    began.set()
    if when.startswith("after the file"):
        saving.thread.join()
        saving.cancel()
    loop.run()
    loop.close()
    kept = named and when.startswith("after the file")
    assert done == ["saved" if kept else "save-given-up"] and path.exists() == (kept or not named)


class Attempt:
    """A Saving that ends when it is told to."""

    def __init__(self, machine, loop, done, *_):
        self.finish, self.told, self.named = done, [], False

    def give_up(self):
        self.told.append("given up")

    def cancel(self):
        self.told.append("cancelled")

    def close(self):
        self.told.append("closed")

    def has_name(self):
        return self.named


def saver():
    return SimpleNamespace(on_close=None, take_fd=lambda: -1, answer=lambda number, error: None)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A domain that is being saved to a descriptor by `first`."""
    monkeypatch.setattr("kvmapp.saving.Saving", Attempt)
    made = domain("", tmp_path)
    made.first = saver()
    made.verb_save(made.first, {"id": 1})
    assert made.state == "saving"
    return made


@pytest.mark.parametrize("written", [True, False])
def test_who_saves_and_goes_away_has_saved_nothing(saved, written):
    attempt = saved.saving
    if written:
        attempt.finish(None)
    saved.first.on_close()
    assert saved.state == "running" and attempt.told == (["closed"] if written else ["given up"])


def test_who_goes_away_after_the_rename_has_saved_it(saved):
    """The guest must not go on beside a file from which it may be restored."""
    saved.saving.named = True
    saved.saving.finish(None)
    saved.first.on_close()
    assert (saved.state, saved.ending.reason) == ("shut off", "saved") and "resume" not in saved.machine.did


@pytest.mark.parametrize("name", ["saved", ".saved.new", "a.1-2.new", "x (deleted)"])
def test_whether_the_file_of_a_descriptor_has_its_name(tmp_path, monkeypatch, name):
    monkeypatch.setattr(snapshot, "describe", lambda *_: ({}, {}))
    monkeypatch.setattr(statefile, "write", lambda *_: 0)
    loop, machine = Loop(), SimpleNamespace(disks=dict, memory=None, config=None)
    with statefile.Draft(str(tmp_path / name)) as draft:
        saving = Saving(machine, loop, lambda error: loop.stop(), fd=os.dup(draft.fd))     # type: ignore[arg-type]
        loop.run()
        assert not saving.has_name()
        draft.publish()
        assert saving.has_name()
        os.rename(tmp_path / name, tmp_path / ".nfs0001")
        assert not saving.has_name(), "so NFS calls a file that was removed"
        os.unlink(tmp_path / ".nfs0001")
        assert not saving.has_name()
    saving.close()
    assert not saving.has_name()
    loop.close()


@pytest.mark.parametrize("way", ["cancelled before it was written", "cancelled after", "undone", "failed"])
def test_one_whose_saving_is_over_does_not_end_the_next(saved, way):
    """Whoever it was that said so."""
    attempt, other = saved.saving, saver()
    if way == "cancelled before it was written":
        saved.verb_save_cancel(other, {})
        assert attempt.told == ["cancelled"]
    attempt.finish(None if way in ("cancelled after", "undone") else HostError("No space left"))
    if way in ("cancelled after", "undone"):
        (saved.verb_save_undo if way == "undone" else saved.verb_save_cancel)(other, {})
    assert saved.state == "running"
    saved.verb_save(other, {"id": 2})
    saved.first.on_close()
    assert saved.state == "saving" and saved.saving.told == []
    other.on_close()
    assert saved.state == "running"
    assert saved.machine.did.count("pause") == saved.machine.did.count("resume") == 2


def test_another_saving_is_refused_and_changes_nothing(saved):
    other = saver()
    with pytest.raises(WrongState):
        saved.verb_save(other, {"id": 2})
    assert other.on_close is None
    saved.first.on_close()
    assert saved.state == "running"


def test_a_saving_to_a_path_outlives_who_asked_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr("kvmapp.saving.Saving", Attempt)
    made, first = domain("", tmp_path), saver()
    made.verb_save(first, {"id": 1, "path": "/nowhere"})
    first.on_close()
    assert made.state == "saving" and made.saving.told == []
    made.saving.finish(None)
    assert (made.state, made.ending.reason) == ("shut off", "saved")


def test_who_goes_away_after_the_file_got_its_name_undoes_nothing(saved):
    saved.loop.call = saved.published.append
    saved.saving.finish(None)
    saved.verb_save_end(saver(), {})
    saved.first.on_close()
    assert saved.state == "saving" and "resume" not in saved.machine.did
    saved.published[-1]()
    assert (saved.state, saved.ending.reason) == ("shut off", "saved")
