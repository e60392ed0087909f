"""`kvmapp run` as a user types it: every bad input gives one clear line with a hint and exit 1; the terminal stays as it was."""
import contextlib
import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from kvmapp.core import Kvm
from kvmapp.probe import IMAGE
from tests.kvm.host import needs_root
from tests.smalldisk import fill, make_room, small_disk, sparse
from tests.unit.boot_images import MIB, elf, pvh_note
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
RUN = [sys.executable, "-m", "kvmapp", "run"]
KVM_CAP_BINARY_STATS_FD = 203
ELF_TO_NOWHERE = b"\x7fELF\x02\x01\x01" + bytes(57)

pytestmark = pytest.mark.kvm


def run(*words, timeout=60):
    return subprocess.run([*RUN, *map(str, words)], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=timeout)


@needs_root
@pytest.mark.parametrize("pressed", [False, True])
def test_a_guest_on_a_full_host_waits_for_room(tmp_path, pressed):
    """And for its power button: a signal does not end it before it can have heard."""
    with small_disk(tmp_path):
        image = sparse(tmp_path / "disk.img", 1 << 20)
        fill(tmp_path / "filler")
        words = [*RUN, "--kernel", str(IMAGE), "--memory", "32", "--append", "steps=virtio-blk end=poweroff", "--disk", str(image)]
        with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True) as guest:
            assert guest.stderr
            said = ""
            while "the host has no room for what the guest writes to vda: paused; make room\n" not in said:
                said += guest.stderr.readline()
            if pressed:
                guest.send_signal(signal.SIGTERM)
            make_room(tmp_path)
            printed, _ = guest.communicate(timeout=60)
        assert guest.returncode == 0 and ("power button" if pressed else "ok virtio-blk") in printed


@pytest.mark.parametrize(("words", "error"), [
    (["--kernel", "/no/kernel"], "/no/kernel"),
    (["--kernel", "{tmp}/empty"], "empty"),
    (["--kernel", "{tmp}/text"], "text"),
    (["--kernel", "{tmp}/elf"], "elf"),
    (["--kernel", "{tmp}"], "is a folder"),
    (["--kernel", "{probe}", "--initrd", "/no/initrd"], "/no/initrd"),
    (["--kernel", "{probe}", "--disk", "/no/disk.img"], "Cannot open disk 'vda' (/no/disk.img)"),
    (["--kernel", "{probe}", "--disk", "{tmp}"], "directory"),
    (["--kernel", "{probe}", "--net", "tap=tap-none"], "Cannot use tap 'tap-none': No such device"),
    (["--kernel", "{probe}", "--net", "bridge=br0"], "needs the daemon"),
    (["--kernel", "{probe}", "--memory", "1"], "memory"),
    (["--kernel", "{probe}", "--memory", "16777216"], "guest memory"),
    (["--kernel", "{probe}", "--vcpus", "0"], "vcpus"),
    (["--kernel", "{probe}", "--vcpus", "many"], "many"),
    (["--kernel", "{probe}", "--memroy", "64"], "unknown option '--memroy'"),
    (["--kernel"], "wants an argument"),
    ([], "nothing to boot"),
    (["/no/domain.conf"], "/no/domain.conf"),
    (["{tmp}/broken.conf"], "kernal"),
    (["{tmp}/text", "{tmp}/empty"], "one domain file"),
])
def test_bad_input_is_one_clear_error(tmp_path, words, error):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("#!/bin/sh\necho I am no kernel\n")
    (tmp_path / "elf").write_bytes(ELF_TO_NOWHERE)
    (tmp_path / "broken.conf").write_text("name = a\nmemory = 64\n[boot]\nkernal = /x\n")
    done = run(*(word.format(tmp=tmp_path, probe=IMAGE) for word in words))
    assert done.returncode == 1, done
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: "), done.stderr
    assert error in lines[0]
    assert len(lines) <= 2
    assert len(lines) == 1 or lines[1].startswith("hint: ")
    assert "Traceback" not in done.stderr


def test_a_nearest_key_is_named(tmp_path):
    (tmp_path / "broken.conf").write_text("name = a\nmemory = 64\n[boot]\nkernal = /x\n")
    done = run(tmp_path / "broken.conf")
    assert f"{tmp_path}/broken.conf:4" in done.stderr
    assert "kernel" in done.stderr


def test_a_domain_file_runs(tmp_path):
    (tmp_path / "probe.conf").write_text(
        f"name = probe\nmemory = 32 MiB\n[boot]\nkernel = {IMAGE}\ncmdline = report=serial steps=cpu,serial\n[debug]\nexit_port = yes\n")
    done = run(tmp_path / "probe.conf")
    assert done.returncode == 1                         # debug exit 0
    assert "ok serial" in done.stdout
    assert "done passed=2 failed=0" in done.stdout


class Terminal:
    """A guest on a pseudo terminal, as on a user's; `stdout`: but for its output."""

    def __init__(self, *words, stdout=None):
        self.master, slave = pty.openpty()
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.seen = b""
        self.process = subprocess.Popen([*RUN, "--kernel", IMAGE, "--memory", "32", "--append", *words], cwd=ROOT, stdin=slave,
                                        stdout=stdout or slave, stderr=slave, start_new_session=True)

    def expect(self, text: bytes, seconds=60):
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert select.select([self.master], [], [], max(0, deadline - time.monotonic()))[0], f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self.master, 65536)

    def type(self, keys: bytes):
        os.write(self.master, keys)

    def is_restored(self) -> bool:
        return termios.tcgetattr(self.slave) == self.before

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal():
    opened = []

    def make(*words, **stdout):
        opened.append(Terminal(*words, **stdout))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def child_of(process) -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def test_keys_go_to_the_guest_and_the_leave_key_ends_it(terminal):
    guest = terminal("steps=none mode=echo report=serial")
    guest.expect(b"ready")
    assert not guest.is_restored()
    guest.type(b"hello\x03")                            # Ctrl-C is the guest's, too
    guest.expect(b"hello\x03")
    guest.type(b"\x1d")
    assert guest.process.wait(60) == 5
    assert guest.is_restored()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_terminal_is_restored_when_the_machine_dies(terminal, number):
    guest = terminal("steps=none mode=echo report=serial")
    guest.expect(b"ready")
    os.kill(child_of(guest.process), number)
    assert guest.process.wait(60) == 128 + number
    assert guest.is_restored()


def test_its_output_may_go_elsewhere_than_to_the_terminal(terminal, tmp_path):
    with open(tmp_path / "boot.log", "wb") as log:
        guest = terminal("steps=cpu report=serial end=poweroff", stdout=log)
        assert guest.process.wait(60) == 0
    assert b"ok cpu" in (tmp_path / "boot.log").read_bytes()
    assert guest.is_restored()


@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGTERM])
def test_a_reader_that_stalls_makes_no_guest_deaf(number):
    """As `kvmapp run ... | less` does."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    process = subprocess.Popen([*RUN, "--kernel", IMAGE, "--memory", "32", "--append", "steps=none end=reset banner=" + "X" * 200],
                               cwd=ROOT, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.DEVNULL)
    try:
        wait_until_full(writer)
        for _ in range(60):
            process.send_signal(number)                  # of several that come together one may be all that is heard
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert process.wait(1) == 5
                break
        else:
            pytest.fail("it hears nothing")
    finally:
        process.kill()
        process.wait()
        os.close(reader)
        os.close(writer)


def wait_until_full(writer: int) -> None:
    poll = select.poll()
    poll.register(writer, select.POLLOUT)
    until(lambda: not poll.poll(0), 60, 0.01)


def test_an_error_leaves_the_terminal_alone(terminal):
    guest = terminal("steps=none", "--disk", "/no/disk.img")
    guest.expect(b"error: Cannot open disk 'vda' (/no/disk.img)")
    assert guest.process.wait(60) == 1
    assert guest.is_restored()


@pytest.mark.parametrize(("words", "status", "text"), [
    ("steps=none end=poweroff", 0, "the guest powered off"),
    ("steps=none end=triple", 3, "triple fault"),
    ("steps=none end=reset", 3, "reset"),
    ("steps=none end=reset-i8042", 3, "reset"),
    ("steps=none end=reset-halt", 3, "reset"),              # it makes no exit after that
])
def test_the_exit_status_tells_how_the_guest_ended(words, status, text):
    done = run("--kernel", IMAGE, "--memory", "32", "--append", words, "--no-reboot")
    assert done.returncode == status
    assert text in done.stderr


def test_the_power_button_is_pressed_by_the_first_signal(terminal):
    guest = terminal("steps=none mode=echo report=serial")
    guest.expect(b"ready")
    guest.process.terminate()
    guest.expect(b"power button")
    assert guest.process.wait(60) == 0


def terminate_again(process) -> int:
    """Once more, and again: on a busy host a signal that comes before the last one was taken is lost in it."""
    for _ in range(60):
        process.terminate()
        try:
            return process.wait(1)
        except subprocess.TimeoutExpired:
            continue
    return process.wait(0)


def test_a_second_signal_ends_a_guest_that_ignores_the_button(terminal):
    guest = terminal("steps=none mode=echo report=serial button=ignore")
    guest.expect(b"ready")
    guest.process.terminate()
    guest.type(b"still here")
    guest.expect(b"still here")
    assert terminate_again(guest.process) == 5


def test_a_guest_restarts_in_place():
    """on_reboot = restart: the banner comes again and again, until we end it."""
    process = subprocess.Popen([*RUN, "--kernel", IMAGE, "--memory", "32", "--append", "steps=none end=reset banner=ONCE"],
                               cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        seen = b""
        while seen.count(b"ONCE") < 4:
            assert select.select([process.stdout], [], [], 60)[0]
            seen += os.read(process.stdout.fileno(), 4096)
    finally:
        process.send_signal(signal.SIGQUIT)
        assert process.wait(60) == 5


def timing_of(stderr: str) -> tuple[list[str], str]:
    """The lines of the marks, and the table of exits."""
    marks, _, exits = stderr[stderr.index("timing, in ms"):].partition("exits of the vCPUs")
    return marks.splitlines()[1:], exits


def test_timing_is_a_table_in_order():
    done = run("--kernel", IMAGE, "--append", "steps=none end=poweroff", "--memory", "32MiB", "--timing")
    assert done.returncode == 0, done.stderr
    lines, exits = timing_of(done.stderr)
    names = [line.split(maxsplit=2)[2] for line in lines]
    assert names == ["process started", "options read", "machine built", "kernel loaded", "first vCPU enters the guest", "first exit",
                     "end"]
    times = [float(line.split()[0]) for line in lines]
    assert times == sorted(times) and times[0] == 0 and 0 < times[-1] < 60_000
    assert sum(float(line.split()[1]) for line in lines) == pytest.approx(times[-1], abs=1)
    counters = {name: int(number) for number, name in (line.split(maxsplit=1) for line in exits.splitlines()[1:])}
    assert counters["to kvmapp: io"] > 10                # the probe guest's report goes byte by byte
    if Kvm().capability(KVM_CAP_BINARY_STATS_FD):
        assert counters["exits.sum"] >= counters["to kvmapp: io"]


def test_a_guest_marks_its_own_points(tmp_path):
    text = b"timing: half way\n"
    code = (b"\xbe" + (MIB + 64).to_bytes(4, "little") + b"\xb9" + len(text).to_bytes(4, "little")    # mov esi, text; mov ecx, length
            + b"\x66\xba\x02\x04\xf3\x6e"           # mov dx, 0x402; rep outsb
            + b"\xb0\x07\xe6\xf4")                   # mov al, 7; out 0xf4, al
    kernel = tmp_path / "kernel"
    kernel.write_bytes(elf(segments=((MIB, MIB, code.ljust(64) + text, 4096),), notes=pvh_note(MIB)))
    done = run("--kernel", kernel, "--memory", "32MiB", "--debug-console", "--debug-exit", "--timing")
    assert done.returncode == 15, done.stderr
    assert "debug: timing: half way" in done.stderr
    names = [line.split(maxsplit=2)[2] for line in timing_of(done.stderr)[0]]
    assert names[-3:] == ["first exit", "guest: half way", "end"]


def test_timing_is_not_shown_unasked():
    assert "timing" not in run("--kernel", IMAGE, "--append", "steps=none end=poweroff", "--memory", "32MiB").stderr
