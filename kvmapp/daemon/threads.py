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


async def in_own_thread(work: Callable[..., Result], *arguments: Any) -> Result:
    """What the work returns or raises. Raises HostError where there are no more threads to be had."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Result] = loop.create_future()

    def tell(set_outcome: Callable[[Any], None], outcome: object) -> None:
        if not answer.done():                       # else whoever waited has given up
            set_outcome(outcome)

    def run() -> None:
        try:
            told = partial(tell, answer.set_result, work(*arguments))
        except Exception as error:
            told = partial(tell, answer.set_exception, error)
        with suppress(RuntimeError):                # the daemon has ended meanwhile
            loop.call_soon_threadsafe(told)

    try:
        threading.Thread(target=run, daemon=True).start()
    except RuntimeError as error:
        raise HostError(f"The daemon cannot start a thread: {error}", "see ulimit -u and pids.max") from None
    return await answer
