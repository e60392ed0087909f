"""`kvmapp daemon`: its command line, its log, and going into the background for SysV init.

Under systemd it stays in the foreground and tells by sd_notify that it is ready. With --background the command returns when the
daemon answers, or fails with what kept it from it.
"""
from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import traceback

from kvmapp import __version__, runtime
from kvmapp.client import Client
from kvmapp.daemon.paths import Paths
from kvmapp.daemon.pidfile import PidFile
from kvmapp.errors import ConfigError, ConnectionFailed, HostError, KvmappError, NoResponse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}
STOP_TIMEOUT = 30.0
FILES_MOST = 1 << 20                    # open ones; an old dnsmasq closes each number up to the limit when it starts
log = logging.getLogger("kvmapp")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvmapp daemon", description="Serves kvmappctl: starts domains, watches them, keeps "
                                     "their configuration. Domains run on when it stops or is killed.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--background", action="store_true", help="go into the background, and return when it answers")
    what.add_argument("--status", action="store_true", help="tell whether it runs: exit status 0, 1 (killed) or 3 (stopped)")
    what.add_argument("--stop", action="store_true", help="stop the one that runs; its domains run on")
    what.add_argument("--reload", action="store_true", help="make the one that runs read its configuration again")
    parser.add_argument("--root", default="/", metavar="DIR", help="what stands before every folder below (default: /)")
    parser.add_argument("--config-dir", metavar="DIR", help="the configuration (default: /etc/kvmapp)")
    parser.add_argument("--run-dir", metavar="DIR", help="sockets and notes of what runs (default: /run/kvmapp)")
    parser.add_argument("--log-dir", metavar="DIR", help="the domains' logs (default: /var/log/kvmapp)")
    parser.add_argument("--state-dir", metavar="DIR", help="what lasts (default: /var/lib/kvmapp)")
    parser.add_argument("--heartbeat", type=float, default=5.0, metavar="SECONDS", help="between two looks at every domain")
    parser.add_argument("--domain-module", default="kvmapp.vmprocess", help=argparse.SUPPRESS)      # for tests
    parser.add_argument("--quick", action="store_true", default=runtime.FROZEN, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"kvmapp {__version__}")
    return parser


def main(arguments: list[str]) -> int:
    given = make_parser().parse_args(arguments)
    paths = Paths(given.root, config=given.config_dir, run=given.run_dir, log=given.log_dir, state=given.state_dir)
    if given.status or given.stop or given.reload:
        return control(PidFile(paths.pid_file), paths.socket, given)
    options = {"module": given.domain_module, "heartbeat": given.heartbeat, "cgroup": cgroup_name(paths),
               "quick": given.quick}
    if given.background:
        return in_background(lambda ready: run(paths, options, paths.daemon_log, ready))
    run(paths, options, None, lambda: None)
    return 0


def run(paths: Paths, options: dict, log_file: str | None, ready: Callable[[], None]) -> None:
    from kvmapp.daemon.service import serve  # aiohttp and asyncio: not for --help

    handler = LogFile(log_file)
    log.addHandler(handler)
    raise_limit()
    serve(paths, options, handler.reopen, ready)


def raise_limit() -> None:
    """As many open files as the host allows: each domain and each caller takes some of the usual 1024. What we start has the limit
    too; none of it counts on select(2), whose sets end at 1024.
    """
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES_MOST if hard == resource.RLIM_INFINITY else min(hard, FILES_MOST)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def control(pid_file: PidFile, socket: str, given: argparse.Namespace) -> int:
    """What an init script asks for. By the lock, not by the number, so a stale pid file misleads nobody."""
    pid = pid_file.holder()
    if given.status:
        stale = not pid and os.path.lexists(pid_file.path)
        print(f"kvmapp (pid {pid}) is running..." if pid else
              "kvmapp dead but pid file exists" if stale else "kvmapp is stopped")
        return 0 if pid else 1 if stale else 3
    try:
        if not pid:
            raise ProcessLookupError
        if given.reload:
            return reload(pid, socket)
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        raise HostError("The kvmapp daemon does not run", "to start it: /etc/init.d/kvmapp start, or systemctl start kvmapp") from None
    except PermissionError as error:
        raise HostError(f"Cannot {'reload' if given.reload else 'stop'} the kvmapp daemon (pid {pid}): {error.strerror}",
                        "as root, or as the user that started it") from None
    deadline = time.monotonic() + STOP_TIMEOUT
    while pid_file.holder() == pid:
        if time.monotonic() > deadline:
            raise HostError(f"The kvmapp daemon (pid {pid}) does not stop", f"kill -9 {pid} hurts no guest")
        time.sleep(0.02)
    return 0


def reload(pid: int, socket: str) -> int:
    """By its socket, so that what it refuses is told; by a signal where that does not answer. Raises OSError."""
    try:
        with Client(socket, timeout=STOP_TIMEOUT) as daemon:
            refused = daemon.post("/v1/daemon/reload").get("refused", [])     # an older daemon does not tell
    except (ConnectionFailed, NoResponse):
        os.kill(pid, signal.SIGHUP)
        return 0
    if refused:
        raise ConfigError("; ".join(refused), "the daemon goes on with what it had")
    return 0


def cgroup_name(paths: Paths) -> str:
    """One of its own for a daemon that is not the host's."""
    return "kvmapp" if paths.run == "/run/kvmapp" else "kvmapp-" + "".join(
        letter if letter.isalnum() else "-" for letter in paths.run.strip("/"))[-100:]


class LogFile(logging.StreamHandler):
    """stderr, or a file that can be opened anew after logrotate has moved it. A full disk costs lines only."""

    def __init__(self, path: str | None):
        super().__init__(sys.stderr)
        self.path = path
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s" if path else "%(message)s"))

    def reopen(self, level: str) -> None:
        log.setLevel(LEVELS[level])
        if self.path is None:
            return
        try:
            stream = open(self.path, "ab")      # noqa: SIM115
        except OSError:
            stream = open("/dev/null", "ab")    # noqa: SIM115 (no log is no reason to hold on to a terminal)
        for fd in (1, 2):                       # what the zygote and libraries print stands here too
            os.dup2(stream.fileno(), fd)
        stream.close()

    def handleError(self, record) -> None:              # noqa: N802 (logging's name)
        pass


def in_background(work: Callable[[Callable[[], None]], None]) -> int:
    """Runs `work(ready)` in a process of its own session; returns when it called ready, or with its failure."""
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        with open(reading, "rb") as pipe:
            said = pipe.read().decode()
        if said == "ready":
            return 0
        print(said or "error: the daemon ended before it was ready", file=sys.stderr)
        return 1
    os.close(reading)
    os.setsid()
    if os.fork():
        os._exit(0)
    status = 0
    try:
        os.chdir("/")
        work(lambda: detach(writing))
    except KvmappError as error:
        status = error.exit_code
        tell(writing, error.render())
    except BaseException:
        status = 1
        tell(writing, traceback.format_exc())
    os._exit(status)


def detach(writing: int) -> None:
    """From here on nobody waits for us, and no terminal is ours; 1 and 2 are the log."""
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    tell(writing, "ready")


def tell(writing: int, text: str) -> None:
    try:
        os.write(writing, text.encode())
        os.close(writing)
    except OSError:
        pass                            # said before
