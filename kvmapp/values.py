"""Kinds of values a setting may have: text of an INI file or option to a typed value and back.

`parse` raises ValueError with the words for "expected ..."; `format` gives text that `parse` reads back as the same
value; `describe` is what the man page and error messages call the kind. Nothing here looks at the host or at a file.
"""
from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
HEX_DIGITS = frozenset("0123456789abcdef")
# Line and paragraph separators, and the marks that turn the writing direction and so make a terminal show another text.
DECEIVING = frozenset("\u2028\u2029\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")
WORD_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def is_plain(text: str) -> bool:
    """True when the text is valid Unicode that a terminal shows as it is: no control characters, no surrogates."""
    return text.isprintable() or not any(
        letter < " " or "\x7f" <= letter <= "\x9f" or "\ud800" <= letter <= "\udfff" or letter in DECEIVING
        for letter in text)


def is_label(text: str) -> bool:
    """Plain, and short enough to be a name or a reason."""
    return len(text) < 64 and is_plain(text)


class Kind:
    """One kind of value. The base class is one line of printable text."""
    python_type: type = str
    metavar = "TEXT"

    def parse(self, text: str):
        return text

    def format(self, value) -> str:
        return str(value)

    def describe(self) -> str:
        return "text"


class Text(Kind):
    """Printable text of at most `limit` bytes; several lines where `lines` is set; ASCII only where `ascii` is set."""

    def __init__(self, limit: int = 1024, *, lines: bool = False, ascii: bool = False):
        self.limit, self.lines, self.ascii = limit, lines, ascii

    def parse(self, text: str) -> str:
        plain = text.replace("\t", " ")
        if self.lines:
            plain = plain.replace("\n", " ")
        if not is_plain(plain) or (self.ascii and not plain.isascii()):
            raise ValueError(self.describe())
        if len(text.encode()) > self.limit:
            raise ValueError(f"at most {self.limit} bytes, got {len(text.encode())}")
        return text

    def describe(self) -> str:
        lines = "printable text" if self.lines else "one line of printable text"
        return f"{lines}{' in ASCII' if self.ascii else ''}, at most {self.limit} bytes"


class Bool(Kind):
    python_type = bool
    metavar = "yes|no"
    words: ClassVar = {"yes": True, "no": False, "on": True, "off": False, "true": True, "false": False}

    def parse(self, text: str) -> bool:
        try:
            return self.words[text.lower()]
        except KeyError:
            raise ValueError("yes or no") from None

    def format(self, value: bool) -> str:
        return "yes" if value else "no"

    def describe(self) -> str:
        return "yes or no"


class Integer(Kind):
    python_type = int
    metavar = "NUMBER"

    def __init__(self, low: int, high: int):
        self.low, self.high = low, high

    def parse(self, text: str) -> int:
        if not text.isascii() or not text.removeprefix("-").isdigit() or len(text) > 20:
            raise ValueError(self.describe())
        number = int(text)
        if not self.low <= number <= self.high:
            raise ValueError(self.describe())
        return number

    def describe(self) -> str:
        return f"a whole number from {self.low} to {self.high}"


class Quota(Integer):
    """Microseconds of CPU time in a period, as the kernel's scheduler takes them (and libvirt); -1 is no limit."""

    def __init__(self) -> None:
        super().__init__(1000, 17592186044415)

    def parse(self, text: str) -> int:
        return -1 if text == "-1" else super().parse(text)

    def describe(self) -> str:
        return f"{super().describe()}, or -1 for no limit"


def scaled(text: str, units: dict[str, int], bare: int, expected: str) -> int:
    """A number with a unit, exactly: `1.5 GiB` is whole in bytes, `0.1 KiB` is not and is refused."""
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = text[len(number):].lower()
    whole, _, fraction = number.strip().partition(".")
    digits = whole + fraction
    scale = units.get(unit) if unit else bare
    if scale is None or not digits.isascii() or not digits.isdigit() or len(digits) > 20:
        raise ValueError(expected)
    value, rest = divmod(int(digits) * scale, 10 ** len(fraction))
    if rest:
        raise ValueError(expected)
    return value


class Size(Kind):
    """Bytes. `1 GiB`, `1G` and `1024M` count in 1024s, `1 GB` in 1000s, as in libvirt; a bare number is in `bare`
    units.
    """
    python_type = int
    metavar = "SIZE"
    units: ClassVar = {"b": 1, "bytes": 1, "k": KIB, "kib": KIB, "m": MIB, "mib": MIB, "g": GIB, "gib": GIB, "t": TIB,
                       "tib": TIB, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}

    def __init__(self, low: int, high: int, *, step: int = 1, bare: int = 1):
        self.low, self.high, self.step, self.bare = low, high, step, bare

    def parse(self, text: str) -> int:
        size = scaled(text, self.units, self.bare, self.describe())
        if not self.low <= size <= self.high:
            raise ValueError(self.describe())
        if size % self.step:
            raise ValueError(f"a multiple of {self.format(self.step)}")
        return size

    def format(self, value: int) -> str:
        for unit, scale in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
            if value and value % scale == 0:
                return f"{value // scale} {unit}"
        return f"{value} B"

    def describe(self) -> str:
        return f"a size such as 512 MiB or 2 GiB, from {self.format(self.low)} to {self.format(self.high)}"


class Duration(Kind):
    """Whole seconds; `90`, `90 s`, `1.5 min`, `1 h`."""
    python_type = int
    metavar = "TIME"
    units: ClassVar = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}

    def __init__(self, low: int, high: int):
        self.low, self.high = low, high

    def parse(self, text: str) -> int:
        seconds = scaled(text, self.units, 1, self.describe())
        if not self.low <= seconds <= self.high:
            raise ValueError(self.describe())
        return seconds

    def format(self, value: int) -> str:
        for unit, scale in (("h", 3600), ("min", 60)):
            if value and value % scale == 0:
                return f"{value // scale} {unit}"
        return f"{value} s"

    def describe(self) -> str:
        return f"a time such as 30 s or 5 min, from {self.format(self.low)} to {self.format(self.high)}"


class Choice(Kind):
    def __init__(self, *choices: str):
        self.choices = choices
        self.metavar = "|".join(choices)

    def parse(self, text: str) -> str:
        if text not in self.choices:
            raise ValueError(self.describe())
        return text

    def describe(self) -> str:
        return self.choices[0] if len(self.choices) == 1 else ", ".join(self.choices[:-1]) + " or " + self.choices[-1]


class Name(Kind):
    """Of a domain, network or pool: also a file's name, so as libvirt refuses, and what a file or a terminal cannot
    bear.
    """
    metavar = "NAME"
    limit = 200

    def parse(self, text: str) -> str:
        if not text or text != text.strip() or text[0] in ".-" or "/" in text or not is_plain(text):
            raise ValueError(self.describe())
        if len(text.encode()) > self.limit:
            raise ValueError(f"a name of at most {self.limit} bytes, got {len(text.encode())}")
        return text

    def describe(self) -> str:
        return "a name without slashes or control characters that starts with neither a dot, a dash nor a space"


class Word(Kind):
    """A plain word: letters, digits, dot, dash and underscore, so that it stands in a section's heading as it is."""
    metavar = "WORD"

    def __init__(self, limit: int = 63):
        self.limit = limit

    def parse(self, text: str) -> str:
        if not text or len(text) > self.limit or text[0] in ".-" or not WORD_CHARACTERS.issuperset(text):
            raise ValueError(self.describe())
        return text

    def describe(self) -> str:
        return f"letters, digits, dots, dashes and underscores, at most {self.limit}"


class DiskName(Kind):
    """What a Linux guest calls the disk: vda ... vdz, vdaa ..."""
    metavar = "vdX"

    def parse(self, text: str) -> str:
        letters = text.removeprefix("vd")
        if len(letters) == len(text) or not letters.isalpha() or not letters.isascii() or not letters.islower() \
                or len(letters) > 2:
            raise ValueError(self.describe())
        return text

    def describe(self) -> str:
        return "the guest's name for a virtio disk: vda, vdb, ..."


class Uuid(Kind):
    metavar = "UUID"

    def parse(self, text: str) -> str:
        digits = text.lower().replace("-", "")
        hyphens = [index for index, character in enumerate(text) if character == "-"]
        if len(digits) != 32 or not HEX_DIGITS.issuperset(digits) or hyphens not in ([], [8, 13, 18, 23]):
            raise ValueError(self.describe())
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))

    def describe(self) -> str:
        return "a UUID such as d340f42e-8611-52c5-949c-8013181e73d4"


def make_uuid() -> str:
    """A random UUID, RFC 9562 version 4."""
    raw = bytearray(os.urandom(16))
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    return Uuid().parse(raw.hex())


class Mac(Kind):
    metavar = "MAC"

    def parse(self, text: str) -> str:
        parts = text.lower().split(":")
        if len(parts) != 6 or any(len(part) != 2 or not HEX_DIGITS.issuperset(part) for part in parts):
            raise ValueError(self.describe())
        if int(parts[0], 16) & 1 or not any(int(part, 16) for part in parts):
            raise ValueError("a unicast MAC address (an even first byte, not all zero)")
        return ":".join(parts)

    def describe(self) -> str:
        return "a MAC address such as 52:54:00:7f:0d:cb"


def make_mac() -> str:
    """A random MAC under the prefix that QEMU and KVM guests bear."""
    return "52:54:00:" + os.urandom(3).hex(":")


class Path(Kind):
    """A file's name. A relative one belongs to the folder of the file that names it; the reader of that file joins
    them.
    """
    metavar = "PATH"

    def parse(self, text: str) -> str:
        if not text or not is_plain(text) or len(os.fsencode(text)) > 4095:
            raise ValueError(self.describe())
        return text

    def describe(self) -> str:
        return "a path without control characters, at most 4095 bytes"


class InterfaceName(Kind):
    """A network device of the host (IFNAMSIZ and the kernel's dev_valid_name)."""
    metavar = "DEVICE"

    def parse(self, text: str) -> str:
        if text in ("", ".", "..") or len(text.encode()) > 15 or "/" in text or ":" in text or " " in text \
                or not is_plain(text):
            raise ValueError(self.describe())
        return text

    def describe(self) -> str:
        return "a network device's name: at most 15 bytes, without slash, colon or space"


class Address(Kind):
    """An IP address of the `version` given (4, 6, or 0 for both) that a host may have."""
    metavar = "ADDRESS"

    def __init__(self, version: int = 0):
        self.version = version

    def parse(self, text: str) -> str:
        from ipaddress import ip_address
        try:
            address = ip_address(text)
        except ValueError:
            raise ValueError(self.describe()) from None
        if self.version not in (0, address.version) or address.is_multicast or "%" in text:
            raise ValueError(self.describe())
        return str(address)

    def describe(self) -> str:
        return f"an IPv{self.version} address" if self.version else "an IPv4 or IPv6 address"


class Subnet(Kind):
    """A host's own address and its network: 192.168.122.1/24."""
    metavar = "ADDRESS/PREFIX"

    def __init__(self, version: int):
        self.version = version

    def parse(self, text: str) -> str:
        from ipaddress import ip_interface
        try:
            interface = ip_interface(text)
        except ValueError:
            raise ValueError(self.describe()) from None
        network, address = interface.network, interface.ip
        if interface.version != self.version or "/" not in text or "%" in text or address.is_multicast:
            raise ValueError(self.describe())
        if network.num_addresses < 4 or address in (network.network_address, network.broadcast_address):
            raise ValueError(f"an address of a host, not of the network, such as {network[1]}/{network.prefixlen}")
        return interface.with_prefixlen

    def describe(self) -> str:
        return f"an address and its prefix, such as {'192.168.122.1/24' if self.version == 4 else 'fd00:122::1/64'}"


class AddressRange(Kind):
    """`FIRST - LAST`, both included."""
    metavar = "FIRST - LAST"

    def __init__(self, version: int):
        self.version = version

    def parse(self, text: str) -> str:
        from ipaddress import ip_address
        first, _, last = (part.strip() for part in text.partition("-"))
        try:
            ends = ip_address(first), ip_address(last)
        except ValueError:
            raise ValueError(self.describe()) from None
        if {end.version for end in ends} != {self.version} or "%" in text:
            raise ValueError(self.describe())
        if int(ends[0]) > int(ends[1]):
            raise ValueError("the lower address first")
        return f"{ends[0]} - {ends[1]}"

    def describe(self) -> str:
        ends = "192.168.122.2 - 192.168.122.254" if self.version == 4 else "fd00:122::100 - fd00:122::1ff"
        return f"two addresses, such as {ends}"


class DomainName(Kind):
    """A DNS name of one or several labels (RFC 1123)."""
    metavar = "DOMAIN"

    def parse(self, text: str) -> str:
        labels = text.lower().split(".")
        allowed = WORD_CHARACTERS - {".", "_"}
        if len(text) > 253 or not all(0 < len(label) < 64 and allowed.issuperset(label) and label[0] != "-"
                                      and label[-1] != "-" for label in labels):
            raise ValueError(self.describe())
        return text.lower()

    def describe(self) -> str:
        return "a DNS name: labels of letters, digits and dashes, parted by dots"


class Forward(Kind):
    """A port of the host that leads to a guest in user mode."""
    metavar = "tcp:[ADDRESS:]PORT:GUESTPORT"

    def parse(self, text: str) -> str:
        try:
            protocol, _, port, to_port = self.split(text)
            if protocol not in ("tcp", "udp") or not (0 < port < 65536 and 0 < to_port < 65536):
                raise ValueError
        except ValueError:
            raise ValueError(self.describe()) from None
        return text

    @staticmethod
    def split(text: str) -> tuple[str, str, int, int]:
        """Protocol, the host's address, its port, the guest's port. Raises ValueError."""
        parts = text.split(":")
        if len(parts) == 3:
            parts.insert(1, "127.0.0.1")
        protocol, address, port, to_port = parts
        return protocol, Address(4).parse(address), int(port), int(to_port)

    def describe(self) -> str:
        return "tcp or udp, an IPv4 address of the host (127.0.0.1 if left out), its port and the guest's: tcp:2222:22"


class Permissions(Kind):
    """Permission bits in octal, 0000 to 0777."""
    python_type = int
    metavar = "OCTAL"

    def parse(self, text: str) -> int:
        digits = text.removeprefix("0o")
        if not 3 <= len(digits) <= 4 or not set(digits) <= set("01234567") or int(digits, 8) > 0o777:
            raise ValueError(self.describe())
        return int(digits, 8)

    def format(self, value: int) -> str:
        return f"{value:04o}"

    def describe(self) -> str:
        return "permission bits in octal, such as 0770"


class ListOf(Kind):
    """Values of one kind, parted by commas."""
    python_type = list

    def __init__(self, kind: Kind, limit: int = 256):
        self.kind, self.limit = kind, limit
        self.metavar = f"{kind.metavar},..."

    def parse(self, text: str) -> list:
        items = [item.strip() for item in text.split(",")] if text.strip() else []
        if len(items) > self.limit:
            raise ValueError(f"at most {self.limit} values, got {len(items)}")
        return [self.kind.parse(item) for item in items]

    def format(self, value: list) -> str:
        return ", ".join(self.kind.format(item) for item in value)

    def describe(self) -> str:
        return f"{self.kind.describe()}; several are parted by commas"
