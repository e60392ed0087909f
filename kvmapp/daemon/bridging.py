"""iface-bridge and iface-unbridge: one change of the host's own network at a time, undone by itself unless somebody confirms it.

Whoever asks may sit at the other end of the device that is moved. What undoes the change is noted in RUN before the first step, so a
daemon that is killed meanwhile undoes it too, at its next start or in time after it. It is forgotten when everything is there again.
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

AGAIN = 10.0                            # seconds until an undo that did not bring everything back is tried again
log = logging.getLogger("kvmapp")


class Bridging:
    def __init__(self, supervisor: Supervisor):
        self.supervisor = supervisor
        self.path = os.path.join(supervisor.paths.run, "interfaces.json")
        self.pending: dict | None = None        # what, undo, device, before, deadline
        self.complaint = ""
        self.timer: asyncio.Task | None = None
        self.lock = asyncio.Lock()

    async def make(self, what: str, move: Move, timeout: float) -> None:
        """Raises KvmappError; then everything is as it was, or will be."""
        async with self.lock:
            self.want_none_pending()
            self.note({"what": what, "undo": move.undo, "device": move.device, "before": move.before, "deadline": time.time() + timeout})
            try:
                await asyncio.to_thread(hostbridge.take, move.steps, what)
            except KvmappError:
                await self.undo()
                raise
        log.info("%s: undone in %.0f s unless confirmed", what, timeout)
        self.set_timer()

    def set_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
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
            if failure := await self.undo():
                raise failure
        return what

    def want_pending(self) -> dict:
        if self.pending is None:
            raise WrongState("No change of the host's network waits to be confirmed", "it was confirmed or undone before")
        return self.pending

    async def undo(self) -> HostError | None:
        """Returns what is not as it was; then it is tried again."""
        pending = self.pending
        assert pending
        if not self.complaint:
            log.warning("undoing: %s", pending["what"])
        try:
            await asyncio.to_thread(hostbridge.take, pending["undo"], f"undo: {pending['what']}", force=True)
            if missing := await asyncio.to_thread(hostbridge.missing, pending["device"], pending["before"]):
                raise HostError(f"Cannot undo: {pending['what']}: {pending['device']} lacks: {'; '.join(missing)}")
        except HostError as error:
            error.hint = f"it is tried again every {AGAIN:.0f} s; kvmappctl iface-bridge --confirm leaves everything as it is now"
            if str(error) != self.complaint:
                log.error("%s", error)
            self.complaint = str(error)
            pending["deadline"] = time.time() + AGAIN
            if self.timer is not asyncio.current_task():
                self.set_timer()
            return error
        self.forget()
        return None

    def forget(self) -> None:
        self.pending, self.complaint = None, ""
        with suppress(OSError):
            os.unlink(self.path)
        if self.timer is not None and self.timer is not asyncio.current_task():
            self.timer.cancel()
        self.timer = None

    async def wait(self) -> None:
        while self.pending is not None:
            if (seconds := self.pending["deadline"] - time.time()) > 0:
                await asyncio.sleep(seconds)
                continue
            async with self.lock:
                if self.pending is not None:
                    await self.undo()

    def find_pending(self) -> None:
        """What an earlier daemon left."""
        try:
            with open(self.path) as file:
                data = json.load(file)
            self.pending = {"what": str(data["what"]), "undo": [str(line) for line in data["undo"]], "deadline": float(data["deadline"]),
                            "device": str(data["device"]), "before": [str(line) for line in data["before"]]}
        except (OSError, ValueError, KeyError, TypeError):
            return
        self.set_timer()
