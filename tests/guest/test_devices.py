"""The virtio devices as stock drivers see them: network by a tap, entropy, the console hvc0."""
import hashlib
import os
import socket
import subprocess
import threading

from tests.guest.guest import BOOT_SECONDS, POWERED_OFF

QUIET = "console=ttyS0 panic=-1 quiet"
MEGABYTE = 1 << 20


def test_the_network_carries_traffic_both_ways(boot, tap):
    guest = boot(append=f"{QUIET} net=10.77.0.2/24 shell=ttyS0", taps=[f"{tap},mac=52:54:00:7f:0d:cb"])
    guest.expect("GUEST UP", BOOT_SECONDS)
    guest.expect("# ")
    assert guest.run("cat /sys/class/net/eth0/address") == "52:54:00:7f:0d:cb"
    assert " 0% packet loss" in guest.run("ping -c 4 -i 0.2 -s 1400 10.77.0.1")
    subprocess.run(["ping", "-c", "4", "-i", "0.2", "-q", "10.77.0.2"], check=True)
    sent = os.urandom(8 * MEGABYTE)
    digest = hashlib.md5(sent).hexdigest()
    with socket.create_server(("10.77.0.1", 7000)) as server:
        def serve() -> None:
            connection = server.accept()[0]
            with connection:
                connection.sendall(sent)

        threading.Thread(target=serve, daemon=True).start()
        assert guest.run("nc 10.77.0.1 7000 >/tmp/data </dev/null; md5sum </tmp/data").split()[0] == digest
    with socket.create_server(("10.77.0.1", 7001)) as server:
        guest.send("nc 10.77.0.1 7001 </tmp/data")
        connection = server.accept()[0]
        received = hashlib.md5()
        with connection:
            while data := connection.recv(65536):
                received.update(data)
        assert received.hexdigest() == digest
    guest.send("poweroff -f")
    assert guest.wait() == POWERED_OFF


def test_a_tap_that_is_not_in_use_by_the_guest_any_more_can_be_used_again(boot, tap):
    for _ in range(2):
        guest = boot(append=f"{QUIET} net=10.77.0.2/24 run=ping,-c,1,10.77.0.1", taps=[tap])
        guest.expect(" 0% packet loss", BOOT_SECONDS)
        assert guest.wait() == POWERED_OFF


def test_entropy_comes_from_the_host(boot):
    guest = boot(append=f"{QUIET} shell=ttyS0", rng=True)
    guest.expect("GUEST UP", BOOT_SECONDS)
    guest.expect("# ")
    assert guest.run("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0"
    lines = {guest.run("head -c 4096 /dev/hwrng | md5sum") for _ in range(3)}
    assert len(lines) == 3
    assert "620f0b67a91f7f74151bc5be745b7110" not in "".join(lines)       # the digest of as many zeros
    guest.send("exit")
    assert guest.wait() == POWERED_OFF


def test_hvc0_is_a_console(boot):
    """The kernel's messages, and a shell that is typed at, with output that is longer than any queue."""
    guest = boot(append="console=hvc0 panic=-1 shell=hvc0", console=True)
    guest.expect("GUEST UP", BOOT_SECONDS)
    guest.expect("# ")
    assert "hvc0" in guest.run("cat /sys/class/tty/console/active")
    guest.run("dmesg -n 1")                                               # no kernel message between the numbers
    assert guest.run("seq 1 2000").split() == [str(number) for number in range(1, 2001)]
    guest.send("poweroff -f")
    assert guest.wait() == POWERED_OFF


def test_the_serial_port_loses_nothing(boot):
    guest = boot(append=f"{QUIET} shell=ttyS0")
    guest.expect("GUEST UP", BOOT_SECONDS)
    guest.expect("# ")
    assert guest.run("seq 1 1000").split() == [str(number) for number in range(1, 1001)]
    line = "x" * 900
    assert guest.run(f"echo {line} | wc -c") == "901"
    guest.send("poweroff -f")
    assert guest.wait() == POWERED_OFF
