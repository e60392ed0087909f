"""The saving of a domain that runs: it stands still, a thread writes it to a file, and it ends - or goes on, when the file failed.

    to a path    `kvmapp run --save FILE`, or {"verb": "save", "path": ...}: the file is published here, and the domain ends
    to an fd     {"verb": "save"} with a descriptor (SCM_RIGHTS): the answer says that all is written; then the client gives the file
                 its name and says {"verb": "save-end"}. A client that goes away before it gave the name has saved nothing, and the
                 guest goes on (vmsaving.py). The descriptor stays open until then: `close` is for who knows.

The control thread stays free: queries are answered, and destroy gives the saving up.
"""
from __future__ import annotations

import os
import threading

from kvmapp import snapshot, statefile
from kvmapp.config import DomainConfig
from kvmapp.errors import HostError, KvmappError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmapp.loop import Loop
    from kvmapp.machine import Machine


class SaveGivenUp(KvmappError):
    """The domain was destroyed, or whoever wanted it saved went away or thought better of it."""
    code = "save-given-up"


class Saving:
    """One attempt. `done(error or None)` is called in the control thread when everything is written and synced, or nothing is."""

    def __init__(self, machine: Machine, loop: Loop, done: Callable[[KvmappError | None], None], path: str = "", fd: int = -1,
                 paused: bool = False, config: dict | None = None):
        """Takes the machine's state at once (it is paused), so that only memory is read in the thread; `paused`: its domain is to be
        so when it is restored; `config`: to be written in the place of the machine's. Raises KvmappError."""
        self.machine, self.loop, self.done, self.path = machine, loop, done, path
        self.written = 0                # bytes of memory, for queries
        self.given_up = self.cancelled = self.published = False
        self.draft = statefile.Draft(path) if path else None
        self.fd = self.draft.fd if self.draft else fd
        self.nameless = self.name()
        try:
            if config is not None:
                snapshot.compare(machine.config.name, machine.config, DomainConfig.from_dict(config))
            own, self.state = snapshot.describe(machine, paused)
            self.config = own if config is None else config
            self.thread = threading.Thread(target=self.run, name="save", daemon=True)
            try:
                self.thread.start()
            except RuntimeError as error:
                raise HostError(f"Cannot save domain '{machine.config.name}': {error}", "see ulimit -u and pids.max") from None
        except BaseException:
            self.close()
            raise

    def give_up(self) -> None:
        """Returns when nothing is written any more; `done` is not called after it."""
        self.given_up = True
        self.thread.join()
        self.close()

    def cancel(self) -> None:
        """It ends with an error as soon as the thread comes to see it, which a file server that hangs may put off."""
        self.cancelled = True

    def has_name(self) -> bool:
        """Whether the file behind the descriptor has got its name, from whoever gave that."""
        return bool(self.nameless) and self.name() == statefile.published(self.nameless)

    def name(self) -> str:
        try:
            return os.readlink(f"/proc/self/fd/{self.fd}")
        except OSError:                 # closed, or there is no /proc
            return ""

    def close(self) -> None:
        """Closes the file; a path that was not published leaves nothing behind. A second call does nothing."""
        if self.draft:
            self.draft.close()
        elif self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    # In the thread.

    def run(self) -> None:
        error: KvmappError | None = None
        try:
            snapshot.flush_disks(self.machine)
            statefile.write(self.fd, self.config, self.state, self.machine.memory, self.progress)
            self.check()
            if self.draft:
                self.draft.publish()
                self.published = True
        except KvmappError as failure:
            error = failure
        self.loop.call(lambda: self.finish(error))

    def progress(self, done: int) -> None:
        self.written = done
        self.check()

    def check(self) -> None:
        if self.given_up or self.cancelled:
            raise SaveGivenUp("The saving was given up")

    # In the control thread again.

    def finish(self, error: KvmappError | None) -> None:
        if not self.given_up:
            self.thread.join()
            if self.cancelled and not self.published:   # perhaps after the thread had looked the last time
                error = error or SaveGivenUp("The saving was given up")
            if error or self.draft:
                self.close()
            self.done(error)
