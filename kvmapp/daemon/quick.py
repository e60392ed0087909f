"""The daemon's end of kvmappctl's warm process (cli/quick.py): its socket, its start, and a new one when it dies.

The socket is for everybody: who uses it hands over a connection to the daemon that he was allowed to make. Without this process
kvmappctl works all the same, in ten times the time.
"""
from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import time

from kvmapp import runtime
from kvmapp.daemon.sockets import listen
from kvmapp.daemon.spawn import environment

log = logging.getLogger("kvmapp")
MODE = 0o666
TOO_SOON = 10.0                         # seconds: one that lived no longer would not live longer the next time
END_TIMEOUT = 5.0


class Quick:
    def __init__(self, path: str):
        self.path = path
        self.listener: socket.socket | None = None
        self.process: subprocess.Popen | None = None
        self.leash = -1                 # the write end of a pipe that lets the process live as long as this one
        self.said = -1                  # the read end of one that ends when the process does

    def start(self) -> None:
        """Raises OSError where it cannot listen. The process warms up beside the daemon."""
        self.listener = listen(self.path, MODE)
        self.spawn()

    def spawn(self) -> None:
        """Where it cannot be started nobody listens either: a call would wait for ever, so kvmappctl is to take its slow way."""
        assert self.listener is not None
        try:
            self.process = self.run_program(self.listener.fileno())
        except (OSError, subprocess.SubprocessError) as error:
            log.error("cannot start kvmappctl's warm process: %s; the next daemon tries again", error)
            self.close()
            return
        self.began = time.monotonic()
        asyncio.get_running_loop().add_reader(self.said, self.died)

    def run_program(self, listener: int) -> subprocess.Popen:
        """Raises what Popen does, and keeps no end of a pipe then."""
        ends: list[int] = []
        try:
            ends += os.pipe()
            ends += os.pipe()
            theirs, leash, said, alive = ends
            process = subprocess.Popen([*runtime.program(), "quick", str(listener), str(theirs)], stdin=subprocess.DEVNULL,
                                       pass_fds=(listener, theirs, alive), start_new_session=True, env=environment())
            self.leash, self.said = leash, said
            ends = [theirs, alive]
            return process
        finally:
            for end in ends:
                os.close(end)

    def died(self) -> None:
        """Its children hold the pipe too, so a request under way is not cut."""
        status = self.release()
        if time.monotonic() - self.began < TOO_SOON:
            log.error("kvmappctl's warm process ended with status %s; the next daemon starts another", status)
            self.close()
        else:
            log.warning("kvmappctl's warm process ended with status %s; starting another", status)
            self.spawn()

    def release(self) -> int | None:
        asyncio.get_running_loop().remove_reader(self.said)
        os.close(self.said)
        os.close(self.leash)
        assert self.process is not None
        try:
            status: int | None = self.process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.process = None
        return status

    def close(self) -> None:
        if self.listener is not None:
            self.listener.close()
            self.listener = None
            if os.path.lexists(self.path):
                os.unlink(self.path)

    def stop(self) -> None:
        self.close()
        if self.process is not None:
            self.release()
