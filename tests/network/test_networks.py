"""Virtual networks as the daemon keeps them, on a host in a network namespace: real bridges, real nft, real dnsmasq."""
import json
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvmapp import errors
from tests.network import namespaces

REASON = namespaces.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
CARD = "[interface 0]\ntype = network\nsource = default\nmac = 52:54:00:00:00:0{}\n"
NO_IPTABLES = namespaces.absent("iptables", "ip6tables")
both_firewalls = pytest.mark.parametrize("host", ["nft", pytest.param("iptables", marks=pytest.mark.skipif(
    NO_IPTABLES is not None, reason=str(NO_IPTABLES)))], indirect=True)


@pytest.fixture
def host(request):
    with namespaces.NetworkHost.temporary(getattr(request, "param", "nft")) as one:
        yield one


def lease(host, guest, *options):
    """What DHCP gave the guest, in udhcpc's words."""
    script = Path(host.root) / "dhcp"
    script.write_text(namespaces.DHCP_SCRIPT)
    script.chmod(0o755)
    words = guest.run("busybox", "udhcpc", "-q", "-n", "-t", "20", "-T", "1", "-i", "eth0", "-s", str(script), *options).split()
    return dict(zip(words[::2], words[1::2], strict=True))


def answers(namespace, address, family="-4", within=2):
    return namespace.run("busybox", "ping", family, "-c", "1", "-W", str(within), address, check=False).returncode == 0


def lookup(guest, name):
    found = guest.run("busybox", "nslookup", name, "192.168.122.1", check=False).stdout
    return [line.split()[-1] for line in found.split("Name:")[-1].splitlines() if line.startswith("Address")]


def listener(namespace, port):
    """Says hello to whoever connects."""
    code = (f"import socket; s = socket.create_server(('', {port})); print('ready', flush=True)\n"
            "while True: c = s.accept()[0]; c.sendall(b'hello ' + c.getpeername()[0].encode()); c.close()")
    process = namespace.popen(sys.executable, "-c", code)
    assert process.stdout.readline() == "ready\n"
    return process


def call(namespace, address, port):
    code = f"import socket; print(socket.create_connection(('{address}', {port}), 60).makefile().read())"
    return namespace.run(sys.executable, "-c", code, check=False).stdout.strip()


@both_firewalls
def test_a_network_comes_and_goes_without_a_trace(host):
    host.network()
    host.start()
    before = host.traces()
    started = host.net("post", "default", "start")["network"]
    assert (started["state"], started["bridge"]) == ("active", "virbr0")
    assert host.dnsmasqs() == [str(started["dnsmasq"])]
    assert f"mac = {json.loads(host.run('ip', '-json', 'link', 'show', 'virbr0'))[0]['address']}" in \
        Path(host.paths.networks, "default.conf").read_text()
    with pytest.raises(errors.KvmappError, match="network is already active"):
        host.net("post", "default", "start")
    stopped = host.net("post", "default", "destroy")["network"]
    assert (stopped["state"], stopped["bridge"], stopped["dnsmasq"]) == ("inactive", None, None)
    assert host.traces() == before
    assert os.listdir(host.paths.network_run) in (["autostarted"], [])
    with pytest.raises(errors.NetworkInactive, match="network 'default' is not active"):
        host.net("post", "default", "destroy")


@both_firewalls
def test_guests_get_addresses_reach_each_other_and_the_outside(host):
    host.network()
    host.start()
    outside = host.outside()
    host.net("post", "default", "start")
    ann, bob = host.plug("virbr0", "g0", "52:54:00:00:00:01"), host.plug("virbr0", "g1", "52:54:00:00:00:02")
    told = lease(host, ann, "-x", "hostname:ann")
    assert (told["router"], told["dns"]) == ("192.168.122.1", "192.168.122.1")
    other = lease(host, bob, "-x", "hostname:bob")
    host.eventually(lambda: lookup(ann, "bob") == [other["lease"]] and lookup(bob, "ann") == [told["lease"]], "the guests' names")
    assert answers(ann, other["lease"], within=30) and answers(ann, "203.0.113.1", within=30)
    leases = host.net("get", "default", "leases")["leases"]
    assert {(one["mac"], one["address"], one["hostname"]) for one in leases} == {
        ("52:54:00:00:00:01", told["lease"], "ann"), ("52:54:00:00:00:02", other["lease"], "bob")}
    assert host.net("get", "default", "leases", mac="52:54:00:00:00:02")["leases"][0]["hostname"] == "bob"
    listener(outside, 7)
    assert call(ann, "203.0.113.1", 7) == "hello 203.0.113.2"          # under the host's address


@both_firewalls
def test_forwards_and_fixed_addresses_change_while_it_is_active(host):
    host.network()
    host.start()
    outside = host.outside()
    host.net("post", "default", "start")
    host.net("post", "default", "update", command="add", section="host", name="web",
             settings={"mac": "52:54:00:00:00:01", "ipv4": "192.168.122.10"})
    web = host.plug("virbr0", "g0", "52:54:00:00:00:01")
    assert lease(host, web)["lease"] == "192.168.122.10"
    host.eventually(lambda: lookup(web, "web") == ["192.168.122.10"], "the guest's name")
    listener(web, 80)
    assert call(outside, "203.0.113.2", 8080) == ""
    host.net("post", "default", "update", command="add", section="forward", name="http",
             settings={"port": "8080", "to": "web", "to_port": "80"})
    assert call(outside, "203.0.113.2", 8080) == "hello 203.0.113.1"
    assert call(host.namespace, "203.0.113.2", 8080).startswith("hello")
    neighbour = host.plug("virbr0", "g1", "52:54:00:00:00:02")
    lease(host, neighbour)
    assert call(neighbour, "203.0.113.2", 8080) == "hello 192.168.122.1"        # by the host, and back by it
    assert "[forward http]" in Path(host.paths.networks, "default.conf").read_text()
    host.net("post", "default", "update", command="delete", section="forward", name="http")
    assert call(outside, "203.0.113.2", 8080) == ""
    assert "forward http" not in Path(host.paths.networks, "default.conf").read_text()


def test_updates_at_one_moment_are_all_there(host):
    path = Path(host.network())
    host.start()
    host.net("post", "default", "start")
    names = [f"f{number}" for number in range(10)]
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda name: host.net("post", "default", "update", command="add", section="forward", name=name,
                                            settings={"port": f"80{name[1:]}0", "to": "192.168.122.9"}), names))
    for text in (host.net("get", "default", "config")["text"], path.read_text()):
        assert sorted(line for line in text.splitlines() if line.startswith("[forward")) == [f"[forward {name}]" for name in names]
    assert host.rules().count("dnat to") == 20


def test_a_host_in_a_network_without_dhcp_gets_its_address_at_once(host):
    """dnsmasq does not read its own configuration again."""
    host.network(text="name = default\n[ipv4]\naddress = 192.168.122.1/24\n[dns]\nenabled = no\n")
    host.start()
    host.net("post", "default", "start")
    assert host.dnsmasqs() == []
    update = {"section": "host", "name": "web"}
    host.net("post", "default", "update", command="add", **update, settings={"mac": "52:54:00:00:00:01", "ipv4": "192.168.122.10"})
    [first] = host.dnsmasqs()
    assert "dhcp-range=192.168.122.0,static" in Path(host.paths.network_run, "default.dnsmasq").read_text()
    host.net("post", "default", "update", command="modify", **update, settings={"ipv4": "192.168.122.11"})
    assert host.dnsmasqs() == [first], "fixed addresses alone it reads again"
    host.net("post", "default", "update", command="delete", **update)
    assert host.dnsmasqs() == []


@pytest.mark.parametrize(("change", "words"), [
    ({"command": "add", "section": "forward", "name": "a", "settings": {"port": "8080", "to": "mars"}}, "neither an address nor a"),
    ({"command": "add", "section": "host", "name": "a", "settings": {"mac": "52:54:00:00:00:01", "ipv4": "10.0.0.1"}},
     "no address for a guest"),
    ({"command": "add", "section": "host", "name": "a b", "settings": {}}, "expected"),
    ({"command": "delete", "section": "host", "name": "web"}, "has no \\[host web\\]"),
    ({"command": "add", "section": "host", "name": "a", "settings": {"colour": "red"}}, "unknown key"),
    ({"command": "add", "section": "forward", "name": "a", "settings": {"port": "7777", "to": "192.168.122.9"}}, "a program of this host")])
def test_updates_that_cannot_be_change_nothing(host, change, words):
    path = Path(host.network())
    host.start()
    host.net("post", "default", "start")
    listener(host.namespace, 7777)
    before = path.read_text(), host.traces()
    with pytest.raises(errors.KvmappError, match=words):
        host.net("post", "default", "update", **change)
    assert (path.read_text(), host.traces()) == before


def test_ranges_that_the_host_reaches_already_are_refused(host):
    host.network()
    host.start()
    host.run("ip", "link", "add", "lan", "type", "bridge")
    host.run("ip", "address", "add", "192.168.122.77/24", "dev", "lan")
    host.run("ip", "link", "set", "lan", "up")
    before = host.traces()
    with pytest.raises(errors.HostError) as caught:
        host.net("post", "default", "start")
    assert "its range 192.168.122.0/24 clashes with the host's route 192.168.122.0/24 dev lan" in str(caught.value)
    assert caught.value.hint.startswith("192.168.123.1/24 is free")
    assert host.traces() == before and host.net("get", "default")["state"] == "inactive"


def test_a_bridge_that_is_somebody_elses_is_left_alone(host):
    host.network(text="name = default\nbridge = virbr0\n[ipv4]\naddress = 192.168.122.1/24\n")
    host.network("free", "name = free\n[ipv4]\naddress = 10.77.0.1/24\n")
    host.start()
    host.run("ip", "link", "add", "virbr0", "type", "bridge")
    before = host.traces()
    with pytest.raises(errors.NameInUse, match="Cannot make bridge 'virbr0' of network 'default': there is a device of this name"):
        host.net("post", "default", "start")
    assert host.traces() == before
    assert host.net("post", "free", "start")["network"]["bridge"] == "virbr1"


@both_firewalls
@pytest.mark.parametrize("mode", ["isolated", "route"])
def test_who_reaches_whom(host, mode):
    host.network(text=f"name = default\nmode = {mode}\n[ipv4]\naddress = 192.168.122.1/24\ndhcp = 192.168.122.2 - 192.168.122.9\n")
    host.start()
    outside = host.outside()
    outside.run("ip", "route", "add", "192.168.122.0/24", "via", "203.0.113.2")
    host.net("post", "default", "start")
    ann, bob = host.plug("virbr0", "g0"), host.plug("virbr0", "g1")
    told, other = lease(host, ann), lease(host, bob)
    assert answers(ann, other["lease"], within=30) and answers(ann, "192.168.122.1", within=30)
    assert told["router"] == ("none" if mode == "isolated" else "192.168.122.1")
    ann.run("ip", "route", "replace", "default", "via", "192.168.122.1")
    within = 30 if mode == "route" else 2
    assert answers(ann, "203.0.113.1", within=within) == (mode == "route")
    assert answers(outside, told["lease"], within=within) == (mode == "route")


@both_firewalls
@pytest.mark.parametrize("mode", ["nat", "isolated", "route", "open"])
def test_who_reaches_whom_by_ipv6(host, mode):
    host.network(text=f"name = default\nmode = {mode}\n[ipv6]\naddress = fd00:122::1/64\n")
    host.start()
    outside = host.outside()
    outside.run("ip", "address", "add", "fd00:9::1/64", "dev", "eth0", "nodad")
    host.run("ip", "address", "add", "fd00:9::2/64", "dev", "eth0", "nodad")
    outside.run("ip", "route", "add", "fd00:122::/64", "via", "fd00:9::2")
    host.net("post", "default", "start")
    ann, bob = host.plug("virbr0", "g0"), host.plug("virbr0", "g1")
    for guest, address in ((ann, "fd00:122::a"), (bob, "fd00:122::b")):
        guest.run("ip", "address", "add", f"{address}/64", "dev", "eth0", "nodad")
        guest.run("ip", "-6", "route", "replace", "default", "via", "fd00:122::1")
    # The first of them may be lost while neighbours are looked for.
    host.eventually(lambda: answers(ann, "fd00:122::b", "-6") and answers(ann, "fd00:122::1", "-6"), "answers of guest and host")
    if mode == "isolated":
        assert not answers(ann, "fd00:9::1", "-6")
    else:
        host.eventually(lambda: answers(ann, "fd00:9::1", "-6"), "the outside's answer")
    if mode in ("route", "open"):
        host.eventually(lambda: answers(outside, "fd00:122::a", "-6"), "the guest's answer")
    else:
        assert not answers(outside, "fd00:122::a", "-6")
    stranger = "fd00:77::a"                     # none of the network's addresses
    ann.run("ip", "address", "add", f"{stranger}/128", "dev", "eth0", "nodad")
    outside.run("ip", "route", "add", "fd00:77::/64", "via", "fd00:9::2")
    host.run("ip", "route", "add", "fd00:77::/64", "dev", "virbr0")

    def reached():
        return ann.run("busybox", "ping", "-6", "-I", stranger, "-c", "1", "-W", "2", "fd00:9::1", check=False).returncode == 0
    if mode == "open":
        host.eventually(reached, "the answer to a stranger")
    else:
        assert not reached()


def test_ipv6_by_advertisement(host):
    host.network(text="name = default\n[ipv6]\naddress = fd00:122::1/64\n")
    host.start()
    outside = host.outside()
    outside.run("ip", "address", "add", "fd00:9::1/64", "dev", "eth0", "nodad")
    host.run("ip", "address", "add", "fd00:9::2/64", "dev", "eth0", "nodad")
    host.net("post", "default", "start")
    guest = host.plug("virbr0", "g0", "52:54:00:00:00:01")
    host.eventually(lambda: " fd00:122::" in guest.run("ip", "-6", "address", "show", "dev", "eth0", "scope", "global", "-tentative"),
                    "the guest's own address")
    host.eventually(lambda: "default via" in guest.run("ip", "-6", "route"), "a way out")
    host.eventually(lambda: answers(guest, "fd00:9::1", "-6"), "the outside's answer")
    host.net("post", "default", "destroy")
    assert host.run("nft", "list", "ruleset") == ""


def test_a_killed_daemons_network_is_found_again(host):
    host.network()
    host.start()
    host.net("post", "default", "start")
    before = host.traces()
    host.kill()
    host.start()
    assert host.net("get", "default")["state"] == "active" and host.traces() == before
    host.net("post", "default", "destroy")
    assert host.dnsmasqs() == []


def test_a_network_that_was_left_half_made_is_cleared_away(host):
    host.network()
    host.start()
    before = host.traces()
    host.net("post", "default", "start")
    host.kill()
    note = Path(host.paths.network_run, "default.json")
    note.write_text(note.read_text().replace('"active"', '"starting"'))
    host.start()
    assert host.traces() == before and not note.exists()
    assert host.net("get", "default")["state"] == "inactive"
    assert host.net("post", "default", "start")["network"]["bridge"] == "virbr0"


def test_a_daemon_that_is_killed_in_the_middle_of_a_start(host):
    """Wherever the kill falls: the next daemon has the network whole, or nothing of it."""
    host.network()
    host.start()
    before = host.traces()
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(host.net, "post", "default", "start")
        host.eventually(lambda: "virbr0" in host.run("ip", "-br", "link"), "the bridge")
        host.kill()
        killed = starting.exception()
    host.start()
    if host.net("get", "default")["state"] == "inactive":
        assert killed is not None and host.traces() == before
        host.net("post", "default", "start")
    assert "chain postrouting" in host.run("nft", "list", "ruleset") and len(host.dnsmasqs()) == 1
    host.net("post", "default", "destroy")
    assert host.traces() == before


HELD_NFT = """#!/bin/sh
! mv {root}/hold {root}/held 2>/dev/null || while [ -e {root}/held ]; do sleep 0.05; done
exec {root}/nft "$@"
"""


def test_what_a_killed_daemon_had_at_work_is_awaited(host):
    """One run of nft here takes until it is let go. The next daemon would clear the network away, and then its rules would come."""
    [real] = namespaces.places("nft")
    shutil.copy(real, f"{host.root}/nft")
    held = Path(host.root, "held-nft")
    held.write_text(HELD_NFT.format(root=host.root))
    held.chmod(0o755)
    host.launcher += ["sh", "-c", f'mount --bind {held} {real} && exec "$@"', "sh"]
    host.network()
    host.start()
    before = host.traces()
    Path(host.root, "hold").touch()
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(host.net, "post", "default", "start")
        host.eventually(Path(host.root, "held").exists, "nft at work")
        host.kill()
        assert starting.exception() is not None
        next_one = pool.submit(host.start)
        host.eventually(lambda: "waiting for programs" in Path(host.log).read_text(), "the next daemon's waiting")
        Path(host.root, "held").unlink()
        next_one.result()
    assert host.traces() == before and host.net("get", "default")["state"] == "inactive"


def test_a_dnsmasq_that_has_no_pid_file_yet_is_found(host):
    """As one has it that is just starting when the daemon is killed."""
    host.network()
    host.start()
    before = host.traces()
    host.net("post", "default", "start")
    host.kill()
    Path(host.paths.network_run, "default.pid").unlink()
    note = Path(host.paths.network_run, "default.json")
    note.write_text(note.read_text().replace('"active"', '"starting"'))
    host.start()
    assert host.traces() == before


@both_firewalls
def test_what_others_take_away_is_put_back(host):
    host.network()
    host.start()
    host.net("post", "default", "start")
    whole = host.rules()
    host.run("sleep", "1")                              # five looks of the daemon: nothing was touched
    assert "put back" not in Path(host.log).read_text()
    assert ("KVMAPP-FORWARD" if host.firewall == "iptables" else "table ip kvmapp") in whole
    guest = host.plug("virbr0", "g0")
    host.flush_rules()
    host.eventually(lambda: host.rules() == whole, "the rules")
    host.flush_nat()
    host.eventually(lambda: host.rules() == whole, "the rules of NAT")
    os.kill(int(host.dnsmasqs()[0]), signal.SIGKILL)
    host.eventually(host.dnsmasqs, "dnsmasq")
    host.run("ip", "link", "delete", "virbr0")
    host.eventually(lambda: host.net("get", "default")["dnsmasq"] and host.run("ip", "-br", "-4", "address", "show", "virbr0", check=False)
                    .stdout.split()[2:3] == ["192.168.122.1/24"], "the bridge")
    host.run("ip", "link", "set", "g0", "master", "virbr0")
    host.eventually(lambda: lease(host, guest)["router"] == "192.168.122.1", "DHCP")


@pytest.mark.skipif(NO_IPTABLES is not None, reason=str(NO_IPTABLES))
@pytest.mark.parametrize("closing", [["-P", "{}", "DROP"], ["-A", "{}", "-j", "REJECT"]], ids=["policy", "rule"])
def test_iptables_that_others_have_closed_lets_guests_through_beside_nft(host, closing):
    """Docker and ufw set the policy, distributions end their chains with such a rule; before or after the network was started."""
    def close():
        for base in ("FORWARD", "INPUT"):
            host.run("iptables", *(word.format(base) for word in closing))

    def ours():
        return [line for line in host.run("iptables", "-S").splitlines() if "KVMAPP" in line]
    host.network()
    host.start()
    host.outside()
    assert host.net("post", "default", "start")["warnings"] == []
    guest = host.plug("virbr0", "g0")
    host.run("sleep", "1")                              # five looks of the daemon: nobody is in the way
    assert ours() == []
    close()
    host.eventually(ours, "our rules in iptables")
    assert lease(host, guest)["router"] == "192.168.122.1" and answers(guest, "203.0.113.1", within=30)
    whole = ours()
    host.run("iptables", "-F")
    if closing[0] == "-A":
        close()
    host.eventually(lambda: ours() == whole, "the rules that were flushed")
    assert answers(guest, "203.0.113.1", within=30)
    said = Path(host.log).read_text()
    host.run("sleep", "1")
    assert Path(host.log).read_text() == said           # and then there is peace
    host.net("post", "default", "destroy")
    assert ours() == []
    host.net("post", "default", "start")                # closed from the first
    assert ours() == whole
    host.net("post", "default", "destroy")


def test_domains_join_an_active_network_and_are_known_by_name(host):
    host.network()
    host.start()
    host.file("web").write_text(f"name = web\nmemory = 64\n{CARD.format(1)}")
    with pytest.raises(errors.NetworkInactive) as caught:
        host.post("web", "start")
    assert str(caught.value) == "Requested operation is not valid: network 'default' is not active"
    assert caught.value.hint == "kvmappctl net-start default"
    host.net("post", "default", "start")
    host.post("web", "start")
    assert host.domain("web")["interfaces"][0]["target"] == "vnet0"
    assert "master virbr0" in host.run("ip", "link", "show", "vnet0")
    assert Path(host.paths.network_run, "default.hosts").read_text() == "52:54:00:00:00:01,web\n"
    # the card itself is in a fake domain's hands: a namespace with its address asks in its place
    guest = host.plug("virbr0", "g0", "52:54:00:00:00:01")
    told = lease(host, guest, "-x", "hostname:something-else")
    host.eventually(lambda: lookup(guest, "web") == [told["lease"]], "the guest's name")
    one = {"interface": "vnet0", "mac": "52:54:00:00:00:01", "protocol": "ipv4", "address": told["lease"]}
    assert host.get("web", "addresses") == {"addresses": [{**one, "prefix": 24}]}
    assert answers(host.namespace, told["lease"], within=30)
    assert host.get("web", "addresses", source="arp") == {"addresses": [{**one, "prefix": 0}]}
    warnings = host.net("post", "default", "destroy")["warnings"]
    assert warnings == ["domain 'web' runs and has no network until this one is started again"]
    host.net("post", "default", "start")
    assert "master virbr0" in host.run("ip", "link", "show", "vnet0")
    host.post("web", "destroy")
    host.eventually(lambda: "vnet0" not in host.run("ip", "-br", "link"), "the tap's end")


def test_a_card_that_stands_elsewhere_stays_there_and_is_in_nobodys_way(host):
    host.network()
    host.start()
    host.net("post", "default", "start")
    host.file("web").write_text(f"name = web\nmemory = 64\n{CARD.format(1)}")
    host.post("web", "start")
    host.run("ip", "link", "add", "br1", "type", "bridge")
    host.run("ip", "link", "set", "vnet0", "master", "br1")
    os.kill(int(host.dnsmasqs()[0]), signal.SIGKILL)
    host.eventually(host.dnsmasqs, "dnsmasq")
    assert host.net("get", "default")["warnings"] == []
    host.net("post", "default", "destroy")
    host.net("post", "default", "start")
    assert "master br1" in host.run("ip", "link", "show", "vnet0")
    host.run("ip", "link", "delete", "br1")
    host.eventually(lambda: "master virbr0" in host.run("ip", "link", "show", "vnet0"), "the tap in its bridge")
