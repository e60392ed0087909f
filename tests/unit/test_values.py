"""Kinds of values: what is read, what is refused, and that what is written is read back."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmapp.schema import DOMAIN
from kvmapp.values import (
    GIB,
    KIB,
    MIB,
    TIB,
    Bool,
    Choice,
    DiskName,
    Duration,
    Integer,
    InterfaceName,
    ListOf,
    Mac,
    Name,
    Path,
    Size,
    Text,
    Uuid,
    make_mac,
    make_uuid,
)

MEMORY = Size(MIB, 16 * TIB, step=4 * KIB, bare=MIB)

READ = [
    (Bool(), "Yes", True), (Bool(), "off", False), (Bool(), "true", True),
    (Integer(0, 10), "007", 7), (Integer(-5, 5), "-5", -5),
    (MEMORY, "1024 MiB", GIB), (MEMORY, "1 GiB", GIB), (MEMORY, "512M", 512 * MIB), (MEMORY, "512", 512 * MIB),
    (MEMORY, "1.5g", 1536 * MIB), (MEMORY, "4096 KB", 4096000), (MEMORY, "2 tib", 2 * TIB),
    (Duration(0, 3600), "90", 90), (Duration(0, 3600), "1.5 min", 90), (Duration(0, 3600), "1h", 3600),
    (Choice("a", "b"), "b", "b"),
    (Name(), "linuxvm02", "linuxvm02"), (Name(), "my guest.1", "my guest.1"), (Name(), "虚拟机", "虚拟机"),
    (Name(), "x" * 200, "x" * 200),
    (DiskName(), "vda", "vda"), (DiskName(), "vdaa", "vdaa"),
    (Uuid(), "D340F42E-8611-52C5-949C-8013181E73D4", "d340f42e-8611-52c5-949c-8013181e73d4"),
    (Uuid(), "d340f42e861152c5949c8013181e73d4", "d340f42e-8611-52c5-949c-8013181e73d4"),
    (Mac(), "52:54:00:7F:0d:cb", "52:54:00:7f:0d:cb"),
    (Path(), "/data/a b #1.img", "/data/a b #1.img"), (Path(), "/数据/全角　.img", "/数据/全角　.img"),
    (InterfaceName(), "br0", "br0"),
    (ListOf(Integer(0, 9)), "1, 2,3", [1, 2, 3]), (ListOf(Text()), "", []),
    (Text(9), "a\tb", "a\tb"), (Text(9, lines=True), "a\nb", "a\nb"),
]
REFUSED = [
    (Bool(), "1"), (Bool(), "maybe"), (Bool(), ""),
    (Integer(0, 10), "11"), (Integer(0, 10), "-1"), (Integer(0, 10), "1.0"), (Integer(0, 10), "٣"),
    (Integer(0, 10), ""), (Integer(0, 10), "--1"), (Integer(0, 10), "1" * 5000),
    (MEMORY, ""), (MEMORY, "lots"), (MEMORY, "-1 MiB"), (MEMORY, "1 XiB"), (MEMORY, "1 KiB"), (MEMORY, "99 TiB"),
    (MEMORY, "1048577 B"), (MEMORY, "0.1 KiB"), (MEMORY, "1..5 G"), (MEMORY, "1 2 M"), (MEMORY, "٣ G"), (MEMORY, "MiB"),
    (MEMORY, "9" * 5000), (MEMORY, "1e3 M"),
    (Duration(0, 3600), "2 h"), (Duration(0, 3600), "0.5"), (Duration(0, 3600), "soon"),
    (Choice("a", "b"), "A"), (Choice("a", "b"), ""),
    (Name(), ""), (Name(), "a/b"), (Name(), ".hidden"), (Name(), "-n"), (Name(), " a"), (Name(), "a "),
    (Name(), "a\nb"), (Name(), "a\0b"), (Name(), "a\x7fb"), (Name(), "x" * 201), (Name(), "机" * 67),
    (Name(), "a\u202eb"), (Name(), "a\udcffb"),
    (DiskName(), "sda"), (DiskName(), "vd"), (DiskName(), "vdA"), (DiskName(), "vd1"), (DiskName(), "vdaaa"),
    (Uuid(), "d340f42e-8611-52c5-949c"), (Uuid(), "d340f42e86-1152c5949c8013181e73d4"), (Uuid(), "g" * 32),
    (Mac(), "52:54:00:7f:0d"), (Mac(), "53:54:00:7f:0d:cb"), (Mac(), "00:00:00:00:00:00"), (Mac(), "52-54-00-7f-0d-cb"),
    (Mac(), "52:54:00:7f:0d:+b"), (Path(), ""), (Path(), "a\0"), (Path(), "a\n"), (Path(), "x" * 4096),
    (InterfaceName(), "sixteen-letters-"), (InterfaceName(), "a/b"), (InterfaceName(), ".."), (InterfaceName(), "a:1"),
    (ListOf(Integer(0, 9)), "1,,2"), (ListOf(Integer(0, 9), limit=2), "1,2,3"),
    (Text(9), "a\nb"), (Text(9), "0123456789"), (Text(9, ascii=True), "é"), (Text(9), "\x1b[2J"),
]


@pytest.mark.parametrize(("kind", "text", "value"), READ)
def test_read_and_written_back(kind, text, value):
    assert kind.parse(text) == value
    assert type(kind.parse(text)) is kind.python_type
    assert kind.parse(kind.format(value)) == value


@pytest.mark.parametrize(("kind", "text"), REFUSED)
def test_refused_with_what_was_expected(kind, text):
    with pytest.raises(ValueError, match=r"\w"):
        kind.parse(text)


@given(st.integers(1, 16 * TIB // (4 * KIB)))
def test_every_size_is_read_back(pages):
    if pages * 4 * KIB >= MIB:
        assert MEMORY.parse(MEMORY.format(pages * 4 * KIB)) == pages * 4 * KIB


@given(st.integers(0, 3600))
def test_every_duration_is_read_back(seconds):
    kind = Duration(0, 3600)
    assert kind.parse(kind.format(seconds)) == seconds


@given(st.text(max_size=40))
def test_no_text_makes_a_kind_raise_anything_but_valueerror(text):
    for section in (DOMAIN.top, *DOMAIN.sections.values()):
        for setting in section.settings.values():
            try:
                value = setting.kind.parse(text)
            except ValueError:
                continue
            assert setting.kind.parse(setting.kind.format(value)) == value


def test_made_addresses_are_well_formed_and_differ():
    assert make_uuid()[14] == "4" and make_uuid()[19] in "89ab"
    assert Mac().parse(make_mac()).startswith("52:54:00:")
    assert len({make_uuid() for _ in range(100)}) == 100
