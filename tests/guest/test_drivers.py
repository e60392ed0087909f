"""Stock Linux drivers of the devices that few guests have: pvpanic, the i6300esb watchdog, vsock."""
import hashlib
import os
import socket
import subprocess

import pytest

from tests.guest.guest import BOOT_SECONDS, CRASHED, POWERED_OFF, RESET

QUIET = "console=ttyS0 panic=-1 quiet"
PIECE = 65536                                           # less than the windows of a connection hold


@pytest.fixture
def device(tmp_path):
    """device(text): the options for a guest that has what the text of a domain file says."""
    def file_of(text):
        file = tmp_path / "guest.conf"
        file.write_text(f"name = guest\nmemory = 512\n{text}\n[serial 0]\n")
        return [str(file)]

    return file_of


@pytest.fixture
def drivers(boot, lab):
    """drivers(append=..., options=...): a shell of the kernel that has these drivers."""
    def boot_to_shell(options, **settings):
        guest = boot(kernel=lab / "vmlinux-amd64", initrd=lab / "initramfs-amd64.gz", append=f"{QUIET} shell=ttyS0", options=options,
                     **settings)
        guest.expect("GUEST UP", BOOT_SECONDS)
        guest.expect("# ")
        return guest

    return boot_to_shell


def test_a_panic_is_told_before_the_guest_resets(drivers, device):
    """The reset, which the guest would do next, is not what ends it."""
    guest = drivers(device("on_crash = destroy\n[panic]"))
    guest.send("echo c >/proc/sysrq-trigger")
    guest.expect("Kernel panic - not syncing: sysrq triggered crash")
    assert guest.wait() == CRASHED
    assert "the guest panicked" in guest.console


def test_a_panic_restarts_the_guest(drivers, device):
    guest = drivers(device("on_crash = restart\n[panic]"))     # and a reset would end it
    guest.send("echo c >/proc/sysrq-trigger")
    guest.expect("Kernel panic")
    guest.expect("GUEST UP", BOOT_SECONDS)
    guest.expect("# ")
    guest.send("poweroff -f")
    assert guest.wait() == POWERED_OFF


def test_a_watchdog_is_fed_or_resets_the_guest(drivers, device):
    guest = drivers(device("[watchdog]\naction = reset"))
    assert guest.run("cat /sys/class/watchdog/watchdog0/identity") == "i6300ESB timer"
    guest.run("watchdog -T 10 -t 2 /dev/watchdog; sleep 15")     # a daemon, which feeds it
    guest.run("killall -9 watchdog")
    assert guest.wait() == RESET
    assert "its watchdog expired" in guest.console


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


@pytest.fixture
def relay(root_disk, tmp_path):
    script = tmp_path / "relay"
    script.write_text(PERL)
    subprocess.run(["debugfs", "-w", "-R", f"write {script} /opt/relay", root_disk], check=True, capture_output=True)
    return root_disk


def test_vsock_streams_from_the_host_and_to_it(boot, device, relay, lab, tmp_path):
    """Each by its own connection, one made by the host and one by the guest."""
    path = tmp_path / "vsock"
    guest = boot(kernel=lab / "vmlinuz", initrd=lab / "initrd-vsock.gz", append=f"{QUIET} root=/dev/vda", disks=[str(relay)],
                 options=device(f"[vsock]\ncid = 7\npath = {path}"))
    guest.log_in()
    sent = os.urandom(4 << 20)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as outgoing:
        listener.bind(f"{path}_5000")
        listener.listen()
        for one in (listener, outgoing):
            one.settimeout(60)
        guest.send("perl /opt/relay")
        guest.expect("^listening")
        outgoing.connect(str(path))
        outgoing.sendall(b"CONNECT 1234\n")
        assert outgoing.recv(64).startswith(b"OK ")
        incoming = listener.accept()[0]
        incoming.settimeout(60)
        with incoming, incoming.makefile("rb") as stream:
            received = hashlib.sha256()
            for at in range(0, len(sent), PIECE):        # more than the two windows hold is on its way at no time
                outgoing.sendall(sent[at:at + PIECE])
                received.update(stream.read(PIECE))
            outgoing.shutdown(socket.SHUT_WR)
            assert stream.read() == b""
    assert received.hexdigest() == hashlib.sha256(sent).hexdigest()
    guest.expect("^passed")
    guest.send("poweroff")
    assert guest.wait(BOOT_SECONDS) == POWERED_OFF
