"""Work on files that may lie on a file server that does not answer: each piece in a thread of its own.

asyncio.to_thread has few threads for the work of all domains, and the daemon's end waits for them. One of these hangs alone, and is
left behind.
"""
from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from functools import partial
from typing import TypeVar

from kvmapp.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

Result = TypeVar("Result")


async def in_own_thread(work: Callable[..., Result], *arguments: Any,
                        unwanted: Callable[[Result], object] | None = None) -> Result:
    """What the work returns or raises. Raises HostError where there are no more threads to be had.

    Whoever waits may be broken off: what the work opens all the same goes to `unwanted`, which may hang, too.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Result] = loop.create_future()

    def throw_away(result: Result) -> None:
        if unwanted is not None:
            with suppress(HostError):
                begin(partial(unwanted, result))

    def succeed(result: Result) -> None:
        if not answer.done():
            answer.set_result(result)
        else:
            throw_away(result)

    def fail(error: Exception) -> None:
        if not answer.done():
            answer.set_exception(error)

    def run() -> None:
        try:
            told = partial(succeed, work(*arguments))
        except Exception as error:
            told = partial(fail, error)
        with suppress(RuntimeError):                # the daemon has ended meanwhile
            loop.call_soon_threadsafe(told)

    begin(run)
    try:
        return await answer
    except asyncio.CancelledError:
        if answer.done() and not answer.cancelled() and answer.exception() is None:     # both came in the same turn of the loop
            throw_away(answer.result())
        raise


def begin(work: Callable[[], object]) -> None:
    """Raises HostError."""
    try:
        threading.Thread(target=work, daemon=True).start()
    except RuntimeError as error:
        raise HostError(f"The daemon cannot start a thread: {error}", "see ulimit -u and pids.max") from None
