"""The verbs that change something, one function a route (routes.py), in the order of a domain's life.

Each takes the domain's job for as long as it changes something and no longer: who waits (shutdown with a timeout) waits without
it. The words of refusals are virsh's where it has any.
"""
from __future__ import annotations

import hashlib
import os
from contextlib import suppress

from kvmapp.config import DomainConfig, write_domain
from kvmapp.daemon import domainlog
from kvmapp.daemon.call import Call
from kvmapp.daemon.domain import Domain
from kvmapp.daemon.images import remove_image
from kvmapp.daemon.process import DomainProcess
from kvmapp.daemon.saving import start_or_go_on
from kvmapp.daemon.starting import start as start_domain
from kvmapp.daemon.storage import remove_storage
from kvmapp.daemon.threads import in_own_thread
from kvmapp.errors import (
    ConfigError,
    DomainNotRunning,
    DomainRunning,
    GuestIgnored,
    HostError,
    KvmappError,
    NameInUse,
    NoResponse,
    Unsupported,
    UsageError,
    WrongState,
)
from kvmapp.ini import Ini
from kvmapp.settings import apply

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmapp.daemon.supervisor import Supervisor

DESTROY_GRACE = 3.0                     # for a domain process to end by itself before it is killed
DESTROY_TIMEOUT = 10.0                  # for the kernel to end it


def digest(text: str) -> str:
    """Names one text of a file."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


# Coming and going.

async def define(call: Call) -> dict:
    """A file for a domain, new or in the place of the old one; `transient`: a domain that runs without a file."""
    body, supervisor = call.body, call.supervisor
    supervisor.refresh()
    if ("text" in body) == ("config" in body):
        raise UsageError("define: either text or config is wanted")
    text = body.get("text", "")
    config = supervisor.store.parse(text, body.get("file")) if "text" in body else DomainConfig.from_dict(body["config"])
    if "config" in body:
        config = supervisor.store.parse(render_anew(config), "/config.conf")
    if body.get("transient"):
        return await create(call, config)
    old = supervisor.domains.get(config.name)
    if old is not None and body.get("replace") is False:
        raise NameInUse(f"Guest name '{config.name}' is already in use.", "choose another name, or undefine that domain first")
    if old is not None and old.active and old.uuid != config.uuid:
        raise NameInUse(f"domain '{config.name}' is already active with uuid {old.uuid}")
    supervisor.check_identity(config)
    domain = supervisor.domains.setdefault(config.name, old or supervisor.make(config.name))
    with domain.jobs.hold("define", call.who):
        warnings = [*config.warnings, *supervisor.store.mac_clashes(config)]
        created = supervisor.store.put(config, text)
    supervisor.merge()
    supervisor.tell(config.name, "Defined", "Added" if created else "Updated")
    return {"domain": domain.summary(), "created": created, "made": list(config.made), "warnings": warnings}


async def create(call: Call, config: DomainConfig) -> dict:
    supervisor = call.supervisor
    domain = supervisor.domains.get(config.name)
    if domain is not None and domain.active:
        raise DomainRunning(f"domain '{config.name}' is already active", f"kvmappctl domstate {config.name}")
    supervisor.check_identity(config)
    domain = supervisor.domains.setdefault(config.name, domain or supervisor.make(config.name))
    try:
        warnings = await start_domain(supervisor, domain, call.who, paused=call.body.get("paused", False), config=config)
    finally:
        supervisor.merge()
    return {"domain": domain.summary(), "created": True, "made": list(config.made),
            "warnings": [*warnings, *config.warnings, *supervisor.store.mac_clashes(config)]}


async def edit(call: Call) -> dict:
    domain = call.domain()
    if "text" not in call.body:
        raise UsageError("edit: text is missing")
    if domain.stored is None:
        domain.want_persistent()
    with domain.jobs.hold("edit", call.who):
        config = call.supervisor.store.replace(domain.name, call.body["text"], call.body.get("digest"), digest)
    call.supervisor.tell(domain.name, "Defined", "Updated")
    warnings = [*config.warnings, *call.supervisor.store.mac_clashes(config)]
    if domain.active:
        warnings.append("the running guest keeps its configuration until its next start")
    return {"domain": domain.summary(), "created": False, "made": list(config.made), "warnings": warnings}


async def undefine(call: Call) -> dict:
    """Never refuses for what is left: it says what it left."""
    domain, store = call.domain(), call.supervisor.store
    wanted = call.query.get("storage")
    everything = call.query.get("remove_all_storage", False)
    if domain.stored is None:
        domain.want_persistent()
    if domain.active and (wanted or everything):
        raise DomainRunning(f"Storage of domain '{domain.name}' can be removed only when it is shut off",
                            f"end it first: kvmappctl destroy {domain.name}")
    config = domain.stored.config if domain.stored else None
    with domain.jobs.hold("undefine", call.who) as job:
        removed = [f"file {domain.stored.path}" if domain.stored else ""]
        if domain.name in store.autostarted:
            removed.append("autostart link")
        store.remove(domain.name)
        kept = []
        try:
            if not domain.active and remove_image(call.supervisor.paths, domain.name):
                removed.append("managed save image")
        except HostError as error:
            kept.append(f"managed save image: {error}")
        names = [disk.name for disk in config.disks] if everything and config else (wanted or "").split(",") if wanted else []
        job.progress = "removing storage"
        others = [(one.name, theirs) for one in call.supervisor.domains.values() if one is not domain
                  for theirs in (one.live, one.stored.config if one.stored else None) if theirs]
        gone, left = await in_own_thread(remove_storage, config, names, others)
    left = kept + left
    if os.path.exists(log := call.supervisor.paths.domain_log(domain.name)):
        left.append(f"log {log}")
    call.supervisor.tell(domain.name, "Undefined", "Removed")
    call.supervisor.merge()
    return {"name": domain.name, "removed": removed + gone, "left": left, "still_runs": domain.active}


async def rename(call: Call) -> dict:
    supervisor, domain = call.supervisor, call.domain()
    new = call.body.get("name", "")
    domain.want_persistent()
    domain.want_inactive()
    if os.path.exists(supervisor.paths.managed_save(domain.name)):
        raise KvmappError("Requested operation is not valid: cannot rename domain with a managed save image",
                          f"start it, or give the image up: kvmappctl managedsave-remove {domain.name}")
    if new == domain.name:
        raise UsageError("Can't rename domain to itself")
    if new in supervisor.domains:                       # perhaps without a file: a transient one
        raise NameInUse(f"domain '{new}' already exists")
    with domain.jobs.hold("rename", call.who):
        supervisor.store.rename(domain.name, new)
        old_log = supervisor.paths.domain_log(domain.name)
        if os.path.exists(old_log):
            os.rename(old_log, supervisor.paths.domain_log(new))
    supervisor.merge()
    supervisor.tell(new, "Defined", "Renamed")
    return call.changed(supervisor.domains[new])


async def autostart(call: Call) -> dict:
    domain = call.domain()
    if domain.stored is None:
        raise KvmappError("Requested operation is not valid: cannot set autostart for transient domain",
                          "define it to make it persistent")
    call.supervisor.store.set_autostart(domain.name, call.body.get("enabled", True))
    return call.changed(domain)


# Running.

async def start(call: Call) -> dict:
    domain = call.domain()
    warnings = await start_or_go_on(call.supervisor, domain, call.who, paused=call.body.get("paused", False),
                                    force_boot=call.body.get("force_boot", False))
    return call.changed(domain, warnings)


async def shutdown(call: Call) -> dict:
    """Presses the power button; with a timeout, waits for the guest to follow. Without one, its log tells if it does not."""
    domain = call.domain()
    process = domain.want_active()
    with domain.jobs.hold("shutdown", call.who):
        await process.ask("shutdown")
    timeout = call.body.get("timeout") or 0
    if timeout <= 0:
        call.supervisor.run(watch_pressed(call.supervisor, domain, process, process.since), f"shutdown of {domain.name}")
    elif not await domain.wait_until(lambda: domain.process is not process or domain.state[0] == "paused", timeout):
        raise ignored(domain, timeout)
    elif domain.process is process:
        raise WrongState(f"Domain '{domain.name}' was paused while it shut down ({domain.state[1]})",
                         f"kvmappctl resume {domain.name} lets it go on")
    return call.changed(domain)


async def watch_pressed(supervisor: Supervisor, domain: Domain, process: DomainProcess, since: float, verb: str = "shutdown") -> None:
    """For guest.conf's shutdown_timeout. A guest that was reset or paused `since` is not waited for, nor is the first of two presses."""
    domain.presses += 1
    presses, timeout = domain.presses, supervisor.guest_defaults().shutdown_timeout
    if await domain.wait_until(lambda: (domain.process, process.since, domain.presses) != (process, since, presses), timeout):
        return
    error = ignored(domain, timeout, verb)
    domain.ignores = (process, since, f"{error.message}; {error.hint}")
    domainlog.append(domain.paths.domain_log(domain.name), f"warning: {error.message}; {error.hint}")
    supervisor.events.publish("guest-ignored", domain.name, uuid=domain.uuid, id=domain.id, type=verb, detail=way_out(domain, verb))


def ignored(domain: Domain, timeout: float, verb: str = "shutdown") -> GuestIgnored:
    return GuestIgnored(f"Domain '{domain.name}' still runs {timeout:g} s after its power button was pressed: the guest ignores ACPI",
                        f"acpid or systemd-logind in the guest would follow it; {way_out(domain, verb)}")


def way_out(domain: Domain, verb: str) -> str:
    return f"to restart it now: kvmappctl reset {domain.name}" if verb == "reboot" else f"to end it now: kvmappctl destroy {domain.name}"


async def reboot(call: Call) -> dict:
    """Presses the power button; the domain process begins anew when the guest has powered off by it. Its log tells if it does not."""
    domain = call.domain()
    process = domain.want_active()
    since = process.since                               # of before: a guest may be quicker than we are
    answer = await tell_process(call, "reboot")
    call.supervisor.run(watch_pressed(call.supervisor, domain, process, since, "reboot"), f"reboot of {domain.name}")
    return answer


async def reset(call: Call) -> dict:
    return await tell_process(call, "reset")


async def suspend(call: Call) -> dict:
    return await tell_process(call, "suspend")


async def resume(call: Call) -> dict:
    return await tell_process(call, "resume")


async def tell_process(call: Call, verb: str) -> dict:
    """One verb of the domain's control socket; its state follows by an event, and is here before we answer."""
    domain = call.domain()
    process = domain.want_active()
    with domain.jobs.hold(verb, call.who):
        await process.ask(verb)
        await process.refresh()
        if process.ended:
            await domain.wait_until(lambda: domain.process is not process, DESTROY_TIMEOUT)
    return call.changed(domain)


async def destroy(call: Call) -> dict:
    """The way out of every state: breaks the job that is there, asks, and kills what does not answer."""
    domain = call.domain()
    starting = domain.jobs.current is not None and domain.jobs.current.verb in ("start", "restore")
    if not domain.active and not starting:
        raise DomainNotRunning("Requested operation is not valid: domain is not running")
    await domain.jobs.break_current(call.who)
    process = domain.process
    if process is not None:
        with domain.jobs.hold("destroy", call.who):
            await end_process(domain, process, call.who, call.body.get("graceful", False))
        await domain.wait_until(lambda: domain.process is not process, DESTROY_TIMEOUT)
    return call.changed(domain)


async def end_process(domain: Domain, process: DomainProcess, who: str, graceful: bool) -> None:
    if not process.silent:
        with suppress(KvmappError):  # then it is killed
            await process.ask("destroy", DESTROY_GRACE)
    if await process.wait_end(DESTROY_GRACE if not process.silent else 0):
        return
    if graceful:
        raise NoResponse(f"Failed to terminate process {process.pid} of domain '{domain.name}' gracefully",
                         f"kvmappctl destroy {domain.name} kills it")
    domain.destroyed_by = who
    process.kill()
    if not await process.wait_end(DESTROY_TIMEOUT):
        raise NoResponse(f"Process {process.pid or ''} of domain '{domain.name}' does not end although it was killed",
                         "it waits in the kernel, mostly for a disk or file server that does not answer")


# Changing.

async def set_memory(call: Call) -> dict:
    domain = call.domain()
    size = call.body.get("bytes")
    if size is None:
        raise UsageError("setmem: bytes is missing")
    live, config = scope(call, domain)
    maximum = call.body.get("maximum", False)
    balloon = None
    with domain.jobs.hold("setmem", call.who):
        if live and maximum:
            raise DomainRunning("Requested operation is not valid: cannot resize the maximum memory on an active domain",
                                "with --config it takes effect at the next start")
        if config:
            change_file(call, domain, **({"memory": size, "current_memory": lower(domain, size)} if maximum
                                         else {"current_memory": size}))
        if live:
            balloon = await set_balloon(domain, size)
    return {"domain": domain.summary(), "balloon": balloon, "warnings": []}


def lower(domain: Domain, maximum: int) -> int | None:
    """current_memory may not stay above a lowered maximum."""
    current = domain.want_persistent().current_memory
    return current if current is None or current <= maximum else None


async def set_balloon(domain: Domain, size: int) -> int | None:
    process, live = domain.want_active(), domain.live
    if live is not None and live.balloon is None:
        raise Unsupported(f"Domain '{domain.name}' has no balloon, by which its memory could change while it runs",
                          "add [balloon] to its file; it takes effect at the next start")
    if live is not None and not 0 < size <= live.memory:
        raise ConfigError(f"Cannot set memory of domain '{domain.name}' to {size >> 10} KiB: "
                          f"its maximum is {live.memory >> 10} KiB",
                          f"kvmappctl setmaxmem {domain.name} --config raises it for the next start")
    answer = await process.ask("setmem", bytes=size)
    await process.refresh()
    reached = answer.get("balloon")
    return reached if type(reached) is int else None


async def set_vcpus(call: Call) -> dict:
    domain = call.domain()
    count = call.body.get("count")
    if count is None:
        raise UsageError("setvcpus: count is missing")
    live, config = scope(call, domain)
    with domain.jobs.hold("setvcpus", call.who):
        if live and domain.config and count != domain.config.vcpus:
            raise Unsupported(f"Cannot change the vCPUs of domain '{domain.name}' while it runs",
                              "with --config it takes effect at the next start")
        if config:
            change_file(call, domain, vcpus=count)
    return call.changed(domain)


async def describe(call: Call) -> dict:
    domain = call.domain()
    live, config = scope(call, domain)
    values = {name: call.body[name] or None for name in ("title", "description") if name in call.body}
    with domain.jobs.hold("desc", call.who):
        if config:
            change_file(call, domain, **values)
        if live and domain.record:
            domain.live = DomainConfig.from_dict({**domain.record.config, **values})
            domain.record.config = domain.live.to_dict()
            domain.note()
    return call.changed(domain)


def scope(call: Call, domain: Domain) -> tuple[bool, bool]:
    """virsh's --live, --config, --current: by default what the domain is."""
    live, config = call.body.get("live", False), call.body.get("config", False)
    if not live and not config:
        live, config = domain.active, not domain.active
    if live:
        domain.want_active()
    if config:
        domain.want_persistent()
    return live, config


def change_file(call: Call, domain: Domain, **values: object) -> None:
    """Rewrites these settings in the domain's file; checked as a whole before it is saved."""
    change_stored(call, domain, lambda _: values)


def change_stored(call: Call, domain: Domain, change: Callable[[DomainConfig], dict[str, object]]) -> None:
    """The same with settings that follow from those in the file, as it is by now: an administrator may have changed it while the verb
    was at work."""
    call.supervisor.refresh()
    config = domain.want_persistent()
    write_domain(domain.paths.domain_config(domain.name), DomainConfig.from_dict({**config.to_dict(), **change(config)}))
    call.supervisor.store.take_over(domain.name)
    call.supervisor.tell(domain.name, "Defined", "Updated")


def render_anew(config: DomainConfig, text: str = "", path: str = "/config.conf") -> str:
    """A configuration as the text of a file, on top of another text."""
    ini = Ini(text, path)
    apply(ini, config, os.path.dirname(path))
    return ini.render()
