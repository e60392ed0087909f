"""What networks tell nft, iptables and dnsmasq, and what they read of leases: texts, without a host that changes."""
import errno
import os
import shutil
import signal
import subprocess

import pytest

from kvmapp.daemon import dnsmasq, hostbridge, hostnet, netrules, otherfilters
from kvmapp.errors import HostError
from kvmapp.hostconfig import NetworkConfig

NAT = {"name": "default", "uuid": "d340f42e-8611-52c5-949c-8013181e73d4", "mode": "nat", "bridge": "virbr0", "mac": "52:54:00:00:00:01",
       "ipv4": {"address": "192.168.122.1/24", "dhcp": "192.168.122.2 - 192.168.122.254"}}


def network(**changes):
    return NetworkConfig.from_dict({**NAT, **changes})


def lines(text):
    return [line.strip() for line in text.splitlines()]


def forward_chain(*networks, version=4):
    return [netrules.nft_rule(conditions, verdict, version) for chain, conditions, verdict in netrules.rules(list(networks), version)
            if chain == "forward"]


def test_nat_lets_out_what_is_ours_and_in_what_was_asked_for():
    assert forward_chain(network()) == [
        'iifname "virbr0" oifname "virbr0" accept', 'iifname "virbr0" ip saddr != 192.168.122.0/24 reject',
        'oifname "virbr0" ct state established,related accept', 'oifname "virbr0" ct status dnat accept', 'oifname "virbr0" reject',
        'iifname "virbr0" accept']


def test_modes():
    isolated = network(mode="isolated")
    assert forward_chain(isolated) == ['iifname "virbr0" oifname "virbr0" accept', 'iifname "virbr0" reject', 'oifname "virbr0" reject']
    route = forward_chain(network(mode="route", device="eth0"))
    assert 'iifname "virbr0" oifname != "eth0" reject' in route and 'oifname "virbr0" iifname != "eth0" reject' in route
    assert 'oifname "virbr0" ip daddr 192.168.122.0/24 accept' in route
    assert not any(chain == "postrouting" for chain, _, _ in netrules.rules([network(mode="route")], 4))
    assert forward_chain(network(mode="open")) == []


def test_one_network_cannot_be_reached_from_another():
    """What leaves the first is accepted only after the second had its say."""
    other = network(name="lab", bridge="virbr1", uuid="d340f42e-8611-52c5-949c-8013181e73d5", mac="52:54:00:00:00:02",
                    ipv4={"address": "10.9.0.1/24"})
    chain = forward_chain(network(), other)
    assert chain.index('oifname "virbr1" reject') < chain.index('iifname "virbr0" accept')
    assert chain.index('oifname "virbr0" reject') < chain.index('iifname "virbr1" accept')


def test_forwards_go_to_hosts_and_addresses_of_their_version():
    one = network(ipv6={"address": "fd00:122::1/64"}, hosts=[{"name": "web", "mac": "52:54:00:00:00:09", "ipv4": "192.168.122.10",
                                                               "ipv6": "fd00:122::10"}],
                  forwards=[{"name": "http", "port": 8080, "to": "web", "to_port": 80},
                            {"name": "dns", "protocol": "udp", "port": 5353, "to": "192.168.122.11", "listen": "192.0.2.1"}])
    four, six = netrules.nft_text([one], 4), netrules.nft_text([one], 6)
    assert "fib daddr type local tcp dport 8080 dnat to 192.168.122.10:80" in lines(four)
    assert "fib daddr type local ip daddr != 127.0.0.0/8 tcp dport 8080 dnat to 192.168.122.10:80" in lines(four)
    assert "ip daddr 192.0.2.1 udp dport 5353 dnat to 192.168.122.11:5353" in lines(four)
    assert "fib daddr type local tcp dport 8080 dnat to [fd00:122::10]:80" in lines(six)
    assert "5353" not in six
    assert 'oifname "virbr0" ip saddr 192.168.122.0/24 ct status dnat masquerade' in lines(four)


NFT_SHOWS = """table ip kvmapp {
	chain forward {
		type filter hook forward priority filter; policy accept;
		iifname "virbr0" ip saddr != 192.168.122.0/24 reject
		oifname "virbr0" ct status dnat accept
	}
	chain prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		fib daddr type local tcp dport 8080 dnat to 192.168.122.10:80
	}
	chain postrouting {
		ip saddr 192.168.122.0/24 ip daddr 224.0.0.0/24 return
		ip saddr 192.168.122.0/24 masquerade
	}
}
"""


def test_rules_that_are_shown_are_counted():
    assert netrules.rules_in(NFT_SHOWS) == 5 and netrules.rules_in("") == 0
    assert netrules.rules_in("-A FORWARD -j KVMAPP-FORWARD\n-A KVMAPP-FORWARD -i virbr0 -j ACCEPT") == 2


@pytest.mark.parametrize(("text", "closed", "ours"), [
    ("", False, False),
    ("\t\ttype filter hook forward priority filter; policy drop;\n\t\tcounter packets 8 bytes 9 jump DOCKER-USER\n", True, False),
    ("\t\ttype filter hook forward priority filter; policy accept;\n\t\tcounter packets 8 bytes 9 jump KVMAPP-FORWARD\n", False, True),
    ("\t\tcounter packets 1 bytes 2 reject with icmp host-prohibited\n", True, False),
    ('\t\tiifname "eth0" counter packets 1 bytes 2 drop\n\t\tcounter packets 1 bytes 2 accept\n', False, False),
    ("-P FORWARD DROP\n-A FORWARD -j KVMAPP-FORWARD\n", True, True),
    ("-P FORWARD ACCEPT\n-A FORWARD -s 10.0.0.1/32 -j DROP\n", False, False),
    ("-P FORWARD ACCEPT\n-A FORWARD -j REJECT --reject-with icmp-host-prohibited\n", True, False)])
def test_chains_of_others_that_let_nothing_pass(monkeypatch, text, closed, ours):
    monkeypatch.setattr(otherfilters, "said", lambda words: text if (words[0] == "nft") != text.startswith("-P") else "")
    monkeypatch.setattr(otherfilters, "content", lambda path: "nat\nfilter\n")
    chain = otherfilters.Chain(4, "forward")
    assert (chain.is_closed, chain.has_ours) == (closed, ours)


def test_a_kernel_without_iptables_of_the_older_kind_is_not_given_it(monkeypatch):
    asked: list[list[str]] = []

    def said(words):
        asked.append(words)
        return ""
    monkeypatch.setattr(otherfilters, "said", said)
    monkeypatch.setattr(otherfilters, "content", lambda path: "")
    assert not otherfilters.Chain(6, "input").is_closed
    assert asked == [["nft", "list", "chain", "ip6", "filter", "INPUT"]]


@pytest.mark.parametrize(("tables", "zone", "installed", "complaint"), [
    ("table inet firewalld\n", "", True, True), ("table inet firewalld\n", "trusted\n", True, False),
    ("table inet firewalld\n", "", False, False), ("table ip filter\n", "", True, False)])
def test_firewalld_that_does_not_know_a_bridge_is_told_of(monkeypatch, tables, zone, installed, complaint):
    monkeypatch.setattr(otherfilters, "said", lambda words: tables if words[0] == "nft" else zone)
    monkeypatch.setattr(otherfilters, "find_program", lambda name: "/usr/bin/x" if installed else None)
    found = otherfilters.complaints("virbr0")
    assert bool(found) == complaint and all("--zone=trusted --add-interface=virbr0" in one for one in found)


def test_without_networks_nothing_is_left():
    assert netrules.nft_text([], 4) == "table ip kvmapp\ndelete table ip kvmapp\n"
    assert netrules.nft_text([network()], 6) == "table ip6 kvmapp\ndelete table ip6 kvmapp\n"


def test_iptables_says_the_same():
    one = network(forwards=[{"name": "ssh", "port": 2222, "to": "192.168.122.10", "to_port": 22}])
    text = netrules.iptables_text(netrules.rules([one], 4))
    assert lines(netrules.iptables_text([("input", {"in": "virbr0"}, "accept")], ("input",))) == [
        "*filter", ":KVMAPP-INPUT - [0:0]", "-A KVMAPP-INPUT -i virbr0 -j ACCEPT", "COMMIT"]
    assert lines(text) == [
        "*filter", ":KVMAPP-FORWARD - [0:0]", ":KVMAPP-INPUT - [0:0]",
        "-A KVMAPP-FORWARD -i virbr0 -o virbr0 -j ACCEPT", "-A KVMAPP-FORWARD -i virbr0 ! -s 192.168.122.0/24 -j REJECT",
        "-A KVMAPP-FORWARD -o virbr0 -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
        "-A KVMAPP-FORWARD -o virbr0 -m conntrack --ctstate DNAT -j ACCEPT", "-A KVMAPP-FORWARD -o virbr0 -j REJECT",
        "-A KVMAPP-FORWARD -i virbr0 -j ACCEPT",
        *(f"-A KVMAPP-INPUT -i virbr0 -p {protocol} --dport {port} -j ACCEPT" for protocol, port in netrules.SERVICES), "COMMIT",
        "*nat", ":KVMAPP-PREROUTING - [0:0]", ":KVMAPP-OUTPUT - [0:0]", ":KVMAPP-POSTROUTING - [0:0]",
        "-A KVMAPP-PREROUTING -m addrtype --dst-type LOCAL -p tcp --dport 2222 -j DNAT --to-destination 192.168.122.10:22",
        "-A KVMAPP-OUTPUT -m addrtype --dst-type LOCAL ! -d 127.0.0.0/8 -p tcp --dport 2222 -j DNAT --to-destination 192.168.122.10:22",
        "-A KVMAPP-POSTROUTING -o virbr0 -s 192.168.122.0/24 -m conntrack --ctstate DNAT -j MASQUERADE",
        "-A KVMAPP-POSTROUTING -s 192.168.122.0/24 -d 224.0.0.0/24 -j RETURN",
        "-A KVMAPP-POSTROUTING -s 192.168.122.0/24 -d 255.255.255.255 -j RETURN",
        "-A KVMAPP-POSTROUTING -s 192.168.122.0/24 ! -d 192.168.122.0/24 -j MASQUERADE", "COMMIT"]


class Iptables:
    """One base chain; `held`: who else changes rules, so that what does not wait for the lock fails."""

    def __init__(self, monkeypatch, rules, version="1.8.9", held=False):
        self.rules, self.version, self.held = rules, version, held
        self.waited: list[bool] = []
        monkeypatch.setattr(netrules, "run", self.run)
        netrules.waiting.cache_clear()

    def run(self, words, what, text=None):
        if words[1:] == ["--version"]:
            return f"iptables v{self.version} (legacy)\n"
        self.waited.append(words[1:3] == ["-w", "5"])
        if self.held:
            raise HostError("Cannot set the rules of networks: iptables: Another app is currently holding the xtables lock")
        command, *rest = words[words.index("filter") + 1:]
        if command == "-S":
            return "-P FORWARD ACCEPT\n" + "".join(f"-A FORWARD -j {one}\n" for one in self.rules)
        if command == "-I":
            self.rules.insert(0, rest[-1])
        elif command == "-D":
            self.rules.remove(rest[-1])
        return ""


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("rules", [[], ["KVMAPP-FORWARD"], ["KVMAPP-FORWARD", "DOCKER", "KVMAPP-FORWARD"]])
@pytest.mark.parametrize(("version", "waits"), [("1.8.9", True), ("1.4.21", True), ("1.4.7", False)])
def test_our_chain_is_jumped_to_once(monkeypatch, rules, wanted, version, waits):
    tables = Iptables(monkeypatch, list(rules), version)
    netrules.jump("iptables", "filter", "FORWARD", "KVMAPP-FORWARD", wanted)
    assert tables.rules.count("KVMAPP-FORWARD") == wanted and tables.rules.count("DOCKER") == rules.count("DOCKER")
    assert set(tables.waited) == {waits}
    netrules.waiting.cache_clear()


@pytest.mark.parametrize("wanted", [True, False])
def test_a_lock_that_is_held_is_not_taken_for_an_answer(monkeypatch, wanted):
    Iptables(monkeypatch, [], held=True)
    with pytest.raises(HostError, match="xtables lock"):
        netrules.jump("iptables", "filter", "FORWARD", "KVMAPP-FORWARD", wanted)
    netrules.waiting.cache_clear()


# dnsmasq.

FILES = dnsmasq.Files("/run/n", "/var/n", "default")


def test_dnsmasq_is_told_of_the_range_and_of_nothing_else():
    text = lines(dnsmasq.config_text(network(), FILES))
    assert "dhcp-range=192.168.122.2,192.168.122.254,255.255.255.0,3600" in text and "dhcp-lease-max=253" in text
    assert "interface=virbr0" in text and "except-interface=lo" in text and "local=//" in text and "domain-needed" in text
    assert not any(line.startswith(("domain=", "server=", "no-resolv", "enable-ra", "dhcp-option")) for line in text)


def test_isolated_guests_learn_of_no_router_and_of_no_outside():
    text = lines(dnsmasq.config_text(network(mode="isolated", ipv6={"address": "fd00:122::1/64"}), FILES))
    assert {"dhcp-option=option:router", "no-resolv", "ra-param=virbr0,0,0"} <= set(text)


def test_names_and_servers():
    text = lines(dnsmasq.config_text(network(domain="guests.example", dns={"forwarders": ["9.9.9.9", "2620:fe::fe"]}), FILES))
    assert {"domain=guests.example", "local=/guests.example/", "expand-hosts", "no-resolv", "server=9.9.9.9",
            "server=2620:fe::fe"} <= set(text)
    off = lines(dnsmasq.config_text(network(dns={"enabled": False, "forwarders": ["9.9.9.9", "2620:fe::fe"]}), FILES))
    assert {"port=0", "dhcp-option=option:dns-server,9.9.9.9", "dhcp-option=option6:dns-server,[2620:fe::fe]"} <= set(off)


@pytest.mark.parametrize(("ipv6", "hosts", "expected"), [
    ({"address": "fd00:122::1/64"}, [], "dhcp-range=fd00:122::,ra-only,64"),
    ({"address": "fd00:122::1/64", "dhcp": "fd00:122::100 - fd00:122::1ff"}, [], "dhcp-range=fd00:122::100,fd00:122::1ff,64,3600"),
    ({"address": "fd00:122::1/64"}, [{"name": "web", "mac": "52:54:00:00:00:09", "ipv6": "fd00:122::10"}],
     "dhcp-range=fd00:122::,static,64,3600")])
def test_ipv6(ipv6, hosts, expected):
    text = lines(dnsmasq.config_text(network(ipv6=ipv6, hosts=hosts), FILES))
    assert expected in text and "enable-ra" in text


@pytest.mark.skipif(not shutil.which("dnsmasq", path="/usr/sbin:/usr/bin"), reason="needs dnsmasq")
@pytest.mark.parametrize("changes", [
    {}, {"mode": "isolated", "ipv6": {"address": "fd00:122::1/64"}}, {"domain": "a.example", "mtu": 1400},
    {"ipv6": {"address": "fd00:122::1/64", "dhcp": "fd00:122::100 - fd00:122::1ff"}, "dns": {"forwarders": ["9.9.9.9", "2620:fe::fe"]}},
    {"dns": {"enabled": False, "forwarders": ["9.9.9.9", "2620:fe::fe"]}, "ipv6": {"address": "fd00:122::1/64"}},
    {"ipv4": {"address": "192.168.122.1/24"}, "hosts": [{"name": "web", "mac": "52:54:00:00:00:09", "ipv4": "192.168.122.10"}]}])
def test_dnsmasq_understands_it(tmp_path, changes):
    live = network(**changes)
    files = dnsmasq.Files(str(tmp_path), str(tmp_path), "default")
    dnsmasq.write(files.config, dnsmasq.config_text(live, files))
    dnsmasq.write(files.hosts, dnsmasq.hosts_text(live, [("52:54:00:00:00:0a", "mail")]))
    dnsmasq.write(files.names, dnsmasq.names_text(live))
    tried = subprocess.run(["/usr/sbin/dnsmasq", "--test", f"--conf-file={files.config}"], capture_output=True, text=True, check=False)
    assert tried.returncode == 0, tried.stderr


def test_hosts_file_names_domains_that_dns_can_bear_once():
    one = network(hosts=[{"name": "web", "mac": "52:54:00:00:00:09", "ipv4": "192.168.122.10"}])
    members = [("52:54:00:00:00:0a", "Mail"), ("52:54:00:00:00:0b", "mail"), ("52:54:00:00:00:0c", "with space"),
               ("52:54:00:00:00:0d", "a,b\n"), ("52:54:00:00:00:09", "other"), ("52:54:00:00:00:0e", "web")]
    assert lines(dnsmasq.hosts_text(one, members)) == ["52:54:00:00:00:09,192.168.122.10,web", "52:54:00:00:00:0a,mail"]
    assert dnsmasq.names_text(one) == "192.168.122.10 web\n"


@pytest.mark.parametrize("name", ["101", "12h", "90M", "7d", "2w", "30s", "infinite", "ignore"])
def test_names_that_mean_something_else_in_the_hosts_file_are_left_out(name):
    """dnsmasq takes them for a lease's time, or for an order to give no address."""
    one = network(hosts=[{"name": name.lower(), "mac": "52:54:00:00:00:09", "ipv4": "192.168.122.10"}])
    assert lines(dnsmasq.hosts_text(one, [])) == ["52:54:00:00:00:09,192.168.122.10"]
    assert dnsmasq.names_text(one) == f"192.168.122.10 {name.lower()}\n"
    assert dnsmasq.hosts_text(network(), [("52:54:00:00:00:0a", name)]) == ""
    assert lines(dnsmasq.hosts_text(network(), [("52:54:00:00:00:0a", f"{name}x"), ("52:54:00:00:00:0b", "m")])) == [
        f"52:54:00:00:00:0a,{name.lower()}x", "52:54:00:00:00:0b,m"]


@pytest.mark.parametrize(("help", "knows"), [("--dhcp-ignore-clid   Ignore client identifier option", True), ("--dhcp-host", False)])
def test_a_guest_gets_no_neighbours_lease_by_its_client_identifier(monkeypatch, help, knows):
    monkeypatch.setattr(dnsmasq, "run", lambda words, what: help)
    dnsmasq.ignores_client_ids.cache_clear()
    assert ("dhcp-ignore-clid" in lines(dnsmasq.config_text(network(), FILES))) is knows
    dnsmasq.ignores_client_ids.cache_clear()


def test_leases():
    text = """100 52:54:00:00:00:01 192.168.122.27 ann 01:52:54:00:00:00:01
50 52:54:00:00:00:02 192.168.122.28 gone *
0 52:54:00:00:00:03 192.168.122.29 * *
garbage
x y z a b
duid 00:01:00:01:2e:1f:00:00:52:54:00:00:00:01
100 1234 fd00:122::100 ann 00:01:00:01:2e:1f:00:00:52:54:00:00:00:04
100 1235 fd00:122::101 * 00:04:aa:bb
"""
    leases = dnsmasq.parse_leases(text, 60)
    assert [(lease.mac, lease.address, lease.name) for lease in leases] == [
        ("52:54:00:00:00:01", "192.168.122.27", "ann"), ("52:54:00:00:00:03", "192.168.122.29", None),
        ("52:54:00:00:00:04", "fd00:122::100", "ann"), (None, "fd00:122::101", None)]


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize(("program", "patience", "by"), [
    ("echo ready; exec sleep infinity", 60.0, signal.SIGTERM), ("trap '' TERM; echo ready; exec sleep infinity", 0.1, signal.SIGKILL)])
def test_a_dnsmasq_is_ended_on_old_kernels_too(monkeypatch, descriptors, program, patience, by):
    """Those before Linux 5.3 have no descriptors of processes."""
    def refuse(_pid):
        raise OSError(errno.ENOSYS, "Function not implemented")
    if not descriptors:
        monkeypatch.setattr(os, "pidfd_open", refuse)
    monkeypatch.setattr(dnsmasq, "STOP_PATIENCE", patience)
    with subprocess.Popen(["/bin/sh", "-c", program], stdout=subprocess.PIPE) as child:
        monkeypatch.setattr(dnsmasq, "runs_with", lambda pid, _files: pid == child.pid and child.poll() is None)
        assert child.stdout and child.stdout.readline() == b"ready\n"
        assert dnsmasq.end(child.pid, FILES)
        assert child.wait() == -by
        assert dnsmasq.end(child.pid, FILES)


# The host.

def test_bridges_of_a_libvirt_are_not_taken(tmp_path):
    (tmp_path / "default.xml").write_text("<network>\n  <bridge name='virbr0' stp='on' delay='0'/>\n</network>")
    (tmp_path / "other.xml").write_text('<network><bridge stp="on" name="virbr7"/></network>')
    (tmp_path / "notes.txt").write_text("<bridge name='virbr1'/>")
    assert hostnet.libvirt_bridges(str(tmp_path)) == {"virbr0", "virbr7"}
    assert hostnet.libvirt_bridges(str(tmp_path / "nothing")) == set()


@pytest.mark.parametrize(("route", "clashes"), [
    ({"dst": "192.168.122.0/24"}, True), ({"dst": "192.168.0.0/16"}, True), ({"dst": "192.168.122.128/25", "gateway": "10.0.0.1"}, True),
    ({"dst": "192.168.0.0/16", "gateway": "10.0.0.1"}, False), ({"dst": "192.168.123.0/24"}, False)])
def test_what_clashes_with_a_range(route, clashes):
    from ipaddress import ip_network
    assert hostnet.clash(ip_network("192.168.122.0/24"), {**route, "dst": ip_network(route["dst"])}) is clashes


OLD_IP = ["printf 'default via 192.0.2.1 dev eth0\\n'", """echo 'Option "-json" is unknown, try "ip -help".' >&2; exit 255"""]


@pytest.mark.parametrize("script", OLD_IP)
def test_an_old_iproute2_is_named(monkeypatch, tmp_path, script):
    for name in ("ip", "bridge"):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(hostnet, "SEARCH", f"{tmp_path}:/bin")
    for work in (lambda: hostnet.routes(4), hostnet.neighbours, hostbridge.interfaces, lambda: hostbridge.look("eth0")):
        with pytest.raises(HostError, match=r"Cannot look at .*: ip: it .*(?i:json)") as caught:
            work()
        assert caught.value.hint == "install iproute2 4.16 or newer"
