"""Guest tests boot stock Linux under `kvmapp run`; place.py decides where, this file gives them their guests."""
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guest.guest import Guest, Machine, start
from tests.guest.place import REPORTS, VMM, LabRun, hardware_virtualization

HERE = Path(__file__).parent
NESTED_LAB = Path("/lab")
GUESTS = pytest.StashKey[list[Guest]]()
LAB_RUN = pytest.StashKey[LabRun]()


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in _guest_items(session):
        item.add_marker(pytest.mark.guest)
        # outside it waits for the lab, which has a time limit of its own
        item.add_marker(pytest.mark.timeout(1200 if hardware_virtualization() else 0), append=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Outside the lab a test is not run but its reports are fetched from there."""
    if HERE not in item.path.parents or hardware_virtualization():       # the hook is called for tests elsewhere too
        return None
    stash = item.session.stash
    if LAB_RUN not in stash:
        stash[LAB_RUN] = LabRun(item.config, [other.nodeid for other in _guest_items(item.session)])
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in stash[LAB_RUN].reports_of(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    if LAB_RUN in session.stash:
        session.stash[LAB_RUN].close()


def pytest_configure(config: pytest.Config) -> None:
    if REPORTS in os.environ:
        config.pluginmanager.register(_ReportWriter(config, os.environ[REPORTS]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows the consoles of the test's guests."""
    report = yield
    if report.failed:
        report.sections += [(f"console of {guest.command[0]}", guest.console) for guest in item.stash.get(GUESTS, [])]
    return report


@pytest.fixture(scope="session")
def lab() -> Path:
    """The folder of kernels and images (see tests/lab/README.md)."""
    if NESTED_LAB.is_dir():
        return NESTED_LAB
    from tests.lab import images
    return images.guests()


@pytest.fixture
def boot(request: pytest.FixtureRequest, lab: Path, tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    """boot(append=..., vcpus=...) starts a guest (see Machine); none outlives the test."""
    guests = request.node.stash[GUESTS] = []

    def boot_one(**settings: object) -> Guest:
        whole: dict[str, Any] = {"kernel": lab / "vmlinuz", "initrd": lab / "initramfs.gz", **settings}
        guests.append(start(Machine(**whole), os.environ.get(VMM, "kvmapp"), tmp_path))
        return guests[-1]

    yield boot_one
    for guest in guests:
        guest.kill()


@pytest.fixture
def debian(boot: Callable[..., Guest], root_disk: Path, lab: Path) -> Callable[..., Guest]:
    """debian(vcpus=...) boots Debian from the test's own root disk, vda."""
    def boot_debian(append: str = "", kernel: Path = lab / "vmlinuz", disks: list[str] | None = None,
                    **settings: object) -> Guest:
        initrd = lab / ("initrd.gz" if kernel.name == "vmlinuz" else "initrd-amd64.gz")
        return boot(kernel=kernel, initrd=initrd, append=f"console=ttyS0 root=/dev/vda panic=-1 quiet {append}",
                    disks=[str(root_disk), *(disks or [])], **settings)

    return boot_debian


@pytest.fixture
def root_disk(lab: Path) -> Iterator[Path]:
    """A copy of Debian's root disk, in memory; e2image leaves out what ext4 does not use."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        copy = Path(folder) / "root.img"
        subprocess.run(["e2image", "-ra", lab / "root.img", copy], check=True, capture_output=True)
        yield copy


@pytest.fixture
def nested_paging() -> Iterator[None]:
    """The lab's KVM with nested paging for this test: without (tests/lab/README.md), four vCPUs of a whole distribution may take
    minutes to boot. To be made before the guests, and so gone after them."""
    # A killed guest's VM goes a bit later.
    reload = "for try in $(seq 100); do modprobe -qr kvm-amd && break; sleep 0.3; done; modprobe kvm-amd "
    if NESTED_LAB.is_dir():
        subprocess.run(reload + "npt=1", shell=True, check=True)
    yield
    if NESTED_LAB.is_dir():
        subprocess.run(reload, shell=True, check=True)


@pytest.fixture
def tap():
    """A tap with the address 10.77.0.1 on the host's side."""
    name = f"guest{os.getpid()}"
    try:
        for words in (f"tuntap add {name} mode tap", f"address add 10.77.0.1/24 dev {name}", f"link set {name} up"):
            subprocess.run(["ip", *words.split()], check=True)
        yield name
    finally:
        subprocess.run(["ip", "link", "delete", name], check=False)


class _ReportWriter:
    """Writes each report, the moment it is made, to the file from which the machine outside reads it."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self.config, self.path = config, path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(self.path, "a") as file:
            file.write(json.dumps(data) + "\n")


def _guest_items(session: pytest.Session) -> list[pytest.Item]:
    return [item for item in session.items if HERE in item.path.parents]
