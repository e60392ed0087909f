"""Managed saves as files, STATE/save/NAME.save: which are void, and their removal.

An image is of the moment that its guest's disks are of, and void once the guest runs: restored then, its memory would know nothing of
what the guest has written since. So every start takes it away while its guest is still paused, and a guest whose image cannot be
taken away does not run. Not before that: a start that fails keeps the image.
"""
from __future__ import annotations

import os
from contextlib import suppress

from kvmapp import statefile
from kvmapp.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.daemon.paths import Paths


def has_image(paths: Paths, name: str) -> bool:
    return os.path.exists(paths.managed_save(name))


def remove_image(paths: Paths, name: str) -> bool:
    """Whether there was one. Raises HostError."""
    path = paths.managed_save(name)
    if not os.path.exists(path):
        return False
    try:
        os.unlink(path)
        statefile.sync_folder(os.path.dirname(path))
    except OSError as error:
        raise HostError(f"Cannot remove the managed save of '{name}': {error.strerror}: {path}",
                        "its guest must not run beside it; see that the file can be removed") from None
    return True


def clear_images(paths: Paths, active: set[str]) -> None:
    """For a daemon that starts: images of domains that run, and what an interrupted saving left."""
    for entry in os.listdir(paths.saved):
        if entry.startswith(".") or entry.removesuffix(".save") in active:
            with suppress(OSError):
                os.unlink(os.path.join(paths.saved, entry))
