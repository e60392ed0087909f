"""Processes that a test started, and those that they started."""
from contextlib import suppress
from pathlib import Path


def descendants(pid):
    """The ids of all processes under this one, children before their children."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):                          # a thread or a child that has ended meanwhile
            for child in children.read_text().split():
                found += [int(child), *descendants(int(child))]
    return found
