"""The start of a domain, step by step; whichever fails, what the earlier ones made is taken away again.

Taps, file servers' sockets, log and control socket are made here and handed over as open descriptors. Disks and kernel are opened and
locked by the domain process itself, while it is still root, so a file server that hangs holds up nobody else; it drops root's
rights before its guest's first instruction.
"""
from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from contextlib import suppress
from copy import copy

from kvmapp import fileserver
from kvmapp.daemon import domainlog
from kvmapp.daemon.counters import vcpu_numbers
from kvmapp.daemon.domain import Domain, Record, plain, read_ending
from kvmapp.daemon.images import has_image, remove_image
from kvmapp.daemon.limits import Tunables, group_limits, no_limits, vcpu_limits
from kvmapp.daemon.process import DomainProcess
from kvmapp.daemon.sockets import listen
from kvmapp.daemon.spawn import ZygoteDied
from kvmapp.daemon.taps import open_tap
from kvmapp.daemon.threads import in_own_thread
from kvmapp.errors import ConfigError, DomainNotFound, DomainRunning, GuestImageError, HostError, KvmappError, NameInUse, NoResponse
from kvmapp.runtime import IDENTITY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

    from kvmapp.config import DiskConfig, DomainConfig, FilesystemConfig
    from kvmapp.daemon.jobs import Job
    from kvmapp.daemon.supervisor import Supervisor
    from kvmapp.hostconfig import GuestDefaults

START_TIMEOUT = 60.0                    # from the fork to the guest's first instruction; a huge initrd on a slow disk takes time
HELD_RATE = 64 << 20                    # bytes of held memory that a slow host reads or touches in a second
KILL_TIMEOUT = 5.0                      # for a process to go after SIGKILL
NEVER_FORKED = "The zygote died before it had started the domain"
WARNINGS_MOST = 20                      # of a domain process about its restored machine
KSM_RUN = "/sys/kernel/mm/ksm/run"
LAST_WORDS = 2.0                        # between the end of its socket and its own


async def start(supervisor: Supervisor, domain: Domain, who: str, *, paused: bool = False,
                config: DomainConfig | None = None, state: int = -1) -> list[str]:
    """Warnings, of limits that this host does not keep. Raises KvmappError; then nothing of it is left. `config`: of a transient or
    saved domain; else its file's. `state`: the open file of a saved state to go on from; it stays the caller's."""
    if supervisor.domains.get(domain.name) is not domain:       # whoever wants it has waited; to undo it would take the other one's socket
        raise DomainNotFound(f"Domain '{domain.name}' was defined anew meanwhile", f"kvmappctl start {domain.name} starts that one")
    with domain.jobs.hold("start" if state < 0 else "restore", who) as job:
        if domain.active:
            raise DomainRunning("Domain is already active", f"kvmappctl domstate {domain.name}")
        config = config or domain.want_persistent()
        saved = has_image(supervisor.paths, domain.name)
        try:
            warnings = await attempt(Start(supervisor, domain, config, paused or saved, state), job)
        except ZygoteDied:                              # a new one is there at the next try
            warnings = await attempt(Start(supervisor, domain, config, paused or saved, state), job)
    supervisor.tell(domain.name, "Started", "Booted" if state < 0 else "Restored")
    supervisor.join_groups(domain)
    if domain.process and domain.process.ended:         # its end fell into the start's last moment
        supervisor.process_gone(domain)
    elif saved and not paused and domain.process:
        await domain.process.ask("resume", begin=True)
        await domain.process.refresh()
    return warnings


async def attempt(start: Start, job: Job) -> list[str]:
    try:
        job.progress = "opening what it needs"
        await start.prepare()
        job.progress = "waiting for its process"
        await start.launch()
        remove_image(start.paths, start.domain.name)
        return start.warnings
    except OSError as error:
        await to_its_end(start.undo(f"{error}"))
        raise HostError(f"Cannot start domain '{start.domain.name}': {error.strerror}" +
                        (f": {error.filename}" if error.filename else "")) from None
    except BaseException as error:
        await to_its_end(start.undo(f"{error}"))
        raise
    finally:
        start.close_fds()


async def to_its_end(undoing: Coroutine) -> None:
    """A second destroy, or the daemon's end, breaks the job again: what is half undone, no verb would lead out of."""
    task = asyncio.ensure_future(undoing)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    task.result()


class Start:
    """One attempt. `files` are the descriptors to hand over, by what they are for."""

    def __init__(self, supervisor: Supervisor, domain: Domain, config: DomainConfig, paused: bool, state: int):
        self.supervisor, self.domain, self.config, self.paused = supervisor, domain, config, paused
        self.paths = supervisor.paths
        self.state = state
        self.files: dict[str, int] = {}
        self.taps: dict[str, str] = {}
        self.disks: list[list] = []
        self.warnings: list[str] = []
        self.servers: list[list] = []

    async def prepare(self) -> None:
        defaults = self.supervisor.guest_defaults()
        if self.supervisor.guest_complaint:
            self.warnings.append(self.supervisor.guest_complaint)
        if self.config.ksm and not merges_pages():
            self.warnings.append(f"ksm = yes merges nothing while this host's KSM is off: echo 1 > {KSM_RUN}")
        self.uid, self.gid = owner(defaults, self.supervisor.socket_gid)
        self.check_macs()
        if self.config.disks:                                   # a file server that hangs must hold up this start only
            await in_own_thread(self.identify_disks)
        self.check_disks()
        await self.open_taps()
        self.make_folder()
        listener = listen(self.paths.control(self.domain.name), 0o660, self.supervisor.socket_gid)
        self.files["control"] = listener.detach()
        self.files["log"] = domainlog.open_log(self.paths.domain_log(self.domain.name), defaults.log_max_size,
                                               defaults.log_max_backups)
        await self.start_servers()
        if self.state >= 0:
            self.files["restore"] = os.dup(self.state)
        self.check_macs()                                       # again: others may have started meanwhile
        self.check_disks()
        self.note()
        await self.make_groups()

    async def launch(self) -> None:
        """From the fork to the first answer."""
        assert self.domain.record
        text = json.dumps(self.config.to_dict(), ensure_ascii=False)
        domainlog.write_line(self.files["log"], f"starting, kvmapp {IDENTITY}, id {self.domain.record.id}: {text}")
        request = {"config": self.config.to_dict(), "files": list(self.files), "run_dir": self.paths.domain_own(self.domain.name),
                   "uid": self.uid, "gid": self.gid, "paused": self.paused,
                   "cache": self.paths.cache}
        try:
            pid = await self.supervisor.zygote.spawn(request, list(self.files.values()))
        except ZygoteDied:
            pid = 0                     # it may have forked before it died: then the domain is behind its socket
        process = self.domain.process = self.supervisor.attach(self.domain)
        if pid:
            process.watch(pid)
        self.close_fds()
        if not await process.connect():
            if not pid:
                raise ZygoteDied(NEVER_FORKED)
            await process.wait_end(LAST_WORDS)
            raise self.failure()
        self.note_process(process)
        try:
            await process.hello(patience(self.config))
        except NoResponse:
            if not process.pid:
                raise ZygoteDied(NEVER_FORKED) from None
            await process.wait_end(LAST_WORDS)
            raise self.failure() from None
        self.note_process(process)
        await self.limit_vcpus(process)
        told = process.status.get("warnings")
        if isinstance(told, list):
            self.warnings += filter(None, map(plain, told[:WARNINGS_MOST]))

    def note_process(self, process: DomainProcess) -> None:
        record = self.domain.record
        if record and record.pid != process.pid:
            record.pid, record.start_time = process.pid, process.start_time
            record.save(self.paths)

    async def undo(self, why: str) -> None:
        """The domain is as it was before: shut off, without taps, groups or records."""
        process = self.domain.process
        if process is not None:
            process.kill()
            await process.wait_end(KILL_TIMEOUT)
        domainlog.append(self.paths.domain_log(self.domain.name), f"not started: {why or 'given up'}")
        self.supervisor.clear_away(self.domain)

    def close_fds(self) -> None:
        close_all(self.files)

    # Steps.

    async def make_groups(self) -> None:
        """Control groups before the process, so that nothing it takes escapes its limits. It takes the kernel 30 ms or more to move
        a process, so domains without limits are moved when they run (`Supervisor.join_groups`).
        """
        groups, name = self.supervisor.cgroups, self.domain.name
        if await asyncio.to_thread(groups.left_over, name):
            await asyncio.to_thread(groups.limit, name, no_limits(groups.unified))
        limits = group_limits(Tunables(self.config), Tunables(), groups.unified)
        if limits:
            made = await in_own_thread(groups.make, name, unwanted=close_all)
            self.files |= made
            self.warn(await asyncio.to_thread(groups.limit, name, limits))

    async def limit_vcpus(self, process: DomainProcess) -> None:
        groups, name = self.supervisor.cgroups, self.domain.name
        limits = vcpu_limits(Tunables(self.config), Tunables(), groups.unified)
        if limits and process.pid:
            await asyncio.to_thread(groups.join, name, process.pid)
            self.warn(await asyncio.to_thread(groups.limit_vcpus, name, vcpu_numbers(process.pid), limits))

    def warn(self, complaints: list[str]) -> None:
        """Into the domain's log, and the answer to whoever starts it."""
        self.warnings += complaints
        for text in complaints:
            domainlog.append(self.paths.domain_log(self.domain.name), f"warning: {text}")

    def check_macs(self) -> None:
        """Two running guests with one MAC disturb each other's every packet."""
        macs = {interface.mac for interface in self.config.interfaces}
        for other in self.supervisor.active():
            for interface in other.live.interfaces if other.live and other is not self.domain else ():
                if interface.mac in macs:
                    raise NameInUse(f"Domain '{other.name}' runs with the same MAC address {interface.mac} ({interface.heading})",
                                    f"take the mac key out of domain '{self.domain.name}' and one is made")

    def identify_disks(self) -> None:
        self.disks = identities(self.config.disks)

    def check_disks(self) -> None:
        check_disks(self.supervisor, self.disks)

    async def open_taps(self) -> None:
        networks = self.supervisor.networks
        for interface in self.config.interfaces:
            bridge = networks.bridge_of(interface) if interface.type == "network" else interface.source or ""
            tap = open_tap(interface, bridge)
            if tap is not None:
                self.files |= tap.files(interface.index)
                self.taps[str(interface.index)] = tap.name
                if tap.made:
                    await self.supervisor.cards.settle(self.domain.name, interface, tap.name, bridge)
        networks.expect(self.config)

    async def start_servers(self) -> None:
        """They end with the sockets that are handed over here, whatever becomes of this start."""
        for filesystem in self.config.filesystems:
            server = await in_own_thread(start_server, filesystem, self.paths.domain_log(self.domain.name),
                                         unwanted=fileserver.Server.dismiss)
            self.files[f"filesystem:{filesystem.tag}"] = server.fd
            if server.process is not None:
                self.servers.append([filesystem.tag, *self.supervisor.file_servers.take(server.process)])

    def make_folder(self) -> None:
        """The domain's folder in RUN, and in it the one where its process says how it ended."""
        folder, own = self.paths.domain_run(self.domain.name), self.paths.domain_own(self.domain.name)
        shutil.rmtree(folder, ignore_errors=True)
        os.mkdir(folder, 0o755)
        os.mkdir(own, 0o700)
        if self.uid is not None and self.gid is not None:
            os.chown(own, self.uid, self.gid)

    def note(self) -> None:
        """From here on a daemon that comes after us knows what to look for and what to clear away."""
        record = Record(name=self.config.name, uuid=self.config.uuid, id=self.supervisor.next_id(), pid=0, start_time=0,
                        started=time.time(), taps=self.taps, disks=self.disks, config=self.config.to_dict(), version=IDENTITY,
                        servers=self.servers)
        record.save(self.paths)
        # A copy, for the file may change under the domain, and the domain under the file.
        self.domain.record, self.domain.live, self.domain.ending = record, copy(self.config), None

    def failure(self) -> KvmappError:
        """Why the process did not come up, in its own words if it left any."""
        ending = read_ending(self.paths.ending(self.domain.name))
        if ending is not None and ending["reason"] == "failed":
            return HostError(ending["text"], ending["hint"])
        process: DomainProcess | None = self.domain.process
        if process is not None and process.pid and process.lives():
            return NoResponse(f"Domain '{self.domain.name}' did not come up within {patience(self.config):.0f} s", "its log has more")
        if self.supervisor.cgroups.oom_kills(self.domain.name):
            return HostError(f"The host's kernel killed the process of domain '{self.domain.name}' for want of memory before its guest ran",
                             "raise [memtune] hard_limit" if self.config.memtune.hard_limit else "free some of the host's memory")
        return HostError(f"The process of domain '{self.domain.name}' ended before its guest ran",
                         f"see {self.paths.domain_log(self.domain.name)}")


def identities(disks: Iterable[DiskConfig]) -> list[list]:
    """Which files the disks are, as records have them; one that is not there is left to whoever opens it to complain of."""
    found = []
    for disk in disks:
        try:
            status = os.stat(disk.source)
        except OSError:
            continue
        identity = [status.st_rdev, 0] if status.st_rdev else [status.st_dev, status.st_ino]
        found.append([disk.name, disk.source, *identity, disk.readonly])
    return found


def check_disks(supervisor: Supervisor, disks: list[list]) -> None:
    """What the locks on the files would say as well, but with the other domain's name."""
    for other in supervisor.active():
        for theirs in other.record.disks if other.record else ():
            for name, source, *identity, readonly in disks:
                if theirs[2:4] == identity and not (readonly and theirs[4]):
                    raise GuestImageError(f"Cannot open disk '{name}' ({source}): it is disk '{theirs[0]}' of domain "
                                          f"'{other.name}', which runs",
                                          "two domains may share a disk only when both have readonly = yes")


def patience(config: DomainConfig) -> float:
    """Seconds from the fork to the first answer. Memory that the host is to hold is touched first, or read from where it was saved."""
    held = config.hugepages != "no" or config.prealloc or config.locked
    return START_TIMEOUT + (config.memory / HELD_RATE if held else 0)


def start_server(filesystem: FilesystemConfig, log: str) -> fileserver.Server:
    """With the log open by itself: a start that is broken meanwhile closes its own."""
    fd = domainlog.open_again(log)
    try:
        return fileserver.start(filesystem, fd)
    finally:
        os.close(fd)


def close_all(files: dict[str, int]) -> None:
    while files:
        os.close(files.popitem()[1])


def merges_pages() -> bool:
    try:
        with open(KSM_RUN) as file:
            return file.read().strip() == "1"
    except OSError:                             # a kernel without it
        return False


def owner(defaults: GuestDefaults, socket_gid: int | None) -> tuple[int | None, int | None]:
    """Whom the domain process becomes; (None, None) when we are not root and it stays what we are."""
    if os.geteuid() != 0:
        return None, None
    import grp
    import pwd
    try:
        uid, gid = pwd.getpwnam(defaults.user).pw_uid, grp.getgrnam(defaults.group).gr_gid
    except KeyError as error:
        raise ConfigError(f"Domains are to run as user {defaults.user}, group {defaults.group}: {error.args[0]}",
                          "kvmapp setup makes them; guest.conf says which") from None
    if gid in (0, socket_gid) or uid == 0:
        raise ConfigError(f"Domains are not to run as user {defaults.user}, group {defaults.group}: a guest that breaks out "
                          "of its process would command the daemon", "guest.conf: user = kvmapp, group = kvmapp-guest")
    return uid, gid
