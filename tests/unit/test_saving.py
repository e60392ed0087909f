"""The saving of a domain: what comes before its file is whole."""
import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from kvmapp import snapshot, statefile
from kvmapp.errors import HostError
from kvmapp.loop import Loop
from kvmapp.saving import Saving


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
