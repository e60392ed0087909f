"""The daemon itself: in the background, never twice, and with settings that are read again."""
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from kvmapp.client import Client, of
from kvmapp.daemon.main import main
from kvmapp.errors import ConfigError, ConnectionFailed, HostError
from tests.unit.daemon.host import DAEMON, GUEST, PATIENCE, ROOT, SOCKET_GROUP


def test_background_returns_when_it_answers(host):
    ready = subprocess.run([sys.executable, "-c", DAEMON, "--background", "--root", host.root], cwd=ROOT, capture_output=True,
                           text=True, timeout=PATIENCE, check=False)
    assert (ready.returncode, ready.stderr) == (0, "")
    with host.client() as client:
        pid = client.get("/v1/daemon")["pid"]
    assert Path(host.paths.pid_file).read_text() == f"{pid}\n"
    os.kill(pid, 15)
    host.eventually(lambda: not os.path.exists(f"/proc/{pid}"))
    assert not os.path.lexists(host.paths.socket) and not os.path.lexists(host.paths.pid_file)
    assert "stopped; 0 domains run on" in Path(host.paths.daemon_log).read_text()


def test_background_tells_why_it_cannot_begin(host):
    host.write("kvmapp.conf", "log_level = loud\n")
    failed = subprocess.run([sys.executable, "-c", DAEMON, "--background", "--root", host.root], cwd=ROOT, capture_output=True,
                            text=True, timeout=PATIENCE, check=False)
    assert failed.returncode == 1 and "kvmapp.conf:1: log_level = 'loud'" in failed.stderr


def test_the_service_manager_hears_at_each_heartbeat_that_the_daemon_lives(host):
    """systemd starts one anew that hangs: WatchdogSec= of the unit."""
    host.options = ["--heartbeat", "0.1"]
    host.start()
    address = f"{host.root}/notify"
    os.unlink(address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(PATIENCE)
        assert [manager.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        assert host.states() == {}
    assert float(re.search(r"WatchdogSec=(.+)", (ROOT / "init/systemd/kvmapp.service").read_text())[1]) > 60


def test_second_daemon_says_who_runs(running):
    second = subprocess.run([sys.executable, "-c", DAEMON, "--background", "--root", running.root], cwd=ROOT, capture_output=True,
                            text=True, timeout=PATIENCE, check=False)
    assert second.returncode == 1
    assert second.stderr.startswith(f"error: A kvmapp daemon runs already (pid {running.process.pid})\n")
    assert running.states() == {}


@pytest.mark.parametrize("verb", ["stop", "reload"])
def test_who_may_not_signal_it_is_told(running, monkeypatch, verb):
    def refuse(error):
        def kill(pid, number):
            raise error(1, "Operation not permitted")
        return kill
    words = [f"--{verb}", "--root", str(running.root)]
    monkeypatch.setattr(Client, "open", Mock(side_effect=ConnectionFailed("no")))
    monkeypatch.setattr(os, "kill", refuse(PermissionError))
    with pytest.raises(HostError, match=rf"Cannot {verb} the kvmapp daemon \(pid {running.process.pid}\): Operation not") as caught:
        main(words)
    assert caught.value.hint.startswith("as root")
    monkeypatch.setattr(os, "kill", refuse(ProcessLookupError))                 # it has ended just now
    with pytest.raises(HostError, match="The kvmapp daemon does not run"):
        main(words)


def test_reload_takes_new_settings_and_survives_bad_ones(running):
    running.write("kvmapp.conf", f"unix_sock_group = {SOCKET_GROUP}\nunix_sock_rw_perms = 0600\n")
    with running.client() as client:
        assert client.post("/v1/daemon/reload")["warnings"] == []
        assert os.stat(running.paths.socket).st_mode & 0o777 == 0o600
        running.write("kvmapp.conf", "nonsense\n")
        assert "kvmapp.conf:1:" in client.post("/v1/daemon/reload")["warnings"][0]
        assert client.get("/v1/domains") == {"domains": []}
    with pytest.raises(ConfigError, match=r"kvmapp\.conf:1:") as caught:
        main(["--reload", "--root", str(running.root)])
    assert caught.value.hint == "the daemon goes on with what it had"


def test_settings_for_guests_that_cannot_be_read_leave_what_was_said_before(running):
    """Not the defaults: guests would get another user by a slip of the finger."""
    running.write("guest.conf", f"{GUEST}log_max_backups = 7\n")
    with running.client() as client:
        assert client.post("/v1/daemon/reload")["warnings"] == []
        running.write("guest.conf", f"{GUEST}log_max_backups = seven\n")
        answer = client.post("/v1/daemon/reload")
        client.post("/v1/daemon/reload")
    assert "guest.conf:" in answer["refused"][0] and answer["refused"] == answer["warnings"]
    running.add("web")
    with running.client() as client:
        started = client.post(of("web", "start"))
    assert started["warnings"] == answer["refused"]
    log = Path(running.log).read_text()
    assert log.count("going by what it said before") == 1


def test_it_takes_as_many_files_as_the_host_allows(host):
    host.launcher = ["sh", "-c", 'ulimit -S -n 256; ulimit -H -n 4096; exec "$@"', "sh"]
    host.start()
    with host.client() as client:
        zygote = client.get("/v1/daemon")["zygote"]
    for pid in (host.process.pid, zygote):
        assert re.search(r"Max open files +4096 +4096 ", Path(f"/proc/{pid}/limits").read_text())
