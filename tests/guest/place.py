"""Where tests run that may want another host: right here, or in one boot of the lab's nested host. A plugin of pytest.

Guest tests are at home where KVM is hardware virtualization. A test marked `lab(lack)` is where `lack` is None; else that names what
the kernel here lacks. A test marked `plain_host` changes the host that it runs on, and is at home in the lab only. All tests that are
not at home run in the lab one after another.

They run beside the tests that are at home, for the emulator leaves a CPU free: the lab begins with the first test that has no nested host
of its own, and its reports are shown last, as the tests' own. A test whose report never comes, because the nested host died or was never
up, fails with the end of what the lab said.
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

GUEST_TESTS = Path(__file__).parent
CHECKOUT = GUEST_TESTS.parents[1]
OWN_NESTED_HOSTS = GUEST_TESTS.parent / "appliance"     # its tests boot them; two emulators at once would take each other's CPU
NESTED_LAB = Path("/lab")                               # is there in the nested host
REPORTS = "KVMAPP_LAB_REPORTS"                          # in the nested host: the file that takes the reports
VMM = "KVMAPP_TEST_VMM"                                 # kvmapp, or qemu to try the tests themselves on the peer
LAB_SECONDS = 3600
TEST_SECONDS = 400                                      # in the nested host; longer than any one test takes on a busy machine
STALL_SECONDS = 480                                     # of silence: then it is the nested host that stands still
STARTS = 4                                              # boots of the nested host, at most
TELLINGS = 3                                            # of one test
RETELLINGS = 5                                          # in one run


def hardware_virtualization() -> bool:
    """Whether /dev/kvm is here and runs guests on the CPU itself; where the CPU lacks the flags, KVM interprets."""
    flags = re.search(r"^flags.*\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return bool(flags) and os.access("/dev/kvm", os.R_OK | os.W_OK)


def lacks(item: pytest.Item) -> list[str]:
    """What the test wants of the kernel and this one has not."""
    return [mark.args[0] for mark in item.iter_markers("lab") if mark.args[0]]


def goes_to_lab(item: pytest.Item) -> bool:
    if NESTED_LAB.is_dir():
        return False
    if lacks(item) or item.get_closest_marker("plain_host"):
        return True
    return GUEST_TESTS in item.path.parents and not hardware_virtualization()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those for the lab stand last."""
    items.sort(key=goes_to_lab)
    for item in items:
        if NESTED_LAB.is_dir() and lacks(item):
            item.add_marker(pytest.mark.skip(reason=f"{', '.join(lacks(item))}: NOT TESTED"))


def pytest_collection_finish(session: pytest.Session) -> None:
    away = session.stash[AWAY] = dict.fromkeys(item.nodeid for item in session.items if goes_to_lab(item))
    for item in session.items:
        if item.nodeid in away:                         # which has a time limit of its own
            item.add_marker(pytest.mark.timeout(0), append=False)
        elif GUEST_TESTS in item.path.parents:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS), append=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """A test that runs in the lab is not run here: its reports are fetched from there."""
    stash = item.session.stash
    away = stash[AWAY]
    if away and LAB_RUN not in stash and OWN_NESTED_HOSTS not in item.path.parents:
        stash[LAB_RUN] = LabRun(item.config, list(away))
    if item.nodeid not in away:
        if LAB_RUN in stash:
            stash[LAB_RUN].look()
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in stash[LAB_RUN].reports_of(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    if LAB_RUN in session.stash:
        session.stash[LAB_RUN].close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash.get(RETOLD, []):
        terminalreporter.section("told again in a new nested host", yellow=True)
        for what in config.stash[RETOLD]:
            terminalreporter.write_line(what)


def pytest_configure(config: pytest.Config) -> None:
    if REPORTS in os.environ:
        config.pluginmanager.register(_ReportWriter(config, os.environ[REPORTS]))


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
        self.read = self.said = 0
        self.progress = time.monotonic()
        (self.folder / "reports").write_bytes(b"")
        (self.folder / "ids").write_text("\n".join(ids))
        command = ["setpriv", "--pdeathsig", "TERM",     # a killed pytest leaves no emulator behind
                   str(CHECKOUT / "tests/lab/run"), "--out", str(self.folder), "--timeout", str(LAB_SECONDS),
                   "--memory", "4096",
                   "env", f"{REPORTS}=/out/reports", f"{VMM}={os.environ.get(VMM, 'kvmapp')}", "python3",
                   "-m", "pytest", "-q",
                   "-p", "no:cacheprovider", "-o", f"timeout={TEST_SECONDS}", "@/out/ids"]
        with open(self.folder / "output", "wb") as output:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)

    def reports_of(self, item: pytest.Item) -> list[pytest.TestReport]:
        """The item's reports, when all have come; when none will come any more, one that says why."""
        while True:
            more = self.look()
            reports = self.reports.get(item.nodeid, [])
            if any(report.when == "teardown" for report in reports):
                if any(report.failed for report in reports) and self._may_be_retold(item):
                    self._tell_again(item, reports)
                    continue
                return reports
            if not more:
                return [self._lost(item)]
            time.sleep(0.2)

    def look(self) -> bool:
        """Reads what has come; a nested host that died or stands still is started anew. Whether more will come."""
        ended = self.process.poll() is not None          # asked first: what was written before the end is read then
        self._read_new()
        if not self._left():
            return False
        if ended and not (self.process.returncode == DIED and self.starts < STARTS):
            return False
        if ended:
            self._start_anew("the nested host died")
        elif time.monotonic() - self.progress > STALL_SECONDS and self.starts < STARTS:
            self._start_anew(f"silent for {STALL_SECONDS} s")
        return True

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
        self.config.stash.setdefault(RETOLD, []).append(item.nodeid)
        self.tellings[item.nodeid] = self.tellings.get(item.nodeid, 1) + 1
        self.starts -= 1                                 # this start is not the nested host's fault
        del self.reports[item.nodeid]
        print(*(report.longreprtext for report in reports if report.failed), sep="\n")
        print(*(f"-- {title}:\n{text[-3000:]}" for report in reports for title, text in report.sections), sep="\n")
        self._start_anew(f"{item.nodeid} failed and is told again")

    def _start_anew(self, why: str) -> None:
        """The emulated host itself hangs or panics now and then; what it had not finished runs in a new one, and this is said."""
        self.process.terminate()                         # and it tells what it was at
        self.process.wait()
        self._read_new()                                 # what it finished after the last look
        print(f"\nlab: {why}: a new nested host runs what is left; the old one's last words:", *self._output()[-60:], sep="\n", flush=True)
        left = self._left()
        for name in left:
            self.reports.pop(name, None)                 # half a test's
        if left:
            self.start(left)

    def _left(self) -> list[str]:
        """The tests whose reports have not all come."""
        return [name for name in self.ids if not any(report.when == "teardown" for report in self.reports.get(name, []))]

    def _read_new(self) -> None:
        said = (self.folder / "output").stat().st_size   # images are made before the first report, which takes a while
        if said != self.said:
            self.said, self.progress = said, time.monotonic()
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


LAB_RUN = pytest.StashKey[LabRun]()
AWAY = pytest.StashKey[dict[str, None]]()               # the ids of the lab's tests, in their order
RETOLD = pytest.StashKey[list[str]]()                   # what had to be told again; for the end of the run, where it is seen


class _ReportWriter:
    """Writes each report, the moment it is made, to the file from which the machine outside reads it."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self.config, self.path = config, path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(self.path, "a") as file:
            file.write(json.dumps(data) + "\n")
