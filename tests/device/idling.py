"""Whether a thread has nothing to do."""
import contextlib
import select
import time
from pathlib import Path

import pytest

from tests.waiting import until


def until_idle(thread):
    """Waits for half a second in which a thread of this process hardly runs: it may have had work until now, or waited for a CPU."""
    until(lambda: share_of_cpu(thread) < 0.5)


def share_of_cpu(thread, seconds=0.5):
    """How much of the time a thread of this process ran or waited for a CPU: nearly all of it in a busy loop, on a busy host, too."""
    def found():
        tasks = []
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):          # it has ended meanwhile
                if (task / "comm").read_text() == f"{thread}\n":
                    tasks.append(task)
        return tasks

    until(lambda: len(found()) == 1)                    # it names itself when it begins; a joined one of before may not be quite gone
    [task] = found()
    if not (task / "schedstat").exists():
        pytest.skip("this kernel does not count how long threads wait for a CPU")

    def wanted():
        ran, waited, _ = (task / "schedstat").read_text().split()
        return (int(ran) + int(waited)) / 1e9

    started, before = time.monotonic(), wanted()
    select.select([], [], [], seconds)                  # the subject is what happens meanwhile: nothing
    return (wanted() - before) / (time.monotonic() - started)
