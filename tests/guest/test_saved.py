"""Stock Debian that works, saved and restored twenty times: its disk and a TCP connection are busy all the while.

By kvmappctl, as users do it: managedsave and start in turn with save and restore. In the lab only, for the tap and the daemon.
"""
import re
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.guest.guest import BOOT_SECONDS, Guest
from tests.guest.test_debian import assert_clean

ROUNDS = 20
MESSAGES = 2                                            # of each load, that a restored guest is seen to get done
PROGRESS_SECONDS = 60
CLOCK_SECONDS = 2
LOADS = Path(__file__).parent / "loads"
PORT = 7
TROUBLE = re.compile(r"stall|lockup|oops|\bbug\b|panic|hung|blocked for|error|warning|unstable|timed? ?out|call trace", re.IGNORECASE)
DOMAIN = """name = web
memory = 256
vcpus = 2
[boot]
kernel = /lab/vmlinuz
initrd = /lab/initrd.gz
cmdline = console=ttyS0 root=/dev/vda panic=-1 quiet
[disk vda]
source = {disk}
[interface 0]
type = tap
target = {tap}
[serial 0]
"""


def ctl(*words: str) -> str:
    done = subprocess.run(["kvmappctl", *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


class EchoServer:
    """Sends each message back when it has all of it (loads/net tells the form); counts connections and messages."""

    def __init__(self, address: str):
        self.connections = self.messages = 0
        self.listener = socket.create_server((address, PORT))
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        try:
            while True:
                client = self.listener.accept()[0]
                self.connections += 1
                with client, client.makefile("rb") as incoming:
                    while head := incoming.read(4):
                        client.sendall(incoming.read(int.from_bytes(head, "big")))
                        self.messages += 1
        except OSError:                                 # the listener was closed, or the guest is gone
            pass

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


class Worker:
    """The guest's console and what it tells of its loads; after a restore the console is another process's."""

    def __init__(self, console: Guest):
        self.console = console

    def attach(self) -> None:
        self.console.wait()
        self.console.kill()
        self.console = Guest(["kvmappctl", "console", "web"])
        self.console.expect("Escape character")

    def start_loads(self, address: str) -> None:
        self.console.run("set +m; dmesg -C; chmod +x /root/disk /root/net; card=$(ls /sys/class/net | grep -v lo); "
                         "ip address add 10.77.0.2/24 dev $card; ip link set $card up")
        for load in ("disk", f"net {address} {PORT}"):
            name = load.split()[0]
            self.console.run(f": >/run/{name}.log; {{ (/root/{load} >>/run/{name}.log 2>&1 </dev/null; echo $? >/run/{name}.end) & }}")

    def end_loads(self) -> None:
        """Returns when both have found everything in order."""
        self.console.run("touch /run/stop; for try in $(seq 300); do [ -e /run/disk.end -a -e /run/net.end ] && break; sleep 0.1; done")
        assert self.console.run("cat /run/disk.end /run/net.end").split() == ["0", "0"]

    def progress(self) -> list[int]:
        """Lines that each load has written; none may speak of anything but success."""
        disk, net, *complaints = self.console.run("cd /run; wc -l <disk.log; wc -l <net.log; grep -v ' ok$' *.log || true").splitlines()
        assert not complaints
        return [int(disk), int(net)]

    def goes_on(self) -> list[int]:
        """Waits until both loads got something done."""
        before = now = self.progress()
        deadline = time.monotonic() + PROGRESS_SECONDS
        while any(late - early < MESSAGES for early, late in zip(before, now, strict=True)):
            assert time.monotonic() < deadline, f"the loads stand still: {before}, {now}"
            time.sleep(0.2)
            now = self.progress()
        return now

    def clock_error(self) -> float:
        """How far the guest's clock is from the host's, in seconds."""
        before = time.time()
        told = float(self.console.run("date +%s.%N"))
        return told - before if told < before else max(0.0, told - time.time())

    def complaints(self) -> list[str]:
        return [line for line in self.console.run("dmesg").splitlines() if TROUBLE.search(line)]


@pytest.fixture
def worker(installed_daemon, root_disk, tap, tmp_path):
    """Debian with both loads at work."""
    for load in ("disk", "net"):
        subprocess.run(["debugfs", "-w", "-R", f"write {LOADS / load} /root/{load}", root_disk], check=True, capture_output=True)
    server = EchoServer("10.77.0.1")
    (tmp_path / "web.conf").write_text(DOMAIN.format(disk=root_disk, tap=tap))
    ctl("define", str(tmp_path / "web.conf"))
    one = Worker(Guest(["kvmappctl", "start", "web", "--console"]))
    try:
        one.console.log_in()
        one.start_loads("10.77.0.1")
        one.goes_on()
        yield one, server
    finally:
        print(one.console.console)
        one.console.kill()
        server.close()
        subprocess.run(["cat", "/var/log/kvmapp/web.log"], check=False)


def test_twenty_rounds_of_saving_and_restoring_under_load(worker, root_disk, tmp_path):
    one, server = worker
    one.console.run(f"date -s @{time.time()}")          # the RTC that it booted with knows whole seconds
    file = str(tmp_path / "web.save")
    for number in range(1, ROUNDS + 1):
        began = time.monotonic()
        if number % 2:
            ctl("managedsave", "web")
            ctl("start", "web")
        else:
            ctl("save", "web", file)
            ctl("restore", file)
        away = time.monotonic() - began
        one.attach()
        error = one.clock_error()
        done = one.goes_on()
        print(f"round {number}: away for {away:.1f} s, clock {error:+.3f} s, files and messages {done}, "
              f"{time.monotonic() - began:.1f} s in all")
        assert abs(error) < CLOCK_SECONDS
        assert one.complaints() == []
    one.end_loads()
    one.progress()
    assert server.connections == 1, "the connection of the start was kept"
    one.console.send("poweroff")
    one.console.wait(BOOT_SECONDS)
    assert ctl("domstate", "web", "--reason").strip() == "shut off (shutdown)"
    assert_clean(root_disk)
