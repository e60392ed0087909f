"""The balloon with stock Linux, from within the VMM's process: what the guest gives up, the host has back."""
import re
import select
import time

import pytest

from kvmapp.config import read_domain
from kvmapp.machine import Machine
from tests.guest.guest import ANSWER_SECONDS, BOOT_SECONDS
from tests.waiting import until

MIB = 1 << 20
DOMAIN = """
name = balloon
memory = 512 MiB
[boot]
kernel = {lab}/vmlinuz
initrd = {lab}/initramfs.gz
cmdline = console=ttyS0 panic=-1 quiet shell=ttyS0
[serial 0]
[balloon]
"""


class Here:
    """A machine in this process, its shell on the serial port."""

    def __init__(self, lab, folder):
        self.machine = Machine(read_domain(str(folder / "balloon.conf"), DOMAIN.format(lab=lab)))
        [(_, self.serial, _)] = self.machine.characters
        self.balloon = self.machine.cards["balloon"].device
        self.console = ""
        self.machine.boot()
        self.machine.resume()

    def expect(self, pattern, seconds=ANSWER_SECONDS):
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.console, re.DOTALL)):
            left = end - time.monotonic()
            assert left > 0 and select.select([self.serial.fd], [], [], left)[0], f"no {pattern!r} in: {self.console}"
            self.console += self.serial.take().decode(errors="replace").replace("\r", "")
        self.console = self.console[found.end():]
        return found

    def run(self, command):
        self.serial.give(f"echo '<''begin>'; {command}; echo '<''end>'\n".encode())
        return self.expect("<begin>\n(.*?)<end>\n")[1].strip()

    def total(self):
        """MemTotal, bytes."""
        return int(self.run("sed -n 's/MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo")) << 10


def resident():
    """Bytes of this process in the host's memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


@pytest.fixture
def here(lab, tmp_path):
    here = Here(lab, tmp_path)
    try:
        here.expect("GUEST UP", BOOT_SECONDS)
        here.expect("# ")
        yield here
    finally:
        here.machine.pause()
        here.machine.close()


def test_memory_goes_to_the_host_and_comes_back(here):
    whole = here.total()
    here.run("dd if=/dev/zero of=/tmp/hundred bs=1M count=100")
    full = resident()

    here.run("rm /tmp/hundred")
    until(lambda: resident() < full - 80 * MIB, ANSWER_SECONDS, pause=0.05)    # free pages are reported, with some delay

    here.run("dd if=/dev/zero of=/tmp/hundred bs=1M count=100")
    here.machine.set_balloon(412 * MIB)
    until(lambda: here.machine.balloon_size() == 412 * MIB, ANSWER_SECONDS, pause=0.05)
    assert here.total() == whole - 100 * MIB

    here.balloon.poll_statistics()
    until(lambda: here.balloon.statistics()[0].get("total_memory") == whole - 100 * MIB, ANSWER_SECONDS, pause=0.05)
    assert 0 < here.balloon.statistics()[0]["free_memory"] < whole

    here.machine.set_balloon(512 * MIB)
    until(lambda: here.machine.balloon_size() == 512 * MIB, ANSWER_SECONDS, pause=0.05)
    assert here.total() == whole
    assert here.run("ls -s /tmp/hundred").split()[0] == str(100 << 10)
