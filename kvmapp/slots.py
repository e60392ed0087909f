"""Where a machine's virtio devices are plugged in: cards in PCI slots, or windows of virtio-mmio where there is no PCI.

Both kinds of slots answer `plug(device)` with what then stands for the device in the machine. The guest finds PCI cards by itself;
of the windows it is told by ACPI or on its command line (boot/).
"""
from kvmapp.layout import VIRTIO_MMIO_BASE, VIRTIO_MMIO_GSIS, VIRTIO_MMIO_GSIS_ACPI
from kvmapp.virtio.transitional import virtio_card

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.core import Vm
    from kvmapp.devices import Interrupts
    from kvmapp.hw.pci import PciFunction
    from kvmapp.hw.pci_host import PciHost
    from kvmapp.virtio.device import VirtioDevice


class PciSlots:
    """The slots of bus 0 from 1 up; `mode` is the domain's setting `virtio`."""

    def __init__(self, host: "PciHost", interrupts: "Interrupts", mode: str):
        self.host, self.interrupts, self.mode = host, interrupts, mode

    def plug(self, device: "VirtioDevice"):
        """A card in the next slot."""
        card = virtio_card(device, self.interrupts, self.mode)
        self.attach(card)
        return card

    def attach(self, function: "PciFunction") -> None:
        """Any card, into the next slot."""
        self.host.attach(max(slot for slot, _ in self.host.slots()) + 1, function)

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
        self.names: list[str] = []
        self.windows: list[tuple[int, int, int]] = []    # (base, size, gsi)

    def plug(self, device: "VirtioDevice"):
        """The next window, with the next line."""
        from kvmapp.virtio.mmio import MMIO_ACKNOWLEDGE, MMIO_WINDOW, VirtioMmio
        number = len(self.windows)
        base, gsi = VIRTIO_MMIO_BASE + number * MMIO_WINDOW, self.lines[number % len(self.lines)]
        window = VirtioMmio(device, self.vm.interrupts.pulse(gsi), legacy=self.legacy)
        window.enter(self.vm.mmio, base)
        self.vm.coalesce_memory(base + MMIO_ACKNOWLEDGE, 4)
        self.windows.append((base, MMIO_WINDOW, gsi))
        self.names.append(device.name)
        return window

    def inventory(self) -> list[dict]:
        """[{name, slot}] of the windows."""
        return [{"name": name, "slot": number} for number, name in enumerate(self.names)]

    def assign_resources(self) -> None:
        """Windows stand where they stand."""
