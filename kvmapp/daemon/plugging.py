"""What comes and goes while a domain runs: in its file, in the running domain, or in both.

As in virsh, the running domain and its file are two things, and `live` and `config` choose. Both new configurations are checked
before either is changed; the running domain comes first, for it is what can refuse. None of the others moves to another slot
because one comes or goes. `kind` is DomainConfig's attribute: interfaces, disks.
"""
from __future__ import annotations

import asyncio
import logging

from kvmapp.config import DomainConfig
from kvmapp.daemon.actions import change_stored, scope
from kvmapp.daemon.call import Call
from kvmapp.daemon.domain import Domain, removable
from kvmapp.errors import ConfigError, KvmappError, NoResponse, Unsupported
from kvmapp.layout import PCI_SLOTS
from kvmapp.places import keep_places, places, require_free

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmapp.daemon.process import DomainProcess
    from kvmapp.daemon.supervisor import Supervisor

    Change = Callable[[list[dict]], list[dict]]         # what becomes of a configuration's sections of one kind

log = logging.getLogger("kvmapp")

ATTACH_TIMEOUT = 10.0                   # seconds
EJECT_PATIENCE = 5.0                    # for the guest to let go of a device before the verb answers; a Linux takes a moment
COME_AND_GO = "Its devices cannot come and go"


def chosen(call: Call, domain: Domain) -> tuple[bool, bool]:
    """`persistent`: what virsh means by it: the file, and the running domain if it runs."""
    if call.body.get("persistent"):
        domain.want_persistent()
        return domain.active, True
    return scope(call, domain)


def configs(domain: Domain, live: bool, config: bool) -> list[DomainConfig]:
    """The live one first."""
    found = []
    if live:
        domain.want_active()
        if domain.live is None:
            raise Unsupported(f"Domain '{domain.name}' was started by another version, which this one does not understand",
                              "with --config the change takes effect at the next start")
        found.append(domain.live)
    return [*found, domain.want_persistent()] if config else found


def changed(domain: Domain, config: DomainConfig, kind: str, change: Change) -> DomainConfig:
    """Checked. Raises ConfigError."""
    before = sections(config, kind)
    wanted = change(before)
    for one in wanted:
        if one not in before and one.get("slot") is not None:
            require_free(config, device_name(one), one["slot"])
    after = DomainConfig.from_dict({**config.to_dict(), kind: wanted})
    if config is domain.live and domain.outdated:
        return after                            # its process would not understand it in what it is to save
    keep_places(config, after)
    return after


def device_name(section: dict) -> str:
    return section["name"] if "name" in section else f"net{section['index']}"


def sections(config: DomainConfig, kind: str) -> list[dict]:
    return [one.to_dict() for one in getattr(config, kind)]


def set_live(domain: Domain, config: DomainConfig) -> None:
    assert domain.record
    domain.live, domain.record.config = config, config.to_dict()
    domain.note()


def change_live(domain: Domain, kind: str, change: Change) -> None:
    """Of the devices that are there by now: the guest may have let go of one while the verb was at work."""
    domain.want_active()
    assert domain.live
    set_live(domain, changed(domain, domain.live, kind, change))


def change_file(call: Call, domain: Domain, kind: str, change: Change) -> None:
    change_stored(call, domain, lambda stored: changed(domain, stored, kind, change).to_dict())


def slot_in_file(call: Call, domain: Domain, slot: int | None, behind: Callable[[DomainConfig], int] = lambda stored: 0) -> int | None:
    """The slot of a device in the running domain, if it can have that at the next start too, where it is to stand `behind` others."""
    call.supervisor.refresh()
    stored = domain.want_persistent()
    return slot if slot is not None and slot > behind(stored) and slot not in places(stored).values() else None


def slot_of(domain: Domain, device: str) -> int | None:
    """Where a device of the running domain stands, if it has that."""
    return None if domain.live is None or domain.outdated else places(domain.live).get(device)


async def plug_in(call: Call, domain: Domain, kind: str, add: Callable[[int | None], Change], device: str, verb: str,
                  files: dict[str, int], **section: dict) -> int | None:
    """Hands a device to the domain process, which tells the guest: its slot. `files`: what was opened for it; they stay the caller's to
    close. It is noted before: where we are killed meanwhile, the next daemon looks whether the domain has it (Cards.compare)."""
    process, supervisor = domain.want_active(), call.supervisor
    domain.plugging.add(device)
    try:
        change_live(domain, kind, add(None))
        answer = await domain.told(process.ask_with_files(verb, files, ATTACH_TIMEOUT, **section), COME_AND_GO)
    except (NoResponse, asyncio.CancelledError):        # it may have the device all the same
        supervisor.run(look_for(supervisor, domain, process, kind, device), f"{device} of {domain.name}")
        raise
    except BaseException as error:
        domain.plugging.discard(device)
        supervisor.cards.forget(domain, device)
        if isinstance(error, ConfigError) and domain.outdated and "unknown key" in error.message:
            raise Unsupported(f"Domain '{domain.name}' runs under a version of kvmapp that does not know of all that this asks for: "
                              f"{error.message}", "leave that out; or with --config it takes effect at the next start") from None
        raise
    domain.plugging.discard(device)
    if domain.live is None:
        raise KvmappError(f"Domain '{domain.name}' ended meanwhile")
    return plugged(supervisor, domain, kind, device, answer.get("slot"))


def plugged(supervisor: Supervisor, domain: Domain, kind: str, device: str, slot: object) -> int | None:
    """The running domain has it, in that slot."""
    number = slot if type(slot) is int and 0 < slot < PCI_SLOTS else None
    if number is not None and domain.live and number not in places(domain.live).values() and not domain.outdated:
        change_live(domain, kind, lambda known: [{**one, "slot": number} if device_name(one) == device else one for one in known])
    log.info("domain '%s': %s is attached", domain.name, device)
    supervisor.events.publish("device-added", domain.name, uuid=domain.uuid, id=domain.id, detail=device)
    return number


async def look_for(supervisor: Supervisor, domain: Domain, process: DomainProcess, kind: str, device: str) -> None:
    """Whether a domain that did not answer has the device, which it says when it answers again."""
    try:
        devices = (await process.ask("status", None)).get("devices", [])
        found = next((one for one in devices if isinstance(one, dict) and one.get("name") == device), None)
        if found is None:
            supervisor.cards.forget(domain, device)
        elif device in removable(domain.live):
            plugged(supervisor, domain, kind, device, found.get("slot"))
    except KvmappError:                                 # it has ended, or the next connection compares
        pass
    finally:
        domain.plugging.discard(device)


async def unplug(domain: Domain, verb: str, device: str, what: str, warnings: list[str]) -> None:
    """Asks the guest for it; what else there is to do is done when the guest has let go (Cards.removed)."""
    await domain.told(domain.want_active().ask(verb, device=device), COME_AND_GO)
    if not await domain.wait_until(lambda: device not in removable(domain.live), EJECT_PATIENCE):
        warnings.append(f"the guest has not let go of {what} yet; a guest without ACPI hotplug never does")
