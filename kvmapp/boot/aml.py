"""A small assembler of ACPI Machine Language: functions that take terms and give bytes, so that a DSDT reads like its source.

    device("COM1", named("_HID", eisa_id("PNP0501")), named("_CRS", resources(io(0x3F8, 8), irq(4))))

A term is bytes already assembled, an int, or a str (an ASL string; a reference to a name is `ref("PATH")`). Follows ACPI 6.5,
chapter 20 (AML) and section 6.4 (resource descriptors). Leaves out: what our DSDT has no use for, loops above all.
"""
import struct

Term = bytes | int | str

DECODE_16, READ_WRITE = 1, 1
RANGE_MEMORY, RANGE_IO, RANGE_BUS = 0, 1, 2
FIXED_WINDOW = 0x0C                                              # minimum and maximum fixed, decoded positively, producer
WHOLE_IO_RANGE = 0x03
CONSUMER, EDGE, SHARED = 1, 2, 8                                 # of an extended interrupt
END_TAG = b"\x79\x00"
SPACE_IO, DWORD_ACCESS = 1, 3


# Data.

def term(value: Term) -> bytes:
    """A term's bytes."""
    if isinstance(value, bytes):
        return value
    return string(value) if isinstance(value, str) else integer(value)


def integer(value: int) -> bytes:
    if value < 2:
        return bytes((value,))                                   # ZeroOp and OneOp stand for themselves
    for prefix, layout in ((0x0A, "<BB"), (0x0B, "<BH"), (0x0C, "<BI")):
        if value < 1 << 8 * (struct.calcsize(layout) - 1):
            return struct.pack(layout, prefix, value)
    return struct.pack("<BQ", 0x0E, value)


def string(text: str) -> bytes:
    return b"\x0D" + text.encode("ascii") + b"\0"


def ref(path: str) -> bytes:
    """A name, as `COM1`, `^PCI0` or `\\_SB.PCI0`."""
    prefix = path[:len(path) - len(path.lstrip("\\^"))]
    segments = [segment.ljust(4, "_").encode("ascii") for segment in path[len(prefix):].split(".")]
    assert all(len(segment) == 4 for segment in segments), path
    counts = {1: b"", 2: b"\x2E"}
    return prefix.encode("ascii") + counts.get(len(segments), bytes((0x2F, len(segments)))) + b"".join(segments)


def eisa_id(text: str) -> bytes:
    """`PNP0A08` as its compressed 32-bit number (6.1.5)."""
    letters = (ord(text[0]) - 64) << 10 | (ord(text[1]) - 64) << 5 | ord(text[2]) - 64
    return integer(int.from_bytes(struct.pack(">HH", letters, int(text[3:], 16)), "little"))


def uuid(text: str) -> bytes:
    """A buffer as ToUUID makes it: the first three fields little-endian."""
    first, second, third, *rest = (bytes.fromhex(part) for part in text.split("-"))
    return buffer(first[::-1] + second[::-1] + third[::-1] + b"".join(rest))


def buffer(data: bytes) -> bytes:
    return _sized(b"\x11", integer(len(data)), data)


def package(*items: Term) -> bytes:
    return _sized(b"\x12", bytes((len(items),)), *map(term, items))


# Objects.

def named(path: str, value: Term) -> bytes:
    return b"\x08" + ref(path) + term(value)


def scope(path: str, *terms: bytes) -> bytes:
    return _sized(b"\x10", ref(path), *terms)


def device(path: str, *terms: bytes) -> bytes:
    return _sized(b"\x5B\x82", ref(path), *terms)


def method(path: str, arguments: int, *terms: bytes) -> bytes:
    """A serialized method."""
    return _sized(b"\x14", ref(path), bytes((arguments | 0x08,)), *terms)


def dword_field(source: bytes, offset: int, path: str) -> bytes:
    """CreateDWordField."""
    return b"\x8A" + source + integer(offset) + ref(path)


def io_region(path: str, port: int, size: int) -> bytes:
    """OperationRegion in I/O space."""
    return b"\x5B\x80" + ref(path) + bytes((SPACE_IO,)) + integer(port) + integer(size)


def dword_fields(region: str, *names: str) -> bytes:
    """Field: the region's dwords, one after the other."""
    return _sized(b"\x5B\x81", ref(region), bytes((DWORD_ACCESS,)), *(ref(name) + bytes((32,)) for name in names))


# Statements and expressions.

def call(path: str) -> bytes:
    """Of a method without arguments."""
    return ref(path)


def notify(path: str, value: int) -> bytes:
    return b"\x86" + ref(path) + integer(value)


def bit_and(left: Term, right: Term) -> bytes:
    """The value alone, stored nowhere."""
    return and_(left, right, b"\0")


def argument(number: int) -> bytes:
    return bytes((0x68 + number,))


def local(number: int) -> bytes:
    return bytes((0x60 + number,))


def if_(condition: bytes, *terms: bytes) -> bytes:
    return _sized(b"\xA0", condition, *terms)


def else_(*terms: bytes) -> bytes:
    return _sized(b"\xA1", *terms)


def equal(left: Term, right: Term) -> bytes:
    return b"\x93" + term(left) + term(right)


def not_equal(left: Term, right: Term) -> bytes:
    return b"\x92" + equal(left, right)


def and_(left: Term, right: Term, target: bytes) -> bytes:
    return b"\x7B" + term(left) + term(right) + target


def or_(left: Term, right: Term, target: bytes) -> bytes:
    return b"\x7D" + term(left) + term(right) + target


def store(source: Term, target: bytes) -> bytes:
    return b"\x70" + term(source) + target


def return_(value: Term) -> bytes:
    return b"\xA4" + term(value)


# Resources.

def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate."""
    return buffer(b"".join(descriptors) + END_TAG)


def io(port: int, size: int) -> bytes:
    return struct.pack("<BBHHBB", 0x47, DECODE_16, port, port, 1, size)


def irq(line: int) -> bytes:
    """An ISA interrupt: edge, active high, exclusive."""
    return struct.pack("<BH", 0x22, 1 << line)


def edge(gsi: int) -> bytes:
    """An extended interrupt (6.4.3.6): consumer, edge, active high, shared."""
    return struct.pack("<BHBBI", 0x89, 6, CONSUMER | EDGE | SHARED, 1, gsi)


def memory32(base: int, size: int) -> bytes:
    """Memory32Fixed, writable."""
    return struct.pack("<BHBII", 0x86, 9, READ_WRITE, base, size)


def bus_window(first: int, last: int) -> bytes:
    return _window(0x88, "H", RANGE_BUS, 0, first, last - first + 1)


def io_window(base: int, size: int) -> bytes:
    return _window(0x88, "H", RANGE_IO, WHOLE_IO_RANGE, base, size)


def memory_window32(base: int, size: int) -> bytes:
    return _window(0x87, "I", RANGE_MEMORY, READ_WRITE, base, size)


def memory_window64(base: int, size: int) -> bytes:
    return _window(0x8A, "Q", RANGE_MEMORY, READ_WRITE, base, size)


def _window(tag: int, width: str, kind: int, flags: int, base: int, size: int) -> bytes:
    """An address space descriptor (6.4.3.5): granularity, minimum, maximum, translation, length."""
    fields = struct.pack(f"<5{width}", 0, base, base + size - 1, 0, size)
    return struct.pack("<BHBBB", tag, 3 + len(fields), kind, FIXED_WINDOW, flags) + fields


def _sized(opcode: bytes, *parts: bytes) -> bytes:
    """opcode, PkgLength, parts. The length counts itself; it takes one to four bytes (20.2.4)."""
    body = b"".join(parts)
    if len(body) + 1 < 1 << 6:
        return opcode + bytes((len(body) + 1,)) + body
    for extra in (1, 2, 3):
        total = len(body) + 1 + extra
        if total < 1 << 4 + 8 * extra:
            return opcode + bytes((extra << 6 | total & 0xF,)) + (total >> 4).to_bytes(extra, "little") + body
    raise OverflowError("AML package of 256 MiB")
