"""A file server that does not answer holds up what wants its files, and nothing else of the daemon."""
import asyncio
import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from kvmapp import statefile
from kvmapp.config import DomainConfig
from kvmapp.daemon import saving
from kvmapp.daemon.domain import disk_views
from kvmapp.daemon.jobs import Jobs
from kvmapp.daemon.paths import Paths


def test_a_query_looks_at_no_image(monkeypatch):
    sources, asked, true_stat = ["/mnt/web.img", "/dev/../mnt/other.img", "/dev/null"], [], os.stat

    def stat(path, **more):
        asked.append(path)
        return true_stat(path, **more)

    config = DomainConfig.from_dict({"name": "web", "memory": 64 << 20, "disks": [
        {"name": f"vd{letter}", "source": source} for letter, source in zip("abc", sources, strict=True)]})
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", stat)
        views = disk_views(config, {})
    assert [view["type"] for view in views] == ["file"] * 3 and asked == ["/dev/null"]


def test_a_save_that_is_broken_off_is_closed_beside_the_daemons_work(tmp_path, monkeypatch):
    closing, answers = threading.Event(), threading.Event()

    class Hanging(statefile.Draft):
        def close(self):
            closing.set()
            assert answers.wait(60)
            super().close()

    async def never(*_, **more):
        await asyncio.get_running_loop().create_future()

    async def story():
        jobs = Jobs("web", lambda job, begins: None)
        domain: Any = SimpleNamespace(name="web", jobs=jobs, live=None, outdated=False, want_active=lambda: SimpleNamespace(ask=never))

        async def save():
            with jobs.hold("save", "ann") as job:
                await saving.write(Paths(str(tmp_path / "root")), domain, str(tmp_path / "web"), job, {})

        task = asyncio.create_task(save())
        while not list(tmp_path.iterdir()):
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        await jobs.break_current("bob")                             # as destroy does
        assert await asyncio.to_thread(closing.wait, 60) and not answers.is_set()
        with pytest.raises(Exception, match="destroyed meanwhile by bob"):
            await task
        answers.set()
        while list(tmp_path.iterdir()):
            await asyncio.sleep(0)

    monkeypatch.setattr(statefile, "Draft", Hanging)
    asyncio.run(asyncio.wait_for(story(), 60))
