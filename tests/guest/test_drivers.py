"""Stock Linux drivers of the devices that few guests have: pvpanic, the i6300esb watchdog, vsock. By kvmappctl, in the lab only."""
import hashlib
import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.guest.guest import BOOT_SECONDS, Guest

MEGABYTE = 1 << 20
DOMAIN = """name = web
memory = 256
vcpus = 2
{actions}
[boot]
kernel = /lab/{kernel}
initrd = /lab/{initrd}
cmdline = console=ttyS0 panic=-1 quiet {append}
[serial 0]
{devices}
"""


def ctl(*words: str) -> str:
    done = subprocess.run(["kvmappctl", *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def start(installed_daemon, tmp_path):
    """start(devices=..., append=...): a guest of the domain's file, on its console."""
    guests = []

    def start_one(devices, *, append="", actions="", kernel="vmlinux-amd64", initrd="initramfs-amd64.gz"):
        file = tmp_path / "web.conf"
        file.write_text(DOMAIN.format(devices=devices, append=append, actions=actions, kernel=kernel, initrd=initrd))
        ctl("define", str(file))
        guests.append(Guest(["kvmappctl", "start", "web", "--console"]))
        return guests[-1]

    yield start_one
    for guest in guests:
        print(guest.console)
        guest.kill()
    subprocess.run(["cat", "/var/log/kvmapp/web.log"], check=False)


def test_a_panic_is_told_before_the_guest_resets(start):
    """The reset, which the guest would do next, is not what ends it."""
    guest = start("[panic]", append="then=panic", actions="on_crash = destroy\non_reboot = restart")
    guest.expect("GUEST UP", BOOT_SECONDS)
    guest.expect("Kernel panic - not syncing: sysrq triggered crash")
    guest.wait()
    assert ctl("domstate", "web", "--reason").strip() == "shut off (crashed)"
    assert "the guest panicked" in Path("/var/log/kvmapp/web.log").read_text()


def test_a_panic_restarts_the_guest(start):
    guest = start("[panic]", append="shell=ttyS0", actions="on_crash = restart\non_reboot = destroy")
    guest.expect("GUEST UP", BOOT_SECONDS)
    guest.expect("# ")
    guest.send("echo c >/proc/sysrq-trigger")
    guest.expect("Kernel panic")
    guest.expect("GUEST UP", BOOT_SECONDS)
    guest.expect("# ")
    guest.send("poweroff -f")
    guest.wait()


def test_a_watchdog_that_is_not_fed_any_more_resets_the_guest(start):
    guest = start("[watchdog]\naction = reset", append="shell=ttyS0", actions="on_reboot = restart")
    guest.expect("GUEST UP", BOOT_SECONDS)
    guest.expect("# ")
    assert guest.run("cat /sys/class/watchdog/watchdog0/identity") == "i6300ESB timer"
    guest.run("watchdog -T 10 -t 2 /dev/watchdog; sleep 25")             # a daemon, which feeds it
    guest.run("killall -9 watchdog")
    guest.expect("GUEST UP", BOOT_SECONDS)
    assert "its watchdog expired: restarting" in Path("/var/log/kvmapp/web.log").read_text()


# A relay in the guest: what the host sends to port 1234 of the guest goes on to port 5000 of the host, as it comes.
PERL = r"""
use Socket;
sub address { pack 'S S L L x4', 40, 0, $_[1], $_[0] }                  # struct sockaddr_vm: CID, port
socket my $listener, 40, SOCK_STREAM, 0 or die "socket: $!";
bind $listener, address(0xffffffff, 1234) or die "bind: $!";
listen $listener, 1 or die "listen: $!";
$| = 1;
print "listening\n";
accept my $incoming, $listener or die "accept: $!";
socket my $outgoing, 40, SOCK_STREAM, 0 or die "socket: $!";
connect $outgoing, address(2, 5000) or die "connect: $!";
while (sysread $incoming, my $part, 65536) {
    for (my $at = 0; $at < length $part; ) { $at += syswrite($outgoing, $part, length($part) - $at, $at) // die "write: $!" }
}
print "passed\n";
"""


def test_vsock_streams_from_the_host_and_to_it(start, root_disk, tmp_path):
    """Each by its own connection, one made by the host and one by the guest."""
    script, path = tmp_path / "relay", Path("/run/kvmapp/web.vsock")
    script.write_text(PERL)
    subprocess.run(["debugfs", "-w", "-R", f"write {script} /root/relay", root_disk], check=True, capture_output=True)
    guest = start(f"[vsock]\ncid = 7\npath = {path}\n[disk vda]\nsource = {root_disk}", append="root=/dev/vda", kernel="vmlinuz",
                  initrd="initrd-vsock.gz")
    guest.log_in()
    guest.send("perl /root/relay")
    guest.expect("^listening")
    sent = os.urandom(4 * MEGABYTE)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as outgoing:
        listener.bind(f"{path}_5000")
        os.chmod(f"{path}_5000", 0o666)
        listener.listen()
        for one in (listener, outgoing):
            one.settimeout(60)
        outgoing.connect(str(path))
        outgoing.sendall(b"CONNECT 1234\n")
        assert outgoing.recv(64).startswith(b"OK ")
        incoming = listener.accept()[0]
        with incoming, incoming.makefile("rb") as stream:
            # More than the two windows hold is on its way at no time.
            received = hashlib.sha256()
            for at in range(0, len(sent), 65536):
                outgoing.sendall(sent[at:at + 65536])
                received.update(stream.read(65536))
            outgoing.shutdown(socket.SHUT_WR)
            assert stream.read() == b""
    assert received.hexdigest() == hashlib.sha256(sent).hexdigest()
    guest.expect("passed")
