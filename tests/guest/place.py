"""Where guest tests run: right here when KVM is hardware virtualization, else in one boot of the lab's nested host.

The reports of a run in the lab come out one by one, as they are made, and are shown as the tests' own. A test whose
report never comes, because the nested host died or was never up, fails with the end of what the lab said.
"""
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.commandline import DIED

CHECKOUT = Path(__file__).resolve().parents[2]
REPORTS = "KVMAPP_LAB_REPORTS"                          # in the nested host: the file that takes the reports
VMM = "KVMAPP_TEST_VMM"                                 # kvmapp, or qemu to try the tests themselves on the peer
LAB_SECONDS = 3600
STALL_SECONDS = 420                                     # longer than any one test takes on a busy machine
STARTS = 4                                              # boots of the nested host, at most


def hardware_virtualization() -> bool:
    """Whether /dev/kvm is here and runs guests on the CPU itself; where the CPU lacks the flags, KVM interprets."""
    flags = re.search(r"^flags.*\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return bool(flags) and os.access("/dev/kvm", os.R_OK | os.W_OK)


class LabRun:
    """One boot of the nested host, in which pytest runs the tests of these ids."""

    def __init__(self, config: pytest.Config, ids: list[str]) -> None:
        self.config = config
        self.ids = ids
        self.starts = 0
        self.folder = Path(tempfile.mkdtemp(prefix="kvmapp-guest-tests-"))
        self.reports: dict[str, list[pytest.TestReport]] = {}
        self.start(ids)

    def start(self, ids: list[str]) -> None:
        """Boots the nested host for these tests."""
        self.starts += 1
        self.read = 0
        self.progress = time.monotonic()
        (self.folder / "reports").write_bytes(b"")
        (self.folder / "ids").write_text("\n".join(ids))
        command = [str(CHECKOUT / "tests/lab/run"), "--out", str(self.folder), "--timeout", str(LAB_SECONDS),
                   "--memory", "4096",
                   "env", f"{REPORTS}=/out/reports", f"{VMM}={os.environ.get(VMM, 'kvmapp')}", "python3",
                   "-m", "pytest", "-q",
                   "-p", "no:cacheprovider", "@/out/ids"]
        with open(self.folder / "output", "wb") as output:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)

    def reports_of(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """The item's reports as they come; when none will come any more, one that says why."""
        given = set()
        while True:
            ended = self.process.poll() is not None      # asked first: what was written before the end is read then
            self._read_new()
            for report in self.reports.get(item.nodeid, []):
                if report.when not in given:
                    given.add(report.when)
                    yield report
                if report.when == "teardown":
                    return
            if ended and not (self.process.returncode == DIED and self.starts < STARTS):
                yield self._lost(item)
                return
            if ended:
                self._start_anew("the nested host died")
            elif time.monotonic() - self.progress > STALL_SECONDS and self.starts < STARTS:
                self._start_anew(f"no report for {STALL_SECONDS} s")
            time.sleep(0.2)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start_anew(self, why: str) -> None:
        """The emulated host itself hangs or panics now and then; what it had not finished runs in a new one, and this is said."""
        print(f"\nlab: {why}: a new nested host runs what is left; the old one's last words:", *self._output()[-12:], sep="\n", flush=True)
        self.process.terminate()
        self.process.wait()
        done = {name for name, reports in self.reports.items() if any(report.when == "teardown" for report in reports)}
        self.reports = {name: reports for name, reports in self.reports.items() if name in done}
        self.start([name for name in self.ids if name not in done])

    def _read_new(self) -> None:
        with open(self.folder / "reports", "rb") as file:
            file.seek(self.read)
            for line in file:
                if not line.endswith(b"\n"):             # still being written
                    break
                self.read += len(line)
                self.progress = time.monotonic()
                report = self.config.hook.pytest_report_from_serializable(config=self.config, data=json.loads(line))
                self.reports.setdefault(report.nodeid, []).append(report)

    def _lost(self, item: pytest.Item) -> pytest.TestReport:
        what = f"no report came from the lab, which ended with status {self.process.returncode}:"
        text = "\n".join([what, *self._output()[-40:]])
        return pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")

    def _output(self) -> list[str]:
        return (self.folder / "output").read_text(errors="replace").splitlines()
