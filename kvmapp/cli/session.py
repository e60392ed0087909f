"""What a verb works with: the daemon, and where its answers go.

    session.daemon.get("/v1/node")       the connection, made at the first use
    session.answer(node, text)           what a query found: the text, or JSON when asked for
    session.done(changed, "...")         what a verb did: silent with --quiet

A verb never prints by itself, so that one of virsh's rules (--quiet, the blank line after each command) has one home.
"""
from __future__ import annotations

import sys

from kvmapp.client import READ_ONLY_SOCKET, SOCKET, Client, encode, of
from kvmapp.errors import KvmappError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_URI = "kvmapp:///system"


class OutputFailed(Exception):
    """What standard output says: there is nobody to read it, or its disk is full. Nothing more can be said there."""

    def __init__(self, reason: OSError):
        super().__init__(reason.strerror)
        self.gone = isinstance(reason, BrokenPipeError)


class Session:
    def __init__(self) -> None:
        self.uri = DEFAULT_URI
        self.default_uri = ""           # of the environment; empty: the host's daemon
        self.socket = SOCKET
        self.read_only = False
        self.quiet = False
        self.json = False               # of the verb that runs
        self.timing = False
        self.escape = "^]"
        self.interactive = False
        self.ended = False              # quit was said
        self.connection: Client | None = None
        self.sink = sys.stdout
        self.error_sink = sys.stderr

    @property
    def daemon(self) -> Client:
        if self.connection is None:
            self.connection = Client(self.socket_in_use)
        return self.connection

    @property
    def socket_in_use(self) -> str:
        if not self.read_only:
            return self.socket
        return READ_ONLY_SOCKET if self.socket == SOCKET else f"{self.socket.rpartition('/')[0]}/kvmapp-sock-ro"

    def disconnect(self) -> None:
        if self.connection is not None:
            self.connection.close()
        self.connection = None

    # Where answers go.

    def say(self, text: str) -> None:
        """As it is; the caller ends the line."""
        try:
            self.sink.write(text)
        except OSError as error:
            raise OutputFailed(error) from None

    def answer(self, data: object, text: str | Callable[[], str]) -> None:
        if self.json:
            self.say_json(data)
        else:
            self.say(text if isinstance(text, str) else text())

    def done(self, changed: dict, text: str) -> None:
        """`changed` is the daemon's answer; its warnings are for people, whatever --quiet says."""
        if self.json:
            self.say_json(changed)
        elif not self.quiet and text:
            self.say(f"{text}\n")
        for warning in changed.get("warnings", ()):
            self.complain(f"warning: {warning}")

    def say_json(self, data: object) -> None:
        self.say(f"{encode(data).decode('ascii')}\n")

    def note(self, text: str) -> None:
        """For people only: to standard error, and not with --quiet or --json."""
        if not (self.quiet or self.json):
            self.complain(text)

    def complain(self, text: str) -> None:
        """To standard error. A domain's process, which its guest may have taken over, has a say in it: the terminal obeys none of it."""
        from kvmapp.cli.render import plain
        self.flush()
        self.error_sink.write("".join(f"{plain(line)}\n" for line in text.split("\n")))
        self.error_sink.flush()

    def complain_of(self, error: KvmappError, headline: str = "") -> None:
        """An error as virsh shows it: what was tried, then the reason; and in JSON, where that is asked for."""
        if self.json:
            self.say_json({"error": error.to_dict()})
        self.complain(f"error: {headline}\n{error.render()}" if headline else error.render())

    def flush(self) -> None:
        try:
            self.sink.flush()
        except OSError as error:
            raise OutputFailed(error) from None

    def wait_with(self, what: str, domain: str | None = None) -> Progress:
        return Progress(self, what, domain)


class Progress:
    """`with session.wait_with("starting x", "x"):` after a second a line on the terminal counts, and says how far the domain's job
    is; it goes away at the end.
    """

    def __init__(self, session: Session, what: str, domain: str | None):
        self.session, self.what, self.domain = session, what, domain
        self.shown = not (session.quiet or session.json) and session.error_sink.isatty()
        self.seconds = 0

    def __enter__(self) -> None:
        if self.shown:
            import signal
            self.session.flush()
            self.before = signal.signal(signal.SIGALRM, self.tick)
            signal.setitimer(signal.ITIMER_REAL, 1, 1)

    def __exit__(self, *_exception: object) -> None:
        if self.shown:
            import signal
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.before)
            if self.seconds:
                self.show("\r\x1b[K")

    def tick(self, _number: int, _frame: object) -> None:
        self.seconds += 1
        self.show(f"\r{self.what}: {self.seconds} s {self.job_progress()}\x1b[K")

    def job_progress(self) -> str:
        """Asked on a connection of its own: ours waits for the answer."""
        if self.domain is None:
            return ""
        try:
            with Client(self.session.socket_in_use, timeout=0.5) as daemon:
                job = daemon.get(of(self.domain))["job"]
        except KvmappError:
            return ""
        return f"({job['progress']}) " if job and job["progress"] else ""

    def show(self, text: str) -> None:
        self.session.error_sink.write(text)
        self.session.error_sink.flush()
