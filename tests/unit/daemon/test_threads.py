"""Work in a thread of its own, which whoever wants it may give up."""
import asyncio
import threading

import pytest

from kvmapp.daemon.threads import in_own_thread


def test_what_comes_after_its_time_goes_to_whoever_throws_it_away():
    goes_on, thrown, is_thrown = threading.Event(), [], threading.Event()

    def work(value):
        assert goes_on.wait(60)
        return value

    def throw_away(value):
        thrown.append((value, threading.current_thread()))
        is_thrown.set()

    async def story():
        wanted = asyncio.create_task(in_own_thread(work, 1, unwanted=throw_away))
        given_up = asyncio.create_task(in_own_thread(work, 2, unwanted=throw_away))
        await asyncio.sleep(0)
        given_up.cancel()
        goes_on.set()
        assert await wanted == 1
        assert await asyncio.to_thread(is_thrown.wait, 60)
    asyncio.run(story())
    [(value, thread)] = thrown
    assert value == 2 and thread is not threading.main_thread(), "it may hang"


def test_what_comes_in_the_moment_when_it_is_given_up_is_thrown_away_too(monkeypatch):
    thrown = threading.Event()

    async def story():
        loop = asyncio.get_running_loop()
        call_soon = loop.call_soon_threadsafe
        task = asyncio.create_task(in_own_thread(str, unwanted=lambda _: thrown.set()))
        with monkeypatch.context() as patched:
            patched.setattr(loop, "call_soon_threadsafe", lambda told: call_soon(lambda: (told(), task.cancel())))
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await asyncio.to_thread(thrown.wait, 60)
    asyncio.run(story())
