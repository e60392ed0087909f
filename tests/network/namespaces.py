"""A host with a network of its own: the daemon of host.py in a network namespace, and namespaces as guests and as the outside.

Nothing here touches the machine's own devices or rules; what a test makes goes with its namespaces.
"""
import contextlib
import json
import os
import shutil
import subprocess
import uuid

from tests.unit.daemon.host import Host

NEEDED = ("ip", "nft", "dnsmasq")
PROGRAMS = "/usr/sbin:/sbin:/usr/bin:/bin"


def missing(*more):
    """Why such tests cannot run here, which may want more programs; None when they can."""
    if os.geteuid() != 0:
        return "needs root"
    if reason := absent(*NEEDED, *more):
        return reason
    lack = lacking("bridges", "ip link add br0 type bridge")
    return f"{lack}: NOT TESTED HERE, run it in the lab: tests/lab/run python3 -m pytest tests/network" if lack else None


def absent(*programs):
    """Which of these programs are not here; None when all are."""
    names = [name for name in programs if not shutil.which(name, path=PROGRAMS)]
    return f"needs {', '.join(names)}" if names else None


def lacking(what, script):
    """None when the script does its work in a network namespace; else words that name what the kernel lacks, loudly."""
    name = f"kvt-{uuid.uuid4().hex[:8]}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "THIS KERNEL LACKS network namespaces"
    probe = subprocess.run(["ip", "netns", "exec", name, "sh", "-c", script], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return f"THIS KERNEL LACKS {what}" if probe.returncode else None


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
    """Its daemon, and what it starts, live in `self.namespace`. `firewall`: what the daemon sets its rules with, nft or iptables."""

    def __init__(self, root, firewall="nft"):
        super().__init__(root)
        self.namespace = Namespace()
        self.others = []
        self.firewall = firewall
        self.launcher = ["ip", "netns", "exec", self.namespace.name]    # in a mount namespace of its own, too
        if firewall == "iptables":
            hidden = " && ".join(f"mount --bind /dev/null {path}" for path in places("nft"))
            self.launcher += ["sh", "-c", f'{hidden} && exec "$@"', "sh"]
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
        self.eventually(lambda: self.forwards(name), f"{name} as a port that carries frames")
        return guest

    def forwards(self, port):
        """Whether the bridge sends frames to the port: the kernel tells it of a veth's carrier beside everything else."""
        return self.link(port)["linkinfo"]["info_slave_data"]["state"] == "forwarding"

    def link(self, name):
        """What ip(8) tells of a device of the host."""
        return json.loads(self.run("ip", "-details", "-json", "link", "show", name))[0]

    def outside(self, address="203.0.113.1/24", host="203.0.113.2/24"):
        """A namespace beyond the host's eth0 that knows no way to guests."""
        there = Namespace()
        self.others.append(there)
        self.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", there.name)
        self.run("ip", "address", "add", host, "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        there.run("ip", "address", "add", address, "dev", "eth0")
        there.run("ip", "link", "set", "eth0", "up")
        self.eventually(lambda: self.link("eth0")["operstate"] == "UP", "the host's way out")       # a veth drops what comes sooner
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
                "rules": self.rules(), "processes": sorted(self.dnsmasqs())}

    def rules(self):
        """Ours and others'; of iptables ours alone, for it leaves empty tables of its own behind."""
        if self.firewall == "nft":
            return self.run("nft", "list", "ruleset")
        lines = [line for tool in ("iptables-save", "ip6tables-save") for line in self.run(tool).splitlines()]
        return "\n".join(line for line in lines if "KVMAPP" in line)

    def flush_rules(self):
        self.run("nft", "flush", "ruleset")
        if self.firewall == "iptables":                 # the older kind, which nft does not see
            for tool in ("iptables", "ip6tables"):
                for table in ("filter", "nat"):
                    self.run(tool, "-t", table, "-F")

    def flush_nat(self):
        """Only a part of them."""
        if self.firewall == "nft":
            self.run("nft", "flush", "chain", "ip", "kvmapp", "postrouting")
        else:
            self.run("iptables", "-t", "nat", "-F", "POSTROUTING")

    def dnsmasqs(self):
        """Without those that have only forked the one that stays, and are ending."""
        parents = {pid: parent_of(pid) for pid in run("ip", "netns", "pids", self.namespace.name).split() if comm(pid) == "dnsmasq"}
        return [pid for pid in parents if pid not in parents.values()]

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


def parent_of(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[1]
    except OSError:
        return ""


def places(program):
    """Where a program lies, each file once."""
    paths = (os.path.join(folder, program) for folder in PROGRAMS.split(":"))
    return list(dict.fromkeys(os.path.realpath(path) for path in paths if os.path.exists(path)))


DHCP_SCRIPT = """#!/bin/sh
case $1 in
    bound | renew) ip addr flush dev "$interface"; ip addr add "$ip/${mask:-24}" dev "$interface"
        [ -z "$router" ] || ip route add default via "${router%% *}"
        echo "lease $ip router ${router:-none} dns ${dns:-none} domain ${domain:-none}" ;;
esac
"""
