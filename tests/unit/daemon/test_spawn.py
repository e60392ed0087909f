"""The daemon's end of the zygote, with a zygote of the test's own."""
import asyncio
import json
import signal
import socket
import subprocess

import pytest

from kvmapp import zygote as zygote_end
from kvmapp.config import read_domain
from kvmapp.daemon import spawn
from kvmapp.daemon.spawn import Zygote, ZygoteDied
from kvmapp.daemon.starting import patience
from kvmapp.errors import HostError


def test_a_process_that_nobody_waits_for_any_more_does_not_live_on():
    """The start was broken by a destroy before the zygote, which was not warm yet, had forked."""
    child = subprocess.Popen(["sleep", "infinity"])

    async def break_a_start():
        zygote = Zygote()
        zygote.socket, theirs = socket.socketpair()
        asyncio.get_running_loop().add_reader(zygote.socket, zygote.receive)
        start = asyncio.create_task(zygote.spawn({}, []))
        while not zygote.answers:
            await asyncio.sleep(0)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        with theirs:
            theirs.sendall(json.dumps({"id": 1, "pid": child.pid}).encode() + b"\n")
            status = await asyncio.to_thread(child.wait, 60)
        zygote.stop()
        return status
    try:
        assert asyncio.run(break_a_start()) == -signal.SIGKILL
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(("more", "seconds"), [("", 60), ("hugepages = 2M\n", 1084), ("prealloc = yes\n", 1084), ("locked = yes\n", 1084)])
def test_memory_that_is_held_has_time_to_be_read_or_touched(more, seconds):
    assert patience(read_domain("big.conf", f"name = big\nmemory = 64 GiB\n{more}")) == seconds


def test_more_descriptors_than_a_message_takes_are_no_death_of_the_zygote():
    """Such as of eight cards with sixteen queues and vhost each."""
    async def start():
        zygote = Zygote()
        zygote.socket, theirs = socket.socketpair()
        asyncio.get_running_loop().add_reader(zygote.socket, zygote.receive)
        with theirs, pytest.raises(HostError, match="the kernel hands over no more than 253") as caught:
            await zygote.spawn({}, [0] * (spawn.FDS_MOST + 1))
        assert not isinstance(caught.value, ZygoteDied) and "fewer queues" in caught.value.hint and zygote.socket
        zygote.stop()
    assert spawn.FDS_MOST == zygote_end.MAX_FDS
    asyncio.run(start())
