"""The daemon as a whole: what it opens, serves, reads again and gives back, from its start to its end."""
from __future__ import annotations

import asyncio
import logging
import os
import signal
import time

from kvmapp.daemon.autostart import Autostart
from kvmapp.daemon.notify import notify, notify_reloading
from kvmapp.daemon.paths import Paths
from kvmapp.daemon.pidfile import PidFile
from kvmapp.daemon.quick import Quick
from kvmapp.daemon.routes import FULL, READ_ONLY
from kvmapp.daemon.server import Server
from kvmapp.daemon.sockets import listen
from kvmapp.daemon.supervisor import Supervisor
from kvmapp.errors import ConfigError, HostError, KvmappError
from kvmapp.hostconfig import DaemonConfig, read_daemon
from kvmapp.ini import clear_leftovers
from kvmapp.runtime import IDENTITY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("kvmapp")


class Daemon:
    """`quick`: with a warm process for kvmappctl. `reopen_log` is called at reload, so that logrotate may have moved the file away."""

    def __init__(self, paths: Paths, supervisor: Supervisor, reopen_log: Callable[[str], None], quick: bool):
        self.paths, self.supervisor, self.reopen_log = paths, supervisor, reopen_log
        self.autostart = Autostart(supervisor)
        self.server = Server(self)
        self.quick = Quick(paths.quick_socket) if quick else None
        self.started = time.time()
        self.warnings: list[str] = []
        self.refused: list[str] = []            # of `warnings`: files that could not be used at the last reload
        self.stopping = asyncio.Event()
        self.config = DaemonConfig()

    async def run(self, ready: Callable[[], None]) -> None:
        """Serves until SIGTERM or SIGINT. `ready` is called when the sockets answer."""
        self.config = self.read_config()
        self.reopen_log(self.config.log_level)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        await self.supervisor.find_running()
        self.supervisor.begin()
        await self.open_sockets()
        await self.supervisor.networks.autostart()      # domains want them
        self.autostart.begin()
        ready()
        notify("READY=1", self.status_line())
        log.info("kvmapp %s serves %s (pid %d, %d domains run)", IDENTITY, self.paths.socket, os.getpid(),
                 len(self.supervisor.active()))
        self.supervisor.run(self.supervisor.sweep(), "older versions")
        await self.stopping.wait()
        notify("STOPPING=1")
        await self.stop()

    async def open_sockets(self) -> None:
        gid = self.supervisor.socket_gid = self.group()
        try:
            await self.server.listen(listen(self.paths.socket, self.config.unix_sock_rw_perms & 0o666, gid), FULL)
            await self.server.listen(listen(self.paths.read_only_socket, self.config.unix_sock_ro_perms & 0o666, gid), READ_ONLY)
            if self.quick:
                self.quick.start()
        except OSError as error:
            raise HostError(f"Cannot listen on '{self.paths.socket}': {error.strerror}") from None

    async def stop(self) -> None:
        """Domains run on; requests under way end first."""
        if self.quick:
            self.quick.stop()
        self.supervisor.events.close()
        await self.server.close()
        await self.supervisor.end()
        for path in (self.paths.socket, self.paths.read_only_socket):
            if os.path.lexists(path):
                os.unlink(path)
        log.info("stopped; %d domains run on", len(self.supervisor.active()))

    def reload(self) -> None:
        """Every file again. What is wrong is a warning: the daemon goes on with what it had."""
        notify_reloading()
        self.warnings, self.refused = [], []
        try:
            self.config = self.read_config()
            gid = self.supervisor.socket_gid = self.group()
            for path, mode in ((self.paths.socket, self.config.unix_sock_rw_perms),
                               (self.paths.read_only_socket, self.config.unix_sock_ro_perms)):
                os.chown(path, -1, -1 if gid is None else gid)
                os.chmod(path, mode & 0o666)
        except (KvmappError, OSError) as error:
            self.refused.append(str(error))
            log.error("reload: %s", error)
        self.supervisor.guest_defaults()
        if self.supervisor.guest_complaint:
            self.refused.append(self.supervisor.guest_complaint)
        self.warnings += self.refused
        self.reopen_log(self.config.log_level)
        self.supervisor.refresh()
        self.supervisor.run(self.put_back(), "networks put back")
        log.info("reloaded")
        notify("READY=1", self.status_line())

    async def put_back(self) -> None:
        await self.supervisor.networks.check(rules=True)
        await self.supervisor.cards.check(everything=True)

    def read_config(self) -> DaemonConfig:
        return read_daemon(os.path.join(self.paths.config, "kvmapp.conf"))

    def group(self) -> int | None:
        """Whose members may use the socket; an ordinary user's daemon is his alone."""
        if os.geteuid() != 0:
            return None
        import grp
        try:
            return grp.getgrnam(self.config.unix_sock_group).gr_gid
        except KeyError:
            self.warnings.append(f"there is no group {self.config.unix_sock_group}: only root may use the socket")
            log.warning("%s", self.warnings[-1])
            return 0

    def status_line(self) -> str:
        return f"STATUS={len(self.supervisor.domains)} domains, {len(self.supervisor.active())} run"


def serve(paths: Paths, options: dict, reopen_log: Callable[[str], None], ready: Callable[[], None]) -> None:
    """Takes the pid file, then serves. Raises KvmappError when it cannot begin."""
    try:
        os.umask(0o022)
        paths.make_folders()
    except OSError as error:
        raise HostError(f"Cannot make '{error.filename}': {error.strerror}",
                        "the daemon is started by root, or with --root in a folder of yours") from None
    pid_file = PidFile(paths.pid_file)
    pid_file.take()
    try:
        clear_leftovers(paths.domains)
    except OSError as error:
        raise ConfigError(f"Cannot clear away what a killed writer left: {error.strerror}", file=paths.domains) from None

    async def main() -> None:
        quick = options.pop("quick", False)
        await Daemon(paths, Supervisor(paths, **options), reopen_log, quick).run(ready)
    try:
        asyncio.run(main())
    finally:
        pid_file.release()
