"""The saving of a domain: what comes before its file is whole."""
import os
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
    machine: Any = SimpleNamespace(disks=[SimpleNamespace(read_only=False, flush=flush)], memory=None, config=None)
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
