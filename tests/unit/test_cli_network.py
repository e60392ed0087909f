"""The net-* verbs, domifaddr and domifstat: what they ask the daemon for, and virsh's words and columns."""
import time

import pytest

from kvmapp.errors import NetworkInactive
from tests.unit.canned_daemon import UUID, CannedDaemon, domain, stats


def network(name, state="active", **more):
    active = state == "active"
    return {"name": name, "uuid": f"{UUID}0", "state": state, "text": None, "active": active, "persistent": True, "autostart": active,
            "mode": "nat", "bridge": "virbr0" if active else None, "ipv4": "192.168.122.1/24", "ipv6": None,
            "since": 1.0 if active else None, "dnsmasq": 7 if active else None, "file": f"/etc/kvmapp/networks/{name}.conf",
            "warnings": [], **more}


@pytest.fixture
def daemon(tmp_path):
    with CannedDaemon(tmp_path) as canned:
        canned.add(domain("linuxvm01", 1))
        canned.answers["GET", "/v1/networks"] = {"networks": [
            network("default"), network("lab", "inactive"), network("bad", "broken", text="bad.conf:2: unknown key")]}
        yield canned


LISTS = {
    "net-list": " Name      State    Autostart   Persistent\n--------------------------------------------\n"
                " default   active   yes         yes\n\n",
    "net-list --inactive --name": "lab\nbad\n\n",
    "net-list --all --no-autostart --name": "lab\nbad\n\n",
    "net-list --transient --name": "\n",
    "net-list --uuid": f"{UUID}0\n\n",
}


@pytest.mark.parametrize("line", LISTS)
def test_net_list(ctl, line):
    assert ctl(line) == (0, LISTS[line], "")


def test_a_broken_file_is_listed_with_the_reason(ctl):
    assert " bad       broken (bad.conf:2: unknown key)   no          yes\n" in ctl("net-list", "--all")[1]


def test_net_info(daemon, ctl):
    daemon.answers["GET", "/v1/networks/default"] = network("default")
    assert ctl("net-info", "default") == (0, (
        f"Name:           default\nUUID:           {UUID}0\nActive:         yes\nPersistent:     yes\nAutostart:      yes\n"
        "Bridge:         virbr0\nMode:           nat\nIPv4:           192.168.122.1/24\n\n"), "")
    assert ctl("net-name", "default")[1] == "default\n\n" and ctl("net-uuid", "default")[1] == f"{UUID}0\n\n"


SAID = {
    "net-start default": ("Network default started", "start", {}),
    "net-destroy default": ("Network default destroyed", "destroy", {}),
    "net-autostart default": ("Network default marked as autostarted", "autostart", {"enabled": True}),
    "net-autostart default --disable": ("Network default unmarked as autostarted", "autostart", {"enabled": False}),
    "net-update default add host web mac=52:54:00:7f:0d:cb ipv4=192.168.122.10": (
        "Updated network default persistent config and live state", "update",
        {"command": "add", "section": "host", "name": "web", "settings": {"mac": "52:54:00:7f:0d:cb", "ipv4": "192.168.122.10"}}),
    "net-update default delete forward http --config": (
        "Updated network default persistent config", "update",
        {"command": "delete", "section": "forward", "name": "http", "settings": {}, "config": True}),
    "net-update default delete forward http --live": (
        "Updated network default live state", "update",
        {"command": "delete", "section": "forward", "name": "http", "settings": {}, "live": True}),
}


@pytest.mark.parametrize("line", SAID)
def test_verbs(daemon, ctl, line):
    words, verb, body = SAID[line]
    daemon.answers["POST", f"/v1/networks/default/{verb}"] = {"network": network("default"), "warnings": []}
    assert ctl(line) == (0, f"{words}\n\n", "")
    assert daemon.requests[-1] == ("POST", f"/v1/networks/default/{verb}", body)


def test_net_update_wants_key_and_value(ctl):
    status, _, error = ctl("net-update", "default", "add", "host", "web", "mac")
    assert status == 1 and "'mac' is not key=value" in error


def test_refusals_come_with_a_hint(daemon, ctl):
    daemon.answers["POST", "/v1/domains/linuxvm01/start"] = NetworkInactive(
        "Requested operation is not valid: network 'default' is not active", "kvmappctl net-start default")
    status, _, error = ctl("start", "linuxvm01")
    assert status == 1 and error.endswith("error: Requested operation is not valid: network 'default' is not active\n"
                                          "hint: kvmappctl net-start default\n")


def test_files(daemon, ctl, tmp_path, monkeypatch):
    path = tmp_path / "lab.conf"
    path.write_text("name = lab\nmode = isolated\n")
    daemon.answers["POST", "/v1/networks"] = {"network": network("lab", "inactive"), "created": True, "made": ["uuid"], "warnings": []}
    assert ctl("net-define", str(path)) == (0, f"Network lab defined from {path}\n\n", "made: uuid\n")
    daemon.answers["GET", "/v1/networks/lab/config"] = {"text": "name = lab\n", "file": None, "config": {}, "digest": "d"}
    assert ctl("net-dumpconf", "lab") == (0, "name = lab\n\n", "")
    assert ctl("net-dumpxml", "lab")[:2] == (0, "name = lab\n\n")
    monkeypatch.setenv("VISUAL", "sed -i s/lab/lub/")
    daemon.answers["PUT", "/v1/networks/lab/config"] = {"network": network("lab"), "created": False, "made": [], "warnings": []}
    assert ctl("net-edit", "lab") == (0, "Network lab configuration edited.\n\n", "")
    assert daemon.requests[-1][2] == {"text": "name = lub\n", "digest": "d"}
    monkeypatch.setenv("VISUAL", "true")
    assert ctl("net-edit", "lab") == (0, "Network lab configuration not changed.\n\n", "")
    daemon.answers["DELETE", "/v1/networks/lab"] = {"name": "lab", "still_active": True, "warnings": []}
    assert ctl("net-undefine", "lab") == (0, "Network lab has been undefined\nit is still active, and gone when it is destroyed\n\n", "")


def test_leases(daemon, ctl, monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    daemon.answers["GET", "/v1/networks/default/leases"] = {"leases": [
        {"expires": 0x70000000, "mac": "52:54:00:00:00:01", "protocol": "ipv4", "address": "192.168.122.27", "prefix": 24,
         "hostname": "ann", "client": "01:52:54:00:00:00:01"},
        {"expires": None, "mac": None, "protocol": "ipv6", "address": "fd00::1", "prefix": 64, "hostname": None, "client": None}]}
    time.tzset()
    lines = ctl("net-dhcp-leases", "default", "--mac", "52:54:00:00:00:01")[1].splitlines()
    assert lines[0] == " Expiry Time           MAC address         Protocol   IP address          Hostname   Client ID or DUID"
    assert lines[2:] == [" 2029-07-18 05:49:52   52:54:00:00:00:01   ipv4       192.168.122.27/24   ann        01:52:54:00:00:00:01",
                         " never                 -                   ipv6       fd00::1/64          -          -", ""]
    assert daemon.requests[-1][2] == {"mac": "52:54:00:00:00:01"}


def test_domifaddr(daemon, ctl):
    one = {"interface": "vnet0", "mac": "52:54:00:00:00:01", "protocol": "ipv4", "address": "192.168.122.27", "prefix": 24}
    daemon.answers["GET", "/v1/domains/linuxvm01/addresses"] = {"addresses": [
        one, {**one, "protocol": "ipv6", "address": "fd00::1", "prefix": 64}]}
    out = ctl("domifaddr", "linuxvm01")[1]
    assert out.splitlines() == [
        " Name       MAC address          Protocol     Address", "-" * 79,
        " vnet0      52:54:00:00:00:01    ipv4         192.168.122.27/24",
        " -          -                    ipv6         fd00::1/64", ""]
    assert ctl("domifaddr", "linuxvm01", "--full")[1].count("vnet0") == 2
    assert "vnet" not in ctl("domifaddr", "linuxvm01", "--interface", "vnet7")[1]


def test_domifstat(daemon, ctl):
    card = {"index": 0, "target": "vnet0", "mac": "52:54:00:00:00:01", "rx_bytes": 1, "rx_packets": 2, "rx_drop": 3, "tx_bytes": 4,
            "tx_packets": 5, "tx_drop": 6}
    daemon.answers["GET", "/v1/domains/linuxvm01/stats"] = stats("linuxvm01", interfaces=[card])
    expected = "vnet0 rx_bytes 1\nvnet0 rx_packets 2\nvnet0 rx_drop 3\nvnet0 tx_bytes 4\nvnet0 tx_packets 5\nvnet0 tx_drop 6\n\n"
    assert ctl("domifstat", "linuxvm01", "vnet0") == (0, expected, "")
    assert ctl("domifstat", "linuxvm01", "52:54:00:00:00:01")[1] == expected
    status, _, error = ctl("domifstat", "linuxvm01", "vnet9")
    assert status == 1 and "invalid path, 'vnet9' is not a known interface" in error and "it has vnet0" in error
