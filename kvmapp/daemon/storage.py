"""Removing the disks of a domain that is undefined: only what is its own, and only files."""
from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.config import DiskConfig, DomainConfig

    Others = list[tuple[str, DomainConfig]]             # domains that are defined, and those that run


def remove_storage(config: DomainConfig | None, names: list[str], others: Others) -> tuple[list[str], list[str]]:
    """Removes these disks' files. Returns what was removed and what was left, with the reason, in words."""
    removed, left = [], []
    disks = {disk.name: disk for disk in config.disks} if config else {}
    left += [f"disk {name}: the domain has no such disk" for name in names if name not in disks]
    for name, disk in disks.items():
        if name not in names:
            left.append(f"disk {name} ({disk.source})")
            continue
        reason = why_kept(disk, others)
        try:
            if reason is None:
                os.unlink(disk.source)
        except OSError as error:
            reason = error.strerror
        if reason is None:
            removed.append(f"disk {name} ({disk.source})")
        else:
            left.append(f"disk {name} ({disk.source}): {reason}")
    if config is None:
        left.append("disks, if there are any: the file was broken")
    return removed, left


def why_kept(disk: DiskConfig, others: Others) -> str | None:
    """What speaks against removing it; None when nothing does."""
    if disk.readonly:
        return "readonly, so it may be others' too"
    if os.path.exists(disk.source) and not os.path.isfile(disk.source):
        return "a device, not a file"
    for name, config in others:
        for theirs in config.disks:
            if os.path.realpath(theirs.source) == os.path.realpath(disk.source):
                return f"domain '{name}' uses it too"
    return None
