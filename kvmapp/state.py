"""Reading saved state that may be broken or hostile: every field is asked for by name, type and bounds, and nothing is left over.

    state = StateReader("serial0", saved, version=1)
    ier = state.uint("ier", 0x0F)
    state.done()

A device reads everything first and takes it over only after `done`, so that a refused state changes nothing.
"""
from kvmapp.errors import StateError

__all__ = ["StateError", "StateReader"]


class StateReader:
    """One device's saved dict. Every method raises StateError with the device's name and the field."""

    def __init__(self, owner: str, state: dict, version: int):
        self.owner = owner
        self.left = dict(state)
        self.version = self.uint("version", 0xFFFF)
        if not 1 <= self.version <= version:
            raise StateError(f"{owner}: state version {self.version} is not known here (1-{version})")

    def take(self, key: str, kind: type):
        """The value of `key`, which must be of `kind`."""
        if key not in self.left:
            raise StateError(f"{self.owner}: '{key}' is missing")
        value = self.left.pop(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise StateError(f"{self.owner}: '{key}' is {type(value).__name__}, not {kind.__name__}")
        return value

    def uint(self, key: str, most: int, least: int = 0) -> int:
        """An int in [least, most]."""
        value = self.take(key, int)
        if not least <= value <= most:
            raise StateError(f"{self.owner}: '{key}' is {value:#x}, not in [{least:#x}, {most:#x}]")
        return value

    def bits(self, key: str, mask: int) -> int:
        """An int with no other bits than those of `mask`."""
        value = self.take(key, int)
        if value & ~mask:
            raise StateError(f"{self.owner}: '{key}' is {value:#x}, with bits outside of {mask:#x}")
        return value

    def flag(self, key: str) -> bool:
        """A bool."""
        return self.take(key, bool)

    def data(self, key: str, most: int, least: int = 0) -> bytes:
        """bytes whose length is in [least, most]."""
        value = self.take(key, bytes)
        if not least <= len(value) <= most:
            raise StateError(f"{self.owner}: '{key}' has {len(value)} bytes, not {least} to {most}")
        return value

    def uints(self, key: str, count: int, most: int) -> list[int]:
        """Exactly `count` ints in [0, most]."""
        values = self.take(key, list)
        if len(values) != count:
            raise StateError(f"{self.owner}: '{key}' has {len(values)} values, not {count}")
        for value in values:
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
                raise StateError(f"{self.owner}: '{key}' holds {value!r}, not a number up to {most:#x}")
        return values

    def nested(self, key: str, version: int) -> "StateReader":
        """A dict with a version of its own; the caller ends it with `done`."""
        return StateReader(f"{self.owner}.{key}", self.take(key, dict), version)

    def nested_list(self, key: str, count: int, version: int) -> "list[StateReader]":
        """Exactly `count` dicts with versions of their own; the caller ends each with `done`."""
        states = self.take(key, list)
        if len(states) != count:
            raise StateError(f"{self.owner}: '{key}' has {len(states)} entries, not {count}")
        if not all(isinstance(state, dict) for state in states):
            raise StateError(f"{self.owner}: '{key}' holds something else than dicts")
        return [StateReader(f"{self.owner}.{key}[{i}]", state, version) for i, state in enumerate(states)]

    def done(self) -> None:
        """Refuses whatever was not asked for."""
        if self.left:
            raise StateError(f"{self.owner}: unknown key '{sorted(map(str, self.left))[0]}'")
