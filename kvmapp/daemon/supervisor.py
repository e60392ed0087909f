"""Every domain of this host: the files of the store and what runs, found again after a restart, watched until it ends.

The daemon's memory is rebuilt from RUN/records (what was started, with which id, taps and configuration) and from the domains'
own control sockets (what is true now). Nothing here is needed by a domain in order to run.
"""
from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time

from kvmapp import runtime
from kvmapp.config import DomainConfig
from kvmapp.daemon import domainlog
from kvmapp.daemon.bridging import Bridging
from kvmapp.daemon.cards import Cards
from kvmapp.daemon.cgroups import Cgroups
from kvmapp.daemon.domain import Domain, Record, read_ending, write_ending
from kvmapp.daemon.events import Events
from kvmapp.daemon.fileservers import FileServers
from kvmapp.daemon.images import clear_images, remove_image
from kvmapp.daemon.networks import Networks
from kvmapp.daemon.notify import notify_alive
from kvmapp.daemon.process import LAST_BREATH, DomainProcess
from kvmapp.daemon.spawn import Zygote
from kvmapp.daemon.store import Store, not_found
from kvmapp.errors import HostError, KvmappError, NameInUse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.daemon.jobs import Job
    from kvmapp.daemon.paths import Paths
    from kvmapp.hostconfig import GuestDefaults

log = logging.getLogger("kvmapp")
HEARTBEAT = 5.0                         # seconds between two looks at every domain
HELLO_TIMEOUT = 2.0                     # for a domain found at start; who is slower shows as `no response` until it answers
STATUS_GRACE = 0.5                      # for the zygote's word on how a child ended
# States of a domain process to the event that a change to them is (virsh event's words).
EVENTS = {"running": ("Resumed", "Unpaused"), "paused": ("Suspended", "Paused"), "crashed": ("Crashed", "Panicked"),
          "in shutdown": ("Shutdown", "Finished")}
STOPPED = {"shutdown": "Shutdown", "destroyed": "Destroyed", "crashed": "Crashed", "failed": "Failed", "killed": "Failed",
           "out of memory": "Failed", "saved": "Saved", "migrated": "Migrated"}


class Supervisor:
    def __init__(self, paths: Paths, *, module: str = "kvmapp.vmprocess", heartbeat: float = HEARTBEAT, cgroup: str = "kvmapp"):
        self.paths = paths
        self.events = Events()
        self.zygote = Zygote(module)
        self.cgroups = Cgroups(cgroup)
        self.store = Store(paths)
        self.domains: dict[str, Domain] = {}
        self.heartbeat = heartbeat
        self.guest_settings: GuestDefaults | None = None
        self.guest_complaint: str | None = None
        self.tasks: set[asyncio.Task] = set()
        self.last_id = 0
        self.socket_gid: int | None = None              # whose members may use the domains' control sockets, too
        self.networks = Networks(self)
        self.cards = Cards(self)
        self.bridging = Bridging(self)
        self.file_servers = FileServers()

    # The set.

    def refresh(self) -> None:
        """Looks at the files again; every query starts with it."""
        before = set(self.store.files)
        changed = self.store.refresh()
        self.merge()
        for name in sorted(changed):
            if name not in self.store.files:
                self.tell(name, "Undefined", "Removed")
            else:
                self.tell(name, "Defined", "Updated" if name in before else "Added")

    def merge(self) -> None:
        """A domain is there as long as it has a file or runs."""
        for name in self.store.files:
            if name not in self.domains:
                self.domains[name] = self.make(name)
        for name, domain in list(self.domains.items()):
            if name not in self.store.files and not domain.active and domain.jobs.current is None:
                del self.domains[name]

    def make(self, name: str) -> Domain:
        return Domain(name, self.store, self.paths, self.job_changed)

    def find(self, reference: str) -> Domain:
        """By Id, UUID or name, in this order, as virsh. Raises DomainNotFound."""
        self.refresh()
        for domain in self.domains.values():
            if domain.active and str(domain.id) == reference:
                return domain
        lower = reference.lower()
        for domain in self.domains.values():
            if domain.uuid == lower:
                return domain
        if reference not in self.domains:
            raise not_found(reference, self.domains)
        return self.domains[reference]

    def check_identity(self, config: DomainConfig) -> None:
        """A UUID is one domain's, also that of one which runs without a file. Raises NameInUse."""
        self.store.check_identity(config)
        for domain in self.active():
            if domain.uuid == config.uuid and domain.name != config.name:
                raise NameInUse(f"domain '{domain.name}' is already defined with uuid {config.uuid}", "leave uuid out and one is made")

    def listed(self) -> list[Domain]:
        self.refresh()
        return [self.domains[name] for name in sorted(self.domains)]

    def active(self) -> list[Domain]:
        return [domain for domain in self.domains.values() if domain.active]

    def next_id(self) -> int:
        """Never one that was given since the host's boot. Raises OSError."""
        path = os.path.join(self.paths.run, "last-id")
        self.last_id += 1
        with open(f"{path}.new", "w") as file:
            file.write(f"{self.last_id}\n")
        os.rename(f"{path}.new", path)
        return self.last_id

    # Starting and stopping the daemon.

    async def find_running(self) -> None:
        """Before the first query is answered: what runs, and its state; what ended while no daemon was there."""
        self.last_id = self.read_last_id()
        self.merge()
        for entry in sorted(os.listdir(self.paths.records)):
            record = Record.load(os.path.join(self.paths.records, entry)) if entry.endswith(".json") else None
            if record is not None:
                self.take_record(record)
        for name in sorted(os.listdir(os.path.join(self.paths.run, "domains"))):
            if name not in self.domains or not self.domains[name].active:
                self.take_orphan(name)
        await asyncio.gather(*(self.find_process(domain) for domain in self.active()))
        self.merge()
        clear_images(self.paths, {domain.name for domain in self.active() if domain.process and domain.process.link is not None})
        await self.networks.find_running()
        await self.cards.find_running()

    def read_last_id(self) -> int:
        try:
            with open(os.path.join(self.paths.run, "last-id")) as file:
                return int(file.read())
        except (OSError, ValueError):
            return 0

    def take_record(self, record: Record) -> None:
        domain = self.domains.setdefault(record.name, self.make(record.name))
        domain.record = record
        try:
            domain.live = DomainConfig.from_dict(record.config)
        except KvmappError:
            domain.live = None          # an older version's, with settings that are gone: its file is shown instead
        self.last_id = max(self.last_id, record.id)

    def take_orphan(self, name: str) -> None:
        """A control socket without a record: somebody removed it. If a domain is behind it, it gets a new one."""
        if os.path.exists(self.paths.control(name)):
            stored = self.store.files.get(name)
            config = stored.config if stored else None
            self.last_id += 1
            self.take_record(Record(name=name, uuid=config.uuid if config else "", id=self.last_id, pid=0, start_time=0,
                                    started=time.time(), taps={}, disks=[], config=config.to_dict() if config else {},
                                    version=runtime.IDENTITY))

    async def find_process(self, domain: Domain) -> None:
        process = domain.process = self.attach(domain)
        assert domain.record
        if domain.record.pid:
            process.watch(domain.record.pid, domain.record.start_time)
        dead = bool(domain.record.pid) and not process.lives()
        if not dead and not await process.connect():
            dead = not process.pid
            if not dead:                # a process that is ending has no socket any more; when it has ended, it is buried
                process.set_silent(not await process.wait_end(LAST_BREATH))
        if dead:
            process.ended = True
            await self.bury(domain)
        if process.ended:
            return
        if process.link is not None:
            await process.quietly(process.hello(HELLO_TIMEOUT))
        self.join_groups(domain)
        self.note_pid(domain)

    def note_pid(self, domain: Domain) -> bool:
        """Whether the process of a record without its pid, or with another one, has told who it is."""
        process, record = domain.process, domain.record
        if process is None or record is None or process.ended or process.pid in (0, record.pid):
            return False
        record.pid, record.start_time = process.pid, process.start_time
        domain.note()
        return True

    def join_groups(self, domain: Domain) -> None:
        pid = domain.process.pid if domain.process else 0
        if pid and self.cgroups.bases:
            self.run(self.enter_groups(domain, pid), f"control group of {domain.name}")

    async def enter_groups(self, domain: Domain, pid: int) -> None:
        """Beside everything else: the kernel takes its time, and the domain may end meanwhile."""
        await asyncio.to_thread(self.cgroups.join, domain.name, pid)
        if not domain.active:
            await self.leave_groups(domain)

    async def leave_groups(self, domain: Domain) -> None:
        """They can be removed when the process's parent has taken notice of its end, which takes a moment, or longer on a busy host."""
        for pause in (0, 0.05, 0.2, 1, 5, 10, 20, 60):
            await asyncio.sleep(pause)
            of_this_name = self.domains.get(domain.name)            # it may have been defined anew, and run
            if domain.active or (of_this_name and of_this_name.active) or self.cgroups.remove(domain.name):
                break
        await self.sweep()

    async def sweep(self) -> None:
        """Takes away the trees of older versions that no guest runs from any more."""
        library = runtime.library()
        for name in await asyncio.to_thread(runtime.sweep, library) if library else ():
            log.info("removed kvmapp %s: nothing runs from it", name)

    def attach(self, domain: Domain) -> DomainProcess:
        return DomainProcess(domain.name, self.paths.control(domain.name), lambda: self.state_changed(domain),
                             lambda: self.process_gone(domain), lambda event, detail: self.guest_did(domain, event, detail))

    def guest_did(self, domain: Domain, event: str, detail: str) -> None:
        if event == "device-removed":
            self.cards.removed(domain, detail)
        elif event == "devices":
            self.cards.compare(domain, detail.split())
        else:
            self.events.publish(event, domain.name, uuid=domain.uuid, id=domain.id, detail=detail)

    def begin(self) -> None:
        self.zygote.start()
        self.bridging.find_pending()
        self.run(self.watch(), "watch")
        self.run(self.networks.watch(), "watch of networks")
        self.run(self.cards.watch(), "watch of cards")

    async def end(self) -> None:
        """Lets go of everything; every domain runs on."""
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.events.close()
        for domain in self.active():
            if domain.process:
                domain.process.close()
        self.zygote.stop()
        self.cgroups.close(bool(self.active()))

    def run(self, work, name: str) -> asyncio.Task:
        """A task whose failure is logged, ended with the daemon."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self.tasks.add(task)
        task.add_done_callback(self.task_done)
        return task

    def task_done(self, task: asyncio.Task) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, KvmappError):
            log.error("task %s failed", task.get_name(), exc_info=error)

    # Watching.

    async def watch(self) -> None:
        """The heartbeat: states of processes that cannot tell them, sizes of logs, files that wait to be completed."""
        while True:
            await asyncio.sleep(self.heartbeat)
            notify_alive()
            self.refresh()
            self.file_servers.reap()
            limits = self.guest_defaults()
            for domain in self.active():
                if domain.unsaved:
                    domain.note()
                if domain.process and domain.jobs.current is None:
                    self.run(self.look_at(domain, domain.process), f"heartbeat of {domain.name}")
                domainlog.rotate(self.paths.domain_log(domain.name), limits.log_max_size, limits.log_max_backups, in_use=True)

    async def look_at(self, domain: Domain, process: DomainProcess) -> None:
        await process.check()
        if domain.process is process and self.note_pid(domain):
            self.join_groups(domain)

    def guest_defaults(self) -> GuestDefaults:
        """guest.conf; while it cannot be used, what it said before, and `guest_complaint` says why."""
        from kvmapp.hostconfig import GuestDefaults, read_guest_defaults
        complaint = None
        try:
            self.guest_settings = read_guest_defaults(os.path.join(self.paths.config, "guest.conf"))
        except KvmappError as error:
            complaint = str(error)
            if complaint != self.guest_complaint:
                log.warning("%s; going by %s", error, "what it said before" if self.guest_settings else "the defaults")
        self.guest_complaint = complaint
        return self.guest_settings or GuestDefaults()

    def tell(self, name: str, type: str, detail: str) -> None:
        domain = self.domains.get(name)
        self.events.publish("lifecycle", name, uuid=domain.uuid if domain else None, id=domain.id if domain else None,
                            type=type, detail=detail)

    def job_changed(self, domain: Domain, job: Job, begins: bool) -> None:
        self.events.publish("job", domain.name, uuid=domain.uuid, id=domain.id, type=job.verb,
                            detail="begins" if begins else "ends")
        if not begins:
            asyncio.get_running_loop().call_soon(self.merge)

    def state_changed(self, domain: Domain) -> None:
        process = domain.process
        domain.notify()
        if process is None or process.ended or (domain.jobs.current and domain.jobs.current.verb == "start"):
            return
        if process.news and (process.state, process.reason) == ("running", "booted"):
            self.events.publish("reboot", domain.name, uuid=domain.uuid, id=domain.id)
        elif process.news:
            self.tell(domain.name, *EVENTS[process.state])
        elif process.silent:
            log.warning("domain '%s' does not answer (pid %d)", domain.name, process.pid)
            self.events.publish("domain-broken", domain.name, uuid=domain.uuid, id=domain.id, detail="no response")

    def process_gone(self, domain: Domain) -> None:
        """A start that fails clears up after itself."""
        if domain.jobs.current is None or domain.jobs.current.verb not in ("start", "restore"):
            self.run(self.bury(domain), f"end of {domain.name}")

    async def bury(self, domain: Domain) -> None:
        """A domain process has ended: says how, and takes away what it leaves."""
        process, record = domain.process, domain.record
        assert process and record
        path = self.paths.ending(domain.name)
        ending = read_ending(path)              # of this run: the folder was made anew at its start
        if ending is None:
            reason, text, status = await self.explain(domain)
            ending = write_ending(path, reason, text, status)
            domainlog.append(self.paths.domain_log(domain.name), f"shut off: {text}")
        self.zygote.forget(process.pid)
        self.void_image(record, str(ending["reason"]))
        domain.ending = ending
        self.clear_away(domain)
        log.info("domain '%s' (id %d) is shut off: %s", domain.name, record.id, ending["text"] or ending["reason"])
        self.events.publish("lifecycle", domain.name, uuid=record.uuid, id=record.id, type="Stopped",
                            detail=STOPPED.get(str(ending["reason"]), "Failed"))
        self.merge()

    def void_image(self, record: Record, reason: str) -> None:
        """Of a guest that ran, also where its start could not see to it. One that came no further than to a process, or failed, may
        have been on the way back from its image."""
        if record.pid and reason not in ("saved", "failed"):
            try:
                remove_image(self.paths, record.name)
            except HostError as error:
                log.error("domain '%s': %s", record.name, error)

    async def explain(self, domain: Domain) -> tuple[str, str, int | None]:
        """Reason, text and exit status of a process that said nothing itself."""
        assert domain.process
        if domain.destroyed_by:
            return "destroyed", f"destroyed by {domain.destroyed_by}", None
        if self.cgroups.oom_kills(domain.name):
            return "out of memory", "the host's kernel killed it for want of memory", None
        status = await self.zygote.status_of(domain.process.pid, STATUS_GRACE)
        if status is None:
            return "killed", "its process is gone without a word: killed, or the host's power was cut", None
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number in (9, 15, 2, 1):
                return "killed", f"its process was killed by signal {number}", None
            return "failed", f"its process crashed (signal {number}): a defect of kvmapp", None
        code = os.waitstatus_to_exitcode(status)
        return "failed", f"its process ended with status {code}: a defect of kvmapp, its log has more", code

    def clear_away(self, domain: Domain) -> None:
        """Whatever a start made, as far as it got. Taps went with the process."""
        self.cards.release(domain.name)
        if domain.record is not None and domain.record.servers:
            self.run(self.file_servers.see_off(domain.name, domain.record.servers), f"file servers of {domain.name}")
        self.run(self.leave_groups(domain), f"control group of {domain.name}")
        for path in (self.paths.control(domain.name), os.path.join(self.paths.records, f"{domain.name}.json")):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                log.warning("cannot remove %s: %s", path, error.strerror)
        if domain.process is not None:
            domain.process.close()
        domain.record = domain.live = domain.process = domain.stats = domain.destroyed_by = None
        domain.notify()
        if domain.stored is None:
            shutil.rmtree(self.paths.domain_run(domain.name), ignore_errors=True)
