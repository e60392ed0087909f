"""Who waits for a domain's state, and has given up, is forgotten."""
import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from kvmapp.daemon.domain import Domain


def test_nothing_is_kept_of_somebody_who_waits_no_longer(tmp_path):
    """A tool that polls with a timeout made the daemon grow for as long as the domain's state stayed as it was."""
    paths: Any = SimpleNamespace(ending=lambda name: str(tmp_path / "none"))
    store: Any = SimpleNamespace(files={})
    domain = Domain("web", store, paths, lambda *_: None)

    async def story():
        assert not await domain.wait_until(lambda: False, 0)
        waiting = asyncio.create_task(domain.wait_until(lambda: False, None))
        await asyncio.sleep(0)
        assert len(domain.waiters) == 1
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert domain.waiters == []
        told = asyncio.create_task(domain.wait_until(lambda: bool(domain.presses), None))
        await asyncio.sleep(0)
        domain.presses = 1
        domain.notify()
        assert await told and domain.waiters == []
    asyncio.run(story())
