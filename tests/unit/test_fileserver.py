"""virtiofsd is found, started with the options that it knows, and connected to; what is missing is an error that tells it."""
import os
import socket
import stat
import sys
from pathlib import Path

import pytest

from kvmapp import fileserver
from kvmapp.config import DomainConfig
from kvmapp.errors import HostError

# Answers --help, writes down its words, and tells the first client so; its end is the client's.
SERVER = """#!{python}
import socket, sys
words = sys.argv[1:]
if words == ["--help"]:
    print({known!r})
    sys.exit()
fd = next(int(word.removeprefix("--fd=")) for word in words if word.startswith("--fd="))
listener = socket.socket(fileno=fd)
client = listener.accept()[0]
print("serving", flush=True)
client.sendall("\\0".join(word for word in words if not word.startswith("--fd=")).encode() + b"\\n")
client.recv(1)
"""


@pytest.fixture
def program(tmp_path):
    def make(known):
        path = tmp_path / "virtiofsd"
        path.write_text(SERVER.format(python=sys.executable, known=known))
        path.chmod(0o755)
        return str(path)
    return make


def section(**settings):
    return DomainConfig.from_dict({"name": "guest", "memory": 64 << 20, "filesystems": [{"tag": "data", **settings}]}).filesystems[0]


def words_of(filesystem, log):
    server = fileserver.start(filesystem, log.fileno())
    with socket.socket(fileno=server.fd) as client, client.makefile() as lines:
        words = lines.readline().rstrip("\n").split("\0")
    assert server.process.wait(30) == 0
    assert Path(log.name).read_text() == "serving\n"
    return words


QUIET = "--log-level=error"


@pytest.mark.parametrize(("settings", "words"), [
    ({}, ["--shared-dir={}", "--cache=auto", QUIET]), ({"cache": "none"}, ["--shared-dir={}", "--cache=never", QUIET]),
    ({"cache": "always", "readonly": True}, ["--shared-dir={}", "--cache=always", QUIET, "--readonly"])])
def test_the_server_in_rust(program, tmp_path, settings, words):
    with open(tmp_path / "log", "w") as log:
        one = section(source=str(tmp_path), binary=program("--shared-dir DIR --readonly --log-level LEVEL"), **settings)
        assert words_of(one, log) == [word.format(tmp_path) for word in words]


def test_the_server_of_old_qemus(program, tmp_path):
    folder = tmp_path / "a,b\\c"
    folder.mkdir()
    with open(tmp_path / "log", "w") as log:
        one = section(source=str(folder), binary=program("-o source=PATH"), cache="none")
        assert words_of(one, log) == ["-f", "-o", f"source={tmp_path}/a\\,b\\\\c,cache=none,log_level=err"]


def test_read_only_without_an_option_for_it(program, tmp_path, monkeypatch):
    one = section(source="/srv/x", binary=program("-o source=PATH"), readonly=True)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    words = fileserver.command(one, one.binary, 3)
    assert words[:2] == ["unshare", "--mount"] and words[-5:-1] == [one.binary, "--fd=3", "-f", "-o"]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostError, match="read-only") as caught:
        fileserver.command(one, one.binary, 3)
    assert "1.13" in caught.value.hint


def test_what_is_missing_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for source, complaint in ((tmp_path / "none", "No such file or directory"), (tmp_path / "file", "no folder")):
        with pytest.raises(HostError, match=complaint):
            fileserver.start(section(source=str(source)), 2)
    with pytest.raises(HostError, match="not there, or no program"):
        fileserver.start(section(source=str(tmp_path), binary=str(tmp_path / "file")), 2)
    monkeypatch.setattr(fileserver, "PLACES", ())
    monkeypatch.setattr(fileserver, "SEARCH", str(tmp_path))
    with pytest.raises(HostError, match="virtiofsd is not installed") as caught:
        fileserver.start(section(source=str(tmp_path)), 2)
    assert "qemu-system-common" in caught.value.hint


def test_a_server_that_listens_already(tmp_path):
    path = str(tmp_path / "s")
    with pytest.raises(HostError, match=r"Cannot reach the file server of \[filesystem data\]"):
        fileserver.start(section(socket=path), 2)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        server = fileserver.start(section(socket=path), 2)
        assert server.process is None and stat.S_ISSOCK(os.fstat(server.fd).st_mode)
        os.close(server.fd)


def test_nobody_else_can_be_first(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    listener, client = fileserver.connected_pair()
    with listener, client:
        assert os.listdir(tmp_path) == []
        assert listener.accept()[0].getpeername() == client.getsockname()
