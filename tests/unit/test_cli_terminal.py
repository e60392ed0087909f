"""kvmappctl on a terminal: the shell, completion, the console, edit's question, top. Each is a process on a pseudo terminal."""
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import termios
import threading
from pathlib import Path

import pytest

from kvmapp.cli import complete
from kvmapp.cli.complete import candidates, candidates_of_line
from kvmapp.cli.session import Session
from kvmapp.errors import ConfigError, KvmappError
from tests.kvmappctl import KVMAPPCTL
from tests.unit.canned_daemon import UUID, CannedDaemon, domain, stats
from tests.unit.terminal import OnTerminal

ROOT = Path(__file__).resolve().parents[2]
# A completion waits for the daemon as long as it takes here: a stalled one is none that is away.
PATIENTLY = "from kvmapp.cli import complete; complete.ANSWER_WITHIN = 60; run("
PATIENT = [*KVMAPPCTL[:-1], KVMAPPCTL[-1].replace("run(", PATIENTLY)]


@pytest.fixture
def daemon(tmp_path):
    with CannedDaemon(tmp_path) as canned:
        canned.add(domain("linuxvm01", 1), domain("linuxvm02"), domain("web", 3))
        yield canned


@pytest.fixture
def terminal(daemon, tmp_path):
    environment = {"KVMAPP_DEFAULT_URI": daemon.uri, "XDG_CACHE_HOME": str(tmp_path / "cache"),
                   "TERM": "dumb", "INPUTRC": "/dev/null"}

    def start(*words, **more):
        return OnTerminal([*PATIENT, *words], {**environment, **more})
    return start


# The shell

def test_shell(terminal, tmp_path):
    with terminal() as screen:
        assert screen.expect("kvmappctl # ").startswith("Welcome to kvmappctl")
        screen.type("domid linuxvm01\r")
        assert "\r\n1\r\n\r\n" in screen.expect("kvmappctl # ")
        screen.type("nosuch\r")
        assert "error: unknown command: 'nosuch'\r\n" in screen.expect("kvmappctl # ")
        screen.type("cd /; pwd\r")
        assert "\r\n/\r\n\r\n" in screen.expect("kvmappctl # ")
        screen.type("domstate x")
        screen.expect("domstate x")
        screen.until_it_waits()                         # Python's readline heeds no interrupt that comes a moment before
        screen.type("\x03")
        screen.expect("kvmappctl # ")
        screen.type("connect --readonly\r")
        screen.expect("error: failed to connect to the hypervisor")
        screen.expect("kvmappctl > ")
        screen.type("quit\r")
        assert screen.status() == 0
    history = (tmp_path / "cache/kvmapp/kvmappctl/history").read_text()
    assert "domid linuxvm01\n" in history and history.endswith("quit\n")


def test_shell_ends_with_control_d(terminal):
    with terminal("-q") as screen:
        assert screen.expect("kvmappctl # ") == "kvmappctl # "
        screen.type("\x04")
        assert screen.status() == 0


def test_shell_completes(terminal, daemon):
    with terminal() as screen:
        screen.expect("kvmappctl # ")
        screen.type("domu\tlinuxvm01\r")
        screen.expect("kvmappctl # ")
        screen.type("start lin\t\r")
        screen.expect("Domain linuxvm02 started")
    assert ("POST", "/v1/domains/linuxvm02/start", {}) in daemon.requests


def test_a_completion_does_not_hurry_what_comes_after_it(session):
    assert candidates(session, ["start"], "lin") == ["linuxvm02"]
    assert session.daemon.timeout is None and session.daemon.get("/v1/domains")["domains"]


def test_lines_from_a_pipe(daemon):
    done = subprocess.run(KVMAPPCTL, input="domid linuxvm01\nnosuch\n\n# comment\ndomid web\n", capture_output=True, text=True,
                          env={**os.environ, "KVMAPP_DEFAULT_URI": daemon.uri}, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n\n3\n\n")
    assert done.stderr.startswith("error: unknown command: 'nosuch'\n")


def test_a_line_that_is_no_text_does_not_end_the_others(daemon):
    done = subprocess.run(KVMAPPCTL, input=b"domid gr\xf6sse\ndomid web\n", capture_output=True, check=False,
                          env={**os.environ, "KVMAPP_DEFAULT_URI": daemon.uri, "PYTHONIOENCODING": "utf-8:strict"})
    assert (done.returncode, done.stdout) == (0, b"\n3\n\n")
    assert done.stderr.startswith(b"error: failed to get domain 'gr")


# Completion

@pytest.fixture
def session(daemon, monkeypatch):
    monkeypatch.setattr(complete, "ANSWER_WITHIN", 60)
    one = Session()
    one.socket = daemon.path
    return one


@pytest.mark.parametrize(("words", "current", "expected"), [
    ([], "dom", ["domblkerror", "domblkinfo", "domblklist", "domblkstat", "domid", "domif-getlink", "domif-setlink", "domifaddr",
                 "domiflist", "domifstat", "domiftune", "dominfo", "domjobabort", "domjobinfo", "domlog", "dommemstat", "domname",
                 "domrename", "domstate", "domstats", "domuuid"]),
    (["start"], "", ["linuxvm02"]), (["destroy"], "", ["linuxvm01", "web"]), (["dominfo"], "w", ["web"]),
    (["start", "linuxvm02"], "", []), (["start", "linuxvm02"], "--p", ["--paused"]), (["start", "--paused"], "--p", []),
    (["start", "--domain"], "l", ["linuxvm02"]), (["domstats", "web"], "l", ["linuxvm01", "linuxvm02"]),
    (["shutdown", "web", "--mode"], "", ["acpi"]), (["event", "--event"], "re", ["reboot"]), (["help"], "mon", ["monitor"]),
    (["undefine", "web", "--storage"], "", ["vda"]), (["console", "web", "--devname"], "s", ["serial0"]), (["nosuch"], "", []),
    (["define"], "", []), (["list"], "", []), (["wait", "web", "--state"], "", ["broken", "crashed", "paused", "running"]),
])
def test_candidates(session, words, current, expected):
    assert candidates(session, words, current) == expected


def test_candidates_of_a_line(session):
    assert candidates_of_line(session, "list; start li") == ["linuxvm02 "]
    assert candidates_of_line(session, "dominfo ") == ["linuxvm01 ", "linuxvm02 ", "web "]


def test_completion_says_no_error_when_the_daemon_is_away(tmp_path):
    one = Session()
    one.socket = str(tmp_path / "none")
    assert candidates(one, ["start"], "") == []


@pytest.mark.parametrize(("line", "expected"), [
    ("kvmappctl domu", ["domuuid"]), ("kvmappctl start ", ["linuxvm02"]), ("kvmappctl -q start --domain=lin", ["linuxvm02"]),
    ("kvmappctl -c kvmapp:///system?socket=SOCKET start ", ["linuxvm02"]), ("kvmappctl --re", ["--readonly"])])
def test_bash_completion(daemon, tmp_path, line, expected):
    program = tmp_path / "bin" / "kvmappctl"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexec " + " ".join(f"'{word}'" for word in PATIENT[:2]) + f' "{PATIENT[2]}"' + ' "$@"\n')
    program.chmod(0o755)
    line = line.replace("SOCKET", daemon.path)
    # bash parts the words at these as readline does.
    words = [word for word in line.replace("=", " = ").replace(":", " : ").split(" ") if word] + ([""] if line.endswith(" ") else [])
    script = (f"source {ROOT}/init/completion/kvmappctl; COMP_WORDS=({' '.join(f'{word!r}' for word in words)}); "
              "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _kvmappctl 2>/dev/null; printf '%s\\n' \"${COMPREPLY[@]}\"")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True,
                          env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}",
                               "KVMAPP_DEFAULT_URI": daemon.uri})
    assert done.stdout.split() == expected


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_completion_script_is_sound():
    subprocess.run(["shellcheck", "-s", "bash", "-e", "SC2207,SC2034", f"{ROOT}/init/completion/kvmappctl"], check=True)


# The console

class GuestConsole:
    """A domain's control socket with one console that answers each line with its upper case."""

    def __init__(self, path, answer=b'{"id": 1, "ok": {"device": "serial0"}}\n', greeting=b"login: "):
        self.path, self.answer, self.greeting = str(path), answer, greeting
        self.typed = b""
        self.asked = b""
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(1)
        self.done = threading.Thread(target=self.serve, daemon=True)
        self.done.start()

    def serve(self):
        connection, _ = self.listener.accept()
        with connection, self.listener, contextlib.suppress(ConnectionError):
            while not self.asked.endswith(b"\n"):
                self.asked += connection.recv(4096)
            connection.sendall(self.answer + self.greeting)
            while (data := connection.recv(4096)) and b"\x04" not in data:
                self.typed += data
                connection.sendall(data.upper())


CONFIG = {"text": "", "file": None, "digest": "", "config": {"boot": {"kernel": None, "cmdline": ""}}}


@pytest.fixture
def console(daemon, tmp_path):
    """linuxvm01 with a console; further arguments are GuestConsole's."""
    def make(kernel=None, cmdline="", state="running", **more):
        daemon.add(domain("linuxvm01", 1, control=str(tmp_path / "control"), state=state))
        daemon.answers["GET", f"/v1/domains/{UUID}1/config"] = {**CONFIG, "config": {"boot": {"kernel": kernel, "cmdline": cmdline}}}
        return GuestConsole(tmp_path / "control", **more)
    return make


def test_console_carries_bytes_until_control_bracket(terminal, console):
    guest = console(kernel="/boot/vmlinuz", cmdline="quiet console=ttyS0,115200n8")
    with terminal("console", "linuxvm01") as screen:
        assert screen.expect("login: ") == "Connected to domain 'linuxvm01'\r\nEscape character is ^] (Ctrl + ])\r\nlogin: "
        screen.type("a\x03\x1a")
        screen.expect("A\x03\x1a")
        screen.type("b\x1dc")
        assert screen.status() == 0
    guest.done.join(60)
    assert guest.typed == b"a\x03\x1ab"
    assert b'"force": false' in guest.asked


def test_console_ends_with_the_guest(terminal, console):
    console()
    with terminal("console", "linuxvm01", "--devname", "serial0", "--force") as screen:
        screen.expect("login: ")
        screen.type("\x04")
        assert screen.status() == 0


def test_console_that_is_asked_to_end_puts_the_terminal_back(terminal, console):
    console()
    fresh = os.openpty()                # as every new one is; the program's own may be changed before we look
    before = termios.tcgetattr(fresh[0])
    with terminal("console", "1") as screen:
        screen.expect("login: ")
        assert termios.tcgetattr(screen.master) != before
        os.kill(screen.pid, signal.SIGTERM)
        screen.expect("\n")
        after = termios.tcgetattr(screen.master)
        assert screen.status() == 130
    assert after == before
    for fd in fresh:
        os.close(fd)


def test_console_with_another_key(terminal, console):
    console()
    with terminal("-e", "^T", "console", "1") as screen:
        assert "Escape character is ^T (Ctrl + T)" in screen.expect("login: ")
        screen.type("\x14")
        assert screen.status() == 0


def test_console_tells_why_it_may_stay_blank(terminal, console):
    console(kernel="/boot/vmlinuz", cmdline="quiet console=tty0")
    with terminal("console", "linuxvm01") as screen:
        assert "note: the kernel's command line has no console=ttyS0" in screen.expect("login: ")


def test_console_of_a_paused_domain(terminal, console):
    console(state="paused")
    with terminal("console", "linuxvm01") as screen:
        assert "note: the domain is paused; kvmappctl resume linuxvm01" in screen.expect("login: ")


@pytest.mark.parametrize(("cmdline", "advice"), [("quiet", "press Enter; if that"), ("console=ttyS0 quiet", "the guest may still be")])
def test_silent_console_says_so(daemon, console, cmdline, advice):
    console(kernel="/boot/vmlinuz", cmdline=cmdline, greeting=b"")
    impatient = KVMAPPCTL[-1].replace("; run(", "; from kvmapp.cli import console; console.SILENCE = 0.25; run(")
    with OnTerminal([*KVMAPPCTL[:-1], impatient, "-c", daemon.uri, "console", "linuxvm01"], {}) as screen:
        screen.expect(f"[nothing came for 0.25 s: {advice}")
        screen.type("\x1d")
        assert screen.status() == 0


def test_second_console_is_told_who_has_the_first(terminal, console):
    console(answer=b'{"id": 1, "error": {"code": "console-busy", "message": "Console serial0 is in use by pid 7 (uid 0)", '
                   b'"hint": "take the console over with --force"}}\n', greeting=b"")
    with terminal("console", "linuxvm01") as screen:
        assert screen.expect("--force") == ("error: Console serial0 is in use by pid 7 (uid 0)\r\n"
                                            "hint: take the console over with --force")
        assert screen.status() == 1


def test_console_of_a_domain_that_does_not_run(terminal):
    with terminal("console", "linuxvm02") as screen:
        screen.expect("error: The domain is not running\r\nhint: kvmappctl start linuxvm02 --console")
        assert screen.status() == 1


@pytest.mark.parametrize("hangs", [False, True], ids=["away", "hangs"])
def test_console_without_the_daemon(tmp_path, hangs):
    """The domain's own socket stands beside the daemon's."""
    (tmp_path / "domains/web").mkdir(parents=True)
    listener = socket.socket(socket.AF_UNIX)
    if hangs:
        listener.bind(f"{tmp_path}/kvmapp.sock")
        listener.listen(8)
    GuestConsole(tmp_path / "domains/web/control.sock")
    environment = {"KVMAPP_DEFAULT_URI": f"kvmapp:///system?socket={tmp_path}/kvmapp.sock"}
    with listener, OnTerminal([*KVMAPPCTL, "console", "web"], environment) as screen:
        screen.expect("Connected to domain 'web'")
        screen.expect("login: ")
        screen.type("\x1d")
        assert screen.status() == 0


def test_start_with_console(terminal, daemon, console):
    console()
    daemon.answers["POST", "/v1/domains/linuxvm01/start"] = {"domain": daemon.domains["linuxvm01"], "warnings": []}
    with terminal("start", "linuxvm01", "--console") as screen:
        screen.expect("Domain linuxvm01 started\r\n")
        screen.expect("login: ")
        screen.type("\x1d")
        assert screen.status() == 0


@pytest.mark.parametrize(("line", "asked"), [(f"start {UUID}9 --console", f"/v1/domains/{UUID}9/start"),
                                             ("create {file} --console", "/v1/domains")])
def test_start_and_create_attach_to_what_they_started(terminal, daemon, tmp_path, line, asked):
    """Not to another domain whose Id is its name: a password may be typed there."""
    daemon.add(domain("linuxvm01", 3, control=str(tmp_path / "other")), domain("3", 7, uuid=f"{UUID}9", control=str(tmp_path / "control")))
    more = {"created": True, "made": []} if asked == "/v1/domains" else {}
    daemon.answers["POST", asked] = {"domain": daemon.domains["3"], "warnings": [], **more}
    daemon.answers["GET", f"/v1/domains/{UUID}9/config"] = CONFIG
    other = GuestConsole(tmp_path / "other")
    GuestConsole(tmp_path / "control")
    (tmp_path / "3.conf").write_text("name = 3\nmemory = 64 MiB\n")
    with terminal(*line.format(file=tmp_path / "3.conf").split()) as screen:
        screen.expect("Connected to domain '3'")
        screen.expect("login: ")
        screen.type("\x1d")
        assert screen.status() == 0
    assert other.asked == b""


def test_start_with_console_needs_a_terminal_before_it_starts(daemon):
    done = subprocess.run([*KVMAPPCTL, "start", "linuxvm02", "--console"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          env={**os.environ, "KVMAPP_DEFAULT_URI": daemon.uri}, check=False)
    assert (done.returncode, done.stderr) == (1, "error: Failed to start domain 'linuxvm02'\n"
                                                 "error: Cannot run interactive console without a controlling TTY\n")
    assert daemon.requests == []


# edit, top and waiting

def test_edit_goes_back_into_a_rejected_text(terminal, daemon, tmp_path):
    daemon.answers["GET", "/v1/domains/linuxvm02/config"] = {**CONFIG, "text": "vcpus = 1\n", "digest": "d"}
    saved = {"domain": daemon.domains["linuxvm02"], "created": False, "made": [], "warnings": []}
    daemon.answers["PUT", "/v1/domains/linuxvm02/config"] = lambda _, body: \
        saved if body["text"] == "vcpus = 3\n" else ConfigError("vcpus = 2: no", file="/f", line=1)
    editor = "f() { expr $(grep -o '[0-9]' $1) + 1 | sed 's/^/vcpus = /' >$1.n; mv $1.n $1; }; f"
    with terminal("edit", "linuxvm02", EDITOR=editor) as screen:
        screen.expect("error: /f:1: vcpus = 2: no\r\nTry again? [y(es), n(o)]: ")
        screen.type("y\r")
        screen.expect("Domain linuxvm02 configuration edited.")
        assert screen.status() == 0


def test_an_interrupt_is_the_editors_own(terminal, daemon, tmp_path):
    """Ctrl-C within vi ends its insert mode; it must end neither vi nor us."""
    daemon.answers["GET", "/v1/domains/linuxvm02/config"] = {**CONFIG, "text": "vcpus = 1\n", "digest": "d"}
    daemon.answers["PUT", "/v1/domains/linuxvm02/config"] = {"domain": daemon.domains["linuxvm02"], "created": False, "made": [],
                                                             "warnings": []}
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\ntrap 'echo interrupted' INT\necho ready\nuntil [ \"$line\" ]; do read line; done\n"
                      "echo \"vcpus = $line\" >$1\n")
    editor.chmod(0o755)
    with terminal("edit", "linuxvm02", VISUAL=str(editor)) as screen:
        screen.expect("ready")
        screen.type("\x03")
        screen.expect("interrupted")
        screen.type("2\r")
        screen.expect("Domain linuxvm02 configuration edited.")
        assert screen.status() == 0
    assert daemon.requests[-1][2]["text"] == "vcpus = 2\n"


def test_who_leaves_at_the_question_is_told_where_the_text_is(terminal, daemon):
    daemon.answers["GET", "/v1/domains/linuxvm02/config"] = {**CONFIG, "text": "vcpus = 1\n", "digest": "d"}
    daemon.answers["PUT", "/v1/domains/linuxvm02/config"] = ConfigError("vcpus = 900: no", file="/f", line=1)
    with terminal("edit", "linuxvm02", VISUAL="sed -i s/1/900/") as screen:
        screen.expect("Try again? [y(es), n(o)]: ")
        screen.type("\x03")
        screen.expect("hint: your text is kept in ")
        kept = Path(screen.expect("\r\n").strip())
        assert kept.read_text() == "vcpus = 900\n" and screen.status() == 1
    kept.unlink()


@pytest.mark.parametrize("words", [["managedsave", "linuxvm01"], ["save", "linuxvm01", "/x.save"]])
def test_an_interrupt_ends_the_saving(terminal, daemon, words):
    begun, ended = threading.Event(), threading.Event()

    def save(*_):
        begun.set()
        assert ended.wait(60)
        raise KvmappError("that was aborted")

    def abort(*_):
        ended.set()
        return {"domain": daemon.domains["linuxvm01"], "warnings": []}
    daemon.answers["POST", f"/v1/domains/linuxvm01/{words[0]}"] = save
    daemon.answers["POST", "/v1/domains/linuxvm01/job/abort"] = abort
    with terminal(*words) as screen:
        assert begun.wait(60)
        screen.type("\x03")
        assert ended.wait(60) and screen.status() == 130


def test_top_on_a_terminal(terminal, daemon):
    turn = iter(range(1, 1000))
    daemon.answers["GET", "/v1/stats"] = lambda *_: {"domains": [stats("linuxvm01", time=float(next(turn)))]}
    with terminal("top", "-d", "1") as screen:
        screen.expect("\x1b[?1049h")
        screen.expect("linuxvm01")
        screen.type("q")
        screen.expect("\x1b[?1049l")
        assert screen.status() == 0


def test_waiting_is_shown_and_leaves_no_trace(terminal, daemon):
    came = threading.Event()

    def answer(_query, _body):
        came.wait(60)
        return {"domain": daemon.domains["linuxvm01"], "warnings": []}
    daemon.answers["POST", "/v1/domains/linuxvm01/shutdown"] = answer
    with terminal("shutdown", "linuxvm01", "--timeout", "20") as screen:
        screen.expect("\rwaiting for linuxvm01 to shut down: 1 s \x1b[K")
        came.set()
        screen.expect("\r\x1b[KDomain linuxvm01 has shut down")
        assert screen.status() == 0


def test_waiting_tells_how_far_the_job_is(terminal, daemon):
    came = threading.Event()

    def answer(_query, _body):
        came.wait(60)
        return {"domain": domain("linuxvm02", 5), "warnings": []}
    daemon.answers["POST", "/v1/domains/linuxvm02/start"] = answer
    daemon.add(domain("linuxvm02", job={"verb": "start", "who": "ann", "since": 1.0, "progress": "waiting for bridge br0"}))
    with terminal("start", "linuxvm02") as screen:
        screen.expect("\rstarting linuxvm02: ")
        screen.expect(" s (waiting for bridge br0) ")           # on a busy machine not in the first second
        came.set()
        screen.expect("\r\x1b[KDomain linuxvm02 started")
        assert screen.status() == 0
