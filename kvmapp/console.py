"""Console ports: what stands between a character device's rings and those who look at it.

A port takes the guest's output from its CharBackend and shows it to its sink (terminal, file, pty), to a log, and to the client
that is attached; it keeps the last 64 KiB, so that who comes late sees where the guest is. A sink that cannot keep up (a terminal
stopped with Ctrl-S) makes the port stop taking: the ring fills and the guest waits, nothing is lost. A client never holds the
guest up.
"""
import errno
import os
import select
import stat

from kvmapp.errors import HostError, KvmappError
from kvmapp.loop import READ, WRITE, Loop

SCROLLBACK = 64 << 10               # bytes
TYPE_AHEAD = 64 << 10               # bytes typed that the guest has not taken
LONGEST_LINE = 1024                 # bytes of a log line
LAST_WORDS = 1.0                    # seconds that a guest that has ended waits for whoever reads its output
# Of a FIFO or a terminal as well: a reader that stalls holds up what it is shown, and nothing else.
TO_FILE = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class ConsoleBusy(KvmappError):
    """Somebody else is attached."""
    code = "console-busy"


NOBODY = -1


class Sink:
    """Where a port's output goes and its input comes from, as descriptors. A lossy one drops what nobody reads."""

    def __init__(self, output: int = NOBODY, source: int = NOBODY, *, lossy: bool = False, path: str | None = None):
        self.output = output
        self.source = source
        self.lossy = lossy
        self.path = path                # for people: /dev/pts/3


def open_sink(config) -> Sink:
    """The sink that a [serial N] or [console N] section asks for. Raises HostError."""
    if config.type == "stdio":
        return Sink(own_output(1), 0)
    if config.type == "pty":
        return open_pty()
    if config.type == "file":
        try:
            return Sink(os.open(config.path, TO_FILE, 0o600))
        except OSError as error:
            raise HostError(f"Cannot open {config.heading}'s file '{config.path}': {error.strerror}", hint_for(error)) from None
    return Sink()


def open_log(config) -> int | None:
    """The file to which everything that the guest prints here is added as well. Raises HostError."""
    if not config.log:
        return None
    try:
        return os.open(config.log, TO_FILE, 0o600)
    except OSError as error:
        raise HostError(f"Cannot open the log '{config.log}': {error.strerror}", hint_for(error)) from None


def hint_for(error: OSError) -> str:
    return "a FIFO wants somebody who reads it" if error.errno == errno.ENXIO else ""


def own_output(fd: int) -> int:
    """The same terminal or pipe, opened anew so as to not wait for its reader: O_NONBLOCK would be the shell's, too."""
    kind = os.fstat(fd).st_mode
    if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
        try:
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:                 # somebody else's terminal, by su: then it is waited for
            pass
    return fd


def open_pty() -> Sink:
    """A pseudo terminal in raw mode. We hold its slave side too, so that it stays whole while nobody has it open."""
    try:
        master, slave = os.openpty()
    except OSError as error:
        raise HostError(f"Cannot make a pseudo terminal: {error.strerror}", "is devpts mounted on /dev/pts?") from None
    import tty
    tty.setraw(slave)
    os.set_blocking(master, False)
    return Sink(master, master, lossy=True, path=os.ttyname(slave))


class ConsolePort:
    """One character device of the guest, by the name that users give it: serial0, console0."""

    def __init__(self, loop: Loop, name: str, backend, sink: Sink | None = None, log: int | None = None, escape=None):
        """`backend` is a CharBackend. `escape(data) -> data or None`, where given, sees what is typed first; None ends here."""
        self.loop = loop
        self.name = name
        self.backend = backend
        self.sink = sink or Sink()
        self.log = log
        self.escape = escape
        self.client = None
        self.scrollback = bytearray()
        self.unshown = bytearray()      # output that the sink has not taken
        self.untaken = bytearray()      # input that the guest has not taken
        loop.watch(backend.fd, self.output_ready)
        if self.sink.source != NOBODY:
            try:
                loop.watch(self.sink.source, self.source_ready)
            except PermissionError:     # a plain file or /dev/null, which has nothing to say
                self.sink.source = NOBODY

    def open(self, connection, force: bool = False) -> dict:
        """What the control verb `console` answers. Raises ConsoleBusy."""
        if self.client is not None and not force:
            peer = self.client.peer
            raise ConsoleBusy(f"Console {self.name} is in use by pid {peer['pid']} (uid {peer['uid']})",
                              "end that session with Ctrl-], or take the console over with --force")
        if self.client is not None:
            self.client.send_bytes(f"\r\n[pid {connection.peer['pid']} took this console over]\r\n".encode())
            self.client.close()
        return {"device": self.name, "attach": self}

    def attach(self, connection) -> None:
        """The connection is the port's client now; first it is shown what the guest said last."""
        self.client = connection
        connection.send_bytes(bytes(self.scrollback))

    def detach(self, connection) -> None:
        if self.client is connection:
            self.client = None

    def type(self, data: bytes) -> None:
        """Input for the guest; what it does not take in time is dropped beyond 64 KiB, as a keyboard would."""
        self.untaken += data[:max(0, TYPE_AHEAD - len(self.untaken))]
        self.feed()

    def feed(self) -> None:
        """The backend's descriptor tells when it takes more."""
        if self.untaken:
            del self.untaken[:self.backend.give(bytes(self.untaken))]

    def output_ready(self, _events: int) -> None:
        data = self.backend.take()
        if data:
            self.show(data)
        self.feed()

    def show(self, data: bytes) -> None:
        self.scrollback += data
        del self.scrollback[:-SCROLLBACK]
        if self.log is not None:
            write_all(self.log, data)
        if self.client is not None:
            self.client.send_bytes(data)
        if self.sink.output != NOBODY:
            self.unshown += data
            self.push()

    def push(self, _events: int = 0) -> None:
        """Gives the sink what it takes; while it does not take all, the guest's ring is left alone."""
        try:
            while self.unshown:
                del self.unshown[:os.write(self.sink.output, self.unshown)]
        except BlockingIOError:
            if self.sink.lossy:
                self.unshown.clear()
                return
            self.loop.unwatch(self.backend.fd)
            self.loop.watch(self.sink.output, self.push, WRITE)
            return
        except OSError as error:                        # nobody is there any more; or a file's disk is full, maybe not for ever
            self.unshown.clear()
            self.take_again()
            if error.errno not in DISK_FULL:
                self.sink.output = NOBODY
            return
        self.take_again()

    def take_again(self) -> None:
        """The sink holds nothing up."""
        if self.backend.fd not in self.loop.callbacks:
            self.loop.unwatch(self.sink.output)
            self.loop.watch(self.backend.fd, self.output_ready)

    def source_ready(self, _events: int) -> None:
        try:
            data = os.read(self.sink.source, 4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:                                    # end of file: the guest gets no more, and goes on
            self.loop.unwatch(self.sink.source)
            return
        typed = self.escape(data) if self.escape else data
        if typed:
            self.type(typed)

    def drain(self, patience: float | None = LAST_WORDS) -> None:
        """Shows the guest's last words before the end, as long as somebody takes some of them within `patience` seconds (None: waits)."""
        self.output_ready(READ)
        while self.unshown and takes_more(self.sink.output, patience):
            self.push()

    def close(self, patience: float | None = LAST_WORDS) -> None:
        self.drain(patience)
        self.loop.unwatch(self.backend.fd)
        if self.sink.source != NOBODY:
            self.loop.unwatch(self.sink.source)
        if self.client is not None:
            self.client.close()


def takes_more(fd: int, patience: float | None) -> bool:
    """Waits until the descriptor takes output, for so many seconds or for ever."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(None if patience is None else patience * 1000))


class LogPort:
    """The debug port's output, which has lines for the domain's log; what is no printable ASCII is shown by its code."""

    def __init__(self, loop: Loop, backend, log):
        """`log(text)` writes a line."""
        self.loop = loop
        self.backend = backend
        self.log = log
        self.pending = b""
        loop.watch(backend.fd, self.output_ready)

    def output_ready(self, _events: int) -> None:
        *lines, self.pending = (self.pending + self.backend.take()).split(b"\n")
        for line in lines:
            self.show(line.removesuffix(b"\r"))
        if len(self.pending) >= LONGEST_LINE:
            self.show(self.pending)
            self.pending = b""

    def show(self, line: bytes) -> None:
        text = line[:LONGEST_LINE].decode("latin-1")
        self.log("debug: " + "".join(c if " " <= c <= "~" else f"\\x{ord(c):02x}" for c in text))

    def drain(self) -> None:
        """Shows the guest's last words, whole line or not."""
        self.output_ready(READ)
        if self.pending:
            self.show(self.pending)
            self.pending = b""

    def close(self) -> None:
        self.drain()
        self.loop.unwatch(self.backend.fd)


def write_all(fd: int, data: bytes) -> None:
    """Writes to a log; a full disk costs the log its lines, never the guest its run."""
    try:
        while data:
            data = data[os.write(fd, data):]
    except OSError:
        pass
