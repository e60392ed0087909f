"""Disks of domains: attach-disk, detach-disk, blockresize, domblkerror, domblkinfo, domblkstat."""
from __future__ import annotations

import os

from kvmapp.cli import render
from kvmapp.cli.cards import NOT_BOTH, PERSISTENT, SCOPE, where
from kvmapp.cli.saving import abortable
from kvmapp.cli.table import SIZE, argument, domain, flag, value, verb
from kvmapp.client import of
from kvmapp.errors import DomainNotRunning, HostError, KvmappError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.cli.table import Option

SIZES = ("capacity", "allocation", "physical")
# Our counters under virsh's names, and in words.
COUNTERS = {"rd_reqs": ("rd_req", "number of read operations:"), "rd_bytes": ("rd_bytes", "number of bytes read:"),
            "wr_reqs": ("wr_req", "number of write operations:"), "wr_bytes": ("wr_bytes", "number of bytes written:"),
            "errors": ("errs", "error count:"), "fl_reqs": ("flush_operations", "number of flush operations:"),
            "rd_ns": ("rd_total_times", "total duration of reads (ns):"), "wr_ns": ("wr_total_times", "total duration of writes (ns):"),
            "fl_ns": ("flush_total_times", "total duration of flushes (ns):")}
HUMAN_COLUMN = 31


def disk(name: str, **more) -> Option:
    return value(name, "the disk: its target (vda) or its source; see domblklist", complete="disk", **more)


@verb("attach-disk", "give a domain one more disk", domain(),
      argument("source", "the image file or the host's block device"), argument("target", "the domain's name for it: vdb"),
      value("targetbus", "how the guest reaches it", choices=("virtio",)), value("subdriver", "its format", choices=("raw",)),
      value("cache", "writeback, none or unsafe: see kvmapp-domain(5)", choices=("writeback", "none", "unsafe")),
      value("driver", "accepted for virsh's sake", choices=("qemu",), named=True),
      value("type", "accepted for virsh's sake: no drive but a disk is there", choices=("disk",), named=True),
      value("sourcetype", "accepted for virsh's sake: the source itself tells", choices=("file", "block"), named=True),
      value("io", "how requests reach the host", choices=("auto", "io_uring", "threads")),
      value("mode", "readonly: the guest may not write", choices=("readonly",)),
      value("serial", "the serial number that the guest reads"),
      value("address", "its slot on the PCI bus, in hexadecimal: pci:0000.00.0a.0 for slot 10", named=True), PERSISTENT, *SCOPE,
      text="The file has to be there (truncate -s 20G FILE makes an empty one). A running guest is told of the disk through ACPI, and has "
           "it at once; it gives disks names of its own, in the order in which it finds them: go by --serial, which it shows as "
           "/dev/disk/by-id/virtio-SERIAL.",
      failure="Failed to attach disk", exclusive=NOT_BOTH)
def attach_disk(session, given):
    settings = {"source": os.path.abspath(given.source), "bus": given.targetbus, "format": given.subdriver, "cache": given.cache,
                "io": given.io, "serial": given.serial, "readonly": "yes" if given.mode else None,
                "slot": None if given.address is None else slot_of(given.address)}
    with abortable(session, f"opening {given.source}", given.domain):
        changed = session.daemon.post(of(given.domain, "disks"), name=given.target,
                                      settings={key: text for key, text in settings.items() if text}, **where(given))
    session.done(changed, "Disk attached successfully")


def slot_of(address: str) -> str:
    """virsh's pci:DOMAIN.BUS.SLOT.FUNCTION as the setting `slot`."""
    kind, _, numbers = address.partition(":")
    try:
        domain_number, bus, slot, function = (int(number, 16) for number in numbers.split(".") if number.isalnum())
    except ValueError:
        raise UsageError(f"Invalid address: {address}", "--address pci:0000.00.09.0") from None
    if kind != "pci" or domain_number or bus or function or not 0 < slot < 32:
        raise UsageError(f"Invalid address: {address}: disks stand in slots 01 to 1f of PCI bus 0", "--address pci:0000.00.09.0")
    return str(slot)


@verb("detach-disk", "take a disk out of a domain", domain(), disk("target", required=True), PERSISTENT, *SCOPE,
      text="Its file stays. A running guest is asked for the disk, and the disk is gone when the guest has let go of it: unmount it there "
           "first.",
      failure="Failed to detach disk", exclusive=NOT_BOTH)
def detach_disk(session, given):
    with session.wait_with(f"waiting for the guest of {given.domain} to let go", given.domain):
        changed = session.daemon.post(of(given.domain, "disks", "detach"), disk=given.target, **where(given))
    session.done(changed, "Disk detached successfully")


@verb("blockresize", "give a disk of a running domain another size", domain(complete="active"), disk("path", required=True),
      value("size", "the new size: a number of KiB, or one with its unit (20G, 512MiB)", kind=SIZE),
      flag("capacity", "take over the size that its file or block device has by now"),
      flag("shrink", "though it is larger now, and what is at its end is lost"),
      text="The guest is told, and sees the new size at once; its partitions and file systems are its own to grow (growpart, resize2fs, "
           "xfs_growfs). A block device has the size that the host gave it (lvextend): --capacity takes it over.",
      failure="Failed to resize block device '{path}'", exclusive=(("size", "capacity"), ("capacity", "shrink")))
def blockresize(session, given):
    if given.size is None and not given.capacity:
        raise UsageError("command 'blockresize' requires --size option",
                         f"kvmappctl blockresize {given.domain} {given.path} --size 20G; or --capacity")
    with session.wait_with(f"resizing {given.path}", given.domain):
        changed = session.daemon.post(of(given.domain, "disks", "resize"), disk=given.path, bytes=given.size, shrink=given.shrink)
    session.done(changed, f"Block device '{given.path}' is resized")


@verb("domblkerror", "the errors of a domain's disks", domain(),
      text="`no space`: the host has no room for what the guest writes, so the guest is paused. Nothing of it is lost: make room, then "
           "`resume` it.")
def domblkerror(session, given):
    errors = {one["name"]: one["error"] for one in session.daemon.get(of(given.domain))["disks"] if one.get("error")}
    session.answer({"errors": errors}, lambda: "".join(f"{name}: {error}\n" for name, error in errors.items()) or "No errors found\n")


@verb("domblkinfo", "how large a domain's disks are", domain(), disk("device"), flag("human", "sizes for people to read"),
      flag("all", "every disk, as a table"),
      text="Capacity is what a guest sees that starts now, Allocation what the host's file system has given for it so far, Physical the "
           "file's length.",
      exclusive=(("device", "all"),))
def domblkinfo(session, given):
    if given.device is None and not given.all:
        raise UsageError("command 'domblkinfo' requires <device> option", f"or --all: kvmappctl domblkinfo {given.domain} --all")
    disks = session.daemon.get(of(given.domain, "disks"))["disks"]
    show = render.human_size if given.human else render.or_dash
    if given.all:
        rows = [[one["name"], *(show(one[key]) for key in SIZES)] for one in disks]
        session.answer({"disks": disks}, lambda: render.table(["Target", *(key.capitalize() for key in SIZES)], rows,
                                                              header=not session.quiet))
        return
    one = chosen(given.domain, given.device, disks, f"invalid argument: invalid path {given.device} not assigned to domain")
    if one["error"]:
        raise HostError(f"Cannot look at disk '{one['name']}' ({one['source']}): {one['error']}")
    session.answer(one, lambda: render.pairs([(key.capitalize(), show(one[key])) for key in SIZES], 16))


@verb("domblkstat", "what a running domain read from and wrote to a disk", domain(complete="active"), disk("device"),
      flag("human", "names for people to read"),
      text="Without a disk: all of them together.", failure="Failed to get block stats {domain} {device}")
def domblkstat(session, given):
    given.device = given.device or ""           # for the failure's words
    stats = session.daemon.get(of(given.domain, "stats"))
    if stats["id"] is None:
        raise DomainNotRunning("Requested operation is not valid: domain is not running")
    if not given.device:
        counts = {key: sum(one[key] for one in stats["disks"]) for key in COUNTERS}
    else:
        counts = chosen(given.domain, given.device, stats["disks"], f"invalid path: {given.device}")
    session.answer(counts, counter_lines(given.device, counts, given.human))


def counter_lines(device: str, counts: dict, human: bool) -> str:
    """virsh's lines, without a device's name too."""
    if human:
        return f"Device: {device}\n" + "".join(f" {words:<{HUMAN_COLUMN}} {counts[key]}\n" for key, (_, words) in COUNTERS.items())
    return "".join(f"{device} {name} {counts[key]}\n" for key, (name, _) in COUNTERS.items())


def chosen(name: str, path: str, disks: list[dict], otherwise: str) -> dict:
    found = next((one for one in disks if path in (one["name"], one["source"])), None)
    if found is None:
        raise KvmappError(otherwise,
                          f"it has: {', '.join(one['name'] for one in disks) or 'none'}; see kvmappctl domblklist {name}")
    return found
