"""Network cards of a running stock guest: cables pulled, cards that come and go, over the domain's control socket as the daemon uses it.

In the lab only, for taps are made on the host.
"""
import json
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from kvmapp.config import InterfaceConfig
from kvmapp.daemon.taps import open_tap
from tests.guest.guest import BOOT_SECONDS, Guest, echo_server

ETC = Path("/etc/kvmapp")
CONTROL = "/run/kvmapp/domains/web/control.sock"
DOMAIN = """name = web
memory = 512
vcpus = {vcpus}
[boot]
kernel = /lab/vmlinuz
initrd = {initrd}
cmdline = console=ttyS0 panic=-1 quiet shell=ttyS0 net=10.9.0.2/24 {append}
[interface 0]
type = tap
target = t0
{card}
[serial 0]
"""

pytestmark = pytest.mark.plain_host


def host(*words):
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout


def card_of(index):
    return InterfaceConfig(index=index, type="tap", target=f"t{index}", mac=f"52:54:00:00:00:{index:02x}")


class Control:
    """The domain's control socket: one for questions, one that hears events."""

    def __init__(self):
        self.asking, self.hearing = self.connect(), self.connect()
        self.ask("subscribe", of=self.hearing)

    def connect(self):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(120)
        connection.connect(CONTROL)
        return connection, connection.makefile("rb")

    def ask(self, verb, descriptors=(), of=None, **arguments):
        connection, lines = of or self.asking
        line = json.dumps({"id": 1, "verb": verb, **arguments}).encode() + b"\n"
        socket.send_fds(connection, [line], list(descriptors))
        answer = json.loads(lines.readline())
        assert "ok" in answer, answer
        return answer["ok"]

    def event(self, kind):
        while True:
            event = json.loads(self.hearing[1].readline()).get("event", {})
            if event.get("type") == kind:
                return event


@pytest.fixture
def taps():
    assert Path("/lab").is_dir()
    for number in range(2):
        host("ip", "tuntap", "add", f"t{number}", "mode", "tap", "vnet_hdr", *(["multi_queue"] if number == 0 else []))
        host("ip", "address", "add", f"10.9.{number}.1/24", "dev", f"t{number}")
        host("ip", "link", "set", f"t{number}", "up")
    yield
    for number in range(2):
        host("ip", "link", "delete", f"t{number}")


@pytest.fixture
def start(taps, tmp_path):
    shutil.rmtree(ETC, ignore_errors=True)
    ETC.mkdir()
    (ETC / "guest.conf").write_text("user = nobody\ngroup = nogroup\n")
    (ETC / "kvmapp.conf").write_text("unix_sock_group = daemon\n")
    subprocess.run(["kvmapp", "daemon", "--background"], check=True, timeout=60)
    guests = []

    def start_one(vcpus=1, card="", append="", initrd="/lab/initramfs.gz"):
        path = tmp_path / "web.conf"
        path.write_text(DOMAIN.format(vcpus=vcpus, card=card, append=append, initrd=initrd))
        host("kvmappctl", "define", str(path))
        guests.append(Guest(["kvmappctl", "start", "web", "--console"]))
        guests[-1].expect("GUEST UP", BOOT_SECONDS)
        guests[-1].expect("# ")
        return guests[-1]

    yield start_one
    for guest in guests:
        print(guest.console)
        guest.kill()
    print(Path("/var/log/kvmapp/web.log").read_text())
    subprocess.run(["kvmappctl", "destroy", "web"], check=False, capture_output=True)
    subprocess.run(["kill", f"-{signal.SIGTERM.value}", Path("/run/kvmapp/kvmapp.pid").read_text().strip()], check=True)


def await_guest(guest, condition):
    guest.run(f"for try in $(seq 200); do {condition} && break; usleep 100000; done; {condition}", 120)


def carrier(tap):
    return Path(f"/sys/class/net/{tap}/carrier").read_text().strip() == "1"


def test_cables_and_cards_of_a_running_guest(start):
    guest = start()
    control = Control()
    assert " 0% packet loss" in guest.run("ping -c 2 10.9.0.1")
    for up in (False, True):
        control.ask("link", device="net0", up=up)
        await_guest(guest, f"[ $(cat /sys/class/net/eth0/carrier) = {int(up)} ]")
    assert " 0% packet loss" in guest.run("ping -c 2 10.9.0.1")

    for _ in range(3):                                  # comes and goes and comes again
        card = card_of(1)
        tap = open_tap(card)
        files = tap.files(1)
        assert control.ask("attach-device", files.values(), interface=card.to_dict(), files=list(files))["device"] == "net1"
        tap.close()
        await_guest(guest, "[ -e /sys/class/net/eth1 ]")
        assert guest.run("cat /sys/class/net/eth1/address") == card.mac
        guest.run("ip address add 10.9.1.2/24 dev eth1; ip link set eth1 up")
        assert " 0% packet loss" in guest.run("ping -c 2 10.9.1.1")
        assert carrier("t1")
        control.ask("detach-device", device="net1")
        assert control.event("device-removed")["device"] == "net1"
        guest.run("[ ! -e /sys/class/net/eth1 ]")
        end = time.monotonic() + 30
        while carrier("t1") and time.monotonic() < end:
            time.sleep(0.1)
        assert not carrier("t1"), "its descriptor is closed"

    control.ask("detach-device", device="net0")         # a card of the start, too
    assert control.event("device-removed")["device"] == "net0"
    guest.run("[ ! -e /sys/class/net/eth0 ]")


@pytest.fixture
def echo():
    with echo_server("10.9.0.1"):
        yield


@pytest.mark.parametrize("vhost", ["yes", "no"])
def test_two_queues_with_the_hosts_kernel_and_without(start, echo, vhost):
    host("modprobe", "vhost_net")
    guest = start(vcpus=2, card=f"queues = 2\nvhost = {vhost}")
    control = Control()
    assert sorted(guest.run("ls /sys/class/net/eth0/queues").split()) == ["rx-0", "rx-1", "tx-0", "tx-1"]
    pid = control.ask("status")["pid"]
    kernel_threads = [name for name in host("ps", "-eo", "comm").split() if name == f"vhost-{pid}"]
    assert len(kernel_threads) == (2 if vhost == "yes" else 0)
    guest.run("head -c 4000000 /dev/urandom >/tmp/a")
    guest.send("(while nc 10.9.0.1 7 </tmp/a >/tmp/b && cmp /tmp/a /tmp/b; do echo passed; done) &")
    guest.expect("passed", 120)
    for _ in range(3):                                  # in the middle of it
        host("kvmappctl", "suspend", "web")
        host("kvmappctl", "resume", "web")
        guest.expect("passed", 120)
    for up in (False, True):
        control.ask("link", device="net0", up=up)
    guest.expect("passed", 120)
    guest.send("kill $!")
    assert " 0% packet loss" in guest.run("ping -c 2 10.9.0.1")
    counters = control.ask("stats")["devices"]["net0"]
    assert min(counters["rx_bytes"], counters["tx_bytes"]) > 8_000_000
