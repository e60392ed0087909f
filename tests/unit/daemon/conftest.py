"""The fixtures of the daemon's tests: see host.py."""
import contextlib
import shutil
import tempfile

import pytest

from tests.unit.daemon.host import Host


@contextlib.contextmanager
def a_host():
    root = tempfile.mkdtemp(prefix="kvmapp-")
    one = Host(root)
    try:
        yield one
    finally:
        one.clean_up()
        shutil.rmtree(root)


@pytest.fixture
def host():
    """A host of the test's own, whose daemon is not started yet."""
    with a_host() as one:
        yield one


@pytest.fixture(scope="session")
def shared():
    with a_host() as one:
        yield one.start()


@pytest.fixture
def running(shared):
    """A host whose daemon runs, without domains; many tests have the same one, so they leave the daemon alone."""
    yield shared
    assert shared.process.poll() is None
    shared.wipe()
