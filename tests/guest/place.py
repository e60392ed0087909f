"""Where guest tests run: right here when KVM is hardware virtualization, else in one boot of the lab's nested host.

The reports of a run in the lab come out test by test, as they end, and are shown as the tests' own. A test whose
report never comes, because the nested host died or was never up, fails with the end of what the lab said.
"""
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.lab.commandline import DIED

CHECKOUT = Path(__file__).resolve().parents[2]
REPORTS = "KVMAPP_LAB_REPORTS"                          # in the nested host: the file that takes the reports
VMM = "KVMAPP_TEST_VMM"                                 # kvmapp, or qemu to try the tests themselves on the peer
LAB_SECONDS = 3600
STALL_SECONDS = 420                                     # longer than any one test takes on a busy machine
STARTS = 4                                              # boots of the nested host, at most
TELLINGS = 3                                            # of one test
RETELLINGS = 5                                          # in one run


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
        self.retold = 0
        self.tellings: dict[str, int] = {}
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

    def reports_of(self, item: pytest.Item) -> list[pytest.TestReport]:
        """The item's reports, when all have come; when none will come any more, one that says why."""
        while True:
            ended = self.process.poll() is not None      # asked first: what was written before the end is read then
            self._read_new()
            reports = self.reports.get(item.nodeid, [])
            if any(report.when == "teardown" for report in reports):
                if any(report.failed for report in reports) and self._may_be_retold(item):
                    self._tell_again(item, reports)
                    continue
                return reports
            if ended and not (self.process.returncode == DIED and self.starts < STARTS):
                return [self._lost(item)]
            if ended:
                self._start_anew("the nested host died")
            elif time.monotonic() - self.progress > STALL_SECONDS and self.starts < STARTS:
                self._start_anew(f"no report for {STALL_SECONDS} s")
            time.sleep(0.2)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _may_be_retold(self, item: pytest.Item) -> bool:
        return self.tellings.get(item.nodeid, 1) < TELLINGS and self.retold < RETELLINGS

    def _tell_again(self, item: pytest.Item, reports: list[pytest.TestReport]) -> None:
        """Emulated CPUs lose a guest now and then (tests/lab/README.md): a test that failed is told again in a new nested host.
        Its failures are shown, and few are borne in one run."""
        self.retold += 1
        self.tellings[item.nodeid] = self.tellings.get(item.nodeid, 1) + 1
        self.starts -= 1                                 # this start is not the nested host's fault
        del self.reports[item.nodeid]
        print(*(report.longreprtext for report in reports if report.failed), sep="\n")
        print(*(f"-- {title}:\n{text[-3000:]}" for report in reports for title, text in report.sections), sep="\n")
        self._start_anew(f"{item.nodeid} failed and is told again")

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
