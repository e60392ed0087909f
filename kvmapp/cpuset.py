"""Sets of the host's CPUs, or of its NUMA nodes, as text: libvirt's cpuset syntax, of which the kernel's own lists are a part.

    CpuSet().parse("0-3,^2,6")      "0-1,3,6", as the kernel would write it; a setting's value stays text
    members("0-1,3,6")              [0, 1, 3, 6]
    ranges([0, 1, 3, 6])            "0-1,3,6"
"""
from __future__ import annotations

from kvmapp.values import Kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

CPUS_MOST = 8192                        # NR_CPUS of the largest kernels
NODES_MOST = 1024                       # MAX_NUMNODES


class CpuSet(Kind):
    """Numbers and ranges, parted by commas; ^N takes a number out of those that stand before it."""
    metavar = "CPUSET"

    def __init__(self, what: str = "CPUs", limit: int = CPUS_MOST):
        self.what, self.limit = what, limit

    def parse(self, text: str) -> str:
        try:
            numbers = members(text, self.limit)
        except ValueError:
            numbers = []
        if not numbers:
            raise ValueError(self.describe())
        return ranges(numbers)

    def describe(self) -> str:
        return f"numbers of {self.what} below {self.limit} such as 0-3,^2,6: ranges parted by commas, ^ for all but this one"


def members(text: str, limit: int = CPUS_MOST) -> list[int]:
    """In ascending order; of nothing, none. Raises ValueError for what is no such list."""
    found: set[int] = set()
    for part in text.split(",") if text.strip() else ():
        part = part.strip()
        first, dash, last = part.removeprefix("^").partition("-")
        numbers = range(number(first, limit), number(last if dash else first, limit) + 1)
        if not numbers or (dash and part.startswith("^")):
            raise ValueError(part)
        if part.startswith("^"):
            found.difference_update(numbers)
        else:
            found.update(numbers)
    return sorted(found)


def number(text: str, limit: int) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 6 and int(text) < limit):
        raise ValueError(text)
    return int(text)


def ranges(numbers: Iterable[int]) -> str:
    """Of ascending numbers: 0-3,6 for 0 1 2 3 6."""
    parts: list[str] = []
    last = 0
    for one in numbers:
        if parts and one == last + 1:
            parts[-1] = f"{parts[-1].partition('-')[0]}-{one}"
        else:
            parts.append(str(one))
        last = one
    return ",".join(parts)
