"""What a kernel finds that steps down to real mode and calls the BIOS, though there is none: an answer, not a jump into nothing.

Follows the IBM PC's conventions: a software interrupt returns with the carry flag set ("not supported"), exceptions and hardware
interrupts just return, the reset vector resets the machine, and the BIOS data area names the serial ports, the EBDA and the
memory below it. Leaves out: every service. Xen asks for the memory map and the video mode that way, whatever the loader told it.
"""
import struct

from kvmapp.boot.platform import Platform
from kvmapp.layout import ACPI_RESET_VALUE, EBDA, KIB, PORT_ACPI_RESET, ROM_AREA_END, ROM_REAL_MODE

VECTORS = 256
HARDWARE = (*range(0x10), *range(0x70, 0x78))                   # exceptions, and both PICs as a BIOS sets them up
BDA_SERIAL_PORTS, BDA_EBDA_SEGMENT, BDA_MEMORY_SIZE = 0x400, 0x40E, 0x413
ROM_SEGMENT = 0xF000
RESET_VECTOR = ROM_AREA_END - 16

NOT_SUPPORTED = bytes.fromhex(
    "55"                                                         # push bp
    "89e5"                                                       # mov bp, sp
    "804e0601"                                                   # or byte [bp + 6], 1: the carry of the caller's flags
    "5d"                                                         # pop bp
    "cf")                                                        # iret: where hardware's vectors lead
RESET = (b"\xBA" + struct.pack("<H", PORT_ACPI_RESET)            # mov dx, PORT_ACPI_RESET
         + b"\xB0" + bytes((ACPI_RESET_VALUE,))                  # mov al, 6
         + bytes.fromhex("ee"                                    # out dx, al
                         "f4"                                    # hlt
                         "ebfd"))                                # jmp to the hlt


def write(memory, platform: Platform) -> None:
    """Writes vectors, handlers and the BIOS data area."""
    services, hardware = (struct.pack("<HH", gpa - (ROM_SEGMENT << 4), ROM_SEGMENT)
                          for gpa in (ROM_REAL_MODE, ROM_REAL_MODE + len(NOT_SUPPORTED) - 1))
    memory.write(0, b"".join(hardware if vector in HARDWARE else services for vector in range(VECTORS)))
    memory.write(ROM_REAL_MODE, NOT_SUPPORTED)
    memory.write(RESET_VECTOR, RESET)
    memory.write(BDA_SERIAL_PORTS, b"".join(struct.pack("<H", port) for port, _ in platform.serial_ports))
    memory.write(BDA_EBDA_SEGMENT, struct.pack("<H", EBDA >> 4))
    memory.write(BDA_MEMORY_SIZE, struct.pack("<H", EBDA // KIB))
    memory.write(EBDA, b"\x01")                                  # its own size in KiB
