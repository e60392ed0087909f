"""Fixtures of the tests of kvmappctl: a daemon of canned answers, and command lines against it."""
import pytest

from kvmapp.cli.main import main
from tests.unit.canned_daemon import CannedDaemon, domain


@pytest.fixture
def daemon(tmp_path):
    with CannedDaemon(tmp_path) as canned:
        canned.add(domain("linuxvm01", 1, title="Title 1"), domain("linuxvm02", 2, state="paused", reason="user"), domain("linuxvm03"))
        yield canned


@pytest.fixture
def ctl(daemon, capsys):
    """Runs one command line: (status, stdout, stderr)."""
    def run(*words):
        status = main(["-c", daemon.uri, *words])
        said = capsys.readouterr()
        return status, said.out, said.err
    return run
