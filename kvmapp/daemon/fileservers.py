"""The file servers of running domains (fileserver.py): who they are, and that none outlives its domain.

A server ends when its domain's process does, by the end of its socket; what is here makes sure of it, also of one that hangs, and of
those that an earlier daemon started. They are told from other processes by pid and start time, as domains are.
"""
from __future__ import annotations

import asyncio
import logging
import os
import signal
from contextlib import suppress

from kvmapp.daemon.process import UNKNOWN, start_time_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess

log = logging.getLogger("kvmapp")
GRACE = (0.05, 0.2, 0.75, 4)            # seconds, one after the other, for a server to see that its socket has ended


class FileServers:
    def __init__(self) -> None:
        self.children: list[subprocess.Popen] = []

    def take(self, process: subprocess.Popen) -> tuple[int, int]:
        """A child of ours, from its start on; its pid and start time."""
        self.children.append(process)
        with suppress(OSError), open(f"/proc/{process.pid}/oom_score_adj", "w") as score:
            score.write("0")                            # the daemon may be protected from the out-of-memory killer; this is not
        return process.pid, max(0, start_time_of(process.pid))

    def reap(self) -> None:
        self.children = [child for child in self.children if child.poll() is None]

    async def see_off(self, name: str, servers: list[list]) -> None:
        """The domain has ended: whichever of its servers has not by itself, is ended."""
        for pause in GRACE:
            await asyncio.sleep(pause)
            self.reap()
            if not any(start_time_of(pid) in (start, UNKNOWN) for _, pid, start in servers if start):
                return
        for tag, pid, start in servers:
            if start and start_time_of(pid) == start:
                log.warning("domain '%s' has ended, the file server of filesystem '%s' (pid %d) has not: killing it", name, tag, pid)
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)       # an old virtiofsd is two processes
        await asyncio.sleep(GRACE[0])
        self.reap()
