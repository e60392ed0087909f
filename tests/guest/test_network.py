"""The default network as an administrator meets it: the installed file, kvmappctl's words, stock guests, and a host as it was before.

In the lab only, for the host's own bridges and rules are what is tested.
"""
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.guest.guest import BOOT_SECONDS, Guest

NESTED_LAB = Path("/lab").is_dir()
CHECKOUT = Path(__file__).resolve().parents[2]
ETC = Path("/etc/kvmapp")
GIB = 1 << 30
DOMAIN = """name = {name}
memory = 512
[boot]
kernel = /lab/vmlinuz
initrd = {initrd}
cmdline = console=ttyS0 panic=-1 quiet {append}
[interface 0]
type = {source[0]}
source = {source[1]}
mac = {mac}
{card}[serial 0]
"""

pytestmark = pytest.mark.plain_host


def ctl(*words):
    done = subprocess.run(["kvmappctl", *words], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    print(f"# kvmappctl {' '.join(words)}\n{done.stdout}", end="")
    return done.stdout


def host(*words, check=True):
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=check).stdout


def traces():
    links = sorted(line.split()[0] for line in host("ip", "-br", "link").splitlines())
    return links, host("nft", "-s", "list", "ruleset"), "dnsmasq" in host("ps", "-eo", "comm")


@pytest.fixture
def daemon():
    """kvmapp on a plain host, with the files as they are installed."""
    assert NESTED_LAB
    shutil.rmtree(ETC, ignore_errors=True)
    (ETC / "networks").mkdir(parents=True)
    shutil.copy(CHECKOUT / "conf/networks/default.conf", ETC / "networks")
    (ETC / "guest.conf").write_text("user = nobody\ngroup = nogroup\n")
    (ETC / "kvmapp.conf").write_text("unix_sock_group = daemon\n")
    subprocess.run(["kvmapp", "daemon", "--background"], check=True, timeout=60)
    yield
    for name in host("kvmappctl", "list", "--name").split():
        host("kvmappctl", "destroy", name)
    host("kvmappctl", "net-destroy", "default", check=False)
    pid = int(Path("/run/kvmapp/kvmapp.pid").read_text())
    subprocess.run(["kill", f"-{signal.SIGTERM.value}", str(pid)], check=True)


@pytest.fixture
def outside():
    """A namespace beyond the host's eth0 that knows no way to guests."""
    host("ip", "netns", "add", "outside")
    host("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", "outside")
    host("ip", "address", "add", "203.0.113.2/24", "dev", "eth0")
    host("ip", "link", "set", "eth0", "up")
    host("ip", "-n", "outside", "address", "add", "203.0.113.1/24", "dev", "eth0")
    host("ip", "-n", "outside", "link", "set", "eth0", "up")
    yield lambda *words: host("ip", "netns", "exec", "outside", *words)
    host("ip", "netns", "delete", "outside")


@pytest.fixture
def start(tmp_path):
    guests = []

    def start_one(name, mac, append, initrd="/lab/initramfs.gz", more="", card="", source=("network", "default")):
        path = tmp_path / f"{name}.conf"
        path.write_text(DOMAIN.format(name=name, mac=mac, initrd=initrd, append=append, card=card, source=source) + more)
        ctl("define", str(path))
        guests.append(Guest(["kvmappctl", "start", name, "--console"]))
        return guests[-1]

    yield start_one
    for guest in guests:
        print(guest.console)
        guest.kill()


def test_stock_guests_on_the_default_network(daemon, outside, start, root_disk):
    before = traces()
    assert re.search(r"^ default +inactive +no +yes$", ctl("net-list", "--all"), re.MULTILINE)
    ctl("net-start", "default")
    ctl("net-update", "default", "add", "host", "bob", "mac=52:54:00:00:00:02", "ipv4=192.168.122.10")
    ctl("net-update", "default", "add", "forward", "http", "port=8080", "to=bob", "to_port=80")

    bob = start("bob", "52:54:00:00:00:02", "net=dhcp shell=ttyS0")
    bob.expect("GUEST UP", BOOT_SECONDS)
    bob.expect("# ")
    ann = start("ann", "52:54:00:00:00:01", "root=/dev/vda", "/lab/initrd.gz", f"[disk vda]\nsource = {root_disk}\n")
    ann.log_in()
    ann.run("printf '[Match]\\nName=e*\\n[Network]\\nDHCP=ipv4\\n' >/etc/systemd/network/card.network")
    ann.run("systemctl start systemd-networkd; echo nameserver 192.168.122.1 >/etc/resolv.conf")
    ann.run("for try in $(seq 100); do ip -4 route | grep -q default && break; sleep 0.2; done; ip -4 route")

    address = re.search(r"ipv4 +(192\.168\.122\.\d+)/24", ctl("domifaddr", "ann"))[1]
    assert "192.168.122.10/24" in ctl("domifaddr", "bob") and "52:54:00:00:00:02" in ctl("net-dhcp-leases", "default")
    assert ann.run("getent hosts bob").split() == ["192.168.122.10", "bob"]
    assert address in bob.run("nslookup ann 192.168.122.1")
    assert " 0% packet loss" in ann.run("ping -c 3 -i 0.2 bob")
    assert " 0% packet loss" in bob.run(f"ping -c 3 {address}")
    assert " 0% packet loss" in ann.run("ping -c 3 -i 0.2 203.0.113.1")
    bob.run("(while true; do echo hello from bob | nc -l -p 80; done) >/dev/null 2>&1 & sleep 1")
    assert outside("busybox", "nc", "203.0.113.2", "8080").strip() == "hello from bob"
    assert "vnet0" in ctl("domiflist", "bob")
    assert int(re.search(r"vnet1 rx_packets (\d+)", ctl("domifstat", "ann", "vnet1"))[1]) > 5

    sectors = int(ann.run("cat /sys/block/vda/size")) + 2 * GIB // 512
    ctl("blockresize", "ann", "vda", "--size", f"{sectors * 512}b")
    ann.run(f"until [ $(cat /sys/block/vda/size) = {sectors} ]; do sleep 0.1; done")
    assert "is now" in ann.run("resize2fs /dev/vda 2>&1") and f"Capacity:       {sectors * 512}\n" in ctl("domblkinfo", "ann", "vda")

    more = root_disk.with_name("more.img")
    more.write_bytes(b"")
    os.truncate(more, 64 << 20)
    for _ in range(2):
        ctl("attach-disk", "ann", str(more), "vdb", "--serial", "MORE")
        ann.run("until [ -b /dev/vdb ]; do sleep 0.1; done")
        assert ann.run("cat /sys/block/vdb/serial").strip() == "MORE"
        ann.run("mount /dev/vdb /mnt || { mkfs.ext4 -q /dev/vdb && mount /dev/vdb /mnt; }")
        ann.run("date >>/mnt/times && umount /mnt")
        ctl("detach-disk", "ann", "vdb")
        assert "vdb" not in ctl("domblklist", "ann")
        ann.run("until ! [ -e /sys/block/vdb ]; do sleep 0.1; done")
    assert host("debugfs", "-R", "cat times", str(more)).count("\n") == 2

    for name in ("ann", "bob"):
        ctl("destroy", name)
    ctl("net-destroy", "default")
    after = traces()
    assert after == before


def test_stock_guests_on_the_hosts_bridge(daemon, outside, start, root_disk):
    ctl("iface-bridge", "eth0", "br0")
    ctl("iface-bridge", "--confirm")
    before = traces()
    source = ("bridge", "br0")
    bob = start("bob", "52:54:00:00:00:02", "net=203.0.113.12/24 shell=ttyS0", source=source)
    bob.expect("GUEST UP", BOOT_SECONDS)
    bob.expect("# ")
    ann = start("ann", "52:54:00:00:00:01", "root=/dev/vda", "/lab/initrd.gz", f"[disk vda]\nsource = {root_disk}\n", source=source)
    ann.log_in()
    ann.run("ip link set $(ls /sys/class/net | grep ^e) up; ip address add 203.0.113.11/24 dev $(ls /sys/class/net | grep ^e)")
    for address in ("203.0.113.12", "203.0.113.2", "203.0.113.1"):      # the other guest, the host, the outside
        assert " 0% packet loss" in ann.run(f"ping -c 3 -i 0.2 {address}")
    for address in ("203.0.113.11", "203.0.113.2", "203.0.113.1"):
        assert " 0% packet loss" in bob.run(f"ping -c 3 {address}")
    assert "0% packet loss" in outside("ping", "-c", "2", "203.0.113.11")
    assert "203.0.113.12" in ctl("domifaddr", "bob", "--source", "arp")
    shown = host("ip", "-o", "link", "show", "master", "br0")
    assert "vnet0" in shown and "vnet1" in shown and "link/ether fe:54:00:00:00:02" in shown
    for name in ("ann", "bob"):
        ctl("destroy", name)
    assert traces() == before
    ctl("iface-unbridge", "br0")
    ctl("iface-bridge", "--confirm")


def test_a_spoofing_stock_guest_is_contained_and_its_card_obeys(daemon, outside, start):
    """It tries what its root may: a second address, another MAC; then the host plugs its cable and limits its rates."""
    before = traces()
    ctl("net-start", "default")
    guest = start("eve", "52:54:00:00:00:01", "net=dhcp shell=ttyS0", card="filter = clean-traffic\n")
    guest.expect("GUEST UP", BOOT_SECONDS)
    guest.expect("# ")
    assert " 0% packet loss" in guest.run("ping -c 2 192.168.122.1")
    assert "table netdev kvmapp-vnet0" in host("nft", "list", "ruleset")
    guest.run("ip address add 192.168.122.99/24 dev eth0")
    assert "100% packet loss" in guest.run("ping -c 2 -W 2 -I 192.168.122.99 192.168.122.1; true")
    assert "192.168.122.99" not in host("ip", "neighbour")
    assert " 0% packet loss" in guest.run("ping -c 2 192.168.122.1")
    guest.run("ip link set eth0 down; ip link set eth0 address 52:54:00:00:00:99; ip link set eth0 up")
    assert "100% packet loss" in guest.run("ping -c 2 -W 2 192.168.122.1; true")
    guest.run("ip link set eth0 down; ip link set eth0 address 52:54:00:00:00:01; ip link set eth0 up")
    assert " 0% packet loss" in guest.run("ping -c 2 192.168.122.1")

    assert ctl("domif-setlink", "eve", "vnet0", "down") == "Device updated successfully\n\n"
    await_carrier(guest, 0)
    assert ctl("domif-getlink", "eve", "vnet0") == "vnet0 down\n\n"
    ctl("domif-setlink", "eve", "vnet0", "up")
    await_carrier(guest, 1)
    ctl("domiftune", "eve", "vnet0", "--inbound", "1000,2000,512", "--outbound", "500")
    assert "inbound.average: 1000\n" in ctl("domiftune", "eve", "vnet0")
    assert "rate 8Mbit ceil 16Mbit" in host("tc", "class", "show", "dev", "vnet0")

    ctl("attach-interface", "eve", "network", "default", "--mac", "52:54:00:00:00:05", "--live")
    guest.run("for try in $(seq 100); do [ -e /sys/class/net/eth1 ] && break; usleep 100000; done; cat /sys/class/net/eth1/address")
    assert "52:54:00:00:00:05" in ctl("domiflist", "eve") and "vnet1" in host("ip", "link")
    ctl("detach-interface", "eve", "network", "--mac", "52:54:00:00:00:05", "--live")
    assert "52:54:00:00:00:05" not in ctl("domiflist", "eve") and "vnet1" not in host("ip", "link")
    guest.run("[ ! -e /sys/class/net/eth1 ]")
    ctl("destroy", "eve")
    ctl("net-destroy", "default")
    assert traces() == before


def await_carrier(guest, wanted):
    """The card's interrupt is on its way when the verb returns."""
    guest.run(f"for try in $(seq 100); do [ $(cat /sys/class/net/eth0/carrier) = {wanted} ] && break; usleep 100000; done; "
              f"[ $(cat /sys/class/net/eth0/carrier) = {wanted} ]")


def test_user_mode_needs_no_privileges(outside, lab):
    assert NESTED_LAB
    Path("/dev/kvm").chmod(0o666)
    before = traces()
    guest = Guest(["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "kvmapp", "run", "--name", "user",
                   "--kernel", str(lab / "vmlinuz"), "--initrd", str(lab / "initramfs.gz"), "--memory", "512", "--append",
                   "console=ttyS0 panic=-1 quiet net=dhcp shell=ttyS0", "--net", "user,forwards=tcp:203.0.113.2:8081:80"])
    try:
        guest.expect("GUEST UP", BOOT_SECONDS)
        guest.expect("# ")
        assert "10.0.2.15/24" in guest.run("ip -4 address show dev eth0")
        assert " 0% packet loss" in guest.run("ping -c 2 10.0.2.2")
        host("sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647")
        assert " 0% packet loss" in guest.run("ping -c 2 203.0.113.1"), "echo requests go out where the host lets them"
        guest.run("(while true; do echo hello from the guest | nc -l -p 80; done) >/dev/null 2>&1 & sleep 1")
        assert outside("busybox", "nc", "203.0.113.2", "8081").strip() == "hello from the guest"
        server = subprocess.Popen(["ip", "netns", "exec", "outside", "busybox", "nc", "-l", "-p", "7"], stdin=subprocess.PIPE, text=True)
        assert server.stdin
        server.stdin.write("hello from outside\n")
        server.stdin.close()
        host("sh", "-c", "until ip netns exec outside ss -ltn | grep -q ':7 '; do sleep 0.1; done")
        assert guest.run("nc 203.0.113.1 7 </dev/null") == "hello from outside"
        server.wait(60)
        assert traces() == before
        guest.send("poweroff -f")
        assert guest.wait() == 0
    finally:
        print(guest.console)
        guest.kill()
