"""SMBIOS: who made the machine, its UUID, CPUs and memory; what dmidecode, cloud-init and inventory tools in the guest read.

Follows DMTF DSP0134, versions 2.8 and 3.0: one list of structures with an entry point of each kind, since old systems know only
the first. Leaves out: OEM strings, slots, and caches.
"""
import struct

from kvmapp import __version__
from kvmapp.boot.acpi import checksum
from kvmapp.boot.platform import Platform
from kvmapp.layout import KIB, MIB, ROM_AREA, ROM_AREA_END, ROM_SMBIOS

ENTRY_2_8 = ROM_SMBIOS + 0x20                                    # behind the 3.0 one; each on 16 bytes
STRUCTURES = ROM_SMBIOS + 0x40

MAKER, PRODUCT = "kvmapp", "kvmapp virtual machine"
RELEASE_DATE = "01/01/2025"                                      # fixed: Linux works around machines older than 2008
OTHER, UNKNOWN, NONE, SAFE = 1, 2, 3, 3
NOT_PROVIDED = 0xFFFE
NO_CACHE = 0xFFFF
CHARACTERISTICS_UNSUPPORTED, VIRTUAL_MACHINE = 1 << 3, 1 << 4
CPU_CENTRAL, CPU_ENABLED_POPULATED, CPU_64_BIT = 3, 0x41, 1 << 2
SYSTEM_BOARD, SYSTEM_MEMORY = 3, 3
FORM_DIMM, TYPE_RAM, DETAIL_OTHER, WIDTH_UNKNOWN = 9, 7, 1 << 1, 0xFFFF
SIZE_IN_EXTENDED_FIELD = 0x7FFF
CAPACITY_IN_EXTENDED_FIELD = 0x8000_0000
ADDRESS_IN_EXTENDED_FIELD = 0xFFFF_FFFF

HANDLE_CHASSIS, HANDLE_CPU, HANDLE_ARRAY, HANDLE_DEVICE, HANDLE_RANGE = 0x300, 0x400, 0x1000, 0x1100, 0x1300


def write(memory, platform: Platform) -> None:
    """Writes the structures and both entry points."""
    structures = build(platform, memory.ranges)
    data = b"".join(structures)
    largest = max(len(structure) for structure in structures)
    memory.write(STRUCTURES, data)
    memory.write(ENTRY_2_8, _entry_2_8(len(data), len(structures), largest))
    memory.write(ROM_SMBIOS, _entry_3_0(len(data)))


def build(platform: Platform, ranges: list[tuple[int, int]]) -> list[bytes]:
    """The structures in the order of their types."""
    size = sum(length for _, length in ranges)
    return [
        _bios(),
        _system(platform),
        _chassis(),
        *(_processor(platform, socket) for socket in range(platform.topology.sockets)),
        _memory_array(size),
        _memory_device(size),
        *(_memory_range(number, gpa, length) for number, (gpa, length) in enumerate(ranges)),
        _structure(32, 0x2000, bytes(7)),                        # boot status: no errors
        _structure(127, 0x7F00, b""),
    ]


def _structure(kind: int, handle: int, formatted: bytes, *strings: str) -> bytes:
    """Header, formatted part, and the strings that it refers to by number, from 1 up."""
    text = b"".join(string.encode("utf-8") + b"\0" for string in strings) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(formatted), handle) + formatted + text + b"\0"


def _bios() -> bytes:
    """Type 0 (7.1): vendor, version, segment, date, ROM size in 64 KiB less one, characteristics."""
    rom = (ROM_AREA_END - ROM_AREA) // (64 * KIB) - 1
    return _structure(0, 0, struct.pack("<BBHBBQBB4B", 1, 2, ROM_AREA >> 4, 3, rom, CHARACTERISTICS_UNSUPPORTED,
                                        0, VIRTUAL_MACHINE, 0, 0, 0xFF, 0xFF), MAKER, __version__, RELEASE_DATE)


def _system(platform: Platform) -> bytes:
    """Type 1 (7.2). The UUID's first three fields are little-endian (7.2.1); woken up by the power switch."""
    uuid = platform.uuid
    mixed = uuid[3::-1] + uuid[5:3:-1] + uuid[7:5:-1] + uuid[8:]
    return _structure(1, 0x100, struct.pack("<BBBB16sBBB", 1, 2, 3, 0, mixed, 6, 0, 0), MAKER, PRODUCT, __version__)


def _chassis() -> bytes:
    """Type 3 (7.4): kind, all states "safe", security unknown, nothing contained."""
    return _structure(3, HANDLE_CHASSIS, struct.pack("<9BI5B", 1, OTHER, 2, 0, 0, SAFE, SAFE, SAFE, UNKNOWN, 0, 0, 0, 0, 0, 0),
                      MAKER, __version__)


def _processor(platform: Platform, socket: int) -> bytes:
    """Type 4 (7.5), a socket. Counts above 255 go into the 16-bit fields at the end."""
    cores, threads = platform.topology.cores, platform.topology.threads_per_socket
    few_cores, few_threads = min(cores, 0xFF), min(threads, 0xFF)
    head = struct.pack("<BBBBQBBHHHBB", 1, CPU_CENTRAL, OTHER, 2, 0, 3, 0, 0, 0, 0, CPU_ENABLED_POPULATED, OTHER)
    tail = struct.pack("<3H3B3BHH3H", NO_CACHE, NO_CACHE, NO_CACHE, 0, 0, 0, few_cores, few_cores, few_threads, CPU_64_BIT, OTHER,
                       cores, cores, threads)
    return _structure(4, HANDLE_CPU + socket, head + tail, f"CPU {socket}", MAKER, __version__)


def _memory_array(size: int) -> bytes:
    """Type 16 (7.17): all of the guest's memory on the system board, without error correction."""
    kib = size // KIB
    fits = kib < CAPACITY_IN_EXTENDED_FIELD
    return _structure(16, HANDLE_ARRAY, struct.pack("<BBBIHHQ", SYSTEM_BOARD, SYSTEM_MEMORY, NONE,
                                                    kib if fits else CAPACITY_IN_EXTENDED_FIELD, NOT_PROVIDED, 1,
                                                    0 if fits else size))


def _memory_device(size: int) -> bytes:
    """Type 17 (7.18): one device of the whole size, in MiB."""
    mib = size // MIB
    fits = mib < SIZE_IN_EXTENDED_FIELD
    return _structure(17, HANDLE_DEVICE, struct.pack(
        "<5H5BHH5BI4H", HANDLE_ARRAY, NOT_PROVIDED, WIDTH_UNKNOWN, WIDTH_UNKNOWN, mib if fits else SIZE_IN_EXTENDED_FIELD,
        FORM_DIMM, 0, 1, 0, TYPE_RAM, DETAIL_OTHER, 0, 2, 0, 0, 0, 0, 0 if fits else mib, 0, 0, 0, 0), "DIMM 0", MAKER)


def _memory_range(number: int, gpa: int, size: int) -> bytes:
    """Type 19 (7.20): first and last KiB of a range; above 4 TiB in bytes, in the extended fields."""
    first, last = gpa // KIB, (gpa + size - 1) // KIB
    if last < ADDRESS_IN_EXTENDED_FIELD:
        fields = struct.pack("<IIHBQQ", first, last, HANDLE_ARRAY, 1, 0, 0)
    else:
        fields = struct.pack("<IIHBQQ", ADDRESS_IN_EXTENDED_FIELD, ADDRESS_IN_EXTENDED_FIELD, HANDLE_ARRAY, 1,
                             gpa, gpa + size - 1)
    return _structure(19, HANDLE_RANGE + number, fields)


def _entry_2_8(length: int, count: int, largest: int) -> bytes:
    """The 32-bit entry point (5.2.1): two checksums, the inner one over the part from _DMI_ on."""
    entry = bytearray(struct.pack("<4sBBBBHB5x5sBHIHB", b"_SM_", 0, 31, 2, 8, largest, 0, b"_DMI_", 0, length, STRUCTURES, count,
                                  0x28))
    entry[21] = checksum(entry[16:])
    entry[4] = checksum(entry)
    return bytes(entry)


def _entry_3_0(length: int) -> bytes:
    """The 64-bit entry point (5.2.2)."""
    entry = bytearray(struct.pack("<5sBBBBBBBIQ", b"_SM3_", 0, 24, 3, 0, 0, 1, 0, length, STRUCTURES))
    entry[5] = checksum(entry)
    return bytes(entry)
