"""In which slots of the PCI bus disks and network cards stand: guests name network cards by them, and count disks in their order.

    places(config)                  {"net0": 1, "vda": 2}, of a machine that starts
    keep_places(before, after)      writes `slot` into a changed file where a card would move

A machine that runs may have its cards elsewhere, for some came or went meanwhile: slots.py knows.
"""
TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.config import DiskConfig, DomainConfig, InterfaceConfig

PCI_SLOTS = 32


def free_place(taken: set[int], behind: int = 0) -> int | None:
    """The first slot behind that one that is not taken; before it if need be. Slot 0 is the bridge's."""
    free = [slot for slot in range(1, PCI_SLOTS) if slot not in taken]
    return next((slot for slot in free if slot > behind), free[0] if free else None)


def places(config: "DomainConfig") -> dict[str, int]:
    """Network cards come first, so that one more disk moves none of them; then each stands behind those of its kind. A card for which there
    is no slot is left out; a microvm has none at all."""
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
    stood, was = places(before), sections_of(before)
    for name, section in sections_of(after).items():
        slot = stood.get(name)
        if slot is not None and section.slot is None and was[name].slot is None and places(after).get(name) != slot:
            section.slot = slot


def last_place(config: "DomainConfig", kind: str) -> int:
    """The slot behind which a new card of the kind ("disks", "interfaces") changes the order of none."""
    names = removables(config)[kind == "disks"]
    return max((slot for name, slot in places(config).items() if name in names), default=0)


def removables(config: "DomainConfig") -> "tuple[dict[str, InterfaceConfig], dict[str, DiskConfig]]":
    """The sections by the names of their devices."""
    return {f"net{one.index}": one for one in config.interfaces}, {one.name: one for one in config.disks}


def sections_of(config: "DomainConfig") -> "dict[str, InterfaceConfig | DiskConfig]":
    interfaces, disks = removables(config)
    return {**interfaces, **disks}
