"""iface-bridge and iface-unbridge: one change of the host's own network at a time, undone by itself unless somebody confirms it.

Whoever asks may sit at the other end of the device that is moved. What undoes the change is noted in RUN before the first step, so a
daemon that is killed meanwhile undoes it too, at its next start or in time after it.
"""
from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from contextlib import suppress

from kvmapp.daemon import hostbridge
from kvmapp.errors import HostError, KvmappError, WrongState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.daemon.hostbridge import Move
    from kvmapp.daemon.supervisor import Supervisor

log = logging.getLogger("kvmapp")


class Bridging:
    def __init__(self, supervisor: Supervisor):
        self.supervisor = supervisor
        self.path = os.path.join(supervisor.paths.run, "interfaces.json")
        self.pending: dict | None = None        # what, undo, deadline
        self.timer: asyncio.Task | None = None
        self.lock = asyncio.Lock()

    async def make(self, what: str, move: Move, timeout: float) -> None:
        """Raises KvmappError; then everything is as it was."""
        async with self.lock:
            self.want_none_pending()
            self.note({"what": what, "undo": move.undo, "deadline": time.time() + timeout})
            try:
                await asyncio.to_thread(hostbridge.take, move.steps, what)
            except KvmappError:
                await self.undo()
                raise
        log.info("%s: undone in %.0f s unless confirmed", what, timeout)
        self.timer = self.supervisor.run(self.wait(), "undoing of a change of the host's network")

    def want_none_pending(self) -> None:
        if self.pending is not None:
            raise WrongState(f"Another change of the host's network waits to be confirmed: {self.pending['what']}",
                             "kvmappctl iface-bridge --confirm keeps it, --undo takes it back")

    def note(self, pending: dict) -> None:
        try:
            with open(f"{self.path}.new", "w") as file:
                json.dump(pending, file)
            os.rename(f"{self.path}.new", self.path)
        except OSError as error:
            raise HostError(f"Cannot write '{self.path}': {error.strerror}") from None
        self.pending = pending

    async def confirm(self) -> str:
        """Returns what is kept."""
        async with self.lock:
            what = self.want_pending()["what"]
            self.forget()
        log.info("confirmed: %s", what)
        return what

    async def take_back(self) -> str:
        async with self.lock:
            what = self.want_pending()["what"]
            await self.undo()
        return what

    def want_pending(self) -> dict:
        if self.pending is None:
            raise WrongState("No change of the host's network waits to be confirmed", "it was confirmed or undone before")
        return self.pending

    async def undo(self) -> None:
        pending = self.pending
        assert pending
        log.warning("undoing: %s", pending["what"])
        await asyncio.to_thread(hostbridge.take, pending["undo"], f"undo: {pending['what']}", force=True)
        self.forget()

    def forget(self) -> None:
        self.pending = None
        with suppress(OSError):
            os.unlink(self.path)
        if self.timer is not None and self.timer is not asyncio.current_task():
            self.timer.cancel()
        self.timer = None

    async def wait(self) -> None:
        assert self.pending
        await asyncio.sleep(max(0.0, self.pending["deadline"] - time.time()))
        async with self.lock:
            if self.pending is not None:
                await self.undo()

    def find_pending(self) -> None:
        """What an earlier daemon left."""
        try:
            with open(self.path) as file:
                data = json.load(file)
            self.pending = {"what": str(data["what"]), "undo": [str(line) for line in data["undo"]], "deadline": float(data["deadline"])}
        except (OSError, ValueError, KeyError, TypeError):
            return
        self.timer = self.supervisor.run(self.wait(), "undoing of a change of the host's network")
