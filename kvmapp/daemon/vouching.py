"""Which configurations are root's own, when a saved state brings one back.

A state file is written by its domain process, which a hostile guest may have taken over, and the configuration in it names files that
root opens and programs that root starts. So the daemon tells the process which configuration to write, and notes its digest where only
root writes. One that is neither noted nor that of the domain's own file is somebody else's word. Of each place where it had a state
saved it also notes which one lies there, lest a domain comes back as another; a file that is moved elsewhere loses that.
"""
from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress

from kvmapp.errors import HostError
from kvmapp.statefile import sync_folder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.daemon.paths import Paths


def vouch_for(paths: Paths, config: dict) -> None:
    """On disk when it returns. Raises HostError."""
    try:
        os.close(os.open(place_of(paths, config), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        sync_folder(paths.vouched)
    except OSError as error:
        raise HostError(f"Cannot note what is saved in {paths.vouched}: {error.strerror}") from None


def is_vouched(paths: Paths, config: dict) -> bool:
    return os.path.exists(place_of(paths, config))


def note_place(paths: Paths, file: str, config: dict | None) -> None:
    """The state that is about to lie there has this configuration; None: nobody knows which. On disk when it returns. Raises HostError."""
    note = note_of(paths, file)
    try:
        if config is None:
            with suppress(FileNotFoundError):
                os.unlink(note)
            return
        fd = os.open(f"{note}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "w") as text:
            text.write(digest(config))
            text.flush()
            os.fsync(fd)
        os.rename(f"{note}.new", note)
        sync_folder(paths.vouched)
    except OSError as error:
        raise HostError(f"Cannot note what is saved in {paths.vouched}: {error.strerror}") from None


def is_at_its_place(paths: Paths, file: str, config: dict) -> bool:
    """Whether this is what was saved there, as far as that is known."""
    try:
        with open(note_of(paths, file)) as text:
            return text.read() == digest(config)
    except OSError:
        return True


def note_of(paths: Paths, file: str) -> str:
    return os.path.join(paths.vouched, f"{hashlib.sha256(os.fsencode(os.path.realpath(file))).hexdigest()}.place")


def place_of(paths: Paths, config: dict) -> str:
    return os.path.join(paths.vouched, digest(config))


def digest(config: dict) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
