"""GuestMemory as Python sees it: views are writable, lie on the same RAM as read and write, and end where RAM ends."""
import pytest

from kvmapp.layout import GIB, HIGH_MEMORY_BASE, LOW_MEMORY_END
from kvmapp.memory import GuestAddressError, GuestMemory

SIZE = 1 << 20


def test_view_writes_through():
    memory = GuestMemory(SIZE)
    memory.view(0x1000, 4)[:] = b"boot"
    assert memory.read(0x1000, 4) == b"boot"


def test_memory_is_split_around_the_hole():
    memory = GuestMemory(4 * GIB)
    assert memory.ranges == [(0, LOW_MEMORY_END), (HIGH_MEMORY_BASE, GIB)]
    assert memory.size == 4 * GIB


@pytest.mark.parametrize(("gpa", "length"), [(SIZE, 1), (SIZE - 1, 2), (2**64 - 1, 2), (0, SIZE + 1), (1, 2**64 - 1)])
def test_ranges_outside_ram_are_refused(gpa, length):
    memory = GuestMemory(SIZE)
    with pytest.raises(GuestAddressError):
        memory.view(gpa, length)
