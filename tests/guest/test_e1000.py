"""Stock Linux drives the 82540EM: its own e1000 reads the EEPROM, negotiates the link, and carries TCP both ways."""
import pytest

from tests.guest.guest import BOOT_SECONDS, echo_server


@pytest.fixture
def echo(tap):
    with echo_server("10.77.0.1"):
        yield tap


def test_linux_uses_its_driver(boot, lab, echo):
    guest = boot(kernel=lab / "vmlinux-amd64", initrd=lab / "initramfs-amd64.gz", taps=[f"{echo},mac=52:54:00:7f:0d:cb,model=e1000"],
                 append="console=ttyS0 panic=-1 quiet net=10.77.0.2/24 shell=ttyS0")
    guest.expect("GUEST UP", BOOT_SECONDS)
    guest.expect("# ")
    assert guest.run("cat /sys/class/net/eth0/address") == "52:54:00:7f:0d:cb"
    assert guest.run("readlink /sys/class/net/eth0/device/driver").endswith("/e1000")
    guest.run("for try in $(seq 200); do [ $(cat /sys/class/net/eth0/carrier) = 1 ] && break; usleep 100000; done; "
              "[ $(cat /sys/class/net/eth0/speed) = 1000 ]", 120)
    for size in (56, 1400, 4000):
        assert " 0% packet loss" in guest.run(f"ping -c 2 -s {size} 10.77.0.1", 120)
    guest.run("head -c 4000000 /dev/urandom >/tmp/a; nc 10.77.0.1 7 </tmp/a >/tmp/b; cmp /tmp/a /tmp/b", 240)
    guest.run("ip link set eth0 down; ip link set eth0 up", 120)
    guest.run("for try in $(seq 200); do ping -c 1 -W 1 10.77.0.1 >/dev/null && break; done; ping -c 1 10.77.0.1", 240)
    counters = "rx_errors tx_errors rx_crc_errors rx_length_errors"
    assert guest.run(f"cd /sys/class/net/eth0/statistics; cat {counters}; cd /").split() == ["0"] * 4
    guest.send("exit")
    assert guest.wait(120) == 0
