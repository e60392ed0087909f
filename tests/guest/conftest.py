"""Guest tests boot stock Linux under `kvmapp run`; place.py decides where, this file gives them their guests."""
import os
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.guest.guest import Guest, Machine, start
from tests.guest.place import NESTED_LAB, VMM

HERE = Path(__file__).parent
# The VMM's threads and where they wait; what KVM counted of them in a second; the kernel's last words.
HOST_STATE = """
ps -eLo pid,tid,stat,pcpu,time,wchan:24,comm --sort -pcpu | head -25
[ -d /sys/kernel/debug/kvm ] || mount -t debugfs none /sys/kernel/debug
cd /sys/kernel/debug/kvm
counts() { grep . exits *_exits pf_fixed insn_emulation irq_injections; }
counts | sed 's/^/before: /'; sleep 1; counts | sed 's/^/after:  /'
dmesg | tail -15
"""
GUESTS = pytest.StashKey[list[Guest]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:                    # the hook is called for tests elsewhere too
            item.add_marker(pytest.mark.guest)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows the consoles of the test's guests, and what the nested host was at."""
    report = yield
    if report.failed:
        report.sections += [(f"console of {guest.command[0]}", guest.console) for guest in item.stash.get(GUESTS, [])]
        if NESTED_LAB.is_dir():
            state = subprocess.run(["timeout", "60", "sh", "-c", HOST_STATE], capture_output=True, text=True, errors="replace", check=False)
            report.sections.append(("the nested host", state.stdout + state.stderr))
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
    with debian_disk(lab) as disk:
        yield disk


@contextmanager
def debian_disk(lab: Path) -> Iterator[Path]:
    """A copy of Debian's root disk, in memory; e2image leaves out what ext4 does not use."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        copy = Path(folder) / "root.img"
        subprocess.run(["e2image", "-ra", lab / "root.img", copy], check=True, capture_output=True)
        yield copy


@pytest.fixture
def nested_paging() -> Iterator[None]:
    """The lab's KVM with nested paging for this test: without (tests/lab/README.md), four vCPUs of a whole distribution may take
    minutes to boot. To be made before the guests, and so gone after them."""
    if NESTED_LAB.is_dir():
        reload_kvm("npt=1")
    yield
    if NESTED_LAB.is_dir():
        reload_kvm()


def reload_kvm(parameters: str = "") -> None:
    """Loads the nested host's kvm-amd anew. Its own machines are let go of for it; a killed guest's goes a bit later."""
    subprocess.run("pkill -x hold-kvm; for try in $(seq 100); do modprobe -qr kvm-amd && break; sleep 0.3; done; "
                   f"modprobe kvm-amd {parameters}; /usr/local/lib/lab/hold-kvm &", shell=True, check=True)


@pytest.fixture
def tap() -> Iterator[str]:
    with host_tap() as name:
        yield name


@contextmanager
def host_tap() -> Iterator[str]:
    """A tap with the address 10.77.0.1 on the host's side."""
    name = f"guest{os.getpid()}"
    try:
        for words in (f"tuntap add {name} mode tap", f"address add 10.77.0.1/24 dev {name}", f"link set {name} up"):
            subprocess.run(["ip", *words.split()], check=True)
        yield name
    finally:
        subprocess.run(["ip", "link", "delete", name], check=False)
