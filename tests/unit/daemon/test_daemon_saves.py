"""Managed saves, as files whose guests are none: when one is void, and what is said of one that cannot be used now."""
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvmapp import errors, statefile
from kvmapp.config import read_domain

NO_MEMORY = SimpleNamespace(size=0, runs=lambda granule: [], view=None)


@pytest.fixture
def saved(running):
    """A domain with a managed save."""
    running.define()
    path = Path(running.paths.managed_save("web"))
    write(path, running)
    assert running.domain("web")["managed_save"]
    yield path
    path.unlink(missing_ok=True)


def write(path, host):
    with statefile.Draft(str(path)) as draft:
        statefile.write(draft.fd, read_domain(str(host.file("web"))).to_dict(), {}, NO_MEMORY)
        draft.publish()


def test_start_goes_on_from_it_and_takes_it_away(running, saved):
    assert running.post("web", "start")["domain"]["state"] == "running"
    assert not saved.exists()


def test_it_is_void_once_the_domain_runs_from_another_file(running, saved, tmp_path):
    """Its memory knows nothing of what the guest has written to its disks since."""
    write(tmp_path / "older", running)
    with running.client() as client:
        client.post("/v1/restore", file=str(tmp_path / "older"))
    assert not saved.exists()


def test_it_is_void_once_the_domain_is_created_anew(running, saved):
    running.define(running.file("web").read_text(), transient=True)
    assert running.states() == {"web": "running"} and not saved.exists()


def test_a_broken_file_is_no_reason_to_give_it_up(running, saved):
    running.file("web").write_text("name = web\nmemory = lots\n")
    with pytest.raises(errors.ConfigError, match="memory = 'lots'"):
        running.post("web", "start")
    assert saved.exists()
