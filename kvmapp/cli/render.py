"""Answers as text, in virsh's layouts (its vshtable.c and the printf lines of its verbs).

Left out: virsh's rule to print what cannot be printed as \\x escapes; the daemon lets no such name in.
"""
from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

GAP = "   "
KIB = 1024
# Control characters of a title or a path must not reach a terminal; the daemon refuses them, a file name of the host may hold them.
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, header: bool = True) -> str:
    """Columns as wide as their widest cell, a line of dashes below the titles; with a blank line after the table's end left out."""
    if header:
        rows = [titles, *rows]
    cells = [[plain(cell) for cell in row] for row in rows]
    widths = [[width(cell) for cell in row] for row in cells]
    columns = [max(column) for column in zip(*widths, strict=True)]
    lines = [" " + GAP.join(cell + " " * (most - wide) for cell, wide, most in zip(row, wide_row, columns, strict=True)).rstrip()
             for row, wide_row in zip(cells, widths, strict=True)]
    if header:
        lines.insert(1, "-" * (sum(columns) + len(GAP) * len(columns)))
    return "\n".join(lines) + "\n" if lines else ""


def pairs(lines: Iterable[tuple[str, object]], column: int) -> str:
    """`Name:   value` lines whose values begin at `column`."""
    return "".join(f"{f'{name}:' if name else '':{column - 1}} {plain(str(value))}\n" for name, value in lines)


def plain(text: str) -> str:
    return text if text.isprintable() else text.translate(CONTROLS)


def width(text: str) -> int:
    """How many places a terminal gives to the text."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width
    return sum(0 if combining(letter) else 2 if east_asian_width(letter) in "WF" else 1 for letter in text)


def kib(size: int | None) -> str:
    return "-" if size is None else f"{size // KIB} KiB"


def seconds(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e9:.1f}s"


def yes_no(value: object) -> str:
    return "yes" if value else "no"


def or_dash(value: object) -> str:
    return "-" if value is None or value == "" else str(value)


def human(amount: float) -> str:
    """At most five places: 999, 1.5K, 12.3M."""
    for unit in ("", "K", "M", "G", "T"):
        if amount < 999.5:
            return f"{amount:.0f}" if not unit else f"{amount:.1f}{unit}"
        amount /= 1000
    return f"{amount:.1f}P"


def human_size(size: int | None) -> str:
    """As virsh's --human: 20.000 GiB."""
    if size is None:
        return "-"
    amount, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.3f} {unit}"


def clock(moment: float) -> str:
    """A moment of the epoch, for people, in the host's time."""
    import time
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
