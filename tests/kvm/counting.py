"""The probe guest under `kvmapp run`, counting on its serial port: what was lost on its way into a file and back shows in the numbers."""
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from kvmapp.probe import IMAGE

ROOT = Path(__file__).resolve().parents[2]
RUN = [sys.executable, "-m", "kvmapp", "run"]
HARDWARE = ["--memory", "16MiB", "--vcpus", "2", "--debug-console", "--debug-exit", "--rng", "--no-reboot"]
COUNTER = ["--kernel", str(IMAGE), "--append", "steps=none mode=counter period=20", *HARDWARE]


class Guest:
    """A foreground guest that counts on its serial port; `counts` is what was seen so far."""

    def __init__(self, *words):
        self.process = subprocess.Popen([*RUN, *map(str, words)], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, bufsize=0)
        self.counts: list[int] = []
        self.heard = b""
        self.said = b""

    def count(self, many: int):
        """Waits until it has printed so many more, or, where we are late, even more."""
        wanted = len(self.counts) + many
        while len(self.counts) < wanted:
            part = os.read(self.process.stdout.fileno(), 65536)
            assert part, self.log()
            self.hear(part)

    def hear(self, part: bytes):
        *lines, self.heard = (self.heard + part).split(b"\n")
        self.counts += [int(re.fullmatch(rb"count (\d+)\s*", line)[1]) for line in lines]

    def log(self) -> str:
        """All that it says until its end, on its serial port into `counts` and in its log."""
        rest, log = self.process.communicate(timeout=60)
        self.hear(rest)
        self.said += log
        return self.said.decode()

    def save(self) -> str:
        """SIGUSR1, and all that it said until its end."""
        self.process.send_signal(signal.SIGUSR1)
        return self.log()

    def fail_to_save(self):
        """SIGUSR1, and waits until it has told that it is not saved: a signal that comes sooner may be heeded first."""
        self.process.send_signal(signal.SIGUSR1)
        while b"not saved: " not in self.said or not self.said.endswith(b"\n"):
            part = os.read(self.process.stderr.fileno(), 65536)
            assert part, self.said
            self.said += part

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
