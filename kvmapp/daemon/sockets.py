"""Listening UNIX sockets: the daemon's two and one a domain. unix(7).

Whoever calls `listen` holds the pid file's lock or has made sure that no process is behind the path, so what stands there is
stale and goes.
"""
from __future__ import annotations

import os
import socket

from kvmapp.client import ADDRESS_LIMIT


def listen(path: str, mode: int, gid: int | None = None, backlog: int = 512) -> socket.socket:
    """A listening socket at `path`, however long that is. Nobody else may connect before mode and group stand. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    old_mask = os.umask(0o177)
    try:
        if os.path.lexists(path):
            os.unlink(path)
        bind(listener, path)
        os.umask(old_mask)
        if gid is not None:
            os.chown(path, -1, gid)
        os.chmod(path, mode)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(old_mask)
    listener.setblocking(False)
    return listener


def bind(listener: socket.socket, path: str) -> None:
    if len(os.fsencode(path)) <= ADDRESS_LIMIT:
        listener.bind(path)
        return
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    finally:
        os.close(folder)
