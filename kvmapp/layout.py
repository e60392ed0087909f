"""Where things stand in the guest's address spaces: the one home of every address that two rooms share.

Devices do not know where they are mapped; machine.py maps them here, boot/ tells the guest through ACPI, MP table and e820.
Addresses are guest-physical (gpa), sizes in bytes, interrupts are global system interrupts (gsi).
"""
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# Guest memory: one memslot below the PCI hole, one from 4 GiB up for the rest.
LOW_MEMORY_END = 0xC000_0000
HIGH_MEMORY_BASE = 0x1_0000_0000

# The hole below 4 GiB.
PCI_MMIO32_BASE, PCI_MMIO32_SIZE = 0xC000_0000, 0x2000_0000
PCI_ECAM_BASE, PCI_ECAM_SIZE = 0xE000_0000, 0x1000_0000          # room for buses 0-255, 1 MiB each
PCI_SLOTS = 32                                                   # of a bus
PCI_BUSES = 1                                                    # that exist: Linux probes each slot of each bus it is told of
VIRTIO_MMIO_BASE = 0xFEB0_0000                                   # a page each
IOAPIC_BASE = 0xFEC0_0000
LAPIC_BASE = 0xFEE0_0000
IDENTITY_MAP_BASE = 0xFFFB_C000                                  # KVM_SET_IDENTITY_MAP_ADDR, one page
TSS_BASE = 0xFFFB_D000                                           # KVM_SET_TSS_ADDR, three pages
PCI_MMIO64_SIZE = 1 << 37                                        # placed above guest memory by machine.py

# I/O ports.
PORT_COM1, PORT_COM2 = 0x3F8, 0x2F8
PORT_CMOS = 0x70
PORT_I8042_DATA, PORT_I8042_COMMAND = 0x60, 0x64
PORT_SYSTEM_CONTROL_A = 0x92                                     # fast A20 and reset
PORT_DEBUG_CONSOLE = 0x402
PORT_DEBUG_EXIT = 0xF4
PORT_PVPANIC = 0x505
PORT_PCI_CONFIG_ADDRESS, PORT_PCI_CONFIG_DATA = 0xCF8, 0xCFC
PORT_ACPI_PM, PORT_ACPI_PM_SIZE = 0x600, 0x28
# its blocks: PM1a event +0, PM1a control +4, PM timer +8, GPE0 +0x20
ACPI_GPE0_SIZE = 4                                               # bytes: status for 16 events, then enable for as many
ACPI_SLEEP_TYPE_S5 = 5                                           # SLP_TYP that powers off; every other type is none
ACPI_HOTPLUG_EVENT = 1                                           # the general-purpose event of cards that come and go
PORT_PCI_HOTPLUG, PORT_PCI_HOTPLUG_SIZE = 0x640, 0xC
PORT_ACPI_RESET = 0x630                                          # what the FADT tells; PORT_PCI_CONFIG_ADDRESS + 1 is the old place
ACPI_RESET_VALUE = 6
PCI_IO_BASE, PCI_IO_SIZE = 0xC000, 0x3000

# Interrupts. The PCI pins go to ISA lines so that a guest without an I/O APIC has them too.
GSI_COM1, GSI_COM2 = 4, 3
GSI_KEYBOARD = 1
GSI_RTC = 8
GSI_SCI = 9
GSI_INTX = (10, 11, 10, 11)                                      # of (slot + pin) % 4, INTA is pin 0; level, active high
VIRTIO_MMIO_GSIS = (5, 6, 7, 10, 11, 12, 14, 15)                 # edges; ISA lines, which every guest can use by their numbers
VIRTIO_MMIO_GSIS_ACPI = tuple(range(16, 24))                     # those that only ACPI can tell of
GSI_MSI_BASE = 24                                                # GSI routes from here up belong to MSI vectors

# What direct boot lays into low memory (all below the EBDA; e820 marks what must survive).
BOOT_GDT = 0x500
BOOT_INFO = 0x6000                                               # PVH start info or multiboot information
BOOT_ZERO_PAGE = 0x7000
BOOT_STACK_TOP = 0x8FF0
BOOT_PAGE_TABLES = 0x9000                                        # PML4, PDPT, four PDs: identity map of 4 GiB in 2 MiB pages
BOOT_SETUP_DATA, BOOT_SETUP_DATA_SIZE = 0x1_0000, 0x1000        # Linux's list of setup_data: a seed for its random numbers
BOOT_CMDLINE, BOOT_CMDLINE_SIZE = 0x2_0000, 0x1_0000
EBDA = 0x9_FC00                                                  # MP floating pointer
ROM_AREA, ROM_AREA_END = 0xE_0000, 0x10_0000                     # RSDP and ACPI tables, then:
ROM_SMBIOS = 0xF_0000                                            # SMBIOS entry points and structures
ROM_MP_TABLE = 0xF_8000                                          # MP table
ROM_REAL_MODE = 0xF_FF00                                         # what answers in place of a BIOS
BOOT_KERNEL = 0x10_0000
