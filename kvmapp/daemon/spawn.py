"""The daemon's end of the zygote: starts it, sends it domains to fork, hears which of them ended and how.

A zygote that is killed is replaced at the next need; domains do not depend on it once they run.
"""
from __future__ import annotations

import array
import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress

import kvmapp
from kvmapp import runtime
from kvmapp.cardfiles import close_all
from kvmapp.errors import HostError

log = logging.getLogger("kvmapp")
PADDING = "-" * 240                     # room for the titles of domains, see zygote.Title
READY_TIMEOUT = 30.0
FDS_MOST = 253                          # SCM_MAX_FD: with more of them a message is an error that says nothing of the zygote


class ZygoteDied(HostError):
    """It went away before it answered: whether the domain was forked is not known."""
    code = "zygote-died"


class Zygote:
    def __init__(self, module: str = "kvmapp.vmprocess"):
        self.module = module
        self.process: subprocess.Popen | None = None
        self.socket: socket.socket | None = None
        self.buffer = b""
        self.count = 0
        self.answers: dict[int, asyncio.Future[int]] = {}
        self.statuses: dict[int, asyncio.Future[int]] = {}      # of its children, by pid
        self.sending = asyncio.Lock()
        self.rest: asyncio.Future[None] | None = None           # of a request that the socket did not take at once

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    def start(self) -> None:
        """Returns at once; requests wait in the socket until the zygote is warm."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.process = subprocess.Popen([*command(), str(theirs.fileno()), self.module, PADDING], stdin=subprocess.DEVNULL,
                                            pass_fds=(theirs.fileno(),), start_new_session=True, env=environment())
        except OSError as error:
            ours.close()
            raise HostError(f"Cannot start the zygote: {error.strerror}") from None
        finally:
            theirs.close()
        self.socket, self.buffer = ours, b""
        asyncio.get_running_loop().add_reader(ours, self.receive)

    def stop(self) -> None:
        """Its end; domains live on."""
        if self.process is not None:
            self.hear_last_words()
        self.hang_up()
        if self.process is not None:
            self.process.wait(READY_TIMEOUT)
            self.process = None

    def hear_last_words(self) -> None:
        """It still forks what was asked of it, and of a start that was given up by now nobody else would ever know."""
        if self.socket is None:
            return
        asyncio.get_running_loop().remove_reader(self.socket)
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            self.socket.settimeout(READY_TIMEOUT)
            while data := self.socket.recv(65536):
                self.hear_lines(data)

    def hang_up(self) -> None:
        """Also wakes a thread that still sends."""
        if self.socket is not None:
            asyncio.get_running_loop().remove_reader(self.socket)
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
            self.socket.close()
            self.socket = None

    async def spawn(self, request: dict, fds: list[int]) -> int:
        """The pid of a new domain process. Raises HostError; ZygoteDied when nobody knows."""
        if len(fds) > FDS_MOST:
            raise HostError(f"The domain wants {len(fds)} open files from the daemon, the kernel hands over no more than {FDS_MOST}",
                            "give its network cards fewer queues (queues = N), or do without vhost")
        self.count += 1
        number = self.count
        body = json.dumps({**request, "id": number}).encode()
        try:
            async with self.sending:
                zygote = await self.ready()
                answer = self.answers[number] = asyncio.get_running_loop().create_future()
                try:
                    await self.send(zygote, len(body).to_bytes(4, "little") + body, fds)
                except TimeoutError:
                    self.give_up(zygote)
                except OSError:
                    self.died()
            return await asyncio.wait_for(answer, READY_TIMEOUT)
        except TimeoutError:
            self.give_up(zygote)
            raise ZygoteDied("The zygote does not answer") from None
        finally:
            self.answers.pop(number, None)

    async def ready(self) -> socket.socket:
        """A zygote's, between two requests: who gave up in the middle of his own has left the rest of it to be sent."""
        if self.rest is not None and not (await asyncio.wait({self.rest}, timeout=READY_TIMEOUT))[0]:
            self.give_up(self.socket)
        self.rest = None
        if self.socket is None:
            self.start()
        assert self.socket is not None
        return self.socket

    async def send(self, zygote: socket.socket, data: bytes, fds: list[int]) -> None:
        """The descriptors go with the first byte. At once if the socket takes it; else beside the daemon's other work, and then to the
        end of it, whether or not somebody still waits: by descriptors of its own, for the caller closes his.
        """
        sent, kept = 0, []
        try:
            sent = zygote.sendmsg([data], rights(fds), socket.MSG_DONTWAIT)         # socket.send_fds forgets its flags
        except BlockingIOError:
            kept = duplicates(fds)
        if sent < len(data):
            self.rest = asyncio.get_running_loop().run_in_executor(None, send_rest, zygote, data[sent:], kept)
            self.rest.add_done_callback(lambda rest: rest.cancelled() or rest.exception())      # it may be nobody's by then
            await asyncio.wait_for(asyncio.shield(self.rest), READY_TIMEOUT)

    async def status_of(self, pid: int, timeout: float) -> int | None:
        """How the child ended (wait status); None for one that another zygote forked, or when this one does not say."""
        status = self.statuses.get(pid)
        if status is None:
            return None
        try:
            return await asyncio.wait_for(asyncio.shield(status), timeout)
        except TimeoutError:
            return None

    def forget(self, pid: int) -> None:
        self.statuses.pop(pid, None)

    def receive(self) -> None:
        assert self.socket is not None
        try:
            data = self.socket.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.died()
            return
        self.hear_lines(data)

    def hear_lines(self, data: bytes) -> None:
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            self.hear(json.loads(line))

    def hear(self, message: dict) -> None:
        if "exited" in message:
            status = self.statuses.get(message["exited"])
            if status is not None and not status.done():
                status.set_result(message["status"])
            return
        answer = self.answers.get(message["id"])
        if answer is None or answer.done():             # whoever asked has given up meanwhile, and nobody else would ever know of it
            if "pid" in message:
                with suppress(ProcessLookupError):
                    os.kill(message["pid"], signal.SIGKILL)
            return
        if "pid" in message:
            self.statuses[message["pid"]] = asyncio.get_running_loop().create_future()
            answer.set_result(message["pid"])
        else:
            answer.set_exception(HostError(f"{message['error']}", "the host has too many processes or too little memory"))

    def give_up(self, zygote: socket.socket | None) -> None:
        """One that hangs is killed, unless another has come in its place: the next start brings one that answers."""
        if zygote is None or self.socket is not zygote:
            return
        if self.process is not None:
            log.error("the zygote (pid %d) does not answer: killing it", self.process.pid)
            self.process.kill()
        self.died()

    def died(self) -> None:
        if self.socket is None:
            return
        self.hang_up()
        if self.process is not None:
            log.warning("the zygote (pid %d) ended with status %s; the next start brings a new one", self.process.pid,
                        self.process.poll())
            asyncio.get_running_loop().run_in_executor(None, self.process.wait)
            self.process = None
        self.statuses.clear()
        for answer in self.answers.values():
            if not answer.done():
                answer.set_exception(ZygoteDied("The zygote died before it had started the domain"))


def rights(fds: list[int]) -> list[tuple[int, int, array.array]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]


def duplicates(fds: list[int]) -> list[int]:
    """All or none. Raises HostError, for this is no fault of the zygote's."""
    kept: list[int] = []
    try:
        for fd in fds:
            kept.append(os.dup(fd))
    except OSError as error:
        close_all(kept)
        raise HostError(f"Cannot hand the domain its open files: {error.strerror}") from None
    return kept


def send_rest(zygote: socket.socket, data: bytes, fds: list[int]) -> None:
    """In a thread, for as long as the zygote does not read."""
    try:
        if fds:
            data = data[zygote.sendmsg([data[:1]], rights(fds)):]
        zygote.sendall(data)
    finally:
        close_all(fds)


def command() -> list[str]:
    """How to run the zygote: from the one file, or from source with the interpreter that runs us."""
    if runtime.FROZEN:
        return [*runtime.program(), "zygote"]
    return [sys.executable, "-P", "-m", "kvmapp.zygote"]


def environment() -> dict[str, str]:
    """Ours without the service manager's words to us; from source, with the way to the package."""
    given = {name: value for name, value in os.environ.items() if name not in ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID")}
    if not runtime.FROZEN:
        given["PYTHONPATH"] = os.path.dirname(os.path.dirname(os.path.abspath(kvmapp.__file__)))
    return given
