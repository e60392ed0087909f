"""A guest on a pseudo terminal: what it prints is expected, what it is to be told is typed, how it ended is its status.

The guest runs under `kvmapp run`. Under QEMU it runs in the same way, with QEMU's own account of the end translated to
the same statuses: so the tests can be tried on the peer, and a failure that both have is the test's.
"""
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

POWERED_OFF, ERROR, RESET, CRASHED, SAVED = 0, 1, 3, 4, 6        # the exit statuses of `kvmapp run`
BOOT_SECONDS = 400                                       # upper bounds, for a nested host on a busy machine
ANSWER_SECONDS = 60
ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]")


@dataclass
class Machine:
    """What to boot, as the options of `kvmapp run` have it."""

    kernel: Path
    initrd: Path | None = None
    append: str = "console=ttyS0 panic=-1 quiet"
    memory: int = 512
    vcpus: int = 1
    acpi: bool = True
    disks: list[str] = field(default_factory=list)       # PATH[,readonly=on][,serial=S]
    taps: list[str] = field(default_factory=list)        # NAME[,mac=M][,model=e1000]
    rng: bool = False
    console: bool = False                                # the terminal is hvc0 instead of ttyS0
    options: list[str] = field(default_factory=list)     # more of `kvmapp run`, which the peer does not have
    reboots: bool = False                                # a reset starts the guest again instead of ending the run


class GuestError(AssertionError):
    """The guest did not do what was expected; the report shows its console."""


class Guest:
    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.terminal, inside = pty.openpty()
        self.output = b""                                # all that came, without colours and cursor movements
        self.seen = 0                                    # how much of it was expected already
        self.status: int | None = None
        environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
        self.process = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside, env=environment,
                                        start_new_session=True)
        os.close(inside)

    @property
    def console(self) -> str:
        return self.output.decode(errors="replace").replace("\r", "")

    def expect(self, pattern: str, timeout: float = ANSWER_SECONDS) -> re.Match[str]:
        """Waits until the console has shown the pattern after what was expected before."""
        __tracebackhide__ = True
        deadline = time.monotonic() + timeout
        while True:
            found = re.search(pattern, self.console[self.seen:], re.MULTILINE)
            if found:
                self.seen += found.end()
                return found
            if not self._read(deadline - time.monotonic()):
                what = "the terminal was closed" if time.monotonic() < deadline else f"{timeout:g} s went by"
                raise GuestError(f"{what} before {pattern!r}")

    def send(self, line: str) -> None:
        os.write(self.terminal, line.encode() + b"\r")

    def run(self, command: str, timeout: float = ANSWER_SECONDS) -> str:
        """Runs a command in the shell that the console shows; its output. A status other than 0 is an error."""
        self.send(f"echo '<''begin>'; {command}; echo '<'$?'>'")      # the terminal's echo of it does not match
        found = self.expect(r"(?s)<begin>\n(.*?)<(\d+)>\n", timeout)
        if found[2] != "0":
            raise GuestError(f"{command!r} ended with status {found[2]}: {found[1]}")
        return found[1].strip()

    def log_in(self) -> None:
        """From Debian's login prompt to a shell."""
        self.expect("login: ", BOOT_SECONDS)
        self.send("root")
        self.expect(r"root@\S+# ")
        self.run("PS1=; dmesg -n 1")

    def press_power_button(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = ANSWER_SECONDS) -> int:
        """The exit status; what the guest prints meanwhile is read."""
        deadline = time.monotonic() + timeout
        while self._read(deadline - time.monotonic()):
            pass
        try:
            return self.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise GuestError(f"it did not end in {timeout:g} s") from None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.terminal >= 0:
            os.close(self.terminal)
            self.terminal = -1

    def _read(self, timeout: float) -> bool:
        """Takes what the terminal has; False when there was nothing in the time, or will be nothing any more."""
        if timeout <= 0 or not select.select([self.terminal], [], [], timeout)[0]:
            return False
        try:
            data = os.read(self.terminal, 65536)
        except OSError:                                  # EIO: the last process has closed its side
            return False
        self.output = ESCAPES.sub(b"", self.output + data)
        return bool(data)


class QemuGuest(Guest):
    """The peer. QMP presses the power button and tells how the guest ended."""

    def __init__(self, command: list[str], folder: Path) -> None:
        path = folder / f"qmp-{time.monotonic_ns()}"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            super().__init__([*command, "-qmp", f"unix:{path}"])
            listener.settimeout(ANSWER_SECONDS)
            self.qmp = listener.accept()[0]
        self._command("qmp_capabilities")

    def press_power_button(self) -> None:
        self._command("system_powerdown")

    def wait(self, timeout: float = ANSWER_SECONDS) -> int:
        status = super().wait(timeout)
        with self.qmp, self.qmp.makefile() as lines:
            events = [json.loads(line) for line in lines]
        reasons = [event["data"]["reason"] for event in events if event.get("event") == "SHUTDOWN"]
        if status or not reasons:
            return status
        return {"guest-shutdown": POWERED_OFF, "guest-reset": RESET}.get(reasons[-1], CRASHED)

    def _command(self, name: str) -> None:
        self.qmp.sendall(json.dumps({"execute": name}).encode() + b"\n")


def start(machine: Machine, vmm: str, folder: Path) -> Guest:
    if vmm == "qemu":
        return QemuGuest(_qemu_command(machine), folder)
    return Guest(kvmapp_command(machine))


def kvmapp_command(machine: Machine) -> list[str]:
    command = [sys.executable, "-m", "kvmapp", "run", "--name", "guest", "--kernel", str(machine.kernel),
               "--append", machine.append, "--memory", str(machine.memory), "--vcpus", str(machine.vcpus)]
    if machine.initrd:
        command += ["--initrd", str(machine.initrd)]
    for disk in machine.disks:
        command += ["--disk", disk]
    for tap in machine.taps:
        command += ["--net", f"tap={tap}"]
    flags = {"--rng": machine.rng, "--console": machine.console, "--no-acpi": not machine.acpi,
             "--no-reboot": not machine.reboots}
    return command + [flag for flag, wanted in flags.items() if wanted] + machine.options


def _qemu_command(machine: Machine) -> list[str]:
    command = ["qemu-system-x86_64", "-M", f"pc,acpi={'on' if machine.acpi else 'off'}", "-accel", "kvm",
               "-cpu", "host", "-nodefaults", "-no-user-config", "-display", "none", "-kernel", str(machine.kernel),
               "-append", machine.append, "-m", str(machine.memory), "-smp", str(machine.vcpus),
               "-chardev", "stdio,id=terminal,signal=off"]
    if machine.initrd:
        command += ["-initrd", str(machine.initrd)]
    for number, disk in enumerate(machine.disks):
        path, *words = disk.split(",")
        readonly = ",readonly=on" if "readonly=on" in words else ""
        serial = "".join(f",{word}" for word in words if word.startswith("serial="))
        command += ["-drive", f"file={path},format=raw,if=none,id=disk{number},discard=unmap{readonly}",
                    "-device", f"virtio-blk-pci,drive=disk{number}{serial}"]
    for number, tap in enumerate(machine.taps):
        name, *words = tap.split(",")
        mac = next((word for word in words if word.startswith("mac=")), "")
        card = "e1000" if "model=e1000" in words else "virtio-net-pci"
        command += ["-netdev", f"tap,id=net{number},ifname={name},script=no,downscript=no",
                    "-device", f"{card},netdev=net{number}" + (f",{mac}" if mac else "")]
    if machine.rng:
        command += ["-device", "virtio-rng-pci"]
    if machine.console:
        command += ["-device", "virtio-serial-pci", "-device", "virtconsole,chardev=terminal"]
    else:
        command += ["-serial", "chardev:terminal"]
    return command if machine.reboots else [*command, "-no-reboot"]


@contextmanager
def echo_server(address: str) -> Iterator[None]:
    """A TCP server of the host's, on port 7, that sends everything back when the other end has said all."""
    with socket.create_server((address, 7)) as server:
        def serve() -> None:
            while True:
                try:
                    client = server.accept()[0]
                except OSError:
                    return
                with client:
                    parts = []
                    while part := client.recv(1 << 16):
                        parts.append(part)
                    client.sendall(b"".join(parts))

        threading.Thread(target=serve, daemon=True).start()
        yield
        server.shutdown(socket.SHUT_RDWR)
