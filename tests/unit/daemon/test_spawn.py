"""The daemon's end of the zygote, with a zygote of the test's own."""
import asyncio
import json
import os
import signal
import socket
import subprocess
import threading
from unittest.mock import Mock

import pytest

from kvmapp import zygote as zygote_end
from kvmapp.config import read_domain
from kvmapp.daemon import spawn
from kvmapp.daemon.spawn import Zygote, ZygoteDied
from kvmapp.daemon.starting import patience
from kvmapp.errors import HostError


async def give_up_a_start(zygote):
    asyncio.get_running_loop().add_reader(zygote.socket, zygote.receive)
    start = asyncio.create_task(zygote.spawn({}, []))
    while not zygote.answers:
        await asyncio.sleep(0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start


def test_a_process_that_nobody_waits_for_any_more_does_not_live_on():
    """The start was broken by a destroy before the zygote, which was not warm yet, had forked."""
    child = subprocess.Popen(["sleep", "infinity"])

    async def break_a_start():
        zygote = Zygote()
        zygote.socket, theirs = socket.socketpair()
        await give_up_a_start(zygote)
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


def test_a_daemon_that_stops_over_a_start_leaves_no_process_that_nobody_knows():
    """Its request waits in the socket, for the zygote is not warm yet, and is read after the daemon's end."""
    child = subprocess.Popen(["sleep", "infinity"])

    async def stop_over_a_start():
        zygote = Zygote()
        zygote.socket, theirs = socket.socketpair()
        zygote.process = Mock(wait=lambda timeout: 0)
        await give_up_a_start(zygote)
        warm = threading.Thread(target=fork_late, args=(theirs, child.pid))
        warm.start()
        zygote.stop()
        warm.join()
    try:
        asyncio.run(stop_over_a_start())
        assert child.wait(60) == -signal.SIGKILL
    finally:
        child.kill()
        child.wait()


def fork_late(zygote, pid):
    """What a zygote does with a request that it finds, and with the daemon's end behind it."""
    with zygote:
        request, _ = zygote_end.receive(zygote)
        assert zygote_end.receive(zygote) is None
        zygote.sendall(json.dumps({"id": request["id"], "pid": pid}).encode() + b"\n")


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


@pytest.mark.parametrize("full", [True, False], ids=["nothing", "part"])
def test_who_gives_up_in_the_middle_of_a_request_leaves_the_next_one_whole(full):
    """A destroy while the zygote warms up: what followed was read as the rest of the first request."""
    async def story():
        zygote = Zygote()
        zygote.socket, theirs = socket.socketpair()
        asyncio.get_running_loop().add_reader(zygote.socket, zygote.receive)
        before = fill(zygote.socket) if full else 0
        handed, kept = os.pipe()
        first = asyncio.create_task(zygote.spawn({"name": "x" * (4 << 20)}, [handed]))
        while zygote.rest is None and not first.done():
            await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        os.close(handed)                                # it is the caller's
        second = asyncio.create_task(zygote.spawn({"name": "second"}, []))
        theirs.settimeout(60)
        await asyncio.to_thread(zygote_end.exactly, theirs, before)
        request, fds = await asyncio.to_thread(zygote_end.receive, theirs)
        assert request["name"][0] == "x" and len(fds) == 1 and not zygote.answers.keys() & {1}
        os.write(kept, b"!")
        assert os.read(fds[0], 1) == b"!"
        request, none = await asyncio.to_thread(zygote_end.receive, theirs)
        assert (request["name"], none) == ("second", [])
        theirs.sendall(json.dumps({"id": request["id"], "pid": 1 << 30}).encode() + b"\n")
        assert await second == 1 << 30
        for fd in (kept, *fds):
            os.close(fd)
        theirs.close()
        zygote.stop()
    asyncio.run(story())


def fill(full):
    """So that it takes not a byte more; how many it took."""
    sent = 0
    try:
        while True:
            sent += full.send(b"x" * 4096, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return sent


@pytest.mark.parametrize("size", [1, 4 << 20], ids=["answering", "reading"])
def test_a_zygote_that_hangs_is_killed_and_replaced(monkeypatch, size):
    """Every start failed from then on, as long as the daemon ran."""
    monkeypatch.setattr(spawn, "READY_TIMEOUT", 0.5)
    monkeypatch.setattr(spawn, "command", lambda: ["sh", "-c", "exec sleep infinity"])

    async def story():
        zygote = Zygote()
        zygote.start()
        hung = zygote.process
        assert hung
        with pytest.raises(ZygoteDied):
            await zygote.spawn({"name": "x" * size}, [])
        assert await asyncio.to_thread(hung.wait, 60) == -signal.SIGKILL and zygote.socket is None
        with pytest.raises(ZygoteDied):
            await zygote.spawn({}, [])
        assert zygote.count == 2 and zygote.process is None
    asyncio.run(story())
