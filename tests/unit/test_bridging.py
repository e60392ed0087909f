"""An undo of a change of the host's network: forgotten when everything is there again, not sooner."""
import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from kvmapp.daemon import bridging, hostbridge
from kvmapp.errors import HostError

MOVE = hostbridge.Move(["there"], ["back"], [], "eth0", ["route replace default via 203.0.113.1 dev eth0"])


class Kernel:
    """`lacking`: how many looks find the route missing; `steps`: what was taken."""

    def __init__(self, monkeypatch, lacking, fails=False):
        self.lacking, self.fails, self.steps = lacking, fails, []
        monkeypatch.setattr(hostbridge, "take", self.take)
        monkeypatch.setattr(hostbridge, "missing", self.missing)
        monkeypatch.setattr(bridging, "AGAIN", 0.01)

    def take(self, steps, what, *, force=False):
        self.steps += steps
        if self.fails and not force:
            raise HostError(f"Cannot {what}: no")

    def missing(self, _device, before):
        self.lacking -= 1
        return before if self.lacking >= 0 else []


def supervisor(tmp_path) -> Any:
    return SimpleNamespace(paths=SimpleNamespace(run=str(tmp_path)), run=lambda work, name: asyncio.ensure_future(work))


def test_an_undo_that_brings_not_everything_back_is_tried_again(monkeypatch, tmp_path, caplog):
    kernel = Kernel(monkeypatch, lacking=3)

    async def scenario():
        one = bridging.Bridging(supervisor(tmp_path))
        await one.make("bridge br0 with eth0 in it", MOVE, 3600)
        with pytest.raises(HostError, match=r"eth0 lacks: route replace default via 203\.0\.113\.1 dev eth0") as caught:
            await one.take_back()
        assert "--confirm" in caught.value.hint
        note = json.loads((tmp_path / "interfaces.json").read_text())
        assert note["undo"] == ["back"] and note["before"] == MOVE.before
        await one.timer
        assert one.pending is None and not (tmp_path / "interfaces.json").exists()
    asyncio.run(scenario())
    assert kernel.steps == ["there", *["back"] * 4]
    assert sum("lacks" in record.message for record in caplog.records) == 1


def test_a_change_that_fails_is_undone_until_everything_is_back(monkeypatch, tmp_path):
    kernel = Kernel(monkeypatch, lacking=1, fails=True)

    async def scenario():
        one = bridging.Bridging(supervisor(tmp_path))
        with pytest.raises(HostError, match="Cannot bridge br0 with eth0 in it: no"):
            await one.make("bridge br0 with eth0 in it", MOVE, 3600)
        again = bridging.Bridging(supervisor(tmp_path))
        again.find_pending()                    # as the next daemon does
        assert again.pending == {**one.pending, "deadline": again.pending["deadline"]}
        again.timer.cancel()
        await one.timer
        assert one.pending is None
    asyncio.run(scenario())
    assert kernel.steps == ["there", "back", "back"]
