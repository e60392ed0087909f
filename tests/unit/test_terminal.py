"""The guard of the user's terminal, whose child has it."""
import os
import signal
import sys
from pathlib import Path

from tests.unit.terminal import OnTerminal

ROOT = Path(__file__).resolve().parents[2]
# The guard is put aside behind its fork, as a busy host may do at any time; its child is up long before it goes on.
LATE = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from kvmapp import terminal
fork = os.fork
def late():
    child = fork()
    if child:
        time.sleep(1)
    return child
os.fork = late
def work():
    signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
    os.write(1, b"ready")
    while True:
        signal.pause()
sys.exit(terminal.guarded(work))
"""


def test_a_signal_that_comes_before_the_guard_is_ready_is_handed_on():
    with OnTerminal([sys.executable, "-c", LATE], {}) as screen:
        screen.expect("ready")
        os.kill(screen.pid, signal.SIGTERM)
        assert screen.status() == 7
