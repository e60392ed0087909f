"""Where a machine's virtio devices are plugged in: cards in PCI slots, or windows of virtio-mmio where there is no PCI.

Both kinds of slots answer `plug(device)` with what then stands for the device in the machine. The guest finds PCI cards by itself;
of the windows it is told by ACPI or on its command line (boot/).
"""
from kvmapp.errors import StateError, Unsupported
from kvmapp.layout import PCI_SLOTS, VIRTIO_MMIO_BASE, VIRTIO_MMIO_GSIS, VIRTIO_MMIO_GSIS_ACPI
from kvmapp.places import LEAVE_OUT, free_place
from kvmapp.virtio.transitional import virtio_card

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmapp.core import Vm
    from kvmapp.devices import Interrupts, MsiLine
    from kvmapp.hw.pci import PciFunction
    from kvmapp.hw.pci_host import PciHost
    from kvmapp.virtio.device import VirtioDevice


class PciSlots:
    """The slots of bus 0 from 1 up; `mode` is the domain's setting `virtio`, `kept` the slots of cards that are to come."""

    def __init__(self, host: "PciHost", interrupts: "Interrupts", mode: str, kept: dict[str, int]):
        """Raises StateError for slots that no bus has: they come from a saved state."""
        self.host, self.interrupts, self.mode = host, interrupts, mode
        if not isinstance(kept, dict) or not all(type(slot) is int and 0 < slot < PCI_SLOTS for slot in kept.values()) or \
                len(set(kept.values())) < len(kept):
            raise StateError("The saved machine does not tell in which slots its cards stand")
        self.kept = dict(kept)

    def plug(self, device: "VirtioDevice"):
        """A card in its slot."""
        self.reserve(device.name)                        # first: a card has interrupt vectors to give back
        card = virtio_card(device, self.interrupts, self.mode)
        self.attach(card)
        return card

    def attach(self, function: "PciFunction") -> None:
        """Any card, into its slot."""
        self.reserve(function.name)
        self.host.attach(self.kept.pop(function.name), function)

    def reserve(self, name: str, slot: int | None = None, behind: "Iterable[str]" = ()) -> None:
        """Keeps this slot for a card that comes, unless one is kept for it; without `slot` a free one, behind these cards if there is
        any. Raises Unsupported."""
        if name in self.kept:
            return
        there = {**self.places(), **self.kept}
        if slot is None:
            slot = free_place(set(there.values()), max((there[one] for one in behind), default=0))
            if slot is None:
                raise Unsupported(f"There is no free PCI slot for {name}", "take another device out")
        elif other := next((one for one in there if there[one] == slot), None):
            raise Unsupported(f"PCI slot {slot} is not free for {name}: {other} stands there", LEAVE_OUT)
        self.kept[name] = slot

    def release(self, name: str) -> None:
        """No card comes."""
        self.kept.pop(name, None)

    def unplug(self, name: str):
        """Takes a card out of its slot and answers it."""
        return self.host.detach(self.slot_of(name))

    def slot_of(self, name: str) -> int:
        return next(slot for (slot, _), function in self.host.slots().items() if function.name == name)

    def places(self) -> dict[str, int]:
        """{name: slot} of the cards."""
        return {function.name: slot for (slot, _), function in self.host.slots().items() if slot}

    def removable(self, names: "Iterable[str]") -> tuple[int, ...]:
        """The slots of these cards, and the free ones: what may come and go while the guest runs."""
        there = {slot: function.name for (slot, _), function in self.host.slots().items()}
        return tuple(slot for slot in range(1, PCI_SLOTS) if there.get(slot) is None or there[slot] in names)

    def inventory(self) -> list[dict]:
        """[{name, slot}] of the cards."""
        return [{"name": function.name, "slot": slot} for (slot, _), function in sorted(self.host.slots().items())]

    def assign_resources(self) -> None:
        """What firmware does before a kernel starts."""
        self.host.assign_resources()


class MmioSlots:
    """Windows from VIRTIO_MMIO_BASE up; lines are shared when there are more devices than lines."""

    def __init__(self, vm: "Vm", *, acpi: bool, legacy: bool):
        self.vm, self.legacy = vm, legacy
        self.lines = VIRTIO_MMIO_GSIS + (VIRTIO_MMIO_GSIS_ACPI if acpi else ())
        self.pulses: dict[int, MsiLine] = {}             # of each line in use
        self.names: list[str] = []
        self.windows: list[tuple[int, int, int]] = []    # (base, size, gsi)

    def plug(self, device: "VirtioDevice"):
        """The next window, with the next line. Windows that share a line share its source of edges: KVM raises and lowers the pin for each
        source by itself, and an edge of one that comes while another holds the pin up would be none."""
        from kvmapp.virtio.mmio import MMIO_ACKNOWLEDGE, MMIO_WINDOW, VirtioMmio
        number = len(self.windows)
        base, gsi = VIRTIO_MMIO_BASE + number * MMIO_WINDOW, self.lines[number % len(self.lines)]
        if gsi not in self.pulses:
            self.pulses[gsi] = self.vm.interrupts.pulse(gsi)
        window = VirtioMmio(device, self.pulses[gsi], legacy=self.legacy)
        window.enter(self.vm.mmio, base)
        self.vm.coalesce_memory(base + MMIO_ACKNOWLEDGE, 4)
        self.windows.append((base, MMIO_WINDOW, gsi))
        self.names.append(device.name)
        return window

    def places(self) -> dict[str, int]:
        """None to tell of: windows come in the order of the configuration."""
        return {}

    def removable(self, names: "Iterable[str]") -> tuple[int, ...]:
        """None: windows stay."""
        return ()

    def inventory(self) -> list[dict]:
        """[{name, slot}] of the windows."""
        return [{"name": name, "slot": number} for number, name in enumerate(self.names)]

    def assign_resources(self) -> None:
        """Windows stand where they stand."""
