"""What a domain process says, and what a caller is called, as the daemon takes it: without a daemon."""
import asyncio
import io
import json
import socket
from types import SimpleNamespace
from typing import Any

from kvmapp.daemon import counters, domainlog
from kvmapp.daemon.call import caller
from kvmapp.daemon.process import DomainProcess


def test_counters_that_no_counter_can_have_come_to():
    """Their sum would have more digits than Python writes, and nobody would be told anybody's counters."""
    most = [{"exits": {"io": 10 ** 4299 * 9}}] * 2
    assert json.dumps(counters.exits(most)) == '{"io": 0}'


def test_the_counters_of_a_domain_that_ends_while_it_is_asked():
    async def ask(_verb, _timeout):
        domain.process = None
        return {}

    config = SimpleNamespace(balloon=True, vcpus=1, disks=[], interfaces=[], memory=1 << 20)
    domain: Any = SimpleNamespace(name="web", id=None, state=("shut off", "destroyed"), config=config, record=None, stats=None,
                                  process=SimpleNamespace(pid=0, silent=False, ask=ask))
    assert asyncio.run(counters.running_stats(domain)) == counters.empty_stats(domain)


def test_an_event_tells_of_the_state_and_of_nothing_else():
    process = DomainProcess("web", "/nowhere", lambda: None, lambda: None)
    process.hear({"type": "lifecycle", "state": "running", "reason": "booted", "junk": "x" * 1000})
    assert process.state == "running" and "junk" not in process.status


def test_a_program_whose_name_is_cut_within_a_letter_is_served():
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs, open("/proc/self/comm", "r+b", buffering=0) as comm:
        before = comm.read()
        try:
            for name, shown in (("виртуальные".encode()[:15], "вир"), (b"\x1b[2J", "")):
                comm.write(name)
                assert caller(ours).isprintable() and shown in caller(ours)
        finally:
            comm.write(before.strip())


def test_a_log_that_grows_while_it_is_set_aside_is_set_aside_all_the_same(tmp_path, monkeypatch):
    path = tmp_path / "web.log"
    path.write_bytes(b"x" * 100)

    class Growing(io.FileIO):
        def read(self, size=-1):
            assert path.stat().st_size < 1000, "it runs after its own end"
            with open(path, "ab") as log:
                log.write(b"y" * 100)
            return super().read(size)

    def open_it(file, mode, **more):
        return Growing(file) if file == str(path) else open(file, mode, **more)

    monkeypatch.setattr(domainlog, "open", open_it, raising=False)
    domainlog.rotate(str(path), 50, 1, in_use=True)
    assert path.stat().st_size == 0 and (tmp_path / "web.log.1").read_bytes() == b"x" * 100
