"""One domain in the daemon's memory: its file, what of it runs, the job that holds it, and how it ended the last time.

The state is computed from these, so it is never wrong for longer than they are. Queries read what is here and wait for nothing.
"""
from __future__ import annotations

import asyncio
import json
import logging
import os
import time

from kvmapp.config import DomainConfig
from kvmapp.daemon.jobs import Job, Jobs
from kvmapp.daemon.process import DomainProcess, cpu_times_of, resident_of
from kvmapp.errors import NOTHING_LEFT, DomainNotRunning, DomainRunning, HostError, KvmappError, NoResponse, Unsupported
from kvmapp.runtime import IDENTITY
from kvmapp.values import is_plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import ClassVar

    from kvmapp.config import InterfaceConfig
    from kvmapp.daemon.paths import Paths
    from kvmapp.daemon.store import Store, Stored

log = logging.getLogger("kvmapp")
ENDING_LIMIT = 64 << 10
TIME_LIMIT = 1 << 36                    # seconds: in the year 4147; what is later is no time that anything ended at
# How a domain may have ended, in virsh's words (domstate --reason), and two that virsh has no word for.
ENDING_REASONS = ("shutdown", "destroyed", "crashed", "migrated", "saved", "failed", "from snapshot", "daemon", "unknown",
                  "killed", "out of memory")


class Record:
    """What the daemon notes of a running domain, in RUN/records/NAME.json, for itself after a restart."""
    fields = ("name", "uuid", "id", "pid", "start_time", "started", "taps", "disks", "config", "version", "servers")
    __slots__ = fields
    absent: ClassVar[dict] = {"servers": ()}            # what older versions did not note
    name: str
    uuid: str
    id: int
    pid: int
    start_time: int
    started: float
    taps: dict[str, str]                # index of the interface to the tap's name
    disks: list[list]                   # [name, source, device, inode, readonly] of each
    config: dict
    version: str
    servers: list[list]                 # [tag, pid, start time] of each file server that was started for it

    def __init__(self, **values):
        for name in self.fields:
            setattr(self, name, values[name] if name in values else self.absent[name])

    def save(self, paths: Paths) -> None:
        """Whole or not at all; /run is in memory, so nothing is synced. Raises OSError."""
        path = os.path.join(paths.records, f"{self.name}.json")
        with open(f"{path}.new", "w") as file:
            json.dump({name: getattr(self, name) for name in self.fields}, file)
        os.rename(f"{path}.new", path)

    @classmethod
    def load(cls, path: str) -> Record | None:
        """None: there is none. Raises HostError where it cannot be known, for what runs must not be taken for ended."""
        try:
            with open(path) as file:
                return cls(**{name: value for name, value in json.load(file).items() if name in cls.fields})
        except OSError as error:
            if error.errno in NOTHING_LEFT:
                raise HostError(f"Cannot read {path}: {error.strerror}",
                                "every guest runs on; make room, then start the daemon anew") from None
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


class Domain:
    def __init__(self, name: str, store: Store, paths: Paths, job_changed: Callable[[Domain, Job, bool], None]):
        self.name, self.store, self.paths = name, store, paths
        self.jobs = Jobs(name, lambda job, begins: job_changed(self, job, begins))
        self.record: Record | None = None
        self.live: DomainConfig | None = None           # what it was started with
        self.process: DomainProcess | None = None
        self.ending: dict | None = read_ending(paths.ending(name))
        self.waiting: dict | None = None                # autostart: for what
        self.stats: tuple[float, float, dict] | None = None     # the last counters, and when: by clock, monotonic
        self.destroyed_by: str | None = None            # who killed a process that could not say it itself
        self.presses = 0                                # of its power button
        self.ignores: tuple[DomainProcess, float, str] | None = None    # a press: whose process, in its state since when, and what is said
        self.waiters: list[asyncio.Future[None]] = []
        self.plugging: set[str] = set()         # devices that are noted, of which it is not known yet whether its process has them
        self.looks: dict[str, asyncio.Task[dict[str, int]]] = {}        # at the files of its disks, which may hang
        self.unsaved = False                            # its record has news that did not get onto disk

    def note(self) -> None:
        """Its record onto disk; where there is no room, the heartbeat tries again."""
        if self.record is not None:
            try:
                self.record.save(self.paths)
                self.unsaved = False
            except OSError as error:
                self.unsaved = True
                log.error("what runs of domain '%s' cannot be noted, so the next daemon would not know of it: %s", self.name,
                          error.strerror)

    # What it is.

    @property
    def stored(self) -> Stored | None:
        return self.store.files.get(self.name)

    @property
    def config(self) -> DomainConfig | None:
        """As it runs, else as its next start will take it."""
        if self.live is not None:
            return self.live
        return self.stored.config if self.stored else None

    @property
    def active(self) -> bool:
        return self.record is not None

    @property
    def id(self) -> int | None:
        return self.record.id if self.record else None

    @property
    def uuid(self) -> str | None:
        return self.record.uuid if self.record else self.config.uuid if self.config else None

    @property
    def state(self) -> tuple[str, str]:
        """virsh's state and reason."""
        if self.process is not None:
            return ("no response", "unknown") if self.process.silent else (self.process.state, self.process.reason)
        if self.active:
            return "paused", "starting up"
        if self.stored and self.stored.error:
            return "broken", "config"
        return "shut off", self.ending["reason"] if self.ending else "unknown"

    def state_text(self) -> str | None:
        state, _ = self.state
        if state == "broken":
            assert self.stored and self.stored.error
            return str(self.stored.error)
        if state == "no response":
            return "its process does not answer; destroy ends it"
        return self.ending["text"] if state == "shut off" and self.ending else None

    def since(self) -> float | None:
        if self.process is not None:
            return self.process.since
        return self.ending["time"] if self.ending and not self.active else None

    def notify(self) -> None:
        """Its state may be another one now."""
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait_until(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        """Whether the condition came true in time; looked at whenever the state changes."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not condition():
            waiter = asyncio.get_running_loop().create_future()
            self.waiters.append(waiter)
            try:
                await asyncio.wait_for(waiter, None if deadline is None else max(0, deadline - time.monotonic()))
            except TimeoutError:
                return condition()
            finally:
                if waiter in self.waiters:      # of somebody who waits no longer
                    self.waiters.remove(waiter)
        return True

    async def told(self, work: Awaitable[dict], cannot: str, hint: str = "with --config it takes effect at the next start") -> dict:
        """What its process answers to a verb that older versions do not know. `cannot`, a sentence: what is not to be had of those."""
        try:
            return await work
        except KvmappError as error:
            if "unknown verb" not in error.message:
                raise
            raise Unsupported(f"{cannot} while domain '{self.name}' runs under this version of kvmapp", hint) from None

    # What a verb wants of it.

    def want_active(self) -> DomainProcess:
        """Raises DomainNotRunning."""
        if not self.active:
            raise DomainNotRunning("Requested operation is not valid: domain is not running",
                                   f"to start it: kvmappctl start {self.name}")
        if self.process is None:
            raise NoResponse(f"Domain '{self.name}' is just being started")
        return self.process

    def want_inactive(self) -> None:
        if self.active:
            raise DomainRunning(f"Requested operation is not valid: domain '{self.name}' is active",
                                f"end it first: kvmappctl shutdown {self.name}")

    def want_persistent(self) -> DomainConfig:
        if self.stored is None:
            raise KvmappError(f"Requested operation is not valid: domain '{self.name}' is transient and has no file",
                              "define it to make it persistent")
        return self.store.config(self.name)

    # What queries show: shapes.py's Domain and DomainDetail.

    def summary(self) -> dict[str, object]:
        state, reason = self.state
        config, record, stored = self.config, self.record, self.stored
        return {
            "name": self.name, "uuid": self.uuid, "id": self.id, "state": state, "reason": reason, "text": self.state_text(),
            "since": self.since(), "persistent": stored is not None, "autostart": self.name in self.store.autostarted,
            "title": config.title if config else None, "vcpus": config.vcpus if config else None,
            "memory": config.memory if config else None, "current_memory": self.current_memory(),
            "pid": (self.process.pid if self.process else record.pid) or None if record else None,
            "started": record.started if record else None,
            "job": self.jobs.current.to_dict() if self.jobs.current else None, "waiting": None if self.active else self.waiting,
            "file": stored.path if stored else None, "outdated": self.outdated, "warnings": self.warnings()}

    @property
    def outdated(self) -> bool:
        """Whether another version than the daemon's runs it."""
        return self.record is not None and self.record.version != IDENTITY

    def warnings(self) -> list[str]:
        config, stored = self.config, self.stored
        found = list(config.warnings) if config else []
        if stored and stored.error and self.active:
            found.append(f"its file is broken: {stored.error}")
        if self.record and self.outdated:
            found.append(f"it runs under kvmapp {self.record.version} until its next start")
        if self.ignores and self.process and self.ignores[:2] == (self.process, self.process.since):
            found.append(self.ignores[2])
        return found

    def current_memory(self) -> int | None:
        config = self.config
        if config is None:
            return None
        balloon = self.process.status.get("balloon") if self.process else None
        if type(balloon) is int and 0 < balloon <= config.memory:
            return balloon
        return config.current_memory or config.memory

    def detail(self) -> dict[str, object]:
        config, record = self.config, self.record
        pid = self.process.pid if self.process else 0
        times = cpu_times_of(pid) if pid else None
        return {
            **self.summary(), "managed_save": os.path.exists(self.paths.managed_save(self.name)),
            "os_type": "hvm", "cpu_time_ns": sum(times) if times else None,
            "resident": resident_of(pid) if pid else None, "log": self.paths.domain_log(self.name),
            "control": self.paths.control(self.name) if record else None,
            "disks": disk_views(config, self.process.status if self.process else {}) if config else [],
            "interfaces": interface_views(config, record.taps if record else {}) if config else [],
            "consoles": console_views(config, self.process.status if self.process else {}) if config else [],
            "acpi": config.acpi if config else None, "balloon": config.balloon is not None if config else None,
            "ending": self.ending, "runtime": record.version if record else None}


def removable(config: DomainConfig | None) -> set[str]:
    """What the control socket calls the devices that may come and go."""
    return {f"net{one.index}" for one in config.interfaces} | {one.name for one in config.disks} if config else set()


def disk_views(config: DomainConfig, status: dict) -> list[dict]:
    full = status.get("full_disks")
    return [{"name": disk.name, "source": disk.source, "format": disk.format, "bus": disk.bus, "readonly": disk.readonly,
             "type": "block" if is_block(disk.source) else "file",
             "error": "no space" if isinstance(full, list) and disk.name in full else None} for disk in config.disks]


def is_block(path: str) -> bool:
    """A query waits for nothing: only devtmpfs always answers, and a file server that hangs may have any other path."""
    try:
        return path.startswith("/dev/") and os.stat(path).st_mode & 0o170000 == 0o060000
    except OSError:
        return False


def interface_views(config: DomainConfig, taps: dict[str, str]) -> list[dict]:
    return [interface_view(one, taps) for one in config.interfaces]


def interface_view(one: InterfaceConfig, taps: dict[str, str]) -> dict:
    return {"index": one.index, "type": one.type, "source": one.source, "model": one.model, "mac": one.mac,
            "target": taps.get(str(one.index), one.target)}


def console_views(config: DomainConfig, status: dict) -> list[dict]:
    """The names by which the domain process calls its ports; a pty's name is known while it runs."""
    ttys = status.get("ttys")
    named = [(f"serial{one.index}", one) for one in config.serials] + [(f"console{one.index}", one) for one in config.consoles]
    return [{"name": name, "type": one.type, "path": one.path,
             "tty": plain(ttys.get(name)) if isinstance(ttys, dict) else None} for name, one in named]


def plain(text: object, limit: int = 4096) -> str | None:
    """A text from a domain process, if it is one that can be shown."""
    return text if isinstance(text, str) and len(text) <= limit and is_plain(text) else None


def read_ending(path: str) -> dict | None:
    """RUN/domains/NAME/NAME.end. A domain process could write there, so whatever is implausible is left out."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            data = json.loads(file.read(ENDING_LIMIT)) if os.fstat(fd).st_mode & 0o170000 == 0o100000 else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    when, status, reason = data.get("time"), data.get("exit"), data.get("reason")
    return {"state": "shut off", "reason": reason if reason in ENDING_REASONS else "unknown",
            "text": plain(data.get("text")) or "", "hint": plain(data.get("hint")),
            "time": float(when) if isinstance(when, int | float) and 0 <= when < TIME_LIMIT else time.time(),
            "exit": status if type(status) is int else None}


def write_ending(path: str, reason: str, text: str, exit: int | None = None) -> dict:
    """What the domain process could not say any more."""
    ending = {"state": "shut off", "reason": reason, "text": text, "hint": None, "exit": exit, "time": time.time()}
    try:
        if os.path.lexists(f"{path}.new"):
            os.unlink(f"{path}.new")
        fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with open(fd, "w") as file:
            json.dump(ending, file)
        os.rename(f"{path}.new", path)
    except OSError:
        pass                            # then a restarted daemon will not know
    return ending
