"""The lab's own parts, as far as they go without a nested host: cpio archives, the cache, the streams of a command."""
import gzip
import os
import socket
import subprocess
import threading

import pytest

from tests.lab import cache, commandline, debian, images, initramfs, nested
from tests.lab.errors import LabError, NestedHostDied
from tests.lab.nested import Heartbeats, NestedHost, Stream


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("KVMAPP_CACHE", str(tmp_path / "cache"))


def test_linux_would_unpack_the_archive(tmp_path):
    """Judged by reading it back in the words of the specification."""
    script = tmp_path / "script"
    script.write_bytes(b"#!/bin/sh\n")
    packed = initramfs.archive({"bin/script": initramfs.program(script), "bin/sh": initramfs.symlink("script")})
    data = gzip.decompress(packed)
    found, at = {}, 0
    while True:
        assert at % 4 == 0 and data[at:at + 6] == b"070701"
        mode, size, name_size = (int(data[at + offset:at + offset + 8], 16) for offset in (14, 54, 94))
        name = data[at + 110:at + 110 + name_size - 1].decode()
        content = at + (110 + name_size + 3) // 4 * 4
        if name == "TRAILER!!!":
            break
        found[name] = (oct(mode), data[content:content + size])
        at = content + (size + 3) // 4 * 4
    assert found == {"bin": ("0o40755", b""), "bin/script": ("0o100755", b"#!/bin/sh\n"), "bin/sh": ("0o120777", b"script")}


def test_an_artifact_is_built_once_whoever_asks():
    built = []

    def build(folder):
        built.append(folder)
        (folder / "content").write_text("whole")

    def ask():
        answers.append((cache.artifact("thing", ["v1"], build) / "content").read_text())

    answers: list[str] = []
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["whole"] * 8
    assert len(built) == 1


def test_an_artifact_is_built_anew_when_its_input_changes(tmp_path):
    source = tmp_path / "source"
    source.write_text("one")
    first = cache.artifact("thing", ["v1", source, cache.artifact], lambda folder: None)
    assert cache.artifact("thing", ["v1", source, cache.artifact], lambda folder: None) == first
    source.write_text("two")
    assert cache.artifact("thing", ["v1", source, cache.artifact], lambda folder: None) != first


def test_a_failed_build_leaves_nothing():
    def build(folder):
        (folder / "half").touch()
        raise LabError("no network")

    with pytest.raises(LabError):
        cache.artifact("thing", ["v1"], build)
    assert [path.name for path in cache.cache_folder().iterdir()] == ["lab-thing.lock"]


def test_old_artifacts_and_leftovers_go_when_a_new_one_is_made():
    old = cache.artifact("thing", ["v1"], lambda folder: None)
    os.utime(old, (0, 0))
    leftover = cache.cache_folder() / ".lab-thing-killed"
    leftover.mkdir()
    other = cache.artifact("another", ["v1"], lambda folder: None)
    os.utime(other, (0, 0))
    new = cache.artifact("thing", ["v2"], lambda folder: None)
    assert new.is_dir() and other.is_dir()
    assert not old.exists() and not leftover.exists()


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_command_s_output_ends_at_its_token_however_it_is_cut(capfd, size):
    stream = Stream("cafe", 1)
    sent = b"one\n\1\1two\1caf\n\1cafe 17\n"
    for start in range(0, len(sent), size):
        assert stream.status is None
        stream.take(sent[start:start + size])
    assert stream.status == 17
    assert capfd.readouterr().out == "one\n\1\1two\1caf\n"


def test_the_last_words_tell_where_each_cpu_is(tmp_path):
    (tmp_path / "console.log").write_text("BUG: soft lockup\n")
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.bind(str(tmp_path / "monitor"))
        monitor.listen()
        told: list[str] = []
        asking = threading.Thread(target=lambda: told.append(NestedHost(tmp_path, tmp_path).last_words()))
        asking.start()
        with monitor.accept()[0] as asked:
            asked.sendall(b"QEMU 7.2 monitor\r\n(qemu) ")
            for command, answer in ((b"info registers -a", b"CPU#0\r\nRAX=1\r\nRIP=1234 HLT=1\r\nYMM00=0"),
                                    (b"info registers -a", b"CPU#0\r\nRAX=1\r\nRIP=5678 HLT=1\r\nYMM00=0"),
                                    (b"info lapic 0", b"LVT0 masked\r\nIRR\t 236")):
                assert asked.recv(100) == command + b"\n"
                asked.sendall(command + b"\r\n" + answer)
                asked.sendall(b"\r\n(qemu) ")
            asking.join()
    assert told == ["-- registers:\nCPU#0\nRIP=1234 HLT=1\n-- registers:\nCPU#0\nRIP=5678 HLT=1\n"
                    "-- its local APIC 0:\nIRR\t 236\n-- end of console.log:\n    BUG: soft lockup"]


def test_the_last_words_of_a_host_that_is_gone(tmp_path):
    assert "monitor does not answer" in NestedHost(tmp_path, tmp_path).last_words()
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.bind(str(tmp_path / "monitor"))
        monitor.listen()
        ending = threading.Thread(target=lambda: monitor.accept()[0].close())
        ending.start()
        assert "monitor does not answer: QEMU has ended" in NestedHost(tmp_path, tmp_path).last_words()
        ending.join()


def test_a_cpu_that_stands_still_is_named(monkeypatch):
    clock = 1000.0
    monkeypatch.setattr(nested.time, "monotonic", lambda: clock)
    heartbeats = Heartbeats()
    assert not heartbeats.missing()                      # none has begun
    heartbeats.take(b"0\n1\n")
    clock += nested.STILL_SECONDS
    assert not heartbeats.missing()
    heartbeats.take(b"0\n")
    clock += 1
    assert heartbeats.missing() == "1"
    heartbeats.begin()
    assert not heartbeats.missing()
    clock += nested.STILL_SECONDS + 1
    assert heartbeats.missing()


@pytest.mark.parametrize("silent", [False, True])
def test_a_command_goes_on_while_every_cpu_beats(tmp_path, monkeypatch, silent):
    """A request on three sockets, with this test as the nested host."""
    monkeypatch.setattr(nested, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(nested, "STILL_SECONDS", 0.5)
    host = NestedHost(tmp_path, tmp_path)
    theirs = {}
    for name in nested.PORTS:
        host.ports[name], theirs[name] = socket.socketpair()
    outcome: list[object] = []

    def ask():
        try:
            outcome.append(host.run(["true"], 60, (os.open(os.devnull, os.O_WRONLY),) * 2))
        except NestedHostDied as died:
            outcome.append(str(died))

    asking = threading.Thread(target=ask)
    asking.start()
    verb, token = theirs["control"].recv(100).split()
    theirs["control"].sendall(b"0\n1\n")
    if silent:                                           # CPU 1 beats no more
        while not outcome:
            theirs["control"].sendall(b"0\n")
            asking.join(0.05)
    else:
        for name in ("out", "err"):
            theirs[name].sendall(b"\1" + token + b" 3\n")
    asking.join()
    for end in (*host.ports.values(), *theirs.values()):
        end.close()
    assert verb == b"run"
    if silent:
        assert str(outcome[0]).startswith("CPU 1 of the nested host stands still")
    else:
        assert outcome == [3]


def test_a_failed_step_shows_the_end_of_what_it_said():
    with pytest.raises(LabError, match=r"(?s)'trying' failed with status 3: sh .*line 30\n.*line 49$"):
        debian.run_step("trying", ["sh", "-c", "for n in $(seq 49); do echo line $n; done; exit 3"])


def test_missing_packages_are_named_to_who_may_not_install_them(monkeypatch, tmp_path):
    monkeypatch.setattr(debian.shutil, "which", lambda program, path=None: "/usr/bin/apt-get" if program == "apt-get" else None)
    monkeypatch.setattr(debian.os, "geteuid", lambda: 1000)
    with pytest.raises(LabError, match=r"debootstrap.*\nhint: as root: apt-get install .*qemu-system-x86"):
        debian.install_tools()


def test_no_apt_get_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(debian.shutil, "which", lambda program, path=None: None)
    with pytest.raises(LabError, match="no apt-get"):
        debian.install_tools()


def test_nothing_to_run_is_a_usage_error(capsys):
    with pytest.raises(SystemExit):
        commandline.main([])
    assert "name a command, or --keep" in capsys.readouterr().err


def test_another_python_than_the_nested_host_s_is_refused(monkeypatch, tmp_path):
    (tmp_path / ".venv/lib/python3.13/site-packages").mkdir(parents=True)
    monkeypatch.setattr(commandline, "CHECKOUT", tmp_path)
    with pytest.raises(LabError, match=r"has Python 3\.11, this build is for python3\.13"):
        commandline.site_packages()


@pytest.mark.parametrize("packer", ["xz", "zstd"])
def test_a_kernel_s_elf_is_found_however_it_is_packed(packer):
    elf = b"\x7fELF" + os.urandom(5000)
    payload = subprocess.run([packer, "-c"], input=elf, stdout=subprocess.PIPE, check=True).stdout + len(elf).to_bytes(4, "little")
    header = bytearray(2 * 512)                          # one sector of setup code after the boot sector
    header[0x1f1] = 1
    header[0x248:0x250] = (16).to_bytes(4, "little") + len(payload).to_bytes(4, "little")
    assert images._vmlinux(bytes(header) + bytes(16) + payload + b"the rest") == elf
    assert images._vmlinux(bytes(header) + bytes(16) + b"as LZ4 would have it") is None


@pytest.mark.parametrize("script", ["host/init", "host/agent", "host/initrd-init", "guest/init", "guest/initrd-init", "guest/dhcp-script"])
def test_the_scripts_are_shell(script):
    assert subprocess.run(["sh", "-n", commandline.CHECKOUT / "tests/lab" / script], check=False).returncode == 0
