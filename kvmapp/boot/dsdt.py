"""The DSDT: the devices that a guest cannot find by itself, the PCI host bridge's windows and interrupts or the
windows of virtio-mmio, and how to power off.

Follows ACPI 6.5 and the PCI Firmware Specification 3.3 (_OSC, MCFG's motherboard resource). Leaves out: sleep states other than S5,
and link devices: PCI pins are wired to fixed interrupts.
"""
from kvmapp.boot import aml
from kvmapp.boot.aml import argument, device, eisa_id, method, named, package, ref, resources, scope
from kvmapp.boot.platform import Platform
from kvmapp.layout import (
    ACPI_HOTPLUG_EVENT,
    ACPI_SLEEP_TYPE_S5,
    GSI_INTX,
    GSI_KEYBOARD,
    GSI_RTC,
    PCI_BUSES,
    PCI_ECAM_BASE,
    PCI_ECAM_SIZE,
    PCI_IO_BASE,
    PCI_IO_SIZE,
    PCI_MMIO32_BASE,
    PCI_MMIO32_SIZE,
    PCI_SLOTS,
    PORT_CMOS,
    PORT_I8042_COMMAND,
    PORT_I8042_DATA,
    PORT_PCI_CONFIG_ADDRESS,
    PORT_PCI_HOTPLUG,
    PORT_PCI_HOTPLUG_SIZE,
    PORT_PVPANIC,
)

PCI_PINS = 4
PCI_OSC = "33db4d5b-1ff7-401c-9657-7441c03dd766"
OSC_GRANTED = 0x1F                                               # all of PCI Express's features that have no firmware part here
OSC_UNKNOWN_UUID, OSC_UNKNOWN_REVISION, OSC_MASKED = 0x04, 0x08, 0x10
DEVICE_CHECK, EJECT_REQUEST = 1, 3                               # what Notify tells (5.6.6)
VGA_MEMORY, VGA_MEMORY_SIZE = 0xA_0000, 0x2_0000


def build(platform: Platform) -> bytes:
    """The table's AML, without its header."""
    return scope(
        "\\_SB",
        *([_pci_host(platform), _motherboard()] if platform.pci else []),
        *(_virtio_mmio(number, *window) for number, window in enumerate(platform.virtio_mmio or ())),
        _rtc(),
        *([_keyboard()] if platform.i8042 else []),
        *(_serial(number, port, gsi) for number, (port, gsi) in enumerate(platform.serial_ports, 1)),
        *([_pvpanic()] if platform.pvpanic else []),
        *(_processor(uid) for uid in range(platform.topology.vcpus)),
    ) + _hotplug_event(platform) + named("\\_S5", package(ACPI_SLEEP_TYPE_S5, ACPI_SLEEP_TYPE_S5, 0, 0))


def _pci_host(platform: Platform) -> bytes:
    windows = [aml.bus_window(0, PCI_BUSES - 1), aml.io(PORT_PCI_CONFIG_ADDRESS, 8), aml.io_window(PCI_IO_BASE, PCI_IO_SIZE),
               aml.memory_window32(PCI_MMIO32_BASE, PCI_MMIO32_SIZE)]
    if platform.vga:
        windows.append(aml.memory_window32(VGA_MEMORY, VGA_MEMORY_SIZE))
    if platform.pci_window64:
        windows.append(aml.memory_window64(*platform.pci_window64))
    return device(
        "PCI0",
        named("_HID", eisa_id("PNP0A08")),                       # PCI Express host bridge
        named("_CID", eisa_id("PNP0A03")),                       # ... which older systems take for a PCI one
        named("_UID", 0),
        named("_SEG", 0),
        named("_BBN", 0),
        named("_CRS", resources(*windows)),
        named("_PRT", _interrupt_routing()),
        _osc(),
        *_hotplug_slots(platform.hotplug_slots),
    )


def _interrupt_routing() -> bytes:
    """(slot and any function, pin, no link device, GSI) for every pin of bus 0."""
    return package(*(package(slot << 16 | 0xFFFF, pin, 0, GSI_INTX[(slot + pin) % PCI_PINS])
                     for slot in range(PCI_SLOTS) for pin in range(PCI_PINS)))


def _hotplug_slots(slots: tuple[int, ...]) -> list[bytes]:
    """Slots whose cards may come and go, over the registers of hw/pci_hotplug; SCAN tells each slot what happened to it."""
    if not slots:
        return []
    region = aml.io_region("PHPR", PORT_PCI_HOTPLUG, PORT_PCI_HOTPLUG_SIZE) + aml.dword_fields("PHPR", "PHPI", "PHPA", "PHPE")
    devices = [device(_slot(slot), named("_ADR", slot << 16), named("_SUN", slot),
                      method("_EJ0", 1, aml.store(1 << slot, ref("PHPE")))) for slot in slots]
    news = [aml.store(ref(field), aml.local(0)) + aml.store(aml.local(0), ref(field)) +
            b"".join(aml.if_(aml.bit_and(aml.local(0), 1 << slot), aml.notify(_slot(slot), what)) for slot in slots)
            for field, what in (("PHPI", DEVICE_CHECK), ("PHPA", EJECT_REQUEST))]
    return [region, *devices, method("SCAN", 0, *news)]


def _slot(slot: int) -> str:
    return f"S{slot:03X}"


def _hotplug_event(platform: Platform) -> bytes:
    if not platform.hotplug_slots:
        return b""
    return scope("\\_GPE", method(f"_E{ACPI_HOTPLUG_EVENT:02X}", 0, aml.call("\\_SB.PCI0.SCAN")))


def _osc() -> bytes:
    """The guest asks for PCI Express's features (third dword of Arg3) and is granted them; errors go into the first."""
    status, control = ref("CDW1"), ref("CDW3")
    return method(
        "_OSC", 4,
        aml.dword_field(argument(3), 0, "CDW1"),
        aml.if_(
            aml.equal(argument(0), aml.uuid(PCI_OSC)),
            aml.dword_field(argument(3), 8, "CDW3"),
            aml.if_(aml.not_equal(argument(1), 1), aml.or_(status, OSC_UNKNOWN_REVISION, status)),
            aml.and_(control, OSC_GRANTED, aml.local(0)),
            aml.if_(aml.not_equal(aml.local(0), control), aml.or_(status, OSC_MASKED, status)),
            aml.store(aml.local(0), control),
        ),
        aml.else_(aml.or_(status, OSC_UNKNOWN_UUID, status)),
        aml.return_(argument(3)),
    )


def _motherboard() -> bytes:
    """Linux trusts the MCFG only where ECAM is reserved as a motherboard resource."""
    return device("MBRD", named("_HID", eisa_id("PNP0C02")), named("_CRS", resources(aml.memory32(PCI_ECAM_BASE, PCI_ECAM_SIZE))))


def _virtio_mmio(number: int, base: int, size: int, gsi: int) -> bytes:
    return device(f"V{number:03X}", named("_HID", "LNRO0005"), named("_UID", number),
                  named("_CRS", resources(aml.memory32(base, size), aml.edge(gsi))))


def _rtc() -> bytes:
    return device("RTC", named("_HID", eisa_id("PNP0B00")), named("_CRS", resources(aml.io(PORT_CMOS, 2), aml.irq(GSI_RTC))))


def _keyboard() -> bytes:
    ports = aml.io(PORT_I8042_DATA, 1) + aml.io(PORT_I8042_COMMAND, 1)
    return device("KBD", named("_HID", eisa_id("PNP0303")), named("_CRS", resources(ports, aml.irq(GSI_KEYBOARD))))


def _serial(number: int, port: int, gsi: int) -> bytes:
    return device(f"COM{number}", named("_HID", eisa_id("PNP0501")), named("_UID", number),
                  named("_CRS", resources(aml.io(port, 8), aml.irq(gsi))))


def _pvpanic() -> bytes:
    return device("PEVT", named("_HID", "QEMU0001"), named("_CRS", resources(aml.io(PORT_PVPANIC, 1))), named("_STA", 0xF))


def _processor(uid: int) -> bytes:
    return device(f"C{uid:03X}", named("_HID", "ACPI0007"), named("_UID", uid))
