"""What a filter tells nft, and what rates tell tc: texts, without a host that changes."""
from types import SimpleNamespace
from typing import Any

import pytest

from kvmapp.daemon import cardfilter, ports, shaping
from kvmapp.errors import HostError

MAC = "52:54:00:7f:0d:cb"


def rules(chain, text):
    return [line for line in text.partition(f"chain {chain} {{\n")[2].partition("}\nchain")[0].splitlines() if line != "}"]


def test_addresses_made_of_a_mac():
    assert cardfilter.interface_id(MAC) == "::5054:ff:fe7f:dcb"
    assert cardfilter.interface_id("02:00:00:00:00:01") == "::ff:fe00:1"


def test_named_addresses_and_no_others():
    text = cardfilter.nft_text("vnet0", MAC, ["192.0.2.1", "fd00::1"], False, new=False)
    assert text.startswith("table netdev kvmapp-vnet0\ndelete table netdev kvmapp-vnet0\n") and "learned" not in text
    assert rules("from_arp", text) == [f"arp saddr ether != {MAC} drop", "arp operation request arp saddr ip 0.0.0.0 accept",
                                       "arp saddr ip { 192.0.2.1 } accept"]
    assert rules("from_ipv4", text) == ["udp sport 67 drop", "ip frag-off & 0x3fff != 0 udp dport 67 drop",
                                        "udp sport 68 udp dport 67 @th,288,48 0x5254007f0dcb accept", "udp dport 67 drop",
                                        "ip saddr { 192.0.2.1 } accept"]
    assert "@th,64,128 0xfd000000000000000000000000000001 return" in text


def test_what_is_learned_stays_when_the_rules_are_made_anew_for_the_same_tap():
    text = cardfilter.nft_text("vnet0", MAC, [], True, new=False)
    assert "\nflush table netdev kvmapp-vnet0\n" in text and "delete" not in text
    assert "add @learned { ip saddr } accept" in rules("from_ipv4", text)
    assert "\ndelete table netdev kvmapp-vnet0\n" in cardfilter.nft_text("vnet0", MAC, [], True, new=True)


def card(**rates):
    return SimpleNamespace(heading="interface 0", **{**dict.fromkeys(shaping.RATES), **rates})


@pytest.mark.parametrize(("rates", "words"), [
    ({"in_average": 1000}, ["qdisc add dev t root handle 1: htb default 1", "class add dev t parent 1: classid 1:1 htb rate 1000kbps"]),
    ({"in_average": 1, "in_peak": 2, "in_burst": 3}, ["rate 1kbps ceil 2kbps burst 3kb"]),
    ({"out_average": 500}, ["qdisc add dev t ingress", "police rate 500kbps burst 500kb mtu 128kb drop"]),
    ({"out_average": 5, "out_peak": 9, "out_burst": 7}, ["police rate 5kbps burst 128kb mtu 128kb peakrate 9kbps drop"]), ({}, [])])
def test_rates(rates, words):
    lines = shaping.to_guest(card(**rates), "t") + shaping.from_guest(card(**rates), "t")
    assert bool(lines) == bool(words) and all(any(one in line for line in lines) for one in words)


@pytest.mark.parametrize("filters", [False, True])
def test_a_port_that_cannot_have_its_vlan_is_not_put_back(monkeypatch, filters):
    """Into a bridge that was made anew: it would be in that one's own VLAN."""
    port = Port(monkeypatch, filters, HostError("no VLAN"))
    with pytest.raises(HostError):
        ports.put_back(vlan_card(), "vnet0", "br0")
    assert port.bridge is None and port.up and port.leaked == []


def test_a_port_carries_nothing_until_it_has_its_vlan(monkeypatch):
    port = Port(monkeypatch, True, None)
    ports.put_back(vlan_card(), "vnet0", "br0")
    assert (port.bridge, port.up, port.vlan, port.leaked) == ("br0", True, 20, [])


def vlan_card() -> Any:
    return SimpleNamespace(heading="interface 0", vlan=20)


class Port:
    """vnet0, as `ip` and `bridge` change it. `leaked`: what was said when it was up in a bridge without its VLAN."""

    def __init__(self, monkeypatch, filters, failure):
        self.bridge: str | None = None
        self.up, self.vlan, self.failure = True, 1, failure
        self.leaked: list[list[str]] = []
        monkeypatch.setattr(ports, "filters_vlans", lambda bridge: filters)
        monkeypatch.setattr(ports, "ask", lambda words, what: [{"vlans": [{"vlan": self.vlan}]}])
        monkeypatch.setattr(ports, "run", self.run)

    def run(self, words, what):
        match words:
            case ["ip", "link", "set", "dev", "vnet0", "up" | "down" as word]:
                self.up = word == "up"
            case ["ip", "link", "set", "dev", "vnet0", "nomaster"]:
                self.bridge = None
            case ["ip", "link", "set", "dev", "vnet0", "master", bridge]:
                self.bridge = bridge
            case ["bridge", "vlan", "add", "dev", "vnet0", "vid", "20", "pvid", "untagged"]:
                if self.failure:
                    raise self.failure
                self.vlan = 20
            case _:
                assert words[:3] == ["bridge", "vlan", "del"]
        if self.bridge and self.up and self.vlan != 20:
            self.leaked.append(words)
        return ""
