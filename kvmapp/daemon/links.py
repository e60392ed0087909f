"""Tells when network devices of the host come, go or change: rtnetlink(7), group RTMGRP_LINK. What changed is not read: who is told
looks for itself.
"""
from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

RTMGRP_LINK = 1
log = logging.getLogger("kvmapp")


class LinkWatch:
    """`changed()` is called in the loop, once or more often, after every change."""

    def __init__(self, changed: Callable[[], None]):
        self.changed = changed
        self.socket: socket.socket | None = None
        try:
            self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
                                        socket.NETLINK_ROUTE)
            self.socket.bind((0, RTMGRP_LINK))
        except OSError as error:        # the heartbeat looks as well
            log.warning("the kernel does not tell of network devices: %s", error.strerror)
            self.close()
            return
        asyncio.get_running_loop().add_reader(self.socket, self.hear)

    def hear(self) -> None:
        assert self.socket
        with suppress(BlockingIOError):
            while True:
                try:
                    self.socket.recv(65536)
                except BlockingIOError:
                    raise
                except OSError:         # ENOBUFS: there was more than fits
                    break
        self.changed()

    def close(self) -> None:
        if self.socket is not None:
            with suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(self.socket)
            self.socket.close()
            self.socket = None
