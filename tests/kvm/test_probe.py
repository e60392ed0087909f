"""The probe guest under `kvmapp run`, as a user starts it: every device seen from inside, every way out, every sort of stubbornness."""
import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kvmapp import probe

pytestmark = pytest.mark.kvm

DISK_SIZE = 1 << 20
MEMORY = ["--memory", "64MiB"]


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"BOOT" + bytes(DISK_SIZE - 1024 - 4) + os.urandom(1024))
    return path


def everything(vcpus, disk):
    return [*MEMORY, "--vcpus", str(vcpus), "--rng", "--console", "--disk", f"{disk},serial=PROBE0"]


def must_pass(outcome):
    assert not outcome.report.failures, outcome.log
    assert outcome.report.complete, outcome.log
    assert outcome.status == probe.EXIT_PASSED
    return outcome.report


@pytest.mark.parametrize("vcpus", [1, 4])
def test_every_device_works_from_inside(disk, vcpus):
    before = disk.read_bytes()
    outcome = probe.run(options=everything(vcpus, disk))
    report = must_pass(outcome)
    skipped = {step.name for step in report.steps if step.verdict == "skip"}
    assert skipped == {"virtio-net"} | ({"smp"} if vcpus == 1 else set())
    assert report["cpu"].text.startswith(("Auth, KVMKVMKVM", "Genu, KVMKVMKVM", "Hygo, KVMKVMKVM"))
    assert f" {vcpus} CPUs" in report["acpi"].text
    assert report["mp-table"].text == f"{vcpus} CPUs"
    assert "mechanism 1 and ECAM agree" in report["pci"].text
    assert report["virtio-blk"].text.startswith(f"{DISK_SIZE >> 10} KiB, last sector written and restored")
    assert report["virtio-blk"].text.endswith("flush discard write-zeroes indirect event-idx, MSI-X")
    assert "id 'PROBE0', sector 0 begins 42 4f 4f 54" in [note.text for note in report.notes]
    assert outcome.serial == "probe: hello on hvc0\r\n"
    assert disk.read_bytes() == before


def test_a_machine_without_cards_is_a_machine(disk):
    report = must_pass(probe.run(options=MEMORY))
    assert {step.name for step in report.steps if step.verdict == "skip"} == {
        "smp", "virtio-blk", "virtio-blk-intx", "virtio-net", "virtio-rng", "msix", "virtio-console"}


def test_without_acpi_the_mp_table_tells_of_the_cpus():
    report = must_pass(probe.run(options=[*MEMORY, "--vcpus", "4", "--no-acpi"]))
    assert report["acpi"].verdict == "skip"
    assert report["mp-table"].text == "4 CPUs"
    assert report["smp"].text.startswith("3 CPUs started")


def test_the_clock_shows_the_time_and_sounds_its_alarm():
    report = must_pass(probe.run("steps=rtc,rtc-alarm", MEMORY))
    shown = datetime.strptime(report["rtc"].text[:19], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - shown) < timedelta(minutes=2)
    assert report["rtc-alarm"].verdict == "ok"


def test_memory_above_the_pci_hole_is_told_of():
    report = must_pass(probe.run("steps=memory", ["--memory", "4GiB"]))
    assert report["memory"].text.endswith(" 1024 MiB above")


def test_both_boot_protocols_reach_the_same_entry(tmp_path):
    """An ELF with a PVH note goes by PVH; the same file without it has its multiboot header."""
    assert " by PVH" in must_pass(probe.run("steps=memory", MEMORY))["memory"].text
    image = tmp_path / "multiboot.elf"
    image.write_bytes(probe.IMAGE.read_bytes().replace(struct.pack("<III4s", 4, 4, 18, b"Xen"), struct.pack("<III4s", 4, 4, 18, b"Nox")))
    assert " by multiboot" in must_pass(probe.run("steps=memory", MEMORY, image))["memory"].text


def test_a_read_only_disk_refuses_writes(disk):
    before = disk.read_bytes()
    report = must_pass(probe.run("steps=virtio-blk", [*MEMORY, "--disk", f"{disk},readonly=yes"]))
    assert "read-only, a write refused" in report["virtio-blk"].text
    assert disk.read_bytes() == before


def test_a_hostile_driver_loses_its_request_but_never_the_machine(disk):
    before = disk.read_bytes()
    outcome = probe.run("steps=hostile,virtio-blk,virtio-rng", everything(1, disk))
    must_pass(outcome)
    assert "guest error" in outcome.log
    assert disk.read_bytes() == before


def test_the_report_comes_by_serial_port_too():
    outcome = probe.run("steps=cpu,serial report=both banner=hello", MEMORY)
    must_pass(outcome)
    banner, *lines = outcome.serial.splitlines()
    assert banner == "hello"
    assert probe.parse("\n".join(lines)) == outcome.report


# How a guest ends, and what exit status tells of it.

@pytest.mark.parametrize(("end", "status", "told"), [
    ("exit:7", 15, "debug exit code 7"),
    ("poweroff", 0, "powered off"),
    ("reset", 3, "reset"),
    ("reset-i8042", 3, "reset"),
    ("triple", 3, "reset"),
    ("crash", 4, "crashed"),
])
def test_each_end_has_its_status(end, status, told):
    outcome = probe.run(f"steps=none end={end}", MEMORY)
    assert outcome.report.complete
    assert outcome.status == status
    assert told in outcome.log.splitlines()[-1]


def test_without_an_exit_port_the_guest_powers_off():
    command = [word for word in probe.command("steps=none", MEMORY) if word != "--debug-exit"]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


class Running:
    """A guest in the foreground that is talked to while it runs."""

    def __init__(self, cmdline, *options, drop=()):
        words = [word for word in probe.command(cmdline, [*MEMORY, *options]) if word not in drop]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def await_line(self, pattern):
        """The next line of the serial port that looks so."""
        for line in self.process.stdout:
            if found := re.fullmatch(pattern, line.decode().strip()):
                return found
        raise AssertionError(f"the guest ended before it said {pattern}: {self.process.stderr.read().decode()}")

    def signal(self, number):
        self.process.send_signal(number)

    def await_end(self):
        _, log = self.process.communicate(timeout=60)
        return self.process.returncode, log.decode()


def test_the_power_button_is_heard():
    with Running("mode=counter period=20") as guest:
        guest.await_line("count 3")
        guest.signal(signal.SIGTERM)
        status, log = guest.await_end()
    assert status == 0
    assert "debug: power button" in log


def test_a_guest_that_ignores_its_power_button_is_ended_by_the_second_signal():
    with Running("mode=counter period=20 button=ignore") as guest:
        guest.await_line("count 3")
        guest.signal(signal.SIGTERM)
        seen = int(guest.await_line(r"count (\d+)")[1])
        guest.await_line(f"count {seen + 10}")
        guest.signal(signal.SIGTERM)
        status, log = guest.await_end()
    assert status == 5
    assert "power button" not in log


@pytest.mark.parametrize("end", ["hang", "spin", "idle"])
def test_a_guest_that_does_nothing_more_can_be_ended(end):
    with Running(f"steps=none banner=here end={end}") as guest:
        guest.await_line("here")
        guest.signal(signal.SIGQUIT)
        assert guest.await_end()[0] == 5


def test_what_is_typed_reaches_the_guest_and_comes_back():
    with Running("mode=echo") as guest:
        guest.await_line("ready")
        typed = b"The quick brown fox jumps over the lazy dog, twice as long as any FIFO\n"
        guest.process.stdin.write(typed)
        guest.process.stdin.flush()
        guest.await_line(typed.decode().strip())


def test_a_reset_starts_the_same_guest_again():
    with Running("steps=serial,rtc,pci,virtio-rng banner=again end=reset", "--rng", drop=["--no-reboot"]) as guest:
        for _ in range(3):
            guest.await_line("again")
        guest.signal(signal.SIGQUIT)
        status, log = guest.await_end()
    assert status == 5
    assert log.count("done passed=4 failed=0") >= 2
    assert "debug: fail" not in log


# The network, where this machine lets us make a tap.

TUNSETIFF, TUNSETPERSIST = 0x4004_54CA, 0x4004_54CB
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_UP = 0x0002, 0x1000, 0x4000, 0x1
SIOCSIFADDR, SIOCSIFNETMASK, SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8916, 0x891C, 0x8913, 0x8914
TAP, HOST, GUEST = f"probe{os.getpid() % 100000}", "10.231.77.1", "10.231.77.2"


@pytest.fixture
def tap():
    """A tap with an address of the host's, so that the kernel answers ARP on it."""
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", TAP.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    except OSError as error:
        pytest.skip(f"no tap can be made here: {error.strerror}")
    fcntl.ioctl(fd, TUNSETPERSIST, 1)
    name = struct.pack("16s", TAP.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for request, address in ((SIOCSIFADDR, HOST), (SIOCSIFNETMASK, "255.255.255.0")):
            fcntl.ioctl(control, request, name + struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(address)))
        flags, = struct.unpack_from("H", fcntl.ioctl(control, SIOCGIFFLAGS, name + bytes(16)), 16)
        fcntl.ioctl(control, SIOCSIFFLAGS, name + struct.pack("H14x", flags | IFF_UP))
    os.close(fd)
    yield TAP
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", TAP.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(fd, TUNSETPERSIST, 0)
    os.close(fd)
    assert not Path(f"/sys/class/net/{TAP}").exists()


def test_the_network_card_gets_an_answer_from_the_host(tap):
    mac = "52:54:00:77:00:02"
    report = must_pass(probe.run(f"steps=virtio-net arp={HOST} from={GUEST}", [*MEMORY, "--net", f"tap={tap},mac={mac}"]))
    assert "answered by a frame" in report["virtio-net"].text
    assert f"MAC {mac}" in [note.text for note in report.notes]


# `run` itself.

def test_a_guest_that_never_ends_is_given_up():
    with pytest.raises(probe.HostError, match=r"has not ended after 3 s; its last line: "):
        probe.run("steps=none end=hang", MEMORY, timeout=3)


def test_the_boot_check_tells_steps_and_time():
    assert re.fullmatch(r"the probe guest passed \d\d steps on 2 vCPUs in \d+\.\d s", probe.boot())
