"""The warm process beside the daemon that runs kvmappctl's frequent verbs for the launcher (onefile/quick.c), a fork each.

    kvmapp quick LISTENER LEASH         two descriptors from the daemon: the socket, and a pipe whose end is the daemon's

A request is two numbers of 32 bits (the length of what follows the first, flags) and strings that end in NUL: the URI, the time zone,
then the words; with its first byte comes the caller's own connection to the daemon. What the caller may do there was decided when
it connected, so this process needs no rights and has none: as root's child it becomes nobody. An answer is frames of two
numbers, kind and size, and the bytes. A verb that wants files, a terminal or another daemon is declined, before anything of it is
done, and the launcher starts the whole program. Left out: more than one request a connection.
"""
from __future__ import annotations

import ctypes
import gc
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from contextlib import suppress

from kvmapp.cli import index
from kvmapp.cli.main import main as run_words
from kvmapp.cli.session import Session
from kvmapp.client import READ_ONLY_SOCKET, Client, ConnectionGone
from kvmapp.errors import NOTHING_LEFT, KvmappError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

OUT, ERR, EXIT, DECLINED = 1, 2, 3, 4
ERR_IS_TERMINAL = 1
NUMBERS = struct.Struct("<II")
REQUEST_LIMIT = 65536
CALLERS_MOST = 256                      # at a time: everybody may call, and each is a process; more are left to the whole program
REQUEST_TIMEOUT = 5                     # seconds until a request must be here
DEAF = 1000                             # milliseconds without new calls when no descriptor is to be had, unless one ends before
NOBODY = 65534
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, LAST_CAPABILITY = 24, 38, 63
# What some verb imports when it needs it: nobody may not read every place that a program runs from, and a child would do it each time.
LATE = ("kvmapp.cli.uri", "kvmapp.cli.help", "kvmapp.settings", "difflib", "signal", "time", "unicodedata")
MODULES = ("addresses", "host", "identity", "lifecycle", "listing", "monitor", "resources", "stats")
NETWORK = ("net-autostart", "net-destroy", "net-dhcp-leases", "net-dumpconf", "net-info", "net-list", "net-name", "net-start",
           "net-undefine", "net-uuid")
VERBS = frozenset(name for name, module in index.MODULES.items() if module in MODULES) | {
    *NETWORK, "undefine", "dumpconf", "domrename", "domblkerror", "domblkinfo", "domblkstat"}


def main(words: list[str]) -> int:
    listener, leash = socket.socket(fileno=int(words[0])), int(words[1])
    for name in VERBS:
        index.find(name)
    for name in LATE:
        __import__(name)
    give_up_rights()
    gc.collect()
    gc.freeze()                         # shared with every child
    Quick(listener, leash).serve()
    return 0


def give_up_rights() -> None:
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:     # the daemon may be protected from the kernel's choice
        score.write("0")
    libc = ctypes.CDLL(None)
    for capability in range(LAST_CAPABILITY + 1):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


class Quick:
    """One loop: callers that come and go, children that end. A child whose caller has gone is killed."""

    def __init__(self, listener: socket.socket, leash: int):
        self.listener, self.leash = listener, leash
        # Both descriptors of a call → its connection, the read end of a pipe that ends when the child does, and the child's pid.
        self.callers: dict[int, tuple[socket.socket, int, int]] = {}
        self.deaf = False
        self.poll = select.poll()
        for descriptor in (listener.fileno(), leash):
            self.poll.register(descriptor, select.POLLIN)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def serve(self) -> None:
        while True:
            ready = self.poll.poll(DEAF if self.deaf else None)
            self.hear_again()
            for descriptor, _ in ready:
                if descriptor == self.leash:
                    return
                if descriptor == self.listener.fileno():
                    self.take_call()
                elif descriptor in self.callers:
                    self.end_call(descriptor)

    def take_call(self) -> None:
        try:
            caller, _ = self.listener.accept()
        except OSError as error:
            if error.errno in NOTHING_LEFT:             # the call would wait and wake us for ever
                self.poll.unregister(self.listener)
                self.deaf = True
            return
        ends: tuple[int, ...] = ()
        try:
            if len(self.callers) >= 2 * CALLERS_MOST:
                raise BlockingIOError
            ends = os.pipe()
            pid = os.fork()
        except OSError:
            for end in ends:
                os.close(end)
            with suppress(OSError):
                caller.sendall(NUMBERS.pack(DECLINED, 0))
            caller.close()
            return
        if pid == 0:
            live(self, caller)
        alive, theirs = ends
        os.close(theirs)
        self.callers[caller.fileno()] = self.callers[alive] = caller, alive, pid
        self.poll.register(caller, select.POLLRDHUP)
        self.poll.register(alive, select.POLLIN)

    def hear_again(self) -> None:
        if self.deaf:
            self.poll.register(self.listener, select.POLLIN)
            self.deaf = False

    def end_call(self, descriptor: int) -> None:
        """Either the child is through, or its caller has gone."""
        caller, alive, pid = self.callers[descriptor]
        for one in (caller.fileno(), alive):
            self.poll.unregister(one)
            del self.callers[one]
        caller.close()
        os.close(alive)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


# In the child.

def live(quick: Quick, caller: socket.socket) -> NoReturn:
    """Its whole life: one request."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        quick.listener.close()
        os.close(quick.leash)
        caller.setblocking(True)
        status = answer(caller)
    except ConnectionError:
        pass                            # the caller has gone
    except BaseException:
        traceback.print_exc()           # to the daemon's log
    finally:
        with suppress(OSError):
            caller.sendall(NUMBERS.pack(EXIT, status))
            caller.shutdown(socket.SHUT_RDWR)
        os._exit(status)


def answer(caller: socket.socket) -> int:
    signal.alarm(REQUEST_TIMEOUT)       # whose end is this process's: one that says nothing is not kept
    flags, texts, daemon = receive(caller)
    signal.alarm(0)
    uri, zone, *words = texts
    verb = verb_of(words)
    if daemon is None or verb not in VERBS or "--console" in words:
        caller.sendall(NUMBERS.pack(DECLINED, 0))
        os._exit(0)
    if zone:
        os.environ["TZ"] = zone
        time.tzset()
    sys.stdin.close()
    session = QuickSession(Frames(caller, OUT, False), Frames(caller, ERR, bool(flags & ERR_IS_TERMINAL)), daemon)
    return run_words(words, session, uri)


def receive(caller: socket.socket) -> tuple[int, list[str], socket.socket | None]:
    data, descriptors, _, _ = socket.recv_fds(caller, REQUEST_LIMIT, 1)
    while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "little"):
        part = caller.recv(REQUEST_LIMIT)
        if not part or len(data) > REQUEST_LIMIT:
            raise ConnectionResetError
        data += part
    texts = data[NUMBERS.size:].decode("utf-8", "surrogateescape").split("\0")[:-1]
    if len(texts) < 3:
        raise ConnectionResetError
    return NUMBERS.unpack_from(data)[1], texts, socket.socket(fileno=descriptors[0]) if descriptors else None


def verb_of(words: list[str]) -> str:
    """The first word that is no option; a string of commands is none of the frequent verbs."""
    return next((word for word in words if not word.startswith("-")), "") if not any(";" in word or "\n" in word for word in words) else ""


class Frames:
    """A stream of text to the caller, as much of one as the session uses."""

    def __init__(self, caller: socket.socket, kind: int, terminal: bool):
        self.caller, self.kind, self.terminal = caller, kind, terminal
        self.parts: list[str] = []

    def reconfigure(self, **_options: object) -> None:
        pass

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> None:
        self.parts.append(text)

    def flush(self) -> None:
        errors = "backslashreplace" if self.kind == OUT else "surrogateescape"
        data, self.parts = "".join(self.parts).encode("utf-8", errors), []
        if data:
            self.caller.sendall(NUMBERS.pack(self.kind, len(data)) + data)


class HandedOver(Client):
    """The caller's connection. It cannot be made again by somebody without the caller's rights."""

    def open(self) -> socket.socket:
        raise ConnectionGone(f"The daemon at '{self.path}' closed the connection",
                             "it was stopped or restarted: look at what became of the request, then repeat it")


class QuickSession(Session):
    def __init__(self, sink: Frames, error_sink: Frames, daemon: socket.socket):
        super().__init__()
        self.sink, self.error_sink = sink, error_sink
        daemon.settimeout(None)
        self.handed = daemon

    @property
    def daemon(self) -> Client:
        if self.connection is None:
            self.connection = HandedOver(super().socket_in_use)
            self.connection.connection = self.handed
        return self.connection

    @property
    def socket_in_use(self) -> str:
        """For a progress line's own connection: the one for everybody."""
        return f"{self.socket.rpartition('/')[0]}/{READ_ONLY_SOCKET.rpartition('/')[2]}"

    def disconnect(self) -> None:
        raise KvmappError("The connection is the caller's")
