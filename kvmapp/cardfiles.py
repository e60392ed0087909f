"""The descriptors of a network card's host side: their names on the way from the daemon to a domain process, and /dev/vhost-net.

`kvmapp run`, which has no daemon, opens what it needs itself; so both sides have this from here.
"""
from __future__ import annotations

import os

from kvmapp.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.config import InterfaceConfig


def file_name(kind: str, index: int, pair: int = 0) -> str:
    """`interface:1` is the tap of card 1, `interface:1.2` the tap's third queue, `vhost:1.2` an open /dev/vhost-net for that one."""
    return f"{kind}:{index}" + (f".{pair}" if pair else "")


def open_vhost(interface: InterfaceConfig) -> list[int]:
    """/dev/vhost-net, once a pair of queues; none where the card's section does not want it, the card has no virtio or no tap,
    or (`vhost = auto`) the host has not got it. Raises HostError."""
    if interface.vhost == "no" or interface.type == "user" or interface.model != "virtio":
        return []
    fds: list[int] = []
    try:
        for _ in range(interface.queues):
            fds.append(os.open("/dev/vhost-net", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        close_all(fds)
        if interface.vhost == "yes":
            raise HostError(f"Cannot open /dev/vhost-net for {interface.heading}: {error.strerror}",
                            "modprobe vhost_net, and run as root; or set vhost = auto") from None
        return []
    return fds


def close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
