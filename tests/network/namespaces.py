"""A host with a network of its own: the daemon of host.py in a network namespace, and namespaces as guests and as the outside.

Nothing here touches the machine's own devices or rules; what a test makes goes with its namespaces.
"""
import contextlib
import os
import shutil
import subprocess
import tempfile
import uuid

from tests.unit.daemon.host import Host

NEEDED = ("ip", "nft", "dnsmasq")


def missing():
    """Why such tests cannot run here; None when they can."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [name for name in NEEDED if not shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")]
    if absent:
        return f"needs {', '.join(absent)}"
    return tried_in_a_namespace("bridges", "ip link add br0 type bridge")


def missing_for_cards():
    """The same for tests of cards' ports, which want more of the kernel than a small one may have."""
    return missing() or tried_in_a_namespace(
        "VLANs on bridges, dummy devices, HTB and police actions",
        "ip link add br0 type bridge vlan_filtering 1 && ip link add d0 type dummy"
        " && ip tuntap add t0 mode tap && tc qdisc add dev t0 root handle 1: htb && tc qdisc add dev t0 handle ffff: ingress"
        " && tc filter add dev t0 parent ffff: protocol all prio 1 u32 match u32 0 0 police rate 1mbit burst 10k drop")


def tried_in_a_namespace(what, script):
    """None when the script does its work; else a reason that names what the kernel lacks, loudly."""
    name = f"kvt-{uuid.uuid4().hex[:8]}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "needs network namespaces"
    probe = subprocess.run(["ip", "netns", "exec", name, "sh", "-c", script], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "delete", name], check=True)
    if probe.returncode == 0:
        return None
    return f"THIS KERNEL LACKS {what}: NOT TESTED HERE, run it in the lab: tests/lab/run python3 -m pytest tests/network"


class Namespace:
    def __init__(self):
        self.name = f"kvt-{uuid.uuid4().hex[:8]}"
        run("ip", "netns", "add", self.name)
        self.run("ip", "link", "set", "lo", "up")

    def run(self, *words, check=True, **options):
        options = {"timeout": 180, **options}
        done = subprocess.run(["ip", "netns", "exec", self.name, *words], capture_output=True, text=True, check=False, **options)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout if check else done

    def popen(self, *words, **options):
        return subprocess.Popen(["ip", "netns", "exec", self.name, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                **options)

    def delete(self):
        for pid in run("ip", "netns", "pids", self.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        run("ip", "netns", "delete", self.name)


def run(*words):
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


class NetworkHost(Host):
    """Its daemon, and what it starts, live in `self.namespace`."""

    def __init__(self, root):
        super().__init__(root)
        self.namespace = Namespace()
        self.others = []
        self.launcher = ["ip", "netns", "exec", self.namespace.name]
        self.options = ["--heartbeat", "0.2"]
        os.makedirs(self.paths.networks)

    def run(self, *words, **options):
        return self.namespace.run(*words, **options)

    def plug(self, bridge, name, mac=None):
        """A namespace with eth0 in the bridge, as a guest with its card has."""
        guest = Namespace()
        self.others.append(guest)
        self.run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", guest.name)
        self.run("ip", "link", "set", name, "master", bridge, "up")
        if mac:
            guest.run("ip", "link", "set", "eth0", "address", mac)
        guest.run("ip", "link", "set", "eth0", "up")
        return guest

    def outside(self, address="203.0.113.1/24", host="203.0.113.2/24"):
        """A namespace beyond the host's eth0 that knows no way to guests."""
        there = Namespace()
        self.others.append(there)
        self.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", there.name)
        self.run("ip", "address", "add", host, "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        there.run("ip", "address", "add", address, "dev", "eth0")
        there.run("ip", "link", "set", "eth0", "up")
        return there

    def network(self, name="default", text=None):
        path = os.path.join(self.paths.networks, f"{name}.conf")
        with open(path, "w") as file:
            file.write(text or f"name = {name}\n[ipv4]\naddress = 192.168.122.1/24\ndhcp = 192.168.122.2 - 192.168.122.254\n")
        return path

    def net(self, method, *parts, **body):
        from kvmapp.client import escape
        path = "/".join(("/v1/networks", *(escape(part) for part in parts)))
        with self.client() as client:
            return getattr(client, method)(path, **body)

    def traces(self):
        """What a network leaves on a host while it is active."""
        return {"links": sorted(line.split()[0] for line in self.run("ip", "-br", "link").splitlines()),
                "rules": self.run("nft", "list", "ruleset"), "processes": sorted(self.dnsmasqs())}

    def dnsmasqs(self):
        return [pid for pid in run("ip", "netns", "pids", self.namespace.name).split() if comm(pid) == "dnsmasq"]

    def clean_up(self):
        super().clean_up()
        for one in (self.namespace, *self.others):
            one.delete()


def comm(pid):
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:
        return ""


@contextlib.contextmanager
def a_network_host():
    root = tempfile.mkdtemp(prefix="kvmapp-")
    os.chmod(root, 0o711)
    one = NetworkHost(root)
    try:
        yield one
    finally:
        one.clean_up()
        shutil.rmtree(root)


DHCP_SCRIPT = """#!/bin/sh
case $1 in
    bound | renew) ip addr flush dev "$interface"; ip addr add "$ip/${mask:-24}" dev "$interface"
        [ -z "$router" ] || ip route add default via "${router%% *}"
        echo "lease $ip router ${router:-none} dns ${dns:-none} domain ${domain:-none}" ;;
esac
"""
