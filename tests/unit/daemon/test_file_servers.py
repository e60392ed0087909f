"""The daemon starts a file server a shared folder, and none outlives its domain, whatever becomes of the daemon meanwhile."""
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvmapp.daemon.jobs import JobBroken
from kvmapp.daemon.process import start_time_of
from kvmapp.errors import HostError, NameInUse

SERVER = """#!{python}
import socket, sys, time
if sys.argv[1:] == ["--help"]:
    {before_help}
    sys.exit(print("--shared-dir"))
listener = socket.socket(fileno=int(sys.argv[1].removeprefix("--fd=")))
client = listener.accept()[0]
print("serving", sys.argv[2], flush=True)
client.recv(1)
while {stubborn}:
    time.sleep(60)
"""


def add(host, name, *behaviour, stubborn=False, source=None, before_help="pass", rest=""):
    program = Path(host.root) / f"server-{stubborn}"
    program.write_text(SERVER.format(python=sys.executable, stubborn=stubborn, before_help=before_help))
    program.chmod(0o755)
    host.add(name, *behaviour, rest=f"[filesystem data]\nsource = {source or host.root}\nbinary = {program}\n{rest}")


def server_of(host, name):
    [[tag, pid, start]] = host.records()[name]["servers"]
    assert tag == "data" and start_time_of(pid) == start != 0
    return pid


def gone(host, pid):
    return host.eventually(lambda: not start_time_of(pid), f"the end of {pid}")


def test_it_lives_as_long_as_its_domain(host):
    add(host, "web")
    host.start()
    host.post("web", "start")
    log = Path(host.paths.domain_log("web"))
    host.eventually(lambda: f"serving --shared-dir={host.root}\n" in log.read_text())
    assert "'filesystem:data'" in log.read_text()
    pid = server_of(host, "web")
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "0\n"
    host.post("web", "destroy")
    gone(host, pid)


def test_it_ends_with_a_domain_that_is_killed_while_no_daemon_runs(host):
    add(host, "web")
    host.start()
    host.post("web", "start")
    pid = server_of(host, "web")
    host.kill()
    host.start()
    assert host.states() == {"web": "running"} and server_of(host, "web") == pid
    host.kill()
    os.kill(host.pids()[0], 9)
    gone(host, pid)
    host.start()
    host.eventually(lambda: host.states() == {"web": "shut off"})       # its process may be ending still, without its sockets


@pytest.mark.parametrize("killed", [False, True])
def test_one_that_does_not_end_by_itself_is_killed(host, killed):
    add(host, "web", stubborn=True)
    host.start()
    host.post("web", "start")
    pid = server_of(host, "web")
    host.eventually(lambda: "serving" in Path(host.paths.domain_log("web")).read_text())
    if killed:
        host.kill()
        os.kill(host.pids()[0], 9)
        host.start()
    else:
        host.post("web", "destroy")
    gone(host, pid)
    assert "the file server of filesystem 'data'" in Path(host.log).read_text()


def test_a_start_that_fails_leaves_none(host):
    add(host, "web", "fail")
    host.start()
    with pytest.raises(HostError, match="cheese"):
        host.post("web", "start")
    host.eventually(lambda: str(Path(host.root) / "server-False") not in every_command_line())
    add(host, "lost", source="/no/such/folder")
    with pytest.raises(HostError, match=r"Cannot share /no/such/folder for \[filesystem data\]: No such file") as caught:
        host.post("lost", "start")
    assert caught.value.hint == "make the folder first"
    assert host.states()["lost"] == "shut off"


class Gate:
    """Where a server's --help waits."""

    def __init__(self, host):
        self.host, self.path = host, Path(host.root) / "gate"
        os.mkfifo(self.path)
        self.waits = f"open({str(self.path) + '-'!r} + str(__import__('os').getpid()), 'w'), open({str(self.path)!r}).read()"

    def reached(self, count):
        self.host.eventually(lambda: len(list(self.path.parent.glob("gate-*"))) == count, f"{count} at the gate")

    def open(self):
        self.path.write_text("")


def test_a_start_that_is_broken_while_its_server_starts_leaves_none(host):
    gate = Gate(host)
    add(host, "web", before_help=gate.waits)
    host.start()
    with ThreadPoolExecutor(1) as clients:
        start = clients.submit(host.post, "web", "start")
        gate.reached(1)
        host.post("web", "destroy")
        with pytest.raises(JobBroken):
            start.result()
    assert host.states() == {"web": "shut off"}
    gate.open()
    log = Path(host.paths.domain_log("web"))
    host.eventually(lambda: "serving" in log.read_text())               # by the time it can end, it has started
    host.eventually(lambda: str(Path(host.root) / "server-False") not in every_command_line())


def test_of_two_that_start_with_one_mac_at_the_same_moment_one_is_refused(host):
    gate, card = Gate(host), "[interface 0]\ntype = user\nmac = 52:54:00:00:00:01\n"
    for name in ("web", "db"):
        add(host, name, before_help=gate.waits, rest=card)
    host.start()
    with ThreadPoolExecutor(2) as clients:
        starts = [clients.submit(host.post, name, "start") for name in ("web", "db")]
        gate.reached(2)
        gate.open()
        outcomes = [start.exception() for start in starts]
    assert sorted(host.states().values()) == ["running", "shut off"]
    assert [str(one) for one in outcomes if one] == [str(one) for one in outcomes if isinstance(one, NameInUse)] != []


def every_command_line():
    found = []
    for entry in os.listdir("/proc"):
        try:
            found.append(Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            pass
    return "\n".join(found)


def test_records_of_older_versions_know_of_none(host):
    add(host, "web")
    host.start()
    host.post("web", "start")
    pid = server_of(host, "web")
    path = Path(host.paths.records) / "web.json"
    host.kill()
    record = host.records()["web"]
    del record["servers"]
    path.write_text(json.dumps(record))
    host.start()
    assert host.states() == {"web": "running"}
    host.post("web", "destroy")
    gone(host, pid)
