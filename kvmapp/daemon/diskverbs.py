"""Disks of domains that come, go and grow, and how large they are: attach-disk, detach-disk, blockresize, domblkinfo."""
from __future__ import annotations

import asyncio
import os
import stat
from functools import partial

from kvmapp import schema
from kvmapp.daemon.call import Call
from kvmapp.daemon.domain import Domain
from kvmapp.daemon.netverbs import parsed
from kvmapp.daemon.plugging import change_file, changed, chosen, configs, plug_in, slot_in_file, slot_of, unplug
from kvmapp.daemon.starting import check_disks, identities
from kvmapp.daemon.threads import in_own_thread
from kvmapp.errors import HostError, KvmappError, NameInUse, UsageError
from kvmapp.imagefile import open_image
from kvmapp.places import last_disk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmapp.config import DiskConfig, DomainConfig
    from kvmapp.daemon.jobs import Job
    from kvmapp.daemon.plugging import Change

SECTION = schema.DOMAIN.sections["disk"]
DISKS = "disks"
SIZES = ("capacity", "allocation", "physical")
SECTOR = 512
PATIENCE = 2.0                          # seconds that a query waits for a file server
RESIZE_TIMEOUT = 30.0                   # requests that are under way are awaited


async def disk_attach(call: Call) -> dict:
    domain, name = call.domain(), call.body.get("name", "")
    with domain.jobs.hold("attach-disk", call.who) as job:
        live, config = chosen(call, domain)
        targets = configs(domain, live, config)
        settings = {key: value for key, value in parsed(SECTION, name, call.body.get("settings", {})).items() if value is not None}
        if not os.path.isabs(str(settings.get("source", "/"))):
            raise UsageError(f"attach-disk: source is {settings['source']!r}, not an absolute path")
        for target in targets:
            if any(disk.name == name for disk in target.disks):
                raise NameInUse(f"operation failed: target {name} already exists", f"it is a disk of the "
                                f"{'running domain' if target is domain.live else 'domain file'}: kvmappctl domblklist {domain.name}")

        def add(slot: int | None = None) -> Change:
            return lambda disks: [*disks, {"name": name, "slot": slot, **settings}]
        after = [changed(domain, one, DISKS, add()) for one in targets]
        if live:
            slot = await plug(call, domain, next(disk for disk in after[0].disks if disk.name == name), add, job)
        else:
            slot = slot_of(domain, name)
        if config:
            change_file(call, domain, DISKS, add(slot_in_file(call, domain, slot, last_disk)))
    return call.changed(domain)


async def plug(call: Call, domain: Domain, disk: DiskConfig, add: Callable[[int | None], Change], job: Job) -> int | None:
    """Opens and locks its file, which the domain process may not, and hands it over: the slot. Raises KvmappError."""
    domain.want_active()
    job.progress, job.abortable = f"opening {disk.source}", True            # whose file server may never answer
    files = await in_own_thread(identities, [disk])
    check_disks(call.supervisor, files)
    fd = await in_own_thread(partial(open_image, disk.name, disk.source, read_only=disk.readonly), unwanted=os.close)
    job.progress, job.abortable = None, False
    try:
        if domain.record:
            domain.record.disks += files
        return await plug_in(call, domain, DISKS, add, disk.name, "attach-disk", {f"disk:{disk.name}": fd}, disk=disk.changes())
    finally:
        os.close(fd)                    # it stays open, and locked, as the domain's


async def disk_detach(call: Call) -> dict:
    domain, path = call.domain(), call.body.get("disk", "")
    with domain.jobs.hold("detach-disk", call.who):
        live, config = chosen(call, domain)
        targets = configs(domain, live, config)
        disk = find(domain, targets[0], path, f"No disk found whose source path or target is {path}")
        if len(targets) > 1:
            find(domain, targets[1], disk.name, f"No disk found whose source path or target is {path} in the domain's file")
        warnings: list[str] = []
        if live:
            await unplug(domain, "detach-disk", disk.name, f"disk {disk.name} ({disk.source})", warnings)
        if config:
            change_file(call, domain, DISKS, without(disk.name))
    return call.changed(domain, warnings)


def without(name: str) -> Change:
    return lambda disks: [one for one in disks if one["name"] != name]


async def disk_sizes(call: Call) -> dict:
    domain = call.domain()
    disks = domain.config.disks if domain.config else ()
    return {"disks": await asyncio.gather(*(disk_size(call, domain, disk) for disk in disks))}


async def disk_size(call: Call, domain: Domain, disk: DiskConfig) -> dict:
    """One look at a file at a time: those that ask meanwhile share it, so that a server that hangs takes no more threads than that. What
    cannot be looked at has no sizes, but an error.
    """
    looks, path = domain.looks, disk.source
    if path not in looks:
        looks[path] = call.supervisor.run(in_own_thread(sizes, path), f"size of {path}")
        looks[path].add_done_callback(lambda _: looks.pop(path))
    one: dict[str, object] = {"name": disk.name, "source": path, **dict.fromkeys((*SIZES, "error"))}
    try:
        return one | await asyncio.wait_for(asyncio.shield(looks[path]), PATIENCE)
    except TimeoutError:
        return one | {"error": "its file server does not answer"}
    except KvmappError as error:
        return one | {"error": error.message}


def sizes(path: str) -> dict[str, int]:
    """Bytes: what a guest sees that starts now, what the host's file system has given for it, the file's length. Raises HostError."""
    try:
        status = os.stat(path)
        if stat.S_ISBLK(status.st_mode):
            with open(f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}/size") as size:
                length = int(size.read()) * SECTOR
            return {"capacity": length, "allocation": length, "physical": length}
    except (OSError, ValueError) as error:
        raise HostError(getattr(error, "strerror", None) or str(error)) from None
    return {"capacity": -(-status.st_size // SECTOR) * SECTOR, "allocation": status.st_blocks * SECTOR, "physical": status.st_size}


async def disk_resize(call: Call) -> dict:
    domain = call.domain()
    size = call.body.get("bytes")
    with domain.jobs.hold("blockresize", call.who):
        process = domain.want_active()
        path = call.body.get("disk", "")
        disk = find(domain, domain.live or domain.want_persistent(), path, f"invalid argument: invalid path {path} not assigned to domain")
        if disk.readonly and size is not None:
            raise UsageError(f"Cannot resize disk '{disk.name}' ({disk.source}): it is read-only")
        await domain.told(process.ask("resize-disk", RESIZE_TIMEOUT, device=disk.name, bytes=size, shrink=call.body.get("shrink", False)),
                          "Its disks keep their sizes", "start it anew")
    return call.changed(domain)


def find(domain: Domain, config: DomainConfig, path: str, otherwise: str) -> DiskConfig:
    """By its target or its source. `otherwise`: virsh's words, which differ."""
    found = next((disk for disk in config.disks if path in (disk.name, disk.source)), None)
    if found is None:
        raise UsageError(otherwise,
                         f"it has: {', '.join(disk.name for disk in config.disks) or 'none'}; see kvmappctl domblklist {domain.name}")
    return found
