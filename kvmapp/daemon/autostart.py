"""Domains marked by autostart, started once after each boot of the host, in their order, when what they need is there.

A domain whose disk or bridge is not there yet waits, and says for what, while the others go on; it is started as soon as
everything is there. Until its turn comes it waits for that. Somebody who starts it by hand ends its waiting. Networks marked by
autostart come before domains.
"""
from __future__ import annotations

import asyncio
import json
import logging
import os
import time

from kvmapp.daemon.call import internal
from kvmapp.daemon.saving import start_or_go_on
from kvmapp.daemon.taps import is_bridge
from kvmapp.daemon.threads import in_own_thread
from kvmapp.errors import HostError, KvmappError
from kvmapp.hostinfo import boot_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.config import DomainConfig
    from kvmapp.daemon.domain import Domain
    from kvmapp.daemon.supervisor import Supervisor

log = logging.getLogger("kvmapp")
ITS_TURN = ["its turn"]
LOOK_AGAIN = 1.0                        # seconds between two looks at what is missing
LOOK_PATIENCE = 5.0                     # seconds for one; a file server that does not answer must not hold up the other domains


class Autostart:
    def __init__(self, supervisor: Supervisor):
        self.supervisor = supervisor
        self.state = "none"
        self.started: list[str] = []
        self.failed: dict[str, str] = {}
        self.waiting: dict[str, dict] = {}                            # by domain: since when, and for what
        self.looks: dict[str, asyncio.Future[list[str]]] = {}       # by domain, those under way
        self.handled: list[str] = []
        self.note = os.path.join(supervisor.paths.run, "autostarted")

    def begin(self) -> None:
        """Once a boot. The note in /run says which boot it was and who has had his turn, so a daemon that is killed while
        domains wait leaves the rest to the next one.
        """
        try:
            with open(self.note) as file:
                noted = json.load(file)
            self.handled = [str(name) for name in noted["handled"]] if noted["boot"] == boot_id() else []
            if noted["boot"] == boot_id() and noted["done"]:
                return
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self.write_note(False)
        self.state = "running"
        self.supervisor.run(self.start_all(), "autostart")

    def write_note(self, done: bool) -> None:
        try:
            with open(f"{self.note}.new", "w") as file:
                json.dump({"boot": boot_id(), "handled": self.handled, "done": done}, file)
            os.rename(f"{self.note}.new", self.note)
        except OSError as error:
            log.warning("autostart: cannot write %s: %s", self.note, error.strerror)

    async def start_all(self) -> None:
        for domain in self.in_order():
            self.wait_for(domain, ITS_TURN)
        await self.look_at_all()
        while self.waiting:
            await asyncio.sleep(LOOK_AGAIN)
            await self.look_at_all()
        self.state = "done"
        self.write_note(True)

    def in_order(self) -> list[Domain]:
        supervisor = self.supervisor
        for name in supervisor.store.autostarted - set(self.handled):
            stored = supervisor.store.files.get(name)
            if stored is None or stored.config is None:
                self.fail(name, str(stored.error) if stored and stored.error else "there is no such domain")
        marked = [domain for domain in supervisor.domains.values()
                  if domain.name in supervisor.store.autostarted and domain.name not in self.handled
                  and domain.config and not domain.active]
        return sorted(marked, key=lambda domain: (domain.config.autostart_order if domain.config else 0, domain.name))

    async def missing_of(self, domain: Domain, config: DomainConfig) -> list[str]:
        """What its start has to wait for, somebody's job on it too: that may be the start itself."""
        networks = self.supervisor.networks
        missing = await self.files_missing_of(domain, config)
        missing += [f"network {card.source}" for card in config.interfaces
                    if card.type == "network" and not networks.is_active(card.source)]
        job = domain.jobs.current
        return missing + ([f"job '{job.verb}' of {job.who}"] if job else [])

    async def files_missing_of(self, domain: Domain, config: DomainConfig) -> list[str]:
        """One look at a time: as long as one hangs, that is what is missing."""
        hanging = self.looks.get(domain.name)
        look = hanging or asyncio.ensure_future(in_own_thread(what_is_missing, config))
        self.looks[domain.name] = look
        await asyncio.wait({look}, timeout=0 if hanging else LOOK_PATIENCE)
        if not look.done():
            return ["an answer from where its files are"]
        try:
            return self.looks.pop(domain.name).result()
        except HostError as error:              # there is no thread for it now; the next look may have one
            return [error.message]

    def wait_for(self, domain: Domain, missing: list[str]) -> None:
        """Said in the log and as an event when it is more than its turn; the first time only, since the list may change every second."""
        before = self.waiting.get(domain.name)
        domain.waiting = self.waiting[domain.name] = {"since": before["since"] if before else time.time(), "missing": missing}
        if before and before["missing"] == ITS_TURN != missing:
            log.info("autostart: domain '%s' waits for %s", domain.name, ", ".join(missing))
            self.supervisor.events.publish("autostart", domain.name, uuid=domain.uuid, type="waiting", detail=", ".join(missing))

    async def look_at_all(self) -> None:
        for name in list(self.waiting):
            if name not in self.waiting:                        # stopped meanwhile
                continue
            domain = self.supervisor.domains.get(name)          # another one by now, if it was defined anew
            config = domain.config if domain else None
            if domain is None or domain.active or config is None or name not in self.supervisor.store.autostarted:
                self.stop_waiting(name)
                self.handle(name)
                continue
            missing = await self.missing_of(domain, config)
            if name not in self.waiting:
                continue
            if missing:
                self.wait_for(domain, missing)
            elif await self.start_one(name):
                await asyncio.sleep(config.autostart_delay)

    def stop_waiting(self, name: str) -> None:
        del self.waiting[name]
        if name in self.supervisor.domains:
            self.supervisor.domains[name].waiting = None

    def handle(self, name: str) -> None:
        """It has had its turn."""
        self.handled.append(name)
        self.write_note(False)

    async def start_one(self, name: str) -> bool:
        self.stop_waiting(name)
        domain = self.supervisor.domains.get(name)
        if domain is None or domain.active:
            self.handle(name)
            return False
        try:
            await start_or_go_on(self.supervisor, domain, "autostart")
        except KvmappError as error:
            self.fail(name, str(error))
            return False
        except Exception as error:              # a defect, or a host that fails where nobody thought of it: the others are started
            log.error("autostart: domain '%s'", name, exc_info=error)
            self.fail(name, str(internal(error)))
            return False
        log.info("autostart: domain '%s' started", name)
        self.started.append(name)
        self.handle(name)
        self.supervisor.events.publish("autostart", name, uuid=domain.uuid, type="started")
        return True

    def fail(self, name: str, why: str) -> None:
        log.error("autostart: domain '%s' is not started: %s", name, why)
        self.failed[name] = why
        self.handle(name)
        self.supervisor.events.publish("autostart", name, type="failed", detail=why)

    def stop(self) -> list[str]:
        """What is not begun yet is left off until the host's next boot: which."""
        left = list(self.waiting)
        for name in left:
            self.stop_waiting(name)
            self.handle(name)
        return left

    def to_dict(self) -> dict[str, object]:
        return {"state": self.state, "started": self.started, "failed": self.failed,
                "waiting": self.waiting}


def what_is_missing(config: DomainConfig) -> list[str]:
    """In words: what the domain cannot be started without and what may still come (a file server, a bridge)."""
    missing = [f"disk {disk.name} ({disk.source})" for disk in config.disks if not os.path.exists(disk.source)]
    missing += [f"{what} ({path})" for what, path in (("kernel", config.boot.kernel), ("initrd", config.boot.initrd))
                if path is not None and not os.path.exists(path)]
    missing += [f"shared folder {one.tag} ({path})" for one in config.filesystems
                if (path := one.source or one.socket) is not None and not os.path.exists(path)]
    for interface in config.interfaces:
        if interface.type == "bridge" and not is_bridge(interface.source or ""):
            missing.append(f"bridge {interface.source}")
        elif interface.type == "tap" and not os.path.exists(f"/sys/class/net/{interface.target}"):
            missing.append(f"tap {interface.target}")
    return missing
