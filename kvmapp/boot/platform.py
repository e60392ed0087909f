"""What the guest is told about its machine: the facts that ACPI, MP table and SMBIOS state, each in its own format.

machine.py builds the devices from the same configuration; this class carries no device, so that tables can be built without any.
"""
from kvmapp.boot.topology import Topology
from kvmapp.layout import GSI_COM1, GSI_INTX, PORT_COM1


class Platform:
    """The facts; `serial_ports` are (port, gsi), `pci_window64` is (gpa, size in bytes) or None, `hotplug_slots` those whose cards
    may come and go.

    `virtio_mmio` are (gpa, size, gsi) of the windows of a machine without PCI; None where there is PCI. `i8042` is for a machine with a
    screen, whose keyboard somebody can press: Linux spends 600 exits on probing one.
    """
    __slots__ = ("acpi", "hotplug_slots", "i8042", "name", "pci_window64", "pvpanic", "serial_ports", "topology", "uuid", "vga",
                 "virtio_mmio")

    def __init__(self, topology: Topology, *, name: str = "guest", uuid: bytes = bytes(16), acpi: bool = True,
                 serial_ports: tuple[tuple[int, int], ...] = ((PORT_COM1, GSI_COM1),), i8042: bool = False, vga: bool = False,
                 pci_window64: tuple[int, int] | None = None, virtio_mmio: list[tuple[int, int, int]] | None = None,
                 pvpanic: bool = False, hotplug_slots: tuple[int, ...] = ()):
        """`uuid` is the domain's, as uuid.UUID(...).bytes has it."""
        self.topology, self.name, self.uuid, self.acpi = topology, name, uuid, acpi
        self.virtio_mmio = virtio_mmio
        self.serial_ports, self.i8042, self.vga, self.pci_window64 = serial_ports, i8042, vga, pci_window64
        self.pvpanic = pvpanic
        self.hotplug_slots = hotplug_slots

    @property
    def pci(self) -> bool:
        """Whether there is a PCI bus."""
        return self.virtio_mmio is None

    @property
    def level_lines(self) -> set[int]:
        """The ISA lines that PCI pins have taken."""
        return set(GSI_INTX) if self.pci else set()
