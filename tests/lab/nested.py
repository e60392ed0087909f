"""One nested host: QEMU's software emulator with AMD SVM in it, and three virtio ports to tell it what to do.

The agent in it (host/agent) takes one request a line on the control port, on which the heartbeats of its CPUs come; a command's
output comes back on two more ports, ended on both by \\001, a token that no output can guess, and the exit status.
"""
import os
import secrets
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab.errors import LabError, NestedHostDied, TimeIsUp
from tests.lab.images import Images

BOOT_TIMEOUT = 240
PORTS = ("control", "out", "err")
MONITOR_TIMEOUT = 5
# Each CPU of the nested host beats every five seconds (host/agent); an emulated one now and then stands still for ever (README.md).
LOOK_SECONDS = 5
STILL_SECONDS = 90
# With the emulator's nested paging a guest now and then resets by a triple fault, or spins with the host's registers in its VMCB
# (README.md). Shadow paging does without.
NO_NESTED_PAGES = "kvm_amd.npt=0"


@dataclass
class Hardware:
    """What the nested host is made of."""

    cpus: int = 2
    memory: int = 3072
    disk: Path | None = None                            # a persistent overlay; None: changes are forgotten
    init: bool = False                                  # boot Debian's own, with its scripts or units
    terminal: bool = False                              # hvc0 is this terminal
    qemu: list[str] = field(default_factory=list)       # more options for QEMU


@dataclass
class Share:
    """The folders of this machine that the nested host sees."""

    checkout: Path
    python: Path
    out: Path


class NestedHost:
    """A nested host that this process started, or one that a former run left running (see `attach`)."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder = folder                            # sockets and logs
        self.out = out
        self.qemu: subprocess.Popen | None = None
        self.ports: dict[str, socket.socket] = {}
        self.heartbeats = Heartbeats()

    def start(self, images: Images, hardware: Hardware, share: Share, outlive: bool = False) -> None:
        """Starts QEMU; `outlive`: it goes on when this process ends."""
        command = _qemu_command(self.folder, images, hardware, share)
        if not outlive:
            command = ["setpriv", "--pdeathsig", "KILL", *command]
        with open(self.folder / "qemu.log", "wb") as log:
            stdio = None if hardware.terminal else subprocess.DEVNULL
            output = None if hardware.terminal else log
            self.qemu = subprocess.Popen(command, stdin=stdio, stdout=output, stderr=log, start_new_session=outlive)
        (self.folder / "pid").write_text(str(self.qemu.pid))
        self.attach()

    def attach(self) -> None:
        """Connects to the ports."""
        for name in PORTS:
            self.ports[name] = self._connect(self.folder / name)

    def run(self, words: list[str], timeout: float, outputs: tuple[int, int] = (1, 2)) -> int:
        """Runs a command, its output live on ours, for `timeout` seconds at most (0: no limit); its exit status."""
        self._write_command(f"cd /src && exec {shlex.join(words)}" if len(words) > 1 else f"cd /src\n{words[0]}\n")
        return self._request("run", timeout, outputs)

    def shell(self) -> None:
        """An interactive shell on hvc0, which is our terminal."""
        size = os.get_terminal_size() if sys.stdout.isatty() else os.terminal_size((80, 24))
        self._write_command(f"export TERM={shlex.quote(os.environ.get('TERM', 'vt100'))}\n"
                            f"stty sane rows {size.lines} cols {size.columns} 2>/dev/null\ncd /src; exec bash -l\n")
        self._request("shell", 0)

    def power_off(self) -> None:
        """Ends it in order; a host that does not go within a minute is killed."""
        self.ports["control"].sendall(b"poweroff\n")
        deadline = time.monotonic() + 60
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill()

    def last_words(self) -> str:
        """What a nested host that no longer answers is at: its CPUs' registers, twice, and the end of its console."""
        words = []
        try:
            with socket.socket(socket.AF_UNIX) as monitor:
                monitor.settimeout(MONITOR_TIMEOUT)
                monitor.connect(str(self.folder / "monitor"))
                _answer(monitor)
                for _ in range(2):                       # the same twice: it stands still
                    registers = _ask_monitor(monitor, "info registers -a", ("CPU#", "RSI=", "RIP=", "CR0="))
                    words += ["-- registers:", *registers]
                for cpu in range(sum(line.startswith("CPU#") for line in registers)):
                    words += [f"-- its local APIC {cpu}:", *_ask_monitor(monitor, f"info lapic {cpu}", ("Timer", "ISR", "IRR", "APR"))]
        except OSError as error:
            words.append(f"-- QEMU's monitor does not answer: {error}")
        return "\n".join([*words, f"-- end of console.log:\n{_tail(self.folder / 'console.log')}"])

    def kill(self) -> None:
        if self.alive():
            os.kill(self.pid(), signal.SIGKILL)
        if self.qemu:
            self.qemu.wait()

    def alive(self) -> bool:
        if self.qemu:
            return self.qemu.poll() is None
        try:
            return b"qemu-system" in Path(f"/proc/{self.pid()}/cmdline").read_bytes()
        except (OSError, ValueError):
            return False

    def pid(self) -> int:
        return int((self.folder / "pid").read_text())

    # -- in order of use

    def _connect(self, path: Path) -> socket.socket:
        port = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 10
        while True:
            try:
                port.connect(str(path))
                return port
            except OSError:
                if not self.alive() or time.monotonic() > deadline:
                    raise self._died("QEMU did not start") from None
                time.sleep(0.02)

    def _write_command(self, script: str) -> None:
        (self.out / ".command").write_text(script)

    def _request(self, verb: str, timeout: float, outputs: tuple[int, int] = (1, 2)) -> int:
        token = secrets.token_hex(16)
        self.ports["control"].sendall(f"{verb} {token}\n".encode())
        deadline = time.monotonic() + timeout if timeout else float("inf")
        self.heartbeats.begin()
        streams = {self.ports[name]: Stream(token, descriptor) for name, descriptor in zip(("out", "err"), outputs, strict=True)}
        with selectors.DefaultSelector() as selector:
            for port in self.ports.values():
                selector.register(port, selectors.EVENT_READ)
            while any(stream.status is None for stream in streams.values()):
                ready = selector.select(max(0.0, min(LOOK_SECONDS, deadline - time.monotonic())))
                if not ready and time.monotonic() > deadline:
                    raise TimeIsUp(f"no end after {timeout:g} s")
                for key, _ in ready:
                    data = key.fileobj.recv(65536)       # type: ignore[union-attr]
                    if not data:
                        raise self._died("the nested host died (a panic, a reset, or QEMU failed)")
                    streams.get(key.fileobj, self.heartbeats).take(data)     # type: ignore[call-overload]
                still = self.heartbeats.missing()
                if still:
                    raise NestedHostDied(f"CPU {still} of the nested host stands still\n{self.last_words()}")
        return max(stream.status or 0 for stream in streams.values())

    def _died(self, what: str) -> NestedHostDied:
        if self.qemu:
            self.qemu.wait()
        tails = [f"-- end of {name}:\n{_tail(self.folder / name)}" for name in ("qemu.log", "console.log")
                 if _tail(self.folder / name)]
        return NestedHostDied("\n".join([what, *tails]))


class Heartbeats:
    """When each CPU of the nested host was last heard of; of one that has not begun yet nothing is known."""

    def __init__(self) -> None:
        self.heard: dict[bytes, float] = {}

    def begin(self) -> None:
        """From now on somebody listens."""
        self.take(b"\n".join(self.heard))

    def take(self, data: bytes) -> None:
        """The numbers of CPUs, a line each."""
        self.heard.update(dict.fromkeys(data.split(), time.monotonic()))

    def missing(self) -> str:
        """The number of a CPU that has been silent for STILL_SECONDS, or nothing."""
        now = time.monotonic()
        return next((cpu.decode() for cpu, heard in self.heard.items() if now - heard > STILL_SECONDS), "")


class Stream:
    """Passes a command's output on until the line that ends it."""

    def __init__(self, token: str, descriptor: int) -> None:
        self.end = b"\1" + token.encode() + b" "
        self.descriptor = descriptor
        self.held = b""
        self.status: int | None = None

    def take(self, data: bytes) -> None:
        data = self.held + data
        found = data.find(self.end)
        if found < 0:                                    # the end may begin in the last bytes
            start = data.rfind(b"\1", max(0, len(data) - len(self.end)))
            keep = start if start >= 0 and self.end.startswith(data[start:]) else len(data)
        else:
            keep = found
            number, newline, _ = data[found + len(self.end):].partition(b"\n")
            if newline:
                self.status = int(number)
        self._write(data[:keep])
        self.held = data[keep:]

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.descriptor, data):]


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join("    " + line.rstrip() for line in lines[-25:])


def _ask_monitor(monitor: socket.socket, command: str, wanted: tuple[str, ...]) -> list[str]:
    """The lines of a command's answer that begin with what is wanted."""
    monitor.sendall(command.encode() + b"\n")
    return [line.rstrip() for line in _answer(monitor).splitlines() if line.startswith(wanted)]


def _answer(monitor: socket.socket) -> str:
    """What QEMU's human monitor says until it asks for the next command."""
    said = b""
    while not said.rstrip().endswith(b"(qemu)"):
        part = monitor.recv(65536)
        if not part:
            raise ConnectionError("QEMU has ended")
        said += part
    return said.decode(errors="replace")


def _qemu_command(folder: Path, images: Images, hardware: Hardware, share: Share) -> list[str]:
    disk = f"file={images.disk},format=raw,snapshot=on,cache=unsafe"
    if hardware.disk:
        disk = f"file={hardware.disk},format=qcow2,cache=writeback"
    boot = " lab.boot" if hardware.init else ""
    command = ["qemu-system-x86_64", "-name", "lab,debug-threads=on", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
               "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(hardware.cpus), "-m", str(hardware.memory),
               "-kernel", str(images.kernel), "-initrd", str(images.initrd), "-append",
               f"console=ttyS0 panic=-1 quiet mitigations=off nokaslr random.trust_cpu=on {NO_NESTED_PAGES}{boot}",
               "-drive", f"if=virtio,{disk}", "-serial", f"file:{folder / 'console.log'}",
               "-monitor", f"unix:{folder / 'monitor'},server=on,wait=off",
               "-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]
    if hardware.terminal:
        command += ["-chardev", "stdio,id=terminal,signal=off", "-device", "virtconsole,chardev=terminal,nr=0"]
    for number, name in enumerate(PORTS, 1):
        command += ["-chardev", f"socket,id={name},path={folder / name},server=on,wait=off",
                    "-device", f"virtserialport,chardev={name},name={name},nr={number}"]
    for tag, path in (("src", share.checkout), ("out", share.out), ("lab,readonly=on", images.guests),
                      ("python,readonly=on", share.python)):
        command += ["-virtfs", f"local,path={path},security_model=none,multidevs=remap,mount_tag={tag}"]
    return command + hardware.qemu


class SavedTerminal:
    """Puts the terminal back as it was, whatever QEMU did to it."""

    def __enter__(self) -> None:
        self.state = termios.tcgetattr(0) if os.isatty(0) else None

    def __exit__(self, *exception: object) -> None:
        if self.state:
            termios.tcsetattr(0, termios.TCSANOW, self.state)


def new_folder() -> Path:
    """A private folder whose path is short enough for UNIX sockets."""
    folder = Path(tempfile.mkdtemp(prefix="kvmapp-lab-", dir="/tmp"))
    if len(str(folder)) > 80:
        raise LabError(f"the path {folder} is too long for a UNIX socket")
    return folder
