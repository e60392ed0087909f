"""kvmappctl when something is wrong: errors in words and in JSON, URIs, options, and an output that cannot be written."""
import json
import os
import subprocess

import pytest

from kvmapp.cli.main import main
from kvmapp.cli.uri import socket_of
from kvmapp.client import SOCKET
from kvmapp.errors import HostError, PermissionDenied
from tests.kvmappctl import KVMAPPCTL
from tests.unit.canned_daemon import domain


@pytest.mark.parametrize("line", ["list --all", "dominfo 1", "domstate 1", "domid 1", "domblklist 1", "domiflist 1", "start 3",
                                  "help", "help list", "pwd", "uri", "ttyconsole 1", "domjobinfo 1", "event --list", "echo x",
                                  "vcpucount 1 --live"])
def test_json_is_one_line(daemon, ctl, line):
    daemon.add(domain("3", 3))
    daemon.answers["GET", "/v1/version"] = {"kvmapp": "0.1", "api": 1, "python": "3", "kernel": "6"}
    for words in (["--json", *line.split()], [*line.split(), "--json"]):
        status, out, err = ctl(*words)
        assert (status, err, out.count("\n")) == (0, "", 1)
        assert isinstance(json.loads(out), dict)


def test_errors_in_json_and_for_people(ctl):
    status, out, err = ctl("--json", "dominfo", "nosuch")
    assert (status, err) == (1, "error: failed to get domain 'nosuch'\n")
    assert json.loads(out) == {"error": {"code": "domain-not-found", "message": "failed to get domain 'nosuch'", "hint": None}}
    for words in (["--json", "list", "extra"], ["list", "extra", "--json"], ["list extra --json"]):
        status, out, err = ctl(*words)
        assert (status, err) == (1, "error: unexpected data 'extra'\n")
        assert json.loads(out)["error"]["code"] == "usage"


def test_daemon_not_running(tmp_path, capsys):
    uri = f"kvmapp:///system?socket={tmp_path}/kvmapp.sock"
    assert main(["-c", uri, "list; list"]) == 1
    said = capsys.readouterr()
    assert said.err == ("error: failed to connect to the hypervisor\n"
                        f"error: Failed to connect socket to '{tmp_path}/kvmapp.sock': No such file or directory\n"
                        "hint: start it: /etc/init.d/kvmapp start\n")
    main(["-r", "-c", uri, "list"])
    assert f"'{tmp_path}/kvmapp-sock-ro'" in capsys.readouterr().err


@pytest.mark.parametrize(("uri", "hint"), [
    ("qemu+ssh://root@host2/system", "ssh root@host2 kvmappctl ..."), ("qemu:///session", "use kvmapp:///system"),
    ("xen:///", "use kvmapp:///system"), ("foo", "use kvmapp:///system"), ("kvmapp:///system?x=1", "use kvmapp:///system")])
def test_other_uris_are_refused(capsys, uri, hint):
    assert main(["-c", uri, "list"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: failed to connect to the hypervisor"
    assert uri.partition("?")[0].split("/")[0] in lines[1] and lines[2].startswith(f"hint: {hint}")


def test_uris_that_mean_the_local_daemon(daemon, capsys):
    for uri in (f"qemu+unix:///system?socket={daemon.path}", f"kvmapp:///system?socket=/{daemon.path[1:].replace('/', '%2F')}"):
        assert main(["-c", uri, "domid", "1"]) == 0
        assert capsys.readouterr().out == "1\n\n"
    assert [socket_of(uri) for uri in ("qemu:///system", "kvmapp:///system", "qemu+unix:///system", "kvmapp://")] == [SOCKET] * 4


def test_global_options(ctl, capsys):
    assert ctl("-v")[1] == ctl("--version")[1]
    assert "License" in ctl("-V")[1] and "License" in ctl("--version=long")[1]
    assert ctl("-x")[2] == "error: unsupported option '-x'. See --help.\n"
    assert ctl("-d")[2] == "error: option '-d'/'--debug' requires an argument\n"
    assert main(["-c"]) == 1 and capsys.readouterr().err == "error: option '-c'/'--connect' requires an argument\n"
    assert ctl("--quiet=1", "list")[0] == 1
    assert ctl("-h", "list") == ctl("help", "list")
    assert "Grouped" not in ctl("--help")[1] and "Domain Management" in ctl("--help")[1]
    out = ctl("-t", "domid", "1")[1]
    assert out.startswith("1\n\n(Time: ") and out.endswith(" ms)\n\n")
    assert ctl("-qk0", "-d", "1", "domid", "1")[1] == "1\n"


def test_host_and_permission_errors(daemon, ctl):
    daemon.answers["POST", "/v1/domains/linuxvm03/start"] = HostError("Cannot open disk 'vda' (/x.img): Permission denied",
                                                                      "user kvmapp lacks search permission on /home/ann")
    assert ctl("start", "linuxvm03")[2].splitlines() == [
        "error: Failed to start domain 'linuxvm03'", "error: Cannot open disk 'vda' (/x.img): Permission denied",
        "hint: user kvmapp lacks search permission on /home/ann"]
    daemon.answers["DELETE", "/v1/domains/linuxvm03"] = PermissionDenied("read-only connection")
    assert ctl("-q", "undefine", "linuxvm03")[2] == "error: Failed to undefine domain 'linuxvm03'\nerror: read-only connection\n"


def test_reader_that_goes_away(daemon):
    """`kvmappctl list | true` ends quietly."""
    done = subprocess.run([*KVMAPPCTL, "list"], stdout=open_closed_pipe(), stderr=subprocess.PIPE, check=False,
                          env={**os.environ, "KVMAPP_DEFAULT_URI": daemon.uri})
    assert (done.returncode, done.stderr) == (141, b"")


def test_output_that_cannot_be_written(daemon):
    """A full disk, and no standard output at all."""
    words = [*KVMAPPCTL, "-c", daemon.uri, "list"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: Cannot write the output: No space left on device\n")
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *words], stderr=subprocess.PIPE, text=True, check=False)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_nobody_to_complain_to_and_nothing_to_read(daemon):
    """Some starters of programs close standard input and error; what was asked for is done all the same."""
    words = [*KVMAPPCTL, "-c", daemon.uri]
    daemon.answers["POST", "/v1/domains/linuxvm03/start"] = {"domain": daemon.domains["linuxvm03"], "warnings": ["it is slow"]}
    silent = subprocess.run(["sh", "-c", '"$@" start linuxvm03 2>&-', "sh", *words], capture_output=True, text=True, check=False)
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "Domain linuxvm03 started\n\n", "")
    assert daemon.requests[-1][:2] == ("POST", "/v1/domains/linuxvm03/start")
    shell = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *words], capture_output=True, text=True, check=False)
    assert (shell.returncode, shell.stdout, shell.stderr) == (0, "", "")


def test_what_the_system_refuses_is_an_error(daemon, ctl, tmp_path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert ctl("pwd") == (1, "\n", "error: pwd: No such file or directory\n")


def test_an_error_commands_no_terminal(daemon, ctl):
    """Its words may be those of a domain's process that its guest has taken over."""
    daemon.answers["POST", "/v1/domains/linuxvm03/start"] = HostError("\x1b]0;owned\x07no\nmore", "\x9b2J")
    assert ctl("start", "linuxvm03")[2] == ("error: Failed to start domain 'linuxvm03'\nerror: \\x1b]0;owned\\x07no\nmore\n"
                                            "hint: \\x9b2J\n")


def test_names_that_are_no_text(ctl):
    assert ctl("dominfo", "\udcff\udcfe")[0] == 1
    assert ctl("dominfo", "../../etc")[2] == "error: failed to get domain '../../etc'\n"


def open_closed_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return writing
