"""The probe guest: a kernel of a few KB that drives every device of the machine it wakes up in and reports what it saw.

`IMAGE` is it: an ELF with a multiboot 1 header and a PVH note, built by setup.py from the C and assembly beside this file. It
needs no disk, no initrd and little speed: the steps take well under a second even where KVM interprets guest code.

Its command line, words apart by spaces, all of them optional:
    steps=cpu,serial,...    only these steps ("none": none); see main.c for their names and order
    report=debug|serial|both    where the report goes; else to the debug port 0x402, or to COM1 where there is none
    banner=WORD             printed on COM1 first
    mode=counter            after the steps, if any are named: "count 1", "count 2", ... on COM1, every period=MS (100)
    mode=echo               the same, but COM1 sends back what it receives, after a line "ready"
    button=ignore           leaves ACPI alone: the power button does nothing (else: "power button", and off by S5)
    end=exit[:N]|poweroff|reset|reset-i8042|triple|crash|hang|spin|idle     how it ends (exit; see power.c)
    arp=A.B.C.D from=A.B.C.D    whom virtio-net must get an ARP reply from, and its own address

The report is lines: "ok STEP: what was seen", "fail STEP: what was wrong", "skip STEP: why", "note STEP: detail", and last
"done passed=N failed=N skipped=N". By the default end the exit status is that of isa-debug-exit: 1 when all passed, 3 when not.
"""
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvmapp import runtime
from kvmapp.errors import HostError

IMAGE = Path(__file__).with_name("probe.elf")
EXIT_PASSED, EXIT_FAILED = 1, 3                      # isa-debug-exit: (written value << 1) | 1

LOGGED = r"(?:[\d-]+ [\d:+]+ debug: )?"              # how a line of the debug port begins in a domain's log
STEP = re.compile(LOGGED + r"(ok|fail|skip|note) ([\w-]+): (.*)")
DONE = re.compile(LOGGED + r"done passed=(\d+) failed=(\d+) skipped=(\d+)")


@dataclass(frozen=True)
class Step:
    verdict: str                                     # ok, fail, skip or note
    name: str
    text: str


@dataclass
class Report:
    steps: list[Step] = field(default_factory=list)
    notes: list[Step] = field(default_factory=list)
    complete: bool = False                           # the last line came, and its counts are those of the lines before

    @property
    def passed(self) -> bool:
        return self.complete and not self.failures

    @property
    def failures(self) -> list[Step]:
        return [step for step in self.steps if step.verdict == "fail"]

    def __getitem__(self, name: str) -> Step:
        for step in self.steps:
            if step.name == name:
                return step
        raise KeyError(name)


def parse(text: str) -> Report:
    """Reads a report out of a domain's log or a serial port's output; lines that are none of the probe's are passed over."""
    report = Report()
    for line in text.splitlines():
        if found := STEP.fullmatch(line):
            step = Step(*found.groups())
            (report.notes if step.verdict == "note" else report.steps).append(step)
        elif found := DONE.fullmatch(line):
            seen = Counter(step.verdict for step in report.steps)
            report.complete = [int(number) for number in found.groups()] == [seen["ok"], seen["fail"], seen["skip"]]
    return report


@dataclass(frozen=True)
class Outcome:
    report: Report
    serial: str                                      # what the guest wrote on the port that `kvmapp run` shows
    log: str                                         # what `kvmapp run` itself said
    status: int                                      # its exit status
    seconds: float


def command(cmdline: str = "", options: Sequence[str] = (), image: Path = IMAGE) -> list[str]:
    """The words that run the probe in the foreground; `options` are those of `kvmapp run`."""
    return [*runtime.program(), "run", "--kernel", str(image), "--append", cmdline,
            "--no-reboot", "--debug-console", "--debug-exit", *options]


def run(cmdline: str = "", options: Sequence[str] = (), image: Path = IMAGE, timeout: float = 60) -> Outcome:
    """Runs the probe to its end, in a process of its own. Raises HostError when it has not ended after `timeout` seconds."""
    started = time.monotonic()
    try:
        done = subprocess.run(command(cmdline, options, image), stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired as expired:
        last = decoded(expired.stderr or b"").splitlines()[-1:]
        raise HostError(f"The probe guest has not ended after {timeout:g} s; its last line: {last[0] if last else 'none'}",
                        "kvmapp runs guests, but not to their end here: please report it with the output of kvmapp check") from None
    log = decoded(done.stderr)
    return Outcome(parse(log), decoded(done.stdout), log, done.returncode, time.monotonic() - started)


def decoded(output: bytes) -> str:
    return output.decode("utf-8", "backslashreplace")


def boot() -> str:
    """For `kvmapp check --boot`: all that needs no network of the host, on two vCPUs. A line about it, or HostError."""
    with tempfile.TemporaryDirectory(prefix="kvmapp-probe-") as folder:
        disk = Path(folder, "disk.img")
        with disk.open("wb") as file:
            os.truncate(file.fileno(), 1 << 20)
        outcome = run(options=["--vcpus", "2", "--memory", "64MiB", "--rng", "--console", "--disk", str(disk)])
    report = outcome.report
    if report.passed and outcome.status == EXIT_PASSED:
        return f"the probe guest passed {len(report.steps)} steps on 2 vCPUs in {outcome.seconds:.1f} s"
    if report.failures:
        raise HostError(f"The probe guest found a fault: {report.failures[0].name}: {report.failures[0].text}",
                        f"please report it; more is shown by: kvmapp run --kernel {IMAGE} --append report=serial")
    last = outcome.log.splitlines()[-1:] or [f"exit status {outcome.status}"]
    raise HostError(f"The probe guest did not get through: {last[0]}", "dmesg may tell what KVM met; kvmapp check what this host lacks")
