"""A whole machine into a file and out of it again: its state tree, its configuration and its memory (statefile.py has the format).

    write(machine, fd)                      # the machine is paused and stays so
    machine = restore(saved)                # saved = statefile.read(fd, name); paused, ready for `resume`

A restored machine's memory is the file, mapped privately: the guest runs before its memory is read, and the file must keep its
contents for as long as the guest lives (a file that is removed or replaced by rename does). The guest's clocks go on as if it
had stood still and time had not: TSC and kvmclock are set ahead by the time that went by.
Leaves out: disks (their contents must be those of the moment of saving), machines with filesystems (a file server's state is its
own), and states of several formats.
"""
from __future__ import annotations

import os
import time

from kvmapp import __version__, statefile
from kvmapp.config import DomainConfig
from kvmapp.errors import KvmappError, StateError, Unsupported
from kvmapp.machine import Machine
from kvmapp.state import StateReader
from kvmapp.statefile import STRETCHES_MOST, SavedState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

VERSION = 2                                             # 1 did not tell whether the domain was paused
CPUID_ENTRIES_MOST = 256
# What of a configuration is the host's side and may be another one at the restore. Everything else the guest has seen, but slots: cards
# stand where the saved machine had them.
HOST_SECTIONS = {"cputune", "vcpu", "numatune", "memtune"}         # as a whole: they may be there or not
HOST_SIDE: dict[str, set[str]] = {
    "": {"name", "uuid", "title", "description", "current_memory", "hugepages", "thp", "ksm", "prealloc",
         "locked", "cpu", "on_poweroff", "on_reboot", "on_crash", "autostart_order",
         "autostart_delay"},
    "boot": {"kernel", "initrd", "cmdline", "unpack"},
    "disk": {"source", "cache", "error_policy", "io", "threads", "poll", "slot"},
    "interface": {"type", "source", "target", "forwards", "link", "vhost", "vlan", "filter", "addresses",
                  "in_average", "in_peak", "in_burst", "out_average", "out_peak", "out_burst", "slot"},
    "serial": {"type", "path", "log"},
    "console": {"type", "path", "log"},
    "watchdog": {"action"},
    "vsock": {"path"},
    "filesystem": {"source", "cache", "binary", "socket"},
    "graphics": {"listen"},
}


def describe(machine: Machine, paused: bool = False) -> tuple[dict, dict]:
    """(configuration, state) of a paused machine, as statefile.write takes them; `paused`: its domain is to be so when it is
    restored. Raises HostError, Unsupported."""
    require_savable(machine.config)
    now = time.time_ns()
    return machine.config.to_dict(), {"version": VERSION, "kvmapp": __version__, "time": now, "paused": paused,
                                      "machine": machine.save_state(now)}


def require_savable(config: DomainConfig) -> None:
    """Raises Unsupported, with the name of what cannot be saved."""
    for filesystem in config.filesystems:
        raise Unsupported(f"Domain '{config.name}' cannot be saved: what its guest has open in filesystem '{filesystem.tag}' lives "
                          "in the file server", "shut it down instead, or take the filesystem away")


def write(machine: Machine, fd: int, progress: Callable[[int], None] = lambda done: None) -> int:
    """The whole machine into an open, empty file, synced; the file's size. Raises HostError."""
    config, state = describe(machine)
    flush_disks(machine)
    return statefile.write(fd, config, state, machine.memory, progress)


def flush_disks(machine: Machine) -> None:
    """A saved guest will not send again what it holds for written: that is on stable storage when this returns, whatever becomes of the
    host. The machine is paused; may take long. Raises HostError."""
    for device in machine.disks().values():
        if not device.disk.read_only:
            device.disk.flush()


def restore(saved: SavedState, config: DomainConfig | None = None, files: dict[str, int] | None = None,
            warn: Callable[[str], None] = lambda text: None) -> Machine:
    """A paused machine that goes on where the saved one stopped, `config` in the place of its own configuration.

    Raises KvmappError: the file is not usable, or the host or the configuration is another.
    """
    reader = StateReader("file", saved.state, VERSION)
    reader.take("kvmapp", str)
    when = reader.uint("time", 2**63 - 1)
    if reader.version > 1:
        reader.flag("paused")                           # whoever has the domain decides what to make of it
    state = reader.take("machine", dict)
    reader.done()
    original = configuration(saved)
    if config is not None:
        compare(saved.name, original, config)
    machine = Machine(config or original, files, cpuids(state, original.vcpus), state.get("slots", {}), warn=warn)
    try:
        load_memory(machine, saved)
        if not machine.restore_state(state, when):
            warn("this host's TSC runs at another rate than the one where the guest was saved: a guest that keeps time by it, "
                 "not by kvmclock, will be wrong")
    except BaseException:
        machine.close()
        raise
    return machine


def configuration(saved: SavedState) -> DomainConfig:
    """The one in the file, checked as strictly as a domain file. Raises StateError."""
    try:
        return DomainConfig.from_dict(saved.config)
    except KvmappError as error:
        raise StateError(f"Saved state '{saved.name}': its configuration is not usable: {error}",
                         "it may come from a newer kvmapp") from None


def compare(name: str, saved: DomainConfig, wanted: DomainConfig) -> None:
    """Whether the guest would find itself in the machine that it knows. Raises StateError."""
    there, here = guest_side(saved.to_dict()), guest_side(wanted.to_dict())
    for key in sorted(there.keys() | here.keys()):
        if there.get(key) != here.get(key):
            raise StateError(f"Saved state '{name}' does not fit domain '{wanted.name}': {key} was {shown(there.get(key))}, "
                             f"is {shown(here.get(key))}", "restore it with the configuration it was saved with, or without one")


def guest_side(config: dict) -> dict[str, object]:
    """{'memory': 1073741824, 'disk vda serial': None, 'rng': 'there', ...}: what the guest can see of a configuration."""
    attributes = {part.attribute: part for part in DomainConfig.file.sections.values()}
    found: dict[str, object] = {}
    for key, value in config.items():
        section = attributes.get(key)
        if section is None:
            found[key] = value if key not in HOST_SIDE[""] else None
            continue
        if section.kind in HOST_SECTIONS:
            continue
        for one in value if isinstance(value, list) else [value] if value is not None else []:
            heading = f"{section.kind} {one[section.word.key]}" if section.word else section.kind
            found[heading] = "there"
            found |= {f"{heading} {name}": setting for name, setting in one.items() if name not in HOST_SIDE.get(section.kind, ())}
    return found


def shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not there" if value is None else str(value)


def cpuids(state: dict, vcpus: int) -> list[list[tuple]]:
    """The CPUID entries of each vCPU. Raises StateError."""
    told = state.get("cpuids")
    if not isinstance(told, list) or len(told) != vcpus or not all(isinstance(one, list) and one for one in told):
        raise StateError(f"The saved machine does not tell the CPUID entries of {vcpus} vCPUs")
    return [[cpuid_entry(entry) for entry in one[:CPUID_ENTRIES_MOST]] for one in told]


def cpuid_entry(entry: object) -> tuple:
    if (not isinstance(entry, list) or len(entry) != 7 or
            not all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32 for value in entry)):
        raise StateError("The saved machine's CPUID entries are malformed")
    return tuple(entry)


def load_memory(machine: Machine, saved: SavedState) -> None:
    """Maps the file's memory into the guest's. Raises StateError, HostError."""
    memory = machine.memory
    stretches = saved.stretches()
    for gpa, length, _ in stretches:
        if not any(start <= gpa and gpa + length <= start + size for start, size in memory.ranges):
            raise StateError(f"Saved state '{saved.name}': it has memory at {gpa:#x} (+{length:#x}), which the guest has not")
    for number, (gpa, length, offset) in enumerate(stretches):
        if number < STRETCHES_MOST and memory.is_pageable:
            memory.map_file(saved.fd, gpa, length, offset)
        else:                                       # more mappings than the kernel may allow, or memory that is to be held now
            read_into(saved, memory.view(gpa, length), offset)


def read_into(saved: SavedState, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        try:
            count = os.preadv(saved.fd, [view[done:]], offset + done)
        except OSError as error:
            raise StateError(f"Saved state '{saved.name}': cannot read it: {error.strerror}") from None
        if count == 0:
            raise StateError(f"Saved state '{saved.name}': it is cut short", statefile.COPY_AGAIN)
        done += count
