"""Disks of domains: how large they are, and larger ones while they run. blockresize, domblkinfo."""
from __future__ import annotations

import asyncio
import os
import stat

from kvmapp.daemon.call import Call
from kvmapp.daemon.domain import Domain
from kvmapp.daemon.threads import in_own_thread
from kvmapp.errors import HostError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.config import DiskConfig, DomainConfig

SIZES = ("capacity", "allocation", "physical")
SECTOR = 512
PATIENCE = 2.0                          # seconds that a query waits for a file server
RESIZE_TIMEOUT = 30.0                   # requests that are under way are awaited


async def disk_sizes(call: Call) -> dict:
    """One look at a time: those that ask meanwhile share it, so that a server that hangs takes one thread a domain."""
    domain = call.domain()
    config = domain.config
    if config is None:
        return {"disks": []}
    if domain.measuring is None:
        domain.measuring = call.supervisor.run(in_own_thread(sizes_of, config.disks), f"sizes of {domain.name}'s disks")
        domain.measuring.add_done_callback(lambda _: setattr(domain, "measuring", None))
    try:
        return {"disks": await asyncio.wait_for(asyncio.shield(domain.measuring), PATIENCE)}
    except TimeoutError:
        raise HostError(f"The disks of domain '{domain.name}' cannot be looked at: their file server does not answer",
                        f"it has: {', '.join(disk.source for disk in config.disks)}") from None


def sizes_of(disks: tuple[DiskConfig, ...]) -> list[dict]:
    """What cannot be looked at has no sizes, but an error."""
    found = []
    for disk in disks:
        one: dict[str, object] = {"name": disk.name, "source": disk.source, **dict.fromkeys((*SIZES, "error"))}
        try:
            one |= sizes(disk.source)
        except (OSError, ValueError) as error:
            one["error"] = getattr(error, "strerror", None) or str(error)
        found.append(one)
    return found


def sizes(path: str) -> dict[str, int]:
    """In bytes: what a guest sees, what the host's file system has given for it, and the file's length. Raises OSError."""
    status = os.stat(path)
    if stat.S_ISBLK(status.st_mode):
        with open(f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}/size") as size:
            length = int(size.read()) * SECTOR
        return {"capacity": length, "allocation": length, "physical": length}
    return {"capacity": -(-status.st_size // SECTOR) * SECTOR, "allocation": status.st_blocks * SECTOR, "physical": status.st_size}


async def disk_resize(call: Call) -> dict:
    domain = call.domain()
    size = call.body.get("bytes")
    with domain.jobs.hold("blockresize", call.who):
        process = domain.want_active()
        disk = find(domain, domain.live or domain.want_persistent(), call.body.get("disk", ""))
        if disk.readonly and size is not None:
            raise UsageError(f"Cannot resize disk '{disk.name}' ({disk.source}): it is read-only")
        await domain.told(process.ask("resize-disk", RESIZE_TIMEOUT, device=disk.name, bytes=size, shrink=call.body.get("shrink", False)),
                          "Its disks keep their sizes", "start it anew")
    return call.changed(domain)


def find(domain: Domain, config: DomainConfig, path: str) -> DiskConfig:
    """By its target or its source. virsh's words."""
    found = next((disk for disk in config.disks if path in (disk.name, disk.source)), None)
    if found is None:
        raise UsageError(f"invalid argument: invalid path {path} not assigned to domain",
                         f"it has: {', '.join(disk.name for disk in config.disks) or 'none'}; see kvmappctl domblklist {domain.name}")
    return found
