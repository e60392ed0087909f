"""The init scripts under the shells that hosts have: their words, exit statuses and effects.

`kvmapp` runs the real daemon in a folder; `kvmapp-guests` speaks to a kvmappctl of the test's own, which notes what it is asked.
"""
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SHELLS = [shell for shell in (["dash"], ["bash"], ["busybox", "sh"]) if shutil.which(shell[0])]
CENTOS = 'success() { printf "[  OK  ]\\r"; }\nfailure() { printf "[FAILED]\\r"; }\n'
each_shell = pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: shell[0])
# This host's own settings, services and guests are none of a test's.
NOTHING = dict.fromkeys(("KVMAPP_SETTINGS", "KVMAPP_FUNCTIONS", "KVMAPP_SYSTEMD", "KVMAPP_SUBSYS", "KVMAPP_GUESTS_SETTINGS",
                         "KVMAPP_GUESTS_DAEMON", "KVMAPP_GUESTS_DOMAINS", "KVMAPP_GUESTS_LIST"), "/nonexistent") | {
                             "KVMAPP": "false", "KVMAPPCTL": "false"}


def run(shell, script, *words, **environment):
    done = subprocess.run([*shell, str(ROOT / "init" / script), *words], capture_output=True, text=True, timeout=60, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **NOTHING, **environment})
    return done.returncode, done.stdout, done.stderr


@each_shell
def test_daemon_start_to_stop(host, shell):
    words = {"KVMAPP": f"{sys.executable} -m kvmapp", "KVMAPP_OPTIONS": f"--root {host.root}"}
    assert run(shell, "kvmapp", "status", **words) == (3, "kvmapp is stopped\n", "")
    assert run(shell, "kvmapp", "condrestart", **words) == (0, "", "")
    assert run(shell, "kvmapp", "start", **words) == (0, "Starting kvmapp daemon: OK\n", "")
    pid = int(Path(host.paths.pid_file).read_text())
    assert run(shell, "kvmapp", "start", **words) == (0, "Starting kvmapp daemon: OK\n", "")
    assert run(shell, "kvmapp", "status", **words) == (0, f"kvmapp (pid {pid}) is running...\n", "")
    assert run(shell, "kvmapp", "reload", **words) == (0, "Reloading kvmapp daemon: OK\n", "")
    assert run(shell, "kvmapp", "restart", **words) == (0, "Stopping kvmapp daemon: OK\nStarting kvmapp daemon: OK\n", "")
    assert int(Path(host.paths.pid_file).read_text()) != pid
    os.kill(int(Path(host.paths.pid_file).read_text()), 9)
    host.eventually(lambda: run(shell, "kvmapp", "status", **words)[:2] == (1, "kvmapp dead but pid file exists\n"))
    assert run(shell, "kvmapp", "start", **words)[0] == 0
    assert run(shell, "kvmapp", "stop", **words) == (0, "Stopping kvmapp daemon: OK\n", "")
    assert run(shell, "kvmapp", "stop", **words) == (0, "Stopping kvmapp daemon: OK\n", "")
    status, said, complaint = run(shell, "kvmapp", "reload", **words)
    assert (status, said) == (1, "Reloading kvmapp daemon: FAILED\n") and "The kvmapp daemon does not run" in complaint


def test_this_hosts_own_daemon_is_out_of_reach():
    """Each place that the scripts look at or work on has another name in `run`."""
    for script in ("kvmapp", "kvmapp-guests"):
        for line in (ROOT / "init" / script).read_text().splitlines():
            if not line.startswith("#") and re.search(r"/(etc|usr/sbin|run|var)/", line):
                assert re.search(r"\$\{(\w+):-/", line).group(1) in NOTHING, line


@each_shell
def test_as_centos_shows_it(shell, tmp_path):
    functions = tmp_path / "functions"
    functions.write_text(CENTOS)
    words = {"KVMAPP": "true", "KVMAPP_FUNCTIONS": str(functions)}
    assert run(shell, "kvmapp", "start", **words)[1] == "Starting kvmapp daemon: [  OK  ]\n"


@each_shell
def test_centos_is_told_that_both_are_to_be_stopped(shell, tmp_path):
    """Its rc runs stop scripts only of what has a file there."""
    (tmp_path / "subsys").mkdir()
    daemon = tmp_path / "kvmapp"
    daemon.write_text('#!/bin/sh\n[ "$2" != --status ]\n')
    daemon.chmod(0o755)
    words = {"KVMAPP": str(daemon), "KVMAPP_SUBSYS": str(tmp_path / "subsys")}
    assert run(shell, "kvmapp", "start", **words)[0] == 0
    assert sorted(os.listdir(tmp_path / "subsys")) == ["kvmapp", "kvmapp-guests"]


@each_shell
def test_failure_is_told_with_its_reason(host, shell):
    host.write("kvmapp.conf", "log_level = loud\n")
    words = {"KVMAPP": f"{sys.executable} -m kvmapp", "KVMAPP_OPTIONS": f"--root {host.root}"}
    status, said, complaint = run(shell, "kvmapp", "start", **words)
    assert (status, said) == (1, "Starting kvmapp daemon: FAILED\n") and "kvmapp.conf:1: log_level = 'loud'" in complaint


@each_shell
def test_a_restart_that_stops_nothing_is_none(shell, tmp_path):
    stubborn = tmp_path / "kvmapp"
    stubborn.write_text("#!/bin/sh\n[ $2 != --stop ] || { echo 'error: it does not end' >&2; exit 1; }\n")
    stubborn.chmod(0o755)
    words = {"KVMAPP": str(stubborn)}
    for verb in ("restart", "condrestart"):
        assert run(shell, "kvmapp", verb, **words) == (1, "Stopping kvmapp daemon: FAILED\n", "error: it does not end\n")


@each_shell
@pytest.mark.parametrize("script", ["kvmapp", "kvmapp-guests"])
def test_usage(shell, script):
    status, said, complaint = run(shell, script, "dance")
    assert (status, said) == (2, "") and complaint.startswith("Usage: ") and "start|stop" in complaint


def test_headers_are_what_chkconfig_and_update_rc_read():
    for script, order in (("kvmapp", "97 03"), ("kvmapp-guests", "98 02")):
        text = (ROOT / "init" / script).read_text()
        assert f"# chkconfig: 345 {order}\n# description: " in text and os.access(ROOT / "init" / script, os.X_OK)
        block = text.split("### BEGIN INIT INFO\n")[1].split("### END INIT INFO\n")[0]
        assert f"# Provides:          {script}\n" in block
        for key in ("Required-Start", "Required-Stop", "Default-Start", "Default-Stop", "Short-Description"):
            assert f"# {key}:" in block


# Behind a letter for each domain: web, old server, scratch; marked by autostart: marked, whose turn is still to come, and early.
UUID = "0000000-1111-4222-8333-444444444444"
RAN = f"a{UUID} web\nb{UUID} old server\nd{UUID} marked\ne{UUID} early\n"
STARTED = ["  web: runs already", "  old server: started", "  marked: left to its autostart mark", "  early: started"]
CTL = """#!/bin/sh
printf '%s\\n' "$*" >>"$CTL_LOG"
U=0000000-1111-4222-8333-444444444444
case $1 in
    list) case "$*" in
              *--uuid\\ --name*persistent*) printf '%s\\n' "a$U web" "b$U old server" "d$U marked" "e$U early" '' ;;
              *--uuid\\ --name*waiting*) echo ;;
              *--uuid\\ --name*) printf '%s\\n' "a$U web" "b$U old server" "c$U scratch" '' ;;
              *--uuid*waiting*) printf '%s\\n' "d$U" '' ;;
              *--name*waiting*) printf '%s\\n' marked '' ;;
              *--uuid*autostart*) printf '%s\\n' "d$U" "e$U" '' ;;
              *--name*autostart*) printf '%s\\n' marked early '' ;;
              *--name*) printf '%s\\n' web 'old server' scratch '' ;;
          esac ;;
    domstate) case $2 in a$U | web) echo running ;; *) echo 'shut off' ;; esac ;;
    shutdown) case $2 in
                  a$U | b$U) ;;
                  c$U) echo "error: Failed to shutdown domain '$2'" >&2
                       echo "error: Domain 'scratch' still runs 7 s after its power button was pressed" >&2
                       echo "hint: destroy it" >&2
                       exit 1 ;;
                  *) echo "error: '$2' may be another domain's Id" >&2; exit 1 ;;
              esac ;;
    managedsave) [ "$2" = a$U ] || { echo "error: unknown command: 'managedsave'" >&2; exit 1; } ;;
esac
"""


@pytest.fixture
def guests(tmp_path):
    ctl = tmp_path / "ctl"
    ctl.write_text(CTL)
    ctl.chmod(0o755)
    settings = tmp_path / "settings"
    settings.write_text("SHUTDOWN_TIMEOUT=7\n")
    return {"KVMAPPCTL": str(ctl), "CTL_LOG": str(tmp_path / "log"), "KVMAPP_GUESTS_LIST": str(tmp_path / "state" / "ran"),
            "KVMAPP_GUESTS_SETTINGS": str(settings)}


@each_shell
def test_guests_shut_down_side_by_side_and_start_again(guests, shell, tmp_path):
    """Each by its UUID, which is never another domain's Id."""
    status, said, complaint = run(shell, "kvmapp-guests", "stop", **guests)
    head, *lines = said.splitlines()
    assert (status, complaint, head) == (0, "", "Shutting down kvmapp's domains (each has 7 s):")
    assert sorted(lines) == ["  old server: shut down",
                             "  scratch: error: Domain 'scratch' still runs 7 s after its power button was pressed",
                             "  web: shut down"]
    assert (tmp_path / "state" / "ran").read_text() == RAN
    assert f"shutdown b{UUID} --timeout 7\n" in (tmp_path / "log").read_text()
    status, said, complaint = run(shell, "kvmapp-guests", "start", **guests)
    assert (status, complaint) == (0, "")
    assert said.splitlines() == ["Starting kvmapp's domains that ran before:", *STARTED]
    asked = (tmp_path / "log").read_text().splitlines()
    assert f"start b{UUID}" in asked and f"start e{UUID}" in asked and f"start d{UUID}" not in asked
    assert not (tmp_path / "state" / "ran").exists()
    assert run(shell, "kvmapp-guests", "start", **guests) == (0, "", "")


@each_shell
def test_guests_that_start_while_others_shut_down_are_shut_down_too(guests, shell, tmp_path):
    """Such as what autostart was just at; the rest it leaves off. Each is asked once it can be, none twice, and all start again."""
    Path(guests["KVMAPPCTL"]).write_text(LATE)
    (tmp_path / "sleep").symlink_to(shutil.which("true"))
    status, said, complaint = run(shell, "kvmapp-guests", "stop", **guests, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (status, complaint) == (0, "")
    assert said.splitlines()[1:] == ["  web: error: Domain 'web' still runs", "  late: shut down"]
    asked = (tmp_path / "log").read_text().splitlines()
    assert [line for line in asked if line.startswith("shutdown")] == [f"shutdown {one}{UUID} --timeout 7" for one in "allll"]
    assert (tmp_path / "state" / "ran").read_text() == f"w{UUID} waits\na{UUID} web\nl{UUID} late\n"
    assert asked.index("autostart-stop") < asked.index(f"shutdown a{UUID} --timeout 7")


LATE = """#!/bin/sh
printf '%s\\n' "$*" >>"$CTL_LOG"
U=0000000-1111-4222-8333-444444444444
times=$(grep -c "^shutdown l" "$CTL_LOG")
fail() { printf '%s\\n' "error: Failed to shutdown domain" "error: $1" "hint: wait" >&2; exit 1; }
case $* in
    *--waiting) printf '%s\\n' "w$U waits" '' ;;
    list\\ --uuid*) echo "a$U web"
                   [ "$times" = 4 ] || ! grep -q ^shutdown "$CTL_LOG" || echo "l$U late"
                   echo ;;
    shutdown\\ a*) fail "Domain 'web' still runs" ;;
    shutdown\\ l*) case $times in
                      1) fail "Domain 'late' is just being started" ;;
                      2) fail "Cannot shutdown domain 'late': job 'start' of autostart holds it since 10:00:00 (0 s)" ;;
                      3) fail "Cannot shutdown domain 'late': job 'restore' of autostart holds it since 10:00:00 (0 s)" ;;
                  esac ;;
esac
"""


@each_shell
def test_a_list_of_names_is_started_too(guests, shell, tmp_path):
    """As an earlier kvmapp left it."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "ran").write_text("web\nold server\nmarked\nearly\n")
    said = run(shell, "kvmapp-guests", "start", **guests)[1]
    assert said.splitlines()[1:] == STARTED
    assert "start old server\n" in (tmp_path / "log").read_text()


@each_shell
@pytest.mark.parametrize(("error", "told"), [
    ("Domain is already active", "runs already"),
    ("Cannot start domain 'early': job 'start' of autostart holds it since 10:00:00 (1 s)", "is just being started"),
    ("Cannot restore domain 'early': job 'restore' of autostart holds it since 10:00:00 (1 s)", "is just being started"),
    ("Cannot start domain 'early': job 'edit' of ann holds it since 10:00:00 (1 s)", "hint: wait")])
def test_what_autostart_has_just_begun_to_start_is_no_failure(guests, shell, tmp_path, error, told):
    Path(guests["KVMAPPCTL"]).write_text(f'#!/bin/sh\n[ $1 != start ] || {{ echo "error: {error}" >&2; echo hint: wait >&2; exit 1; }}\n')
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "ran").write_text("early\n")
    assert run(shell, "kvmapp-guests", "start", **guests)[1].splitlines()[1:] == [f"  early: {told}"]


@each_shell
def test_guests_that_are_to_be_saved(guests, shell):
    Path(guests["KVMAPP_GUESTS_SETTINGS"]).write_text("ON_SHUTDOWN=suspend\nSHUTDOWN_TIMEOUT=7\n")
    said = run(shell, "kvmapp-guests", "stop", **guests)[1].splitlines()
    assert "  web: saved" in said and "  old server: shut down" in said
    assert "  old server: cannot be saved (error: unknown command: 'managedsave'); shutting it down" in said


@each_shell
def test_guests_that_have_all_the_time_are_waited_for(guests, shell, tmp_path):
    """libvirt-guests' 0 is no limit; for kvmappctl it is not to wait at all."""
    Path(guests["KVMAPP_GUESTS_SETTINGS"]).write_text("SHUTDOWN_TIMEOUT=0\n")
    said = run(shell, "kvmapp-guests", "stop", **guests)[1].splitlines()
    assert said[0] == "Shutting down kvmapp's domains (each has all the time that it takes):" and "  web: shut down" in said
    assert f"shutdown a{UUID} --timeout 2147483\n" in (tmp_path / "log").read_text()


@each_shell
def test_guests_are_left_alone_when_asked(guests, shell, tmp_path):
    Path(guests["KVMAPP_GUESTS_SETTINGS"]).write_text("ON_BOOT=ignore\n")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "ran").write_text("web\n")
    assert run(shell, "kvmapp-guests", "start", **guests) == (0, "", "")
    assert not (tmp_path / "state" / "ran").exists() and not (tmp_path / "log").exists()
    assert run(shell, "kvmapp-guests", "restart", **guests) == (0, "", "")


@each_shell
def test_guests_that_outlived_the_daemon_are_shut_down_too(guests, shell, tmp_path):
    """kvmappctl answers only once the daemon was started; it is, since a domain's socket is there."""
    daemon, ctl = tmp_path / "daemon", Path(guests["KVMAPPCTL"])
    daemon.write_text(f"#!/bin/sh\necho Starting the daemon: $1\ntouch {tmp_path}/up\n")
    daemon.chmod(0o755)
    ctl.write_text(CTL.replace("printf", f"[ -e {tmp_path}/up ] || exit 1\nprintf", 1))
    guests |= {"KVMAPP_GUESTS_DAEMON": str(daemon), "KVMAPP_GUESTS_DOMAINS": str(tmp_path / "domains")}
    assert run(shell, "kvmapp-guests", "stop", **guests) == (0, "", "")             # no domain: nothing to start it for
    (tmp_path / "domains" / "web").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(tmp_path / "domains" / "web" / "control.sock"))
    status, said, complaint = run(shell, "kvmapp-guests", "stop", **guests)
    assert (status, complaint) == (0, "") and said.startswith("Starting the daemon: start\nShutting down kvmapp's domains")
    assert "  web: shut down\n" in said


@each_shell
def test_where_systemd_starts_no_unit_any_more_the_daemon_is_started_without(guests, shell, tmp_path):
    """It refuses while the host goes down; the daemon's own settings hold all the same, and stay apart from these."""
    refusing, program, settings = tmp_path / "daemon", tmp_path / "kvmapp", tmp_path / "kvmapp-settings"
    refusing.write_text("#!/bin/sh\necho 'Transaction is destructive' >&2\nexit 1\n")
    program.write_text(f'#!/bin/sh\necho "$*" >{tmp_path}/up\n')
    settings.write_text("KVMAPP_OPTIONS='--heartbeat 9'\nSHUTDOWN_TIMEOUT=1\n")
    refusing.chmod(0o755)
    program.chmod(0o755)
    Path(guests["KVMAPPCTL"]).write_text(CTL.replace("printf", f"[ -e {tmp_path}/up ] || exit 1\nprintf", 1))
    (tmp_path / "domains" / "web").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(tmp_path / "domains" / "web" / "control.sock"))
    status, said, complaint = run(shell, "kvmapp-guests", "stop", **guests, KVMAPP=str(program), KVMAPP_SETTINGS=str(settings),
                                  KVMAPP_GUESTS_DAEMON=str(refusing), KVMAPP_GUESTS_DOMAINS=str(tmp_path / "domains"))
    assert (status, complaint) == (0, "Transaction is destructive\n") and "  web: shut down\n" in said and "has 7 s" in said
    assert (tmp_path / "up").read_text() == "daemon --background --heartbeat 9\n"


@each_shell
def test_what_ran_is_not_forgotten_while_the_daemon_does_not_answer(guests, shell, tmp_path):
    Path(guests["KVMAPPCTL"]).write_text("#!/bin/sh\necho 'error: failed to connect to the hypervisor' >&2\nexit 1\n")
    guests["KVMAPP_GUESTS_DOMAINS"] = str(tmp_path / "domains")
    ran = tmp_path / "state" / "ran"
    ran.parent.mkdir()
    ran.write_text("web\n")
    status, said, complaint = run(shell, "kvmapp-guests", "start", **guests)
    assert (status, said) == (0, "") and "the daemon does not answer; once it runs: " in complaint
    assert run(shell, "kvmapp-guests", "stop", **guests) == (0, "", "")
    assert ran.read_text() == "web\n"


@each_shell
def test_a_daemon_that_hangs_does_not_hold_up_the_host(guests, shell, tmp_path):
    Path(guests["KVMAPPCTL"]).write_text("#!/bin/sh\nexec sleep 600\n")
    Path(guests["KVMAPP_GUESTS_SETTINGS"]).write_text("ANSWER_TIMEOUT=1\n")
    guests |= {"KVMAPP_GUESTS_DAEMON": "true", "KVMAPP_GUESTS_DOMAINS": str(tmp_path / "domains")}
    (tmp_path / "domains" / "web").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(tmp_path / "domains" / "web" / "control.sock"))
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "ran").write_text("web\n")
    assert "the daemon does not answer; once it runs: " in run(shell, "kvmapp-guests", "start", **guests)[2]
    assert run(shell, "kvmapp-guests", "stop", **guests) == (
        0, "", "kvmapp's domains cannot be shut down: the daemon does not answer\n")
    assert (tmp_path / "state" / "ran").read_text() == "web\n"


@each_shell
def test_a_daemon_that_hangs_at_a_shutdown_is_told(guests, shell):
    ctl = Path(guests["KVMAPPCTL"])
    ctl.write_text(CTL.replace("a$U | b$U) ;;", "a$U) ;;\n                  b$U) exec sleep 600 ;;"))
    Path(guests["KVMAPP_GUESTS_SETTINGS"]).write_text("SHUTDOWN_TIMEOUT=1\nANSWER_TIMEOUT=1\n")
    said = run(shell, "kvmapp-guests", "stop", **guests)[1].splitlines()
    assert "  web: shut down" in said and "  old server: error: the daemon does not answer" in said


@each_shell
def test_a_host_without_timeout(guests, shell, tmp_path):
    """Or with one of other words, as busybox had it."""
    (tmp_path / "timeout").write_text("#!/bin/sh\nexit 127\n")
    (tmp_path / "timeout").chmod(0o755)
    said = run(shell, "kvmapp-guests", "stop", **guests, PATH=f"{tmp_path}:{os.environ['PATH']}")[1]
    assert "  web: shut down\n" in said


def unit_settings():
    for unit in (ROOT / "init/systemd").iterdir():
        for line in unit.read_text().splitlines():
            key, _, value = line.partition("=")
            yield unit.name, key, value


def test_no_unit_is_stopped_with_the_daemon():
    """systemd.unit(5): Requires= and its stronger kin hand on a stop and a restart; of kvmapp-guests that is the end of every guest."""
    for unit, key, others in unit_settings():
        assert key not in ("Requires", "Requisite", "BindsTo", "PartOf") or "kvmapp.service" not in others, (unit, key)


def test_guests_end_before_what_they_need():
    """The unit of their processes too: kvmapp.service, which comes after it, may be stopped already and then orders nothing."""
    [after] = [value.split() for unit, key, value in unit_settings() if (unit, key) == ("kvmapp-guests.service", "After")]
    assert {"kvmapp.service", "kvmapp-domains.service", "network-online.target", "remote-fs.target"} <= set(after)


def test_no_timeout_is_infinity():
    """systemd before 229 adds it to the time of day, and what overflows has passed already: the stop script would end at once."""
    assert ("kvmapp-guests.service", "TimeoutStopSec", "0") in set(unit_settings())
    assert not [(unit, key) for unit, key, value in unit_settings() if key.startswith("Timeout") and value == "infinity"]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("script", ["kvmapp", "kvmapp-guests"])
def test_shellcheck(script):
    subprocess.run(["shellcheck", "--shell=dash", str(ROOT / "init" / script)], check=True)
