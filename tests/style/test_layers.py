"""The house has floors: who may import whom (ARCHITECTURE.md), read from the imports of every .py, .pyx and .pxd."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each room and the rooms it may look into; a room may always look into itself.
FLOORS = {
    "abi": set(),
    "memory": {"abi"},
    "devices": {"abi", "memory"},
    "vmstate": {"abi"},
    "irqchip": {"abi", "devices"},
    "coalesced": {"abi", "devices"},
    "vcpu": {"abi", "devices", "coalesced", "iothread"},
    "core": {"abi", "memory", "devices", "vmstate", "irqchip", "coalesced", "vcpu"},
    "iothread": {"abi"},
    "chardev": {"abi"},
    "block": {"abi", "memory", "devices", "iothread"},
    "net": {"abi", "memory", "devices", "iothread"},
    "hw": {"abi", "memory", "devices", "iothread", "chardev", "net"},
    "virtio": {"abi", "memory", "devices", "iothread", "chardev", "hw", "block", "net"},
    "boot": {"abi", "memory"},
    "slots": {"abi", "memory", "devices", "core", "hw", "virtio"},
    "tuning": set(),
    "netcards": {"iothread", "hw", "virtio", "net"},
    "diskcards": {"iothread", "virtio", "block"},
    "removables": {"iothread", "netcards", "diskcards"},
    "machine": {"abi", "memory", "devices", "core", "iothread", "chardev", "hw", "virtio", "boot", "removables", "slots", "tuning"},
    "snapshot": {"machine"},
    "saving": {"loop", "machine", "snapshot"},
    "loop": set(),
    "control": {"loop"},
    "console": {"loop", "chardev"},
    "terminal": set(),
    "vmdevices": {"control", "machine"},
    "vmsaving": {"vmdevices", "saving", "snapshot"},
    "preload": {"hw", "virtio", "block", "net", "boot", "netcards", "diskcards", "control", "saving"},
    "vmprocess": {"devices", "control", "console", "loop", "machine", "vmdevices", "vmsaving", "snapshot", "preload"},
    "timing": {"machine"},
    "foreground": {"console", "loop", "terminal", "machine", "snapshot", "vmprocess", "timing"},
    "zygote": {"vmprocess"},
    "daemon": set(),
    "manual": {"daemon"},
    "cli": {"terminal"},
}
# Rooms that everybody may use; they look into no other.
SHARED = {"errors", "state", "schema", "layout", "config", "client", "check", "values", "settings", "cpuset", "ini", "initree", "runtime",
          "kvmstats", "laying", "licences", "options", "samples", "hostinfo", "install", "hostconfig", "probe", "statefile",
          "unixsocket", "fileserver", "cardfiles", "imagefile", "imagelocks", "places", "__init__", "__main__"}
IMPORT = re.compile(r"^\s*(?:from\s+(kvmapp(?:\.\w+)*)\s+c?import\s+([\w, ()]+)|c?import\s+(kvmapp(?:\.\w+)+))", re.MULTILINE)


def room(path: Path) -> str:
    return path.relative_to(ROOT / "kvmapp").parts[0].split(".")[0]


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for package, names, module in IMPORT.findall(path.read_text()):
        dotted = (package or module).split(".")[1:]
        rooms |= {dotted[0]} if dotted else {name.strip(" ()") for name in names.split(",")}
    return {name for name in rooms if name in FLOORS}


SOURCES = [path for path in sorted((ROOT / "kvmapp").rglob("*")) if path.suffix in {".py", ".pyx", ".pxd"}]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    here = room(path)
    if here not in FLOORS:
        assert here in SHARED, f"{here} is a new room: give it a floor in this test and in ARCHITECTURE.md"
        return
    forbidden = imported_rooms(path) - FLOORS[here] - {here}
    assert not forbidden, f"{path.name} ({here}) must not import {sorted(forbidden)}"


SHARED_SOURCES = [path for path in SOURCES if room(path) in SHARED - {"__main__"}]


@pytest.mark.parametrize("path", SHARED_SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shared_rooms_import_no_vmm(path):
    assert not imported_rooms(path), f"{path.name} is shared by all and must import no room"


def test_no_shared_room_goes_unread():
    """Each has sources under its name, be it a file or a folder."""
    assert {room(path) for path in SHARED_SOURCES} == SHARED - {"__main__"}
