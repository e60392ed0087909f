"""The fixtures of the daemon's unit tests, for those that take a daemon or more each."""
from tests.unit.daemon.conftest import host, running, shared

__all__ = ["host", "running", "shared"]
