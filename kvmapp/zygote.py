"""The zygote: a warm single-threaded process that forks one child a domain, so that a start costs a fork and no imports.

    python -m kvmapp.zygote FD [MODULE] PADDING          FD: a stream socket to the daemon; MODULE has run_domain (vmprocess)

The daemon sends a request, 4 bytes of length and JSON, with the domain's open descriptors (SCM_RIGHTS) at its first byte; the
zygote answers with JSON lines: {"id", "pid"} or {"id", "error"} for a request, {"exited": pid, "status": wait status} for each
child that ends. When the daemon goes, so does the zygote; its children live on, re-parented to init. Left out: anything that a
thread or an event loop would be wanted for; neither may exist when it forks.
"""
from __future__ import annotations

import array
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from contextlib import suppress

MAX_FDS = 253                           # SCM_MAX_FD
LENGTH = 4
PADDING = 240                           # bytes of argv that a title may overwrite: "kvmapp: " and a name of 200 bytes
PR_SET_NAME, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 15, 24, 38
LAST_CAPABILITY = 63
EXIT_DEFECT = 70                        # EX_SOFTWARE of sysexits.h


def main(argv: list[str]) -> int:
    daemon = socket.socket(fileno=int(argv[1]))
    daemon.set_inheritable(False)
    runner = importlib.import_module(argv[2] if len(argv) > 3 else "kvmapp.vmprocess")
    Title.find()
    set_title("kvmapp: zygote")
    runner.preload()
    gc.collect()
    gc.freeze()                         # what is there now is not touched by a child's collector, so its pages stay shared
    Zygote(daemon, runner).serve()
    return 0


class Zygote:
    """One loop: requests of the daemon, ends of children."""

    def __init__(self, daemon: socket.socket, runner):
        self.daemon, self.runner = daemon, runner
        self.wakeup, self.signalled = socket.socketpair()
        self.wakeup.setblocking(False)
        self.signalled.setblocking(False)
        signal.set_wakeup_fd(self.signalled.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)               # of a terminal's or an init script's; our end is the daemon's

    def serve(self) -> None:
        poll = select.poll()
        poll.register(self.daemon, select.POLLIN)
        poll.register(self.wakeup, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self.wakeup.fileno() in ready:
                self.wakeup.recv(4096)
                self.reap()
            if self.daemon.fileno() in ready:
                message = receive(self.daemon)
                if message is None:
                    return
                self.spawn(*message)

    def spawn(self, request: dict, fds: list[int]) -> None:
        """Forks one domain. The child never returns from here."""
        try:
            pid = os.fork()
        except OSError as error:
            self.tell({"id": request["id"], "error": f"Cannot fork: {error.strerror}"})
        else:
            if pid == 0:
                self.live(request, fds)
            self.tell({"id": request["id"], "pid": pid})
        for fd in fds:
            os.close(fd)

    def live(self, request: dict, fds: list[int]) -> None:
        """The child's whole life."""
        status = EXIT_DEFECT
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            self.daemon.close()
            self.wakeup.close()
            self.signalled.close()
            status = run(self.runner, request, fds)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.tell({"exited": pid, "status": status})

    def tell(self, message: dict) -> None:
        with suppress(OSError):  # the daemon has gone; `receive` says so next
            self.daemon.sendall(json.dumps(message).encode() + b"\n")


def receive(daemon: socket.socket) -> tuple[dict, list[int]] | None:
    """The next request and its descriptors; None at the daemon's end."""
    fds = array.array("i")
    try:
        head, ancillary, _, _ = daemon.recvmsg(LENGTH, socket.CMSG_SPACE(MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[:len(data) - len(data) % fds.itemsize])
        head += exactly(daemon, LENGTH - len(head)) if head else b""
        body = exactly(daemon, int.from_bytes(head, "little")) if head else b""
    except OSError:
        body = b""
    return (json.loads(body), list(fds)) if body else None


def exactly(daemon: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = daemon.recv(size - len(data))
        if not part:
            raise ConnectionResetError("the daemon went away in the middle of a request")
        data += part
    return data


# In the child.

def run(runner, request: dict, fds: list[int]) -> int:
    """Becomes the domain process: session, name, log; then the runner's `run_domain`, which drops root's rights."""
    from kvmapp.config import DomainConfig
    files = dict(zip(request["files"], fds, strict=True))
    os.setsid()
    set_title(f"kvmapp: {request['config']['name']}")
    use_log(files["log"])
    join_groups(files)
    forbid_new_rights()
    reset_oom_score()
    control = socket.socket(fileno=files.pop("control"))
    control.listen(64)                  # again, by us: SO_PEERCRED tells a client who listened, and that must be this process
    config = DomainConfig.from_dict(request["config"])
    return runner.run_domain(config, control=control, log_fd=files.pop("log"), files=files, run_dir=request["run_dir"],
                             drop=lambda: drop(request["uid"], request["gid"]), paused=request["paused"], cache=request["cache"])


def use_log(fd: int) -> None:
    """Nothing is read, and what a library prints stands in the domain's log."""
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    if null > 2:
        os.close(null)


def join_groups(files: dict[str, int]) -> None:
    """Into the control groups that limit us, before we take anything. One that cannot be joined is the daemon's to tell."""
    for name in [name for name in files if name.startswith("cgroup:")]:
        fd = files.pop(name)
        with suppress(OSError):
            os.write(fd, b"0")          # who writes
        os.close(fd)


def reset_oom_score() -> None:
    """The daemon may be protected from the out-of-memory killer; a guest is not."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:     # not root: then it is not below 0 either
        score.write("0")


def forbid_new_rights() -> None:
    """capabilities(7): no program that this process might run gains rights; threads made later inherit it."""
    libc = ctypes.CDLL(None)
    for capability in range(LAST_CAPABILITY + 1):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break                       # past the last one that this kernel knows, or not root
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def drop(uid: int | None, gid: int | None) -> None:
    """From root to an ordinary user, for good and in every thread (glibc sees to the threads)."""
    if uid is None or gid is None:
        return
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


class Title:
    """Where the kernel shows this process's command line from: proc_pid_stat(5), arg_start and arg_end."""
    address = 0
    size = 0

    @classmethod
    def find(cls) -> None:
        with open("/proc/self/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
        start, end = int(fields[45]), int(fields[46])           # fields 48 and 49 of the whole line
        if start < end:
            cls.address, cls.size = start, end - start


def set_title(title: str) -> None:
    """The name that ps and top show: the whole command line, and the 15 bytes of comm."""
    text = title.encode("utf-8", "surrogateescape")
    ctypes.CDLL(None).prctl(PR_SET_NAME, text[:15], 0, 0, 0)
    if Title.size:
        ctypes.memmove(Title.address, text[:Title.size - 1].ljust(Title.size, b"\0"), Title.size)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
