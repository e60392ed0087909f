"""Whether a domain's process lives, where the daemon has no descriptor left to look at it with."""
import asyncio
import json
import os
import subprocess
from collections import Counter
from typing import Any

import pytest

from kvmapp.daemon.domain import Record
from kvmapp.daemon.paths import Paths
from kvmapp.daemon.process import UNKNOWN, ControlLink, DomainProcess, start_time_of, title_of
from kvmapp.errors import HostError, NoResponse
from tests.descriptors import nothing_left
from tests.waiting import until


@pytest.fixture
def child():
    with subprocess.Popen(["kvmapp: web"], executable="/bin/cat", stdin=subprocess.PIPE) as one:
        until(lambda: title_of(one.pid))         # a new program's words come a moment after its files were closed
        yield one
        one.kill()


@pytest.mark.parametrize("known", [True, False])
def test_a_process_is_not_dead_because_nobody_can_look_at_it(child, known):
    """It lost its record, its socket and its managed save, and ran on."""
    gone = []
    process = DomainProcess("web", "/nowhere", lambda: None, lambda: gone.append(True))
    start_time = start_time_of(child.pid) if known else 0

    async def story():
        with nothing_left():
            process.watch(child.pid, start_time)
            assert start_time_of(child.pid) == UNKNOWN and process.pidfd < 0
            assert process.lives() and await process.connect() and process.silent
            await process.check()
            assert not await process.wait_end(0)
            process.kill()                      # it might be another's pid by now
        assert child.poll() is None and not gone
        await process.check()
        assert process.pidfd >= 0 and process.start_time == start_time_of(child.pid) and not gone
        child.kill()
        assert await process.wait_end(60) and gone
    asyncio.run(story())


def test_a_process_that_talks_without_end_leaves_time_for_others(tmp_path, monkeypatch):
    """Nor is each word of a long status kept, to be copied for each event."""
    status = {"state": "running", "reason": "booted", **{f"k{number}": 0 for number in range(50_000)}}
    heard: Counter[int] = Counter()             # how many events in which turn of the loop
    monkeypatch.setattr("kvmapp.daemon.process.TURN", 0.001)

    async def story():
        turn, over = 0, asyncio.Event()

        async def talk(_reader, writer):
            writer.write(json.dumps({"id": 1, "ok": status}).encode() + b"\n" + b'{"event": {"state": "paused"}}\n' * 20_000
                         + b'{"event": {"type": "device-removed", "device": "last"}}\n')
        process = DomainProcess("web", "/nowhere", lambda: heard.update([turn]), lambda: None, lambda kind, detail: over.set())
        server = await asyncio.start_unix_server(talk, str(tmp_path / "s"))
        link = ControlLink(process.hear, lambda: None)
        answer = link.answers[1] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda answer: process.take_answer(answer.result()["ok"]))
        await asyncio.get_running_loop().create_unix_connection(lambda: link, str(tmp_path / "s"))
        while not over.is_set():
            await asyncio.sleep(0)
            turn += 1
        assert process.status == {"state": "paused", "reason": "booted"}
        link.close()
        server.close()
    asyncio.run(story())
    assert sum(heard.values()) > 20_000 and max(heard.values()) < 2000


def test_a_process_that_was_never_seen_clearly_is_known_by_its_name(child):
    process = DomainProcess("mail", "/nowhere", lambda: None, lambda: None)

    async def story():
        with nothing_left():
            process.watch(child.pid)
        assert process.lives()
        await process.check()
        assert process.ended and child.poll() is None
    asyncio.run(story())


def test_a_start_that_is_undone_ends_the_process_that_it_could_not_look_at(child):
    process = DomainProcess("web", "/nowhere", lambda: None, lambda: None)

    async def story():
        with nothing_left():
            process.watch(child.pid)
        process.kill()
        assert await process.wait_end(60)
    asyncio.run(story())


def test_a_record_that_cannot_be_opened_is_not_taken_for_none(tmp_path):
    """A daemon that starts on a host without descriptors does not start, rather than take what runs for ended."""
    values = {"name": "web", "uuid": "", "id": 1, "pid": 2, "start_time": 3, "started": 4.0, "taps": {}, "disks": [], "config": {},
              "version": "1", "servers": []}
    paths = Paths(str(tmp_path))
    os.makedirs(paths.records)
    Record(**values).save(paths)
    path = os.path.join(paths.records, "web.json")
    with nothing_left(), pytest.raises(HostError, match="Too many open files") as caught:
        Record.load(path)
    assert "every guest runs on" in (caught.value.hint or "")
    record = Record.load(path)
    assert record and record.pid == 2 and Record.load(os.path.join(paths.records, "mail.json")) is None


def test_what_a_domain_has_is_compared_with_the_first_answer_of_each_connection():
    """Also where that is not the answer to the first question, for the domain was busy then."""
    told: list = []
    process = DomainProcess("web", "/nowhere", lambda: None, lambda: None, lambda *words: told.append(words))
    answers: list = [NoResponse("not yet"), NoResponse("not yet"), *({"devices": [{"name": name}]} for name in ("vda", "vdb", "vdc"))]

    async def ask(verb, *_, **_more):
        if isinstance(answer := answers.pop(0), NoResponse):
            raise answer
        return answer
    process.ask = ask               # type: ignore[method-assign]

    async def story():
        process.pid = os.getpid()
        await process.quietly(process.hello())
        for _ in range(2):
            await process.refresh()
        assert told == [("devices", "vda")]
        process.compared = False    # as a new connection leaves it
        await process.refresh()
        assert told == [("devices", "vda"), ("devices", "vdc")]
    asyncio.run(story())


def test_a_link_that_was_lost_and_made_anew_says_nothing_of_a_hang(monkeypatch):
    monkeypatch.setattr("kvmapp.daemon.process.LAST_BREATH", 0.01)

    class Link:
        async def ask(self, *_):
            process.link = second
            raise ConnectionResetError
    second: Any = object()
    process = DomainProcess("web", "/nowhere", lambda: None, lambda: None)

    async def story():
        links: list[Any] = [Link(), None]
        for link, silent in zip(links, (False, True), strict=True):
            process.link = link
            with pytest.raises(NoResponse, match="does not answer"):
                await process.ask("stats")
            assert process.silent is silent
    asyncio.run(story())
