"""kvmappctl's quick way, launcher and warm process: the whole program's words and statuses, and nobody's rights grow by it."""
import contextlib
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvmapp.cli import quick
from kvmapp.cli.main import main
from kvmapp.errors import DomainNotFound
from onefile import build
from tests.unit.canned_daemon import CannedDaemon, domain

WHOLE = "#!/bin/sh\necho \"the whole program: $*\"\n"
LINES = ["list", "list --all", "list --all --json", "list --name", "--json list", "-q list --all", "--quiet list", "-r list --all",
         "dominfo linuxvm01", "domstate linuxvm02 --reason", "domblklist linuxvm01", "domid 2", "domuuid nosuch", "start linuxvm03",
         "start linuxvm03 --json", "destroy nosuch", "autostart linuxvm01 --disable", "list --nosuch", "dominfo", "list extra",
         "dominfo linuxvm01 --domain x", "vcpucount linuxvm01 --live", "list --help", "domstate \udcff"]
LEFT = ["", "edit linuxvm01", "console linuxvm01", "nosuch", "list --all; list", "-c qemu:///system list", "--connect=x list", "--help",
        "-v", "define x", "cd /", "event --all", "-rq list", "top", "start linuxvm03 --console"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The launcher, in a tree whose program only says how it was called."""
    folder = tmp_path_factory.mktemp("tree")
    launcher = build.compile_launcher(folder)
    launcher.rename(folder / "kvmapp")
    (folder / "kvmappctl").symlink_to("kvmapp")
    (folder / "runtime").mkdir()
    (folder / "runtime/kvmapp").write_text(WHOLE)
    (folder / "runtime/kvmapp").chmod(0o755)
    return folder


class Run:
    """A folder of sockets as a daemon has it: canned answers, and the warm process of the sources."""

    def __init__(self, folder: Path, daemon: CannedDaemon):
        self.folder, self.daemon = folder, daemon
        for name in ("kvmapp.sock", "kvmapp-sock-ro"):
            (folder / name).symlink_to(daemon.path)
        self.uri = f"kvmapp:///system?socket={folder}/kvmapp.sock"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "kvmapp-sock-quick"))
        self.listener.listen()
        self.theirs, self.leash = os.pipe()
        self.process = subprocess.Popen([sys.executable, "-m", "kvmapp", "quick", str(self.listener.fileno()), str(self.theirs)],
                                        pass_fds=(self.listener.fileno(), self.theirs), cwd=build.ROOT)

    def close(self):
        os.close(self.leash)
        os.close(self.theirs)
        self.listener.close()
        assert self.process.wait(30) == 0


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with CannedDaemon(tmp_path) as daemon:
        daemon.add(domain("linuxvm01", 1, title="Title 1"), domain("linuxvm02", 2, state="paused", reason="user"), domain("linuxvm03"))
        one = Run(folder, daemon)
        try:
            yield one
        finally:
            one.close()


def call(tree, run, *words, uri=None, **more):
    environment = {"PATH": os.environ["PATH"], "KVMAPP_DEFAULT_URI": run.uri if uri is None else uri}
    return subprocess.run([tree / "kvmappctl", *words], capture_output=True, timeout=60, check=False, env=environment, **more)


@pytest.mark.parametrize("line", LINES)
def test_words_and_status_are_the_whole_programs(line, tree, run, monkeypatch):
    words = line.split(" ")
    quickly = call(tree, run, *(os.fsencode(word) for word in words))
    monkeypatch.setitem(os.environ, "KVMAPP_DEFAULT_URI", run.uri)
    wholly = subprocess.run([sys.executable, "-m", "kvmapp", "ctl", *words], capture_output=True, cwd=build.ROOT, check=False)
    assert b"the whole program" not in quickly.stdout
    assert (quickly.returncode, quickly.stdout, quickly.stderr) == (wholly.returncode, wholly.stdout, wholly.stderr)


@pytest.mark.parametrize("line", LEFT)
def test_what_is_out_of_the_ordinary_is_left_to_the_whole_program(line, tree, run):
    words = line.split(" ") if line != "list --all; list" else [line]
    said = call(tree, run, *filter(None, words))
    assert (said.returncode, said.stdout.decode()) == (0, f"the whole program: {' '.join(filter(None, words))}\n")
    assert run.daemon.requests == []


@pytest.mark.parametrize("uri", ["qemu:///system", "kvmapp:///system?socket=relative", "kvmapp:///system?socket=/a%20b/kvmapp.sock",
                                 "kvmapp:///system?socket=/nonexistent/kvmapp.sock", f"kvmapp:///system?socket=/{'x' * 200}/kvmapp.sock"])
def test_another_daemon_is_left_to_the_whole_program(uri, tree, run):
    assert call(tree, run, "list", uri=uri).stdout == b"the whole program: list\n"


def test_no_warm_process(tree, run):
    (run.folder / "kvmapp-sock-quick").unlink()
    assert call(tree, run, "list").stdout == b"the whole program: list\n"


def test_long_words(tree, run):
    assert call(tree, run, "dominfo", "x" * 50000).stderr.startswith(b"error: failed to get domain 'xxx")
    assert call(tree, run, "dominfo", "x" * 70000).stdout.startswith(b"the whole program: dominfo")


def test_a_read_only_caller_is_nobodys_superior(tree, run):
    """Who may not connect to the daemon's socket gets the whole program, which says why; the warm process has no rights to lend."""
    assert call(tree, run, "-r", "list").stdout.startswith(b" Id ")
    (run.folder / "kvmapp.sock").unlink()
    assert call(tree, run, "destroy", "linuxvm01").stdout == b"the whole program: destroy linuxvm01\n"
    status = Path(f"/proc/{run.process.pid}/status").read_text()
    if os.geteuid() == 0:
        assert "Uid:\t65534\t65534\t65534\t65534\n" in status and "Groups:\t \n" in status
    assert ("NoNewPrivs:\t1\n" in status and "CapBnd:\t0000000000000000\n" in status) or os.geteuid() != 0


def test_a_request_without_a_connection_is_declined(run):
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(run.folder / "kvmapp-sock-quick"))
        body = b"\0\0\0\0" + b"\0\0list\0"
        caller.sendall(len(body).to_bytes(4, "little") + body)
        assert caller.recv(8) == quick.NUMBERS.pack(quick.DECLINED, 0)


@pytest.mark.parametrize("request_", [b"", b"\1", b"\xff\xff\xff\xff" + b"x" * 100, b"\4\0\0\0\0\0\0\0", b"\x06\0\0\0\0\0\0\0\0\0"])
def test_hostile_requests_hurt_nobody_else(request_, tree, run):
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(run.folder / "kvmapp-sock-quick"))
        caller.sendall(request_)
        assert call(tree, run, "list").stdout.startswith(b" Id ")


def test_silent_callers_are_no_processes_without_end(tree, run):
    """The socket is everybody's. What is beyond the most is left to the whole program, and who says nothing is not kept."""
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children")
    with contextlib.ExitStack() as stack:
        callers = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(quick.CALLERS_MOST + 44)]
        for caller in callers:
            caller.connect(str(run.folder / "kvmapp-sock-quick"))
            assert len(children.read_text().split()) <= quick.CALLERS_MOST
        assert callers[-1].recv(8) == quick.NUMBERS.pack(quick.DECLINED, 0)
        assert call(tree, run, "list").stdout == b"the whole program: list\n"
        assert {caller.recv(8) for caller in callers[:-1]} <= {b"", quick.NUMBERS.pack(quick.DECLINED, 0)}
    assert call(tree, run, "list").stdout.startswith(b" Id ")


def test_no_descriptor_for_a_call_keeps_no_cpu_busy(tmp_path, monkeypatch):
    """It waits until one ends, or a moment."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as caller:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        caller.connect(str(tmp_path / "socket"))
        leash, other = os.pipe()
        warm = quick.Quick(listener, leash)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert warm.poll.poll(0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (listener.fileno(), limits[1]))
        try:
            warm.take_call()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert warm.deaf and warm.poll.poll(0) == []
        warm.hear_again()
        assert warm.poll.poll(0) == [(listener.fileno(), select.POLLIN)]
        os.close(leash)
        os.close(other)


@pytest.fixture
def asked(run):
    """Set when a client waits for linuxvm01, to which the daemon has no answer for as long as the test goes on."""
    asked, gone = threading.Event(), threading.Event()

    def wait(_query, _body):
        asked.set()
        gone.wait(60)
        return DomainNotFound("too late")
    run.daemon.answers["GET", "/v1/domains/linuxvm01/wait"] = wait
    yield asked
    gone.set()


def test_a_child_that_is_killed_leaves_nobody_waiting(tree, run, asked):
    """By the kernel for want of memory, say: it has no time to say farewell, and the warm process holds the caller's connection too."""
    environment = {"KVMAPP_DEFAULT_URI": run.uri}
    with subprocess.Popen([tree / "kvmappctl", "wait", "linuxvm01"], stderr=subprocess.PIPE, env=environment) as waiting:
        assert asked.wait(60)
        os.kill(int(Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text()), signal.SIGKILL)
        assert b"error: The daemon closed the connection" in waiting.communicate(timeout=60)[1] and waiting.returncode == 1
    assert call(tree, run, "list").stdout.startswith(b" Id ")


def test_verbs_that_wait_do_not_hold_up_others_and_end_with_their_caller(tree, run, asked):
    with subprocess.Popen([tree / "kvmappctl", "wait", "linuxvm01"], env={"KVMAPP_DEFAULT_URI": run.uri}) as waiting:
        assert asked.wait(60)
        children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children")
        [child] = children.read_text().split()
        assert call(tree, run, "list").stdout.startswith(b" Id ")
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(60) == 130
    assert call(tree, run, "list").returncode == 0           # a turn of its loop, and of the one that reaps
    while child in children.read_text().split():
        call(tree, run, "list")


def test_full_and_closed_outputs(tree, run):
    environment = {"KVMAPP_DEFAULT_URI": run.uri}
    with open("/dev/full", "w") as full:
        said = subprocess.run([tree / "kvmappctl", "list"], stdout=full, stderr=subprocess.PIPE, env=environment, check=False)
    assert (said.returncode, said.stderr) == (1, b"error: Cannot write the output: No space left on device\n")
    reading, writing = os.pipe()
    os.close(reading)
    assert subprocess.run([tree / "kvmappctl", "list"], stdout=writing, env=environment, check=False).returncode == 141
    os.close(writing)
    for closed in (">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"):           # no connection takes their places
        said = subprocess.run(["/bin/sh", "-c", f'"$1" domid nosuch {closed}; "$1" list {closed}', "sh", tree / "kvmappctl"],
                              capture_output=True, env=environment, check=False)
        assert (closed, said.returncode, said.stderr) == (closed, 0, b"" if "2" in closed else b"error: failed to get domain 'nosuch'\n")


def test_the_quick_verbs_are_what_the_index_has():
    assert set(quick.VERBS) <= set(quick.index.MODULES)
    assert not {"edit", "console", "define", "create", "top", "event", "cd", "help", "net-edit", "net-define"} & set(quick.VERBS)
    assert main is quick.run_words
