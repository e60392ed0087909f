"""Tells the service manager how far we are: sd_notify(3)'s datagrams, without libsystemd. Under SysV nobody listens."""
from __future__ import annotations

import os
import socket
import time


def notify(*lines: str, flags: int = 0) -> None:
    """READY=1, STOPPING=1, WATCHDOG=1, STATUS=..., as sd_notify(3) lists them."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.connect("\0" + address[1:] if address[0] == "@" else address)
            manager.sendall("\n".join(lines).encode(), flags)
    except OSError:
        pass                            # a service manager that went away is no reason to stop


def notify_alive() -> None:
    """For WatchdogSec=; a service manager that hangs itself holds nobody up."""
    notify("WATCHDOG=1", flags=socket.MSG_DONTWAIT)


def notify_reloading() -> None:
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
