"""Fixtures of the tests of kvmappctl: a daemon of canned answers, which command lines are for."""
import pytest

from tests.unit.canned_daemon import CannedDaemon, domain


@pytest.fixture
def daemon(tmp_path):
    with CannedDaemon(tmp_path) as canned:
        canned.add(domain("linuxvm01", 1, title="Title 1"), domain("linuxvm02", 2, state="paused", reason="user"), domain("linuxvm03"))
        yield canned


@pytest.fixture
def uri(daemon):
    return daemon.uri
