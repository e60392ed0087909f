"""What can go wrong in the lab, told in one line with a hint."""


class LabError(Exception):
    """A failure that is told to the user as it stands; `hint` says what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\nhint: {self.hint}" if self.hint else text


class TimeIsUp(LabError):
    """A command did not end in the time that it was given."""


class NestedHostDied(LabError):
    """The nested host went away while a command ran in it: a panic, a reset, or QEMU itself failed."""
