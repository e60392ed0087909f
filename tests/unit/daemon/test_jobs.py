"""A domain's one job: a destroy gets through to it, whoever else wants it at the same moment."""
import asyncio
import contextlib

from kvmapp.daemon.jobs import JobBroken, Jobs


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
