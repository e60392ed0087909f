"""In which slots of the PCI bus disks and network cards stand: guests name network cards by them, and count disks in their order.

    places(config)                  {"net0": 1, "vda": 2}, of a machine that starts
    keep_places(before, after)      writes `slot` into a changed configuration where a card would move

A machine that runs may have its cards elsewhere, when it was restored with another configuration: slots.py knows.
"""
from kvmapp.errors import ConfigError
from kvmapp.layout import PCI_SLOTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.config import DiskConfig, DomainConfig, InterfaceConfig

LEAVE_OUT = "without a slot (attach-disk: --address) it gets a free one"


def free_place(taken: set[int], behind: int = 0) -> int | None:
    """The first slot behind that one that is not taken; before it if need be. Slot 0 is the bridge's."""
    free = [slot for slot in range(1, PCI_SLOTS) if slot not in taken]
    return next((slot for slot in free if slot > behind), free[0] if free else None)


def places(config: "DomainConfig") -> dict[str, int]:
    """Network cards come first, so that one more disk moves none of them; then each stands behind those of its kind that come before it.
    A card for which there is no slot is left out; a microvm has none at all."""
    if config.machine == "microvm":
        return {}
    kinds = removables(config)
    found = {name: section.slot for sections in kinds for name, section in sections.items() if section.slot is not None}
    for sections in kinds:
        last = 0
        for name in sections:
            slot = found.get(name) or free_place(set(found.values()), last)
            if slot is not None:
                found[name] = slot
                last = max(last, slot)
    return found


def keep_places(before: "DomainConfig", after: "DomainConfig") -> None:
    """A card that is in both keeps its place, unless its section gives it another one, or had one and gives none any more."""
    stood, was, sections = places(before), sections_of(before), sections_of(after)
    staying = {name: stood[name] for name in sections if name in stood and sections[name].slot == was[name].slot}
    while moved := [name for name, slot in places(after).items() if staying.get(name, slot) != slot]:
        sections[moved[0]].slot = staying[moved[0]]             # which may push others away: one at a time


def require_free(config: "DomainConfig", name: str, slot: int) -> None:
    """Raises ConfigError if another card stands in that slot."""
    other = next((one for one, theirs in places(config).items() if theirs == slot and one != name), None)
    if other is not None:
        raise ConfigError(f"PCI slot {slot} is not free for {name}: {other} stands there", LEAVE_OUT)


def last_disk(config: "DomainConfig") -> int:
    """The slot behind which a new disk changes the order of none."""
    return max((slot for name, slot in places(config).items() if name in removables(config)[1]), default=0)


def removables(config: "DomainConfig") -> "tuple[dict[str, InterfaceConfig], dict[str, DiskConfig]]":
    """The sections by the names of their devices."""
    return {f"net{one.index}": one for one in config.interfaces}, {one.name: one for one in config.disks}


def sections_of(config: "DomainConfig") -> "dict[str, InterfaceConfig | DiskConfig]":
    interfaces, disks = removables(config)
    return {**interfaces, **disks}
