"""A domain's one job: a destroy gets through to it, whoever else wants it at the same moment."""
import asyncio
import contextlib
from typing import Any

import pytest

from kvmapp.daemon.jobs import JobBroken, Jobs
from kvmapp.daemon.starting import attempt
from kvmapp.errors import WrongState


def test_a_job_that_comes_when_another_is_broken_is_broken_too():
    jobs = Jobs("web", lambda job, begins: None)

    async def work(verb):
        with contextlib.suppress(JobBroken), jobs.hold(verb, "ann"):
            await asyncio.sleep(60)

    async def come_at_once(verb):
        while jobs.current is not None:
            await asyncio.sleep(0)
        await work(verb)

    async def scenario():
        works = [asyncio.create_task(work("suspend")), *(asyncio.create_task(come_at_once("resume")) for _ in range(3))]
        await asyncio.sleep(0)
        await jobs.break_current("bob")
        assert jobs.current is None
        for one in works:
            one.cancel()
    asyncio.run(scenario())


def test_only_what_leaves_the_domain_as_it_was_is_aborted():
    jobs = Jobs("web", lambda job, begins: None)

    async def work(verb, abortable):
        with jobs.hold(verb, "ann") as job:
            job.abortable = abortable
            await asyncio.sleep(60)

    async def story():
        with pytest.raises(WrongState, match="no job is active on the domain"):
            await jobs.abort("bob")
        start = asyncio.create_task(work("start", False))
        await asyncio.sleep(0)
        with pytest.raises(WrongState, match="job 'start' of ann cannot be aborted") as caught:
            await jobs.abort("bob")
        assert caught.value.hint == "wait for it, or end the domain with: kvmappctl destroy web"
        start.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await start
        save = asyncio.create_task(work("save", True))
        await asyncio.sleep(0)
        await jobs.abort("bob")
        assert jobs.current is None
        with pytest.raises(JobBroken, match="Cannot save domain 'web': that was aborted by bob"):
            await save
    asyncio.run(story())


def test_a_start_that_is_broken_twice_is_undone_to_its_end():
    """Its process waits in the kernel for a disk, say, so somebody says destroy once more."""
    async def story():
        start: Any = HangingStart()
        jobs = Jobs("web", lambda job, begins: None)

        async def hold():
            with jobs.hold("start", "ann") as job:
                await attempt(start, job)
        task = asyncio.create_task(hold())
        await start.prepares.wait()
        first = asyncio.create_task(jobs.break_current("bob"))
        await start.undoes.wait()
        second = asyncio.create_task(jobs.break_current("eve"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        start.dies.set()
        with pytest.raises(JobBroken):
            await task
        await asyncio.gather(first, second)
        return start.undone
    assert asyncio.run(story())


class HangingStart:
    def __init__(self):
        self.prepares, self.undoes, self.dies = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.undone = False

    async def prepare(self):
        self.prepares.set()
        await asyncio.Event().wait()

    async def undo(self, _why):
        self.undoes.set()
        await self.dies.wait()
        self.undone = True

    def close_fds(self):
        pass
