"""kvmappctl's warm process, as the daemon starts it: where it cannot, kvmappctl is not left waiting for it."""
import asyncio
import errno
import os
import socket
import subprocess

import pytest

from kvmapp.daemon import quick


def fail(*_arguments, **_more):
    raise OSError(errno.EAGAIN, "Resource temporarily unavailable")


@pytest.mark.parametrize(("what", "name"), [(os, "pipe"), (subprocess, "Popen")])
def test_nobody_listens_for_a_process_that_could_not_be_started(tmp_path, monkeypatch, what, name):
    """Every kvmappctl list hung."""
    path = str(tmp_path / "quick")
    monkeypatch.setattr(what, name, fail)

    async def story():
        one = quick.Quick(path)
        one.start()
        with socket.socket(socket.AF_UNIX) as caller:
            assert caller.connect_ex(path) in (errno.ENOENT, errno.ECONNREFUSED)
        one.stop()

    with asyncio.Runner() as runner:
        runner.get_loop()
        descriptors = os.listdir("/proc/self/fd")
        runner.run(story())
        assert os.listdir("/proc/self/fd") == descriptors


def test_nor_for_one_that_could_not_be_started_again(tmp_path, monkeypatch):
    path = str(tmp_path / "quick")
    monkeypatch.setattr(quick.runtime, "program", lambda: ["false"])
    monkeypatch.setattr(quick, "TOO_SOON", 0)

    async def story():
        one = quick.Quick(path)
        one.start()
        assert os.path.lexists(path)
        monkeypatch.setattr(subprocess, "Popen", fail)
        async with asyncio.timeout(60):
            while os.path.lexists(path):
                await asyncio.sleep(0.01)
        one.stop()
    asyncio.run(story())
