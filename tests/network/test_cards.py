"""The host's side of domains' cards, on a host in a network namespace: filters, rates, VLANs, and bridges that come and go."""
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from kvmapp import errors
from kvmapp.daemon.process import start_time_of
from tests.network import frames, namespaces

REASON = namespaces.missing("bridge", "tc")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def needs(what, script):
    """Where the kernel lacks it, the test runs in the lab."""
    return pytest.mark.lab(None if REASON else namespaces.lacking(what, script))


needs_vlans = needs("VLANs on bridges", "ip link add br0 type bridge vlan_filtering 1")
needs_rates = needs("HTB and police actions",
                    "ip tuntap add t0 mode tap && tc qdisc add dev t0 root handle 1: htb && tc qdisc add dev t0 handle ffff: ingress"
                    " && tc filter add dev t0 parent ffff: protocol all prio 1 u32 match u32 0 0 police rate 1mbit burst 10k drop")

MAC, OTHER, THIRD = "52:54:00:00:00:01", "52:54:00:00:00:02", "52:54:00:00:00:03"
OWN, FOREIGN = "192.168.122.10", "192.168.122.20"
LOCAL = "fe80::5054:ff:fe00:1"                  # made of MAC, as RFC 4291 says


@pytest.fixture
def host():
    """On its host everything is as before when the last domain and network are gone."""
    with namespaces.NetworkHost.temporary() as one:
        yield one


def bridge(host, name="br0", *options):
    host.run("ip", "link", "add", name, "type", "bridge", *options)
    host.run("ip", "link", "set", name, "up")


def card(host, name="web", mac=MAC, **settings):
    """A running domain with one card in br0, unless the settings say otherwise."""
    lines = {"type": "bridge", "source": "br0", "mac": mac, **settings}
    text = "".join(f"{key} = {value}\n" for key, value in lines.items())
    host.file(name).write_text(f"name = {name}\nmemory = 64\n[interface 0]\n{text}")
    host.post(name, "start")
    return host.domain(name)["interfaces"][0]["target"]


def passes(host, watcher, *tried, name="web", last=None):
    """Which of these frames of the guest come through."""
    last = last or frames.udp4(MAC, OWN, (4, 4))
    host.told(name, "test_frames", card=0, frames=[frame.hex() for frame in (*tried, last)])
    seen = watcher.until(last)
    return [frames.bare(frame) in seen for frame in tried]


def is_in(host, tap, name):
    return f"master {name} " in host.run("ip", "link", "show", tap, check=False).stdout


HONEST = {
    "ARP": frames.arp(MAC, MAC, OWN), "an ARP answer": frames.arp(MAC, MAC, OWN, 2), "an ARP probe": frames.arp(MAC, MAC, "0.0.0.0"),
    "IPv4": frames.udp4(MAC, OWN), "asking for an address": frames.dhcp(MAC),
    "asking with an address that ran out": frames.dhcp(MAC, FOREIGN, kind=3),
    "IPv6": frames.ipv6(MAC, LOCAL, 17, b"\0\t\0\t\0\x08\0\0"), "the fixed IPv6 address": frames.ipv6(MAC, "fd00::10", 59, bytes(8)),
    "a prefix of its own": frames.ipv6(MAC, "2001:db8::5054:ff:fe00:1", 59, bytes(8)),
    "answering for itself": frames.neighbour(MAC, LOCAL, 136, LOCAL), "for its fixed one": frames.neighbour(MAC, LOCAL, 136, "fd00::10"),
    "asking for others": frames.neighbour(MAC, LOCAL, 135, "fe80::77"), "whether its own is free": frames.neighbour(MAC, "::", 135, LOCAL),
}
SPOOFED = {
    "another MAC": frames.udp4(OTHER, OWN), "another MAC in ARP": frames.arp(MAC, OTHER, OWN), "another IP": frames.udp4(MAC, FOREIGN),
    "another IP in ARP": frames.arp(MAC, MAC, FOREIGN), "an ARP answer for others": frames.arp(MAC, MAC, FOREIGN, 2),
    "answers of DHCP": frames.udp4(MAC, OWN, (67, 68)), "answers of DHCPv6": frames.ipv6(MAC, LOCAL, 17, b"\2\x23\2\x22\0\x08\0\0"),
    "a tag": frames.udp4(MAC, OWN, tag=7), "a tag of priority": frames.udp4(MAC, OWN, tag=0),
    "giving another's address back": frames.dhcp(MAC, chaddr=OTHER, kind=7),
    "the same with an address": frames.dhcp(MAC, OWN, chaddr=OTHER, kind=7), "a part of it": frames.dhcp(MAC, OWN, fragment=0x2000),
    "a DHCP message without a body": frames.udp4(MAC, "0.0.0.0", (68, 67)),
    "another protocol": frames.ethernet(MAC, 0x88CC, b"\0"),
    "a bridge's hello": frames.ethernet(MAC, 38, b"\x42\x42\x03" + bytes(35), to="01:80:c2:00:00:0e"),
    "another IPv6": frames.ipv6(MAC, "fd00::20", 59, bytes(8)), "another local one": frames.ipv6(MAC, "fe80::20", 59, b""),
    "a router": frames.icmp6(MAC, LOCAL, 134, bytes(12)), "a redirect": frames.icmp6(MAC, LOCAL, 137, bytes(36)),
    "answering for others": frames.neighbour(MAC, LOCAL, 136, "fd00::20"),
    "that theirs is not free": frames.neighbour(MAC, "::", 135, "fe80::20"),
}
# What gets through without the filter, so that it is the filter that holds it back. (A bridge keeps hellos; tags are taken off.)
WITHOUT = ("another MAC", "another MAC in ARP", "another IP", "another IP in ARP", "an ARP answer for others", "answers of DHCP")


def test_a_spoofing_guest_is_contained(host):
    host.start()
    before = host.traces()
    bridge(host)
    tap = card(host, filter="clean-traffic", addresses=f"{OWN}, fd00::10")
    watcher = frames.Watcher(host.plug("br0", "g0"))
    assert dict(zip(HONEST, passes(host, watcher, *HONEST.values()), strict=True)) == dict.fromkeys(HONEST, True)
    assert dict(zip(SPOOFED, passes(host, watcher, *SPOOFED.values()), strict=True)) == dict.fromkeys(SPOOFED, False)
    free = card(host, "free", OTHER)
    tried = {name: SPOOFED[name] for name in WITHOUT}
    assert dict(zip(tried, passes(host, watcher, *tried.values(), name="free"), strict=True)) == dict.fromkeys(tried, True)
    host.post("web", "destroy")
    host.post("free", "destroy")
    host.eventually(lambda: f"kvmapp-{tap}" not in host.run("nft", "list", "ruleset"), "the filter's end")
    assert free != tap
    host.run("ip", "link", "delete", "br0")
    host.run("ip", "link", "delete", "g0")
    host.eventually(lambda: host.traces() == before, "a host as it was")


def test_the_first_address_is_its_own_where_nobody_names_one(host):
    bridge(host)
    host.start()
    tap = card(host, filter="clean-traffic")
    watcher = frames.Watcher(host.plug("br0", "g0"))
    tried = [frames.arp(MAC, MAC, "0.0.0.0"), frames.arp(MAC, MAC, OWN), frames.udp4(MAC, FOREIGN), frames.udp4(MAC, OWN)]
    assert passes(host, watcher, *tried) == [True, True, False, True]
    host.kill()
    host.start()
    with host.client() as client:
        client.post("/v1/daemon/reload")
    assert passes(host, watcher, *tried) == [True, True, False, True], "it is kept when the daemon comes again"
    host.run("nft", "delete", "table", "netdev", f"kvmapp-{tap}")
    host.eventually(lambda: f"kvmapp-{tap}" in host.run("nft", "list", "tables"), "the filter")


def test_a_new_tap_has_learned_nothing_of_one_that_had_its_name(host):
    """The table of a domain that was killed is there for a moment longer than its tap."""
    bridge(host)
    host.start()
    host.run("nft", f"add table netdev kvmapp-vnet0; add set netdev kvmapp-vnet0 learned {{ type ipv4_addr; flags dynamic; size 1; "
             f"elements = {{ {FOREIGN} }}; }}")
    assert card(host, filter="clean-traffic") == "vnet0"
    watcher = frames.Watcher(host.plug("br0", "g0"))
    assert passes(host, watcher, frames.udp4(MAC, OWN), last=frames.dhcp(MAC)) == [True]


def test_a_filter_follows_what_its_network_lends(host):
    host.network(text="name = default\n[ipv4]\naddress = 192.168.122.1/24\ndhcp = 192.168.122.2 - 192.168.122.254\n"
                 f"[host lee]\nmac = {OTHER}\nipv4 = {FOREIGN}\n")
    host.start()
    host.net("post", "default", "start")
    card(host, type="network", source="default", filter="clean-traffic")
    watcher = frames.Watcher(host.plug("virbr0", "g0"))
    asks = frames.dhcp(MAC)
    assert passes(host, watcher, frames.udp4(MAC, OWN), frames.arp(MAC, MAC, OWN), last=asks) == [False, False]
    with open(os.path.join(host.paths.network_state, "default.leases"), "a") as leases:     # as dnsmasq does, before it answers
        leases.write(f"4000000000 {MAC} {OWN} web *\n")
    host.eventually(lambda: OWN in host.run("nft", "list", "ruleset"), "the address")
    assert passes(host, watcher, frames.udp4(MAC, OWN), frames.udp4(MAC, FOREIGN), last=asks) == [True, False]
    host.kill()
    Path(host.paths.network_state, "default.leases").write_text("")                         # ... when a lease has run out
    host.start()
    host.run("nft", "delete", "table", "netdev", "kvmapp-vnet0")
    host.eventually(lambda: OWN in host.run("nft", "list", "ruleset"), "the address that the next daemon knows of")
    card(host, "lee", OTHER, type="network", source="default", filter="clean-traffic")
    assert passes(host, watcher, frames.udp4(OTHER, FOREIGN), frames.udp4(OTHER, OWN), name="lee",
                  last=frames.dhcp(OTHER)) == [True, False]


def test_filters_of_domains_that_ended_without_a_daemon_are_removed(host):
    bridge(host)
    host.start()
    tap = card(host, filter="clean-traffic")
    pid = host.domain("web")["pid"]
    host.kill()
    os.kill(pid, signal.SIGKILL)
    host.eventually(lambda: tap not in host.run("ip", "-br", "link"), "the tap's end")
    host.eventually(lambda: not start_time_of(pid), "the domain's end")
    host.start()
    assert host.run("nft", "list", "ruleset") == ""
    assert host.states() == {"web": "shut off"}


@needs_rates
def test_rates(host):
    bridge(host)
    host.start()
    tap = card(host, in_average=1000, in_peak=2000, in_burst=100, out_average=500)
    assert "class htb 1:1 root prio 0 rate 8Mbit ceil 16Mbit burst 100Kb" in host.run("tc", "class", "show", "dev", tap)
    assert "rate 4Mbit burst 500Kb mtu 128Kb" in host.run("tc", "filter", "show", "dev", tap, "parent", "ffff:")
    host.run("tc", "qdisc", "del", "dev", tap, "root")
    with host.client() as client:
        client.post("/v1/daemon/reload")
    host.eventually(lambda: "rate 8Mbit" in host.run("tc", "class", "show", "dev", tap), "the rates")


@needs_rates
def test_a_limited_guest_does_not_exceed_its_rate(host):
    """The kernel's word: of a megabyte sent at once, the policer lets through its burst and what the rate gives meanwhile."""
    bridge(host)
    host.start()
    tap = card(host, out_average=8, out_burst=128)
    frame = frames.udp4(MAC, OWN, payload=bytes(1400))
    begun = time.monotonic()
    host.told("web", "test_frames", card=0, frames=[frame.hex()] * 700)
    allowed = (128 + 8 * (time.monotonic() - begun)) * 1024 / len(frame)
    dropped = int(host.run("tc", "-s", "filter", "show", "dev", tap, "parent", "ffff:").split("dropped ")[1].split(",")[0])
    assert dropped > 700 - 2 * allowed


@needs_vlans
def test_a_vlan(host):
    bridge(host, "br0", "vlan_filtering", "1")
    bridge(host, "br1")
    host.start()
    tap = card(host, vlan=20)
    vlans = json.loads(host.run("bridge", "-json", "vlan", "show", "dev", tap))[0]["vlans"]
    assert vlans == [{"vlan": 20, "flags": ["PVID", "Egress Untagged"]}]
    trunk, plain = host.plug("br0", "g0"), host.plug("br0", "g1")
    host.run("bridge", "vlan", "add", "dev", "g0", "vid", "20")
    host.run("bridge", "vlan", "add", "dev", "g1", "vid", "20", "pvid", "untagged")
    watcher = frames.Watcher(plain)
    assert passes(host, watcher, frames.udp4(MAC, OWN)) == [True]
    assert trunk
    with pytest.raises(errors.HostError, match=r"Cannot put interface 0 into VLAN 20: bridge 'br1' does not filter VLANs") as caught:
        card(host, "other", OTHER, vlan=20, source="br1")
    assert caught.value.hint == "ip link set br1 type bridge vlan_filtering 1"
    assert "vnet1" not in host.run("ip", "-br", "link")


@needs_vlans
def test_a_bridge_that_is_made_anew_gets_its_guests_back(host):
    bridge(host, "br0", "vlan_filtering", "1")
    host.options = ["--heartbeat", "3600"]              # by the kernel's word alone
    host.start()
    tap, other = card(host, vlan=20), card(host, "two", OTHER)
    host.run("ip", "link", "delete", "br0")
    assert not is_in(host, tap, "br0")
    bridge(host, "br1")
    host.run("ip", "link", "set", other, "master", "br1")       # an administrator's decision
    bridge(host, "br0", "vlan_filtering", "1")
    host.eventually(lambda: is_in(host, tap, "br0"), "the guest in its bridge")
    host.eventually(lambda: '"vlan":20' in host.run("bridge", "-json", "vlan", "show", "dev", tap), "its VLAN")
    assert is_in(host, other, "br1")
    assert host.domain("web")["state"] == "running"


def test_a_tap_has_its_bridges_mtu_and_goes_with_its_guest(host):
    bridge(host)
    host.run("ip", "link", "set", "br0", "mtu", "1400")
    host.start()
    before = host.traces()
    tap = card(host)
    link = json.loads(host.run("ip", "-json", "link", "show", tap))[0]
    assert (link["mtu"], link["address"], link["master"]) == (1400, "fe" + MAC[2:], "br0")
    host.post("web", "destroy")
    host.eventually(lambda: host.traces() == before, "a host as it was")


def test_a_taps_name_means_no_other_card_of_the_file(host):
    """One that was attached to the running domain alone and one of the file alone have one index."""
    bridge(host)
    host.start()
    card(host)
    new = {"type": "bridge", "source": "br0"}
    tap = host.post("web", "interfaces", settings={**new, "mac": OTHER}, live=True)["interface"]["target"]
    third = host.post("web", "interfaces", settings={**new, "mac": THIRD, "target": "lan7"}, config=True)["interface"]
    assert (tap, third["index"], third["target"]) == ("vnet1", 1, "lan7")
    both, file = {"live": True, "config": True}, {"config": True}
    for verb, more in ("detach", both), ("detach", {"persistent": True}), ("detach", file), ("update", both), ("update", file):
        settings = {"settings": {"link": "down"}} if verb == "update" else {}
        with pytest.raises(errors.UsageError, match="in the domain's file"):
            host.post("web", "interfaces", verb, interface=tap, **settings, **more)
    text = host.file("web").read_text()
    assert THIRD in text and "link" not in text and is_in(host, tap, "br0")
    host.post("web", "interfaces", settings={**new, "mac": OTHER}, config=True)
    host.post("web", "interfaces", "update", interface=tap, settings={"link": "down"}, **both)
    assert "link = down" in host.file("web").read_text().partition(OTHER)[2].splitlines()
    host.post("web", "interfaces", "detach", interface=tap, config=True)
    text = host.file("web").read_text()
    assert MAC in text and THIRD in text and OTHER not in text


def test_what_stands_in_a_cards_way_is_named(host):
    bridge(host)
    bridge(host, "lan0")
    host.run("ip", "link", "add", "taken", "type", "bridge")
    host.start()
    before = host.traces()
    with pytest.raises(errors.NameInUse, match="Cannot make interface 0's tap 'taken': there is a device of this name"):
        card(host, target="taken")
    with pytest.raises(errors.HostError, match="Cannot connect interface 0 to bridge 'br7': there is no such bridge") as caught:
        card(host, source="br7")
    assert "bridges here: br0, lan0, taken; " in caught.value.hint and "ip link add br7 type bridge" in caught.value.hint
    with pytest.raises(errors.HostError, match="'lo': that device is no bridge"):
        card(host, source="lo")
    assert host.traces() == before and host.states() == {"web": "shut off"}


TWO_HUNDRED = """
import os
from kvmapp.config import InterfaceConfig
from kvmapp.daemon.taps import open_tap
for number in range(200):
    tap = open_tap(InterfaceConfig(index=0, type="bridge", source="br0", mac=f"52:54:00:00:00:{number:02x}"), "br0")
    assert os.listdir("/sys/class/net/br0/brif") == [tap.name] == ["vnet0"], tap.name
    tap.close()
"""


@pytest.mark.timeout(900)
def test_two_hundred_interfaces_in_turn(host):
    bridge(host)
    before = host.traces()
    host.run("timeout", "800", sys.executable, "-c", TWO_HUNDRED, timeout=900)
    assert host.traces() == before


def test_without_nft_a_filter_says_what_it_takes(monkeypatch):
    from kvmapp.daemon import cardfilter, hostnet
    monkeypatch.setattr(hostnet, "SEARCH", "/nowhere")
    with pytest.raises(errors.HostError, match="Cannot filter interface 0's tap 'vnet0': the program 'nft' is not installed") as caught:
        cardfilter.apply("interface 0", "vnet0", MAC, [OWN], False, new=True)
    assert "it takes nftables" in caught.value.hint and "filter = none" in caught.value.hint


def test_names_that_no_rule_can_bear(host):
    bridge(host)
    host.start()
    with pytest.raises(errors.HostError, match="Cannot use tap 'a'b' for interface 0 with filter"):
        card(host, filter="clean-traffic", target="a'b")
    assert "a'b" not in host.run("ip", "-br", "link")
