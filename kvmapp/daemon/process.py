"""One domain process as the daemon sees it: a connection to its control socket, its pid, and whether it answers.

control.py has the protocol. A guest may have taken its domain process over, so whatever comes from there is checked before it is
believed, is bounded in size, and is never waited for without an end. A process that does not answer is `silent`: everything else
goes on, and `kill` works without it.
"""
from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import struct
import time
from contextlib import suppress

from kvmapp.cardfiles import close_all
from kvmapp.client import ask_domain, connect
from kvmapp.daemon.spawn import duplicates
from kvmapp.daemon.threads import in_own_thread
from kvmapp.errors import NOTHING_LEFT, ConnectionFailed, HostError, KvmappError, NoResponse, error_from_dict
from kvmapp.values import is_label

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LINE_LIMIT = 4 << 20
TURN = 0.005                            # seconds that one domain's words may take at a time ...
REST = 4                                # ... and how many times as long the others then have
ANSWER_TIMEOUT = 5.0
CHECK_TIMEOUT = 2.0                     # of the heartbeat: a domain's control thread has little else to do than to answer
LAST_BREATH = 0.5                       # between the end of a process's sockets and its own
UNKNOWN = -1                            # a start time that could not be read, as when the daemon has no descriptor left
# What a domain process calls its state, and what virsh does.
STATES = {"starting": "paused", "running": "running", "paused": "paused", "saving": "paused", "shutting down": "in shutdown",
          "in shutdown": "in shutdown", "crashed": "crashed", "shut off": "in shutdown"}
# What else a domain process tells, and which word of it counts.
KEPT = ("state", "reason", "full_disks", "balloon", "ttys", "warnings")        # of a status: what somebody asks for later
TOLD = {"device-removed": "device", "io-error": "device", "watchdog": "action"}


class ControlLink(asyncio.Protocol):
    """Lines of JSON: answers to our numbered requests, and events. A process that talks without end has a fifth of our time."""

    def __init__(self, on_event: Callable[[dict], None], on_lost: Callable[[], None]):
        self.on_event, self.on_lost = on_event, on_lost
        self.answers: dict[int, asyncio.Future[dict]] = {}
        self.buffer = bytearray()
        self.count = 0
        self.transport: asyncio.Transport | None = None
        self.socket: socket.socket | None = None                # beside the transport, for descriptors only

    def connection_made(self, transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        self.hear_all()

    def hear_all(self) -> None:
        begun = time.monotonic()
        while (end := self.buffer.find(b"\n")) >= 0:
            line = bytes(self.buffer[:end])
            del self.buffer[:end + 1]
            self.hear(line)
            spent = time.monotonic() - begun
            if spent > TURN and self.transport is not None:
                self.transport.pause_reading()
                asyncio.get_running_loop().call_later(REST * spent, self.go_on)
                return
        if len(self.buffer) > LINE_LIMIT:
            self.close()

    def go_on(self) -> None:
        if self.transport is not None:
            self.transport.resume_reading()
            self.hear_all()

    def hear(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self.close()
        elif isinstance(message.get("event"), dict):
            self.on_event(message["event"])
        else:
            answer = self.answers.get(message["id"]) if isinstance(message.get("id"), int) else None
            if answer is not None and not answer.done():
                answer.set_result(message)

    def connection_lost(self, _error) -> None:
        self.transport = self.socket = None
        for answer in self.answers.values():
            if not answer.done():
                answer.set_exception(ConnectionResetError("the domain process closed its control socket"))
        self.on_lost()

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    async def ask(self, verb: str, timeout: float | None, arguments: dict, fd: int = -1) -> dict:
        """The answer; `fd` goes with the request. Raises KvmappError as the domain says, TimeoutError, ConnectionResetError."""
        if self.transport is None:
            raise ConnectionResetError
        self.count += 1
        number = self.count
        answer = self.answers[number] = asyncio.get_running_loop().create_future()
        try:
            line = json.dumps({"id": number, "verb": verb, **arguments}).encode() + b"\n"
            if fd >= 0:
                if self.transport.get_write_buffer_size() or self.socket is None:
                    raise TimeoutError      # it does not even read what it was sent before
                socket.send_fds(self.socket, [line], [fd])      # a line is small: all of it goes, or BlockingIOError
            else:
                self.transport.write(line)
            message = await asyncio.wait_for(answer, timeout)
        finally:
            del self.answers[number]
        if isinstance(message.get("error"), dict):
            raise error_from_dict(message["error"])
        ok = message.get("ok")
        return ok if isinstance(ok, dict) else {}


class DomainProcess:
    """`changed()` is called when what it says of itself changed, `gone()` once, when the process has ended, `told(event, detail)`
    for what its guest does (TOLD), and at each beginning for the devices that it has.
    """

    def __init__(self, name: str, control: str, changed: Callable[[], None], gone: Callable[[], None],
                 told: Callable[[str, str], None] = lambda event, detail: None):
        self.name, self.control, self.changed, self.gone, self.told = name, control, changed, gone, told
        self.pid = 0
        self.start_time = 0                     # tells a pid from its reuse; clock ticks since the host's boot
        self.pidfd = -1
        self.link: ControlLink | None = None
        self.status: dict = {}
        self.state, self.reason = "paused", "starting up"
        self.since = time.time()
        self.news = False                       # within `changed`: its state has just become another one, or the same anew
        self.silent = False
        self.compared = False                   # whether it was heard since the last connection which devices it has
        self.ended = False
        self.over = asyncio.Event()             # the process has ended

    # Getting hold of it.

    async def connect(self) -> bool:
        """Connects to the control socket and learns the pid. False: nobody is behind it. A full backlog counts as silence, and so does
        that we have nothing left to connect with.
        """
        try:
            connection = connect(self.control, 0)
        except OSError as error:
            unsaid = isinstance(error, BlockingIOError) or error.errno in NOTHING_LEFT
            if unsaid:
                self.set_silent(True)
            return unsaid
        peer = socket.socket(fileno=connection.detach())
        self.meet(peer)
        link = ControlLink(self.hear, self.lost)
        await asyncio.get_running_loop().create_connection(lambda: link, sock=peer)
        link.socket = peer
        self.link, self.compared = link, False
        return True

    def meet(self, peer: socket.socket) -> None:
        """The pid of the process that listens, as the kernel tells it. Before the domain process has listened itself, that is a
        daemon's, perhaps of one that is long gone; so what bears another name is nobody of ours.
        """
        pid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        if not self.pid and title_of(pid) == f"kvmapp: {self.name}":
            self.watch(pid)

    def watch(self, pid: int, start_time: int = 0) -> None:
        """Notices when this process ends, whoever its parent is."""
        self.pid, self.start_time = pid, start_time or start_time_of(pid)
        try:
            self.pidfd = os.pidfd_open(pid)
        except (OSError, AttributeError):
            return                              # an old kernel, gone, or no descriptor left: `check` looks at /proc instead
        if not start_time_of(pid) == self.start_time > 0:
            os.close(self.pidfd)                # the number is another process's by now, or we cannot tell
            self.pidfd = -1
            return
        asyncio.get_running_loop().add_reader(self.pidfd, self.finish)

    def watch_again(self) -> None:
        """One whose start time nobody could read is known by its name."""
        if self.start_time == UNKNOWN and (title := title_of(self.pid)):
            self.start_time = start_time_of(self.pid) if title == f"kvmapp: {self.name}" else 0
        if self.start_time > 0:
            self.watch(self.pid, self.start_time)

    async def hello(self, timeout: float = ANSWER_TIMEOUT) -> None:
        """Its state, and from then on every change of it. Raises NoResponse or KvmappError."""
        answers = await asyncio.gather(self.ask("subscribe", timeout), self.ask("status", timeout))
        self.take_answer(answers[1])
        if not self.pid:
            try:
                connection = connect(self.control, 0)
            except OSError:
                return
            with socket.socket(fileno=connection.detach()) as peer:
                self.meet(peer)

    async def check(self, timeout: float = CHECK_TIMEOUT) -> None:
        """The heartbeat: is it there, does it answer?"""
        if self.pidfd < 0 and self.pid and not self.ended:      # there may be descriptors again
            self.watch_again()
        if self.pid and not self.lives():
            self.finish()
        elif self.link is None or self.link.transport is None:
            if not await self.connect():
                self.set_silent(not await self.wait_end(LAST_BREATH))
            elif self.link is not None:
                await self.quietly(self.hello(timeout))
        elif not self.pid:
            await self.quietly(self.hello(timeout))         # the first one was not answered in time, so we do not know who it is
        else:
            await self.quietly(self.refresh(timeout))

    async def refresh(self, timeout: float = ANSWER_TIMEOUT) -> None:
        """Its state; nothing if it has ended. Raises NoResponse."""
        try:
            status = await self.ask("status", timeout)
        except NoResponse:
            if self.ended:
                return
            raise
        self.take_answer(status)

    async def quietly(self, work) -> None:
        with suppress(KvmappError):  # NoResponse has made it silent; any other answer is one
            await work

    # Talking.

    async def ask(self, verb: str, timeout: float | None = ANSWER_TIMEOUT, *, fd: int = -1, **arguments: object) -> dict:
        """One verb, with a descriptor if need be; timeout None: as long as it takes. Raises what the domain raises, or NoResponse.

        A domain that does not answer is silent from then on; who waits less than the heartbeat does says nothing of it.
        """
        link = self.link
        try:
            if link is None:
                raise ConnectionResetError
            answer = await link.ask(verb, timeout, arguments, fd)
        except (TimeoutError, OSError) as error:
            if not isinstance(error, TimeoutError) and not self.silent and await self.wait_end(LAST_BREATH):
                raise NoResponse(f"Domain '{self.name}' ended meanwhile") from None
            hasty = isinstance(error, TimeoutError) and timeout is not None and timeout < CHECK_TIMEOUT
            if not hasty and self.link is link and not self.ended and (not self.pid or self.lives()):
                self.set_silent(True)
            raise NoResponse(f"Domain '{self.name}' does not answer (pid {self.pid or 'unknown'})",
                             f"kvmappctl destroy {self.name} ends it") from None
        except KvmappError:
            self.set_silent(False)
            raise
        self.set_silent(False)
        return answer

    async def ask_with_files(self, verb: str, files: dict[str, int], timeout: float, **arguments: object) -> dict:
        """As `ask`, with open descriptors (SCM_RIGHTS), on a connection of its own. They stay the caller's, who may be broken off and close
        them while the thread is at work: it has copies.
        """
        copies = duplicates(list(files.values()))

        def work() -> dict:
            try:
                return ask_domain(self.control, verb, timeout=timeout, descriptors=copies, files=list(files), **arguments)
            finally:
                close_all(copies)
        try:
            return await in_own_thread(work)
        except ConnectionFailed as error:
            raise NoResponse(error.message, error.hint) from None
        except HostError:                       # there was no thread to be had, or the domain refuses: then they are closed
            close_all(copies)
            raise

    def hear(self, event: dict) -> None:
        kind = event.get("type")
        if kind in (None, "lifecycle"):
            self.take_status({**self.status, **{key: event[key] for key in ("state", "reason", "full_disks") if key in event}}, told=True)
        elif kind in TOLD and isinstance(detail := event.get(TOLD[kind]), str) and is_label(detail):
            self.told(kind, detail)

    def take_answer(self, status: dict) -> None:
        """Its whole status. The removal of a device is told once, to whoever is there to hear it; so the first one is compared."""
        self.take_status(status)
        if not self.compared and isinstance(devices := status.get("devices"), list):
            self.compared = True
            self.told("devices", " ".join(str(one["name"]) for one in devices if isinstance(one, dict) and "name" in one))

    def take_status(self, status: dict, *, told: bool = False) -> None:
        """What the process says of itself, as far as it is plausible; `told` by itself, for something has happened."""
        known, balloon = bool(self.status), self.status.get("balloon")
        state, reason = STATES.get(str(status.get("state")), self.state), status.get("reason")
        reason = reason if isinstance(reason, str) and is_label(reason) else "unknown"
        if status.get("state") == "starting":
            reason = "starting up"
        self.status = {key: status[key] for key in KEPT if key in status}
        if told or (state, reason) != (self.state, self.reason):
            self.state, self.reason, self.since = state, reason, time.time()
            self.news = known
            self.changed()
            self.news = False
        if known and type(size := status.get("balloon")) is int and size != balloon:
            self.told("balloon-change", str(size))

    def set_silent(self, silent: bool) -> None:
        if silent != self.silent:
            self.silent, self.since = silent, time.time()
            self.changed()

    # Its end.

    def lost(self) -> None:
        """The connection is gone: mostly because the process is; if not, the heartbeat connects again."""
        if self.pidfd < 0 and not self.ended:
            asyncio.get_running_loop().call_later(LAST_BREATH, self.finish_if_gone)

    def finish_if_gone(self) -> None:
        if not self.ended and (not self.pid or not self.lives()):
            self.finish()

    def lives(self) -> bool:
        """Whether the process with our pid and start time is there and not yet a zombie; also where nobody can tell, for a domain that
        is taken for dead loses its socket and its record.
        """
        if self.pidfd >= 0:
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            return not poll.poll(0)
        now = start_time_of(self.pid)
        return now == UNKNOWN or (now > 0 and self.start_time in (now, UNKNOWN))

    def kill(self) -> None:
        """SIGKILL, to this very process."""
        if self.pidfd < 0 and self.pid and not self.ended:      # a start that is undone has given its descriptors back
            self.watch_again()
        with suppress(ProcessLookupError):
            if self.pidfd >= 0:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            elif self.pid and start_time_of(self.pid) == self.start_time > 0:
                os.kill(self.pid, signal.SIGKILL)

    def finish(self) -> None:
        if not self.ended:
            self.ended = True
            self.over.set()
            self.close()
            self.gone()

    async def wait_end(self, timeout: float) -> bool:
        """Whether it ended in this time."""
        if not self.ended and self.pid and not self.lives():        # before it was watched, so nothing will tell
            self.finish()
        try:
            await asyncio.wait_for(self.over.wait(), timeout)
        except TimeoutError:
            if self.pid and not self.lives():
                self.finish()
        return self.ended

    def close(self) -> None:
        """Lets it go; the process itself does not notice."""
        if self.link is not None:
            self.link.close()
        if self.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1


def start_time_of(pid: int) -> int:
    """Field 22 of proc_pid_stat(5); 0 when there is no such process, or only its zombie; UNKNOWN when it cannot be read."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    except OSError:
        return UNKNOWN
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def title_of(pid: int) -> str:
    """The name that ps shows, see zygote.set_title."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as line:
            return line.read(4096).rstrip(b"\0").decode("utf-8", "surrogateescape")
    except OSError:
        return ""


def cpu_times_of(pid: int) -> tuple[int, int] | None:
    """User and system time in nanoseconds, all threads together."""
    tick = 10**9 // os.sysconf("SC_CLK_TCK")
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[11]) * tick, int(fields[12]) * tick


def resident_of(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
