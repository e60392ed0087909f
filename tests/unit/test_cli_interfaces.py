"""The iface-* verbs: what they ask the daemon for, and virsh's words and columns."""
import pytest

from tests.unit.canned_daemon import CannedDaemon


def interface(name, mac, active=True, **more):
    return {"name": name, "mac": mac, "active": active, "mtu": 1500, "type": "ether", "bridge": None, "ports": [], "addresses": [], **more}


@pytest.fixture
def daemon(tmp_path):
    with CannedDaemon(tmp_path) as canned:
        canned.answers["GET", "/v1/interfaces"] = {"interfaces": [
            interface("br0", "52:54:00:00:00:0a", type="bridge", ports=["eth1"], addresses=["192.0.2.2/24"]),
            interface("eth0", "52:54:00:00:00:01", addresses=["203.0.113.2/24"]), interface("eth7", "52:54:00:00:00:07", active=False),
            interface("lo", "00:00:00:00:00:00", type="loopback")]}
        for path in ("eth0/bridge", "br0/unbridge"):
            canned.answers["POST", f"/v1/interfaces/{path}"] = {"bridge": "br0", "device": "eth0", "timeout": 30, "warnings": ["mind"]}
        for path in ("confirm", "undo"):
            canned.answers["POST", f"/v1/interfaces/{path}"] = {"what": "bridge br0 with eth0 in it"}
        yield canned


def test_the_list_has_virshs_columns(ctl):
    assert ctl("iface-list") == (0, (
        " Name   State    MAC Address\n------------------------------------\n br0    active   52:54:00:00:00:0a\n"
        " eth0   active   52:54:00:00:00:01\n lo     active   00:00:00:00:00:00\n\n"), "")
    assert "eth7" in ctl("iface-list --all")[1] and "eth0" in ctl("iface-list --all")[1]
    assert ctl("iface-list --inactive")[1].count("inactive") == 1


def test_one_of_them(ctl):
    assert ctl("iface-name 52:54:00:00:00:01")[1] == "eth0\n\n" and ctl("iface-mac eth0")[1] == "52:54:00:00:00:01\n\n"
    assert ctl("iface-dumpconf br0")[1] == (
        "name = br0\ntype = bridge\nmac = 52:54:00:00:00:0a\nmtu = 1500\nstate = active\nports = eth1\naddresses = 192.0.2.2/24\n\n")
    assert ctl("iface-mac eth9") == (1, "\n", "error: failed to get interface 'eth9'\nhint: there are: br0, eth0, eth7, lo\n")


SAID = {
    "iface-bridge eth0 br0": ("Created bridge br0 with attached device eth0\nBridge interface br0 started\n\n",
                              "eth0/bridge", {"bridge": "br0"}),
    "iface-bridge 52:54:00:00:00:01 br0 --timeout 60 --no-stp": (
        "Created bridge br0 with attached device eth0\nBridge interface br0 started\n\n", "eth0/bridge", {"bridge": "br0", "timeout": 60}),
    "iface-unbridge br0": ("Device eth0 un-attached from bridge br0\nInterface eth0 started\n\n", "br0/unbridge", {}),
}


@pytest.mark.parametrize("line", SAID)
def test_bridges(daemon, ctl, line):
    words, where, body = SAID[line]
    status, said, noted = ctl(line)
    assert (status, said) == (0, words) and "undone in 30 s unless you say: kvmappctl iface-bridge --confirm" in noted
    assert "warning: mind" in noted and daemon.requests[-1] == ("POST", f"/v1/interfaces/{where}", body)


def test_confirming(ctl):
    assert ctl("iface-bridge --confirm") == (0, "Kept: bridge br0 with eth0 in it\n\n", "")
    assert ctl("iface-bridge --undo") == (0, "Undone: bridge br0 with eth0 in it\n\n", "")
    assert ctl("iface-bridge eth0")[0] == 1 and ctl("iface-bridge --confirm --undo")[0] == 1
