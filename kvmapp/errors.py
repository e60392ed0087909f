"""Every error that a user may meet, as one tree: a message (what failed, on which named thing, with which value) and
a hint.

Each class has a stable `code`, so that an error crosses the control socket as JSON and is the same error on the other
side. Nothing else is raised on purpose towards a user: a traceback is always a defect of kvmapp.
"""
from __future__ import annotations

import errno

# What accept(2) answers, for as long as it lasts, when the host or the process has no descriptor or memory left for a caller.
NOTHING_LEFT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

BY_CODE: dict[str, type[KvmappError]] = {}


class KvmappError(Exception):
    """Renders as `error: MESSAGE` and, where there is a way out to name, `hint: HINT`."""
    code = "error"
    exit_code = 1
    facts: tuple[str, ...] = ()             # names of further attributes, carried over the socket

    def __init__(self, message: str, hint: str | None = None, **facts: object):
        super().__init__(message)
        self.message = message
        self.hint: str = hint or ""
        for name in self.facts:
            setattr(self, name, facts.pop(name, None))
        if facts:
            raise TypeError(f"{type(self).__name__} has no {', '.join(facts)}")

    def __init_subclass__(cls) -> None:
        assert cls.code not in BY_CODE, f"two errors have the code {cls.code}"
        BY_CODE[cls.code] = cls

    def __str__(self) -> str:
        return self.message

    def render(self) -> str:
        return f"error: {self}" + (f"\nhint: {self.hint}" if self.hint else "")

    def to_dict(self) -> dict[str, object]:
        return {"code": self.code, "message": self.message, "hint": self.hint or None,
                **{name: getattr(self, name) for name in self.facts}}


BY_CODE[KvmappError.code] = KvmappError


def error_from_dict(data: dict) -> KvmappError:
    """The error that to_dict described; a code that is not known here becomes a plain KvmappError that bears it."""
    cls = BY_CODE.get(str(data.get("code")), KvmappError)
    error = cls(str(data.get("message")), data.get("hint"), **{name: data.get(name) for name in cls.facts})
    error.code = str(data.get("code") or cls.code)
    return error


class UsageError(KvmappError):
    """A command line that cannot be understood: an unknown verb or option, a missing argument."""
    code = "usage"


class ConfigError(KvmappError):
    """A setting or a configuration file that cannot be used; says the file and the line where there is one."""
    code = "config"
    facts = ("file", "line")
    file: str | None
    line: int | None

    def __str__(self) -> str:
        if not self.file:
            return self.message
        return f"{self.file}:{self.line}: {self.message}" if self.line else f"{self.file}: {self.message}"


class HostError(KvmappError):
    """The host lacks or refuses something: /dev/kvm, memory, a tap, a bridge, a program."""
    code = "host"


class GuestImageError(KvmappError):
    """A kernel, initrd, firmware or disk that cannot be used: missing, truncated, foreign, locked by another guest."""
    code = "guest-image"


class StateError(KvmappError):
    """A saved machine state that this version cannot trust: truncated, corrupted, or newer."""
    code = "saved-state"


class BadRequest(KvmappError):
    """What a client sent over a socket is not a request of its protocol."""
    code = "bad-request"


class DomainNotFound(KvmappError):
    code = "domain-not-found"


class DomainNotRunning(KvmappError):
    code = "domain-not-running"


class DomainRunning(KvmappError):
    """The verb wants the domain to be shut off, and it is not."""
    code = "domain-running"


class WrongState(KvmappError):
    """What the verb is about is not in a state for it."""
    code = "wrong-state"


class NameInUse(KvmappError):
    """A name, UUID, MAC or tap that another object of this host already has."""
    code = "name-in-use"


class JobRunning(KvmappError):
    """One job a domain at a time: says which one holds it and since when (seconds of the epoch)."""
    code = "job-running"
    facts = ("verb", "who", "since")
    verb: str | None
    who: str | None
    since: float | None


class GuestIgnored(KvmappError):
    """The guest was asked (power button, balloon) and did not follow in time."""
    code = "guest-ignored"


class NetworkNotFound(KvmappError):
    code = "network-not-found"


class NetworkInactive(KvmappError):
    code = "network-inactive"


class NetworkActive(KvmappError):
    """The verb wants the network to be inactive, and it is not."""
    code = "network-active"


class PoolNotFound(KvmappError):
    code = "pool-not-found"


class VolumeNotFound(KvmappError):
    code = "volume-not-found"


class PermissionDenied(KvmappError):
    """The caller may not do that: the read-only socket, or a user outside the group."""
    code = "permission-denied"


class Unsupported(KvmappError):
    """Understood, but this host, guest or version cannot do it."""
    code = "unsupported"


class TooManyClients(KvmappError):
    """The read-only socket has as many clients as it may have."""
    code = "too-many-clients"


class ConnectionFailed(KvmappError):
    """The daemon's or a domain's socket cannot be reached."""
    code = "connection-failed"


class NoResponse(KvmappError):
    """A domain process or the daemon is there but does not answer in time."""
    code = "no-response"
