"""The control socket's verbs by which a running domain is saved (saving.py), and what becomes of it afterwards.

    → {"verb": "save", "path": FILE}                and an answer when the domain has its file; it ends
    → {"verb": "save"} and a descriptor             ← {} when everything is written there
    → {"verb": "save-end"}                          the file has its name: the domain ends
    → {"verb": "save-undo"}                         it has none: the guest goes on
    → {"verb": "save-cancel"}                       it is to have none, though it may be still written

Who saves to a descriptor and goes away has saved nothing, unless the file has its name. Mixed into vmprocess.Domain.
"""
import os

from kvmapp.errors import BadRequest, KvmappError, WrongState
from kvmapp.vmdevices import DeviceVerbs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmapp.saving import Saving


class SaveVerbs(DeviceVerbs):
    """What it needs of the domain: `require_alive`, `require_no_wish`, `end_saved`."""
    saving: "Saving | None" = None                      # what is being written
    written: "Saving | None" = None                     # what is written, to a descriptor that may get a name
    saver: object = None                                # the connection that wants it
    saved_from = "", ""                                 # the state and reason to which the domain goes back when it is not saved

    def require_alive(self) -> None:
        raise NotImplementedError

    def require_no_wish(self) -> None:
        raise NotImplementedError

    def end_saved(self, text: str) -> None:
        raise NotImplementedError

    def verb_save(self, connection, request) -> None:
        """Answers when everything is written. `paused`: how it is to come back; as it is now if that is not said. `config`: what is
        written as its configuration; its own if none is given."""
        number, path, paused, config = request.get("id"), request.get("path"), request.get("paused"), request.get("config")
        if path is not None and not (isinstance(path, str) and path.startswith("/") and "\0" not in path):
            raise BadRequest(f"'path' is {path!r}, not an absolute path")
        if not isinstance(paused, bool | None):
            raise BadRequest(f"'paused' is {paused!r}, neither true nor false")
        if not isinstance(config, dict | None):
            raise BadRequest("'config' is no configuration")
        self.save(lambda error: connection.answer(number, error=error), path or "", -1 if path else connection.take_fd(), paused, config)
        self.saver = None if path else connection
        connection.on_close = lambda: self.saver_gone(connection)

    def verb_save_end(self, _connection, _request) -> dict:
        self.require_written()
        self.saver = None
        self.loop.call(lambda: self.end_saved("saved"))         # so that the answer goes out first
        return {}

    def verb_save_cancel(self, _connection, _request) -> dict:
        """The guest goes on as soon as nothing is written any more."""
        self.require("saving")
        self.saver = None
        if self.saving:
            self.saving.cancel()
        else:
            self.save_undone(None)
        return {}

    def verb_save_undo(self, _connection, _request) -> dict:
        self.require_written()
        self.save_undone(None)
        return {}

    def require_written(self) -> None:
        if self.state != "saving" or self.saving:
            raise WrongState(f"Domain '{self.config.name}' is {self.state}", "this needs a domain that was just saved")

    def saver_gone(self, connection) -> None:
        """A later saving is none of its business. A file that has its name may be restored, so its guest must not go on: the one who gave
        it died before it could say so."""
        if self.saver is not connection:
            return
        if self.written and self.written.has_name():
            self.end_saved("saved")
        else:
            self.save_undone(None)

    def save(self, done: "Callable[[KvmappError | None], None]", path: str = "", fd: int = -1, paused: bool | None = None,
             config: dict | None = None) -> None:
        """Stops the guest and starts to write it. `done` hears of the end, before the domain ends or goes on. Raises KvmappError."""
        from kvmapp.saving import Saving  # a domain that is never saved goes without
        from kvmapp.snapshot import require_savable
        was_running = False
        try:
            self.require("running", "paused")
            self.require_alive()
            require_savable(self.config)
            was_running = self.state == "running"
            self.machine.pause()
            self.require_no_wish()
            self.device_ejected(0)                      # a card that the guest has just let go of is no part of what is saved
            self.saved_from = self.state, self.reason
            file, fd = fd, -1                           # Saving closes it, whatever becomes of it
            self.saving = Saving(self.machine, self.loop, lambda error: self.save_over(error, done, path), path, file,
                                 not was_running if paused is None else paused, config)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            if was_running:
                self.machine.resume()
            raise
        self.change("saving", "saving")

    def save_over(self, error: KvmappError | None, done: "Callable[[KvmappError | None], None]", path: str) -> None:
        self.saving, self.written = None, None if error else self.saving
        if error:
            self.saver = None
        done(error)
        if error:
            self.save_undone(error)
        elif path:
            self.end_saved(f"saved to {path}")

    def save_undone(self, error: KvmappError | None) -> None:
        """The guest goes on as if nothing had been."""
        self.saver = None
        if self.state != "saving":
            return
        self.give_up_saving()
        self.log(f"not saved: {error.message if error else 'whoever saved it gave up'}")
        if self.saved_from[0] == "running":
            self.machine.resume()
        self.change(*self.saved_from)

    def give_up_saving(self) -> None:
        if self.saving:
            self.saving.give_up()
        if self.written:
            self.written.close()
        self.saving = self.written = None
