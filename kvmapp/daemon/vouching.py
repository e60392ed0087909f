"""Which configurations are root's own, when a saved state brings one back.

A state file is written by its domain process, which a hostile guest may have taken over, and the configuration in it names files that
root opens and programs that root starts. So the daemon tells the process which configuration to write, and notes its digest where only
root writes. One that is neither noted nor that of the domain's own file is somebody else's word.
"""
from __future__ import annotations

import hashlib
import json
import os

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


def place_of(paths: Paths, config: dict) -> str:
    return os.path.join(paths.vouched, hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest())
