"""save, restore, managedsave: a running domain into a file and back (statefile.py has the format, saving.py the domain's side); abort.

The file is opened here, as root, and written by the domain process through that descriptor. It gets its name when all is written
and synced, and only then the domain ends; whatever fails before, the guest goes on. A managed save lies in STATE/save/NAME.save:
the next start goes on from it. images.py has when such an image is void.
"""
from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager, suppress

from kvmapp import statefile
from kvmapp.config import DomainConfig
from kvmapp.daemon.call import Call
from kvmapp.daemon.domain import Domain, removable
from kvmapp.daemon.images import remove_image
from kvmapp.daemon.starting import start as start_domain
from kvmapp.daemon.threads import begin, in_own_thread
from kvmapp.daemon.vouching import is_at_its_place, is_vouched, note_place, vouch_for
from kvmapp.errors import DomainRunning, HostError, KvmappError, NoResponse, StateError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from kvmapp.daemon.jobs import Job
    from kvmapp.daemon.paths import Paths
    from kvmapp.daemon.process import DomainProcess
    from kvmapp.daemon.supervisor import Supervisor

END_TIMEOUT = 10.0                      # for the process of a saved domain to go
ABORT_PATIENCE = 10.0                   # for the guest to go on after a save was aborted


async def save(call: Call) -> dict:
    domain, path = call.domain(), absolute(call)
    with domain.jobs.hold("save", call.who) as job:
        await write(call.supervisor.paths, domain, path, job, call.body)
    return call.changed(domain)


async def managed_save(call: Call) -> dict:
    domain, paths = call.domain(), call.supervisor.paths
    domain.want_active()
    if domain.stored is None:
        raise KvmappError("Requested operation is not valid: cannot do managed save for transient domain",
                          f"kvmappctl save {domain.name} FILE saves it to a file of yours")
    with domain.jobs.hold("managedsave", call.who) as job:
        await write(paths, domain, paths.managed_save(domain.name), job, call.body)
    return call.changed(domain)


async def abort_job(call: Call) -> dict:
    """Answers when the guest goes on, unless that takes long."""
    domain = call.domain()
    await domain.jobs.abort(call.who)
    goes_on = await domain.wait_until(lambda: domain.state[1] != "saving", ABORT_PATIENCE)
    return call.changed(domain, [] if goes_on else [f"domain '{domain.name}' stands still until the host has written what is under way"])


async def managed_save_remove(call: Call) -> dict:
    domain = call.domain()
    with domain.jobs.hold("managedsave-remove", call.who):
        removed = remove_image(call.supervisor.paths, domain.name)
    return {**call.changed(domain), "removed": removed}


async def restore(call: Call) -> dict:
    path, supervisor = absolute(call), call.supervisor
    opened = await in_own_thread(Opened, path, unwanted=Opened.close)
    config = opened.config
    try:
        supervisor.refresh()
        domain = supervisor.domains.get(config.name)
        if not call.body.get("trust"):
            require_own(supervisor, opened, domain, f"look at where it comes from; kvmappctl restore --trust {path} believes it")
        if domain is not None and domain.active:
            raise DomainRunning(f"domain '{config.name}' is already active", f"end it first: kvmappctl destroy {config.name}")
        supervisor.check_identity(config)
        domain = supervisor.domains.setdefault(config.name, domain or supervisor.make(config.name))
        try:
            warnings = await start_domain(supervisor, domain, call.who, paused=call.body.get("paused", opened.paused), config=config,
                                          state=opened.fd)
        finally:
            supervisor.merge()
    finally:
        opened.close()
    return call.changed(domain, warnings)


async def start_or_go_on(supervisor: Supervisor, domain: Domain, who: str, *, paused: bool = False,
                         force_boot: bool = False) -> list[str]:
    """Starts the domain, from its managed save if it has one; warnings. Raises KvmappError; a save that cannot be used is kept."""
    path = supervisor.paths.managed_save(domain.name)
    if domain.active or force_boot or not os.path.exists(path):
        return await start_domain(supervisor, domain, who, paused=paused)
    way_out = f"kvmappctl managedsave-remove {domain.name} gives it up; then start boots the domain"
    try:
        opened = await in_own_thread(Opened, path, unwanted=Opened.close)
    except StateError as error:
        raise StateError(error.message, way_out) from None
    try:
        if opened.config.uuid != domain.want_persistent().uuid:
            raise StateError(f"The managed save image of domain '{domain.name}' is another domain's (UUID {opened.config.uuid})", way_out)
        require_own(supervisor, opened, domain, way_out)
        return await start_domain(supervisor, domain, who, paused=paused or opened.paused, config=opened.config, state=opened.fd)
    finally:
        opened.close()


# Steps.

async def write(paths: Paths, domain: Domain, path: str, job: Job, body: dict) -> None:
    """Saves the active domain and ends it; with `paused` or without, as the body has it. Raises KvmappError; then it goes on."""
    process = domain.want_active()
    job.progress = "writing its memory"
    job.abortable = not domain.outdated                 # an older version's process may know nothing of that
    async with new_file(path) as draft:
        paused = {"paused": body["paused"]} if "paused" in body else {}
        try:
            config = await ask_to_save(domain, process, fd=draft.fd, paths=paths, **paused)
        except asyncio.CancelledError:
            if job.aborted:
                with suppress(KvmappError):             # it had not begun
                    await process.ask("save-cancel")
            raise
        job.abortable = False
        job.progress = "giving the file its name"
        try:
            await in_own_thread(publish, draft, paths, path, config)
        except HostError:
            await process.ask("save-undo")
            raise
    await process.ask("save-end")
    if not await domain.wait_until(lambda: domain.process is not process, END_TIMEOUT):
        raise NoResponse(f"Domain '{domain.name}' is saved to {path}, but its process does not end",
                         f"kvmappctl destroy {domain.name} ends it")


def publish(draft: statefile.Draft, paths: Paths, path: str, config: dict | None) -> None:
    note_place(paths, path, config)
    draft.publish()


async def ask_to_save(domain: Domain, process: DomainProcess, fd: int, paths: Paths, **paused: bool) -> dict | None:
    """The configuration that it was told to write. Again where the guest let go of a card just before it stood still: of that we have heard
    before the refusal.
    """
    while True:
        devices = removable(domain.live)
        config = vouched(paths, domain)
        try:
            await process.ask("save", None, fd=fd, config=config, **paused)
            return config
        except StateError:
            if removable(domain.live) == devices:
                raise


@asynccontextmanager
async def new_file(path: str) -> AsyncIterator[statefile.Draft]:
    """Closed in a thread, too: whoever breaks a save off, since its file server hangs, must not wait for that."""
    draft = await in_own_thread(statefile.Draft, path, unwanted=statefile.Draft.close)
    try:
        yield draft
    except asyncio.CancelledError:
        draft.given_up = True
        with suppress(HostError):       # no thread is to be had: then it stays open, which hurts less
            begin(draft.close)
        raise
    except BaseException:
        await put_away(draft)
        raise
    await put_away(draft)


async def put_away(draft: statefile.Draft) -> None:
    try:
        await in_own_thread(draft.close)
    except HostError:                   # no thread is to be had; its file server has only just answered
        draft.close()


def vouched(paths: Paths, domain: Domain) -> dict | None:
    """What the file is to have as its configuration; None: an older version's domain writes its own. Raises HostError."""
    if domain.live is None:
        return None
    config = domain.live.changes() if domain.outdated else domain.live.to_dict()
    vouch_for(paths, config)
    return config


def absolute(call: Call) -> str:
    path = call.body.get("file", "")
    if not path.startswith("/") or "\0" in path:
        raise UsageError(f"{call.route.name}: file is {path!r}, not an absolute path")
    return path


class Opened:
    """An open, whole state file. Raises KvmappError."""

    def __init__(self, path: str):
        self.path = path
        self.fd = statefile.open_file(path)
        try:
            saved = statefile.read(self.fd, path)
            self.written = saved.config                 # as it stands there
            self.config = DomainConfig.from_dict(saved.config)
            self.paused = saved.state.get("paused") is True
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self.fd)


def require_own(supervisor: Supervisor, opened: Opened, domain: Domain | None, way_out: str) -> None:
    """Raises StateError for a configuration that nobody here has written, or not there."""
    if not is_at_its_place(supervisor.paths, opened.path, opened.written):
        raise StateError(f"The configuration in saved state '{opened.path}' is not the one that this host's daemon had saved there: "
                         "its domain may want to come back as another", way_out)
    stored = domain.stored.config if domain is not None and domain.stored is not None else None
    if not is_vouched(supervisor.paths, opened.written) and (stored is None or stored.to_dict() != opened.config.to_dict()):
        raise StateError(f"The configuration in saved state '{opened.path}' is not from this host's daemon, nor that of a domain here: "
                         "root would open the files and start the programs that it names", way_out)
