"""Saved state is asked for field by field; whatever is missing, of another type, out of bounds or left over is refused."""
import pytest

from kvmapp.state import StateError, StateReader

GOOD = {"version": 1, "ier": 3, "on": True, "fifo": b"ab", "regs": [1, 2], "mask": 0x81}


def take_all(state):
    reader = StateReader("serial0", state, version=1)
    values = reader.uint("ier", 0xF), reader.flag("on"), reader.data("fifo", 16), reader.uints("regs", 2, 0xFF)
    assert reader.bits("mask", 0x81) == 0x81
    reader.done()
    return values


def test_a_good_state_is_taken_and_left_as_it_was():
    state = dict(GOOD)
    assert take_all(state) == (3, True, b"ab", [1, 2])
    assert state == GOOD


@pytest.mark.parametrize("change", [
    {"version": 2}, {"version": 0}, {"version": "1"}, {"ier": 0x10}, {"ier": -1}, {"ier": True}, {"ier": None}, {"on": 1},
    {"fifo": b"x" * 17}, {"fifo": "ab"}, {"regs": [1]}, {"regs": [1, 256]}, {"regs": [1, True]}, {"regs": (1, 2)}, {"extra": 0},
    {"mask": 2}, {"mask": -1}, {"mask": None},
])
def test_a_bad_state_is_refused_with_the_owner_named(change):
    with pytest.raises(StateError, match="serial0"):
        take_all({**GOOD, **change})


@pytest.mark.parametrize("key", sorted(GOOD))
def test_a_missing_field_is_refused(key):
    with pytest.raises(StateError, match=key):
        take_all({name: value for name, value in GOOD.items() if name != key})
