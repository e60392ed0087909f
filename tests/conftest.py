"""What all tests share: a slow moment of a busy machine is no failure of a property; command lines of kvmappctl; and place.py says
where they run."""
import signal

import pytest
from hypothesis import settings

from kvmapp.cli.main import main

settings.register_profile("kvmapp", deadline=None)
settings.load_profile("kvmapp")

pytest_plugins = ["tests.guest.place"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:        # started in the background: the programs of tests shall hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def ctl(uri, capsys):
    """Runs one command line against the daemon at `uri`, each folder's own: (status, stdout, stderr)."""
    def run(*words):
        status = main(["-c", uri, *words])
        said = capsys.readouterr()
        return status, said.out, said.err
    return run
