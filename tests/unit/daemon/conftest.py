"""The fixtures of the daemon's tests: see host.py."""
import pytest

from tests.unit.daemon.host import Host


@pytest.fixture
def host():
    """A host of the test's own, whose daemon is not started yet."""
    with Host.temporary() as one:
        yield one


@pytest.fixture(scope="session")
def shared():
    with Host.temporary() as one:
        yield one.start()


@pytest.fixture
def running(shared):
    """A host whose daemon runs, without domains; many tests have the same one, so they leave the daemon alone."""
    yield shared
    assert shared.process.poll() is None
    shared.wipe()
