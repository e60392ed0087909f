"""Waiting for what tells nobody that it has happened."""
import time

TIMEOUT = 20                             # seconds until a test gives up waiting; never reached when things work


def until(condition, seconds=TIMEOUT, pause=0.0005):
    """Looks again and again until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(pause)
