"""attach-interface, detach-interface, domif-setlink, domif-getlink, domiftune: what they ask the daemon for, and virsh's words."""
import pytest

from kvmapp.daemon import shapes
from kvmapp.errors import HostError
from tests.unit.canned_daemon import CannedDaemon, config_answer, domain

MAC = "aa:bb:cc:dd:ee:01"
URL = "/v1/domains/linuxvm01/interfaces"
CARD = {"index": 0, "mac": MAC, "link": "down", "in_average": 1000, "in_peak": 2000, "in_burst": None, "out_average": None,
        "out_peak": None, "out_burst": None}


@pytest.fixture
def daemon(tmp_path):
    with CannedDaemon(tmp_path) as canned:
        one = domain("linuxvm01", 1)
        canned.add(one)
        summary = {key: one[key] for key in shapes.DOMAIN["properties"]}
        for what in ("", "/detach", "/update"):
            canned.answers["POST", URL + what] = {"domain": summary, "interface": one["interfaces"][0], "warnings": []}
        canned.answers["GET", "/v1/domains/linuxvm01/config"] = config_answer(interfaces=[CARD])
        yield canned


ATTACHED, DETACHED = "Interface attached successfully\n\n", "Interface detached successfully\n\n"
UPDATED = "Device updated successfully\n\n"
SAID = {
    "attach-interface linuxvm01 bridge br0": (ATTACHED, "", {"settings": {"type": "bridge", "source": "br0"}}),
    f"attach-interface linuxvm01 network default --mac {MAC} --model virtio --target tap7 --persistent": (
        ATTACHED, "", {"settings": {"type": "network", "source": "default", "mac": MAC, "model": "virtio", "target": "tap7"},
                       "persistent": True}),
    "attach-interface linuxvm01 user --live": (ATTACHED, "", {"settings": {"type": "user"}, "live": True}),
    "attach-interface --domain linuxvm01 --type bridge --source br0 --config --inbound 100,200,50 --outbound 80": (
        ATTACHED, "", {"settings": {"type": "bridge", "source": "br0", "in_average": "100", "in_peak": "200", "in_burst": "50",
                                    "out_average": "80"}, "config": True}),
    f"detach-interface linuxvm01 bridge --mac {MAC} --config --live": (
        DETACHED, "/detach", {"type": "bridge", "interface": MAC, "live": True, "config": True}),
    "detach-interface linuxvm01 network": (DETACHED, "/detach", {"type": "network"}),
    "domif-setlink linuxvm01 vnet0 down": (UPDATED, "/update", {"interface": "vnet0", "settings": {"link": "down"}}),
    f"domif-setlink linuxvm01 {MAC} up --config": (UPDATED, "/update", {"interface": MAC, "settings": {"link": "up"}, "config": True}),
    "domiftune linuxvm01 vnet0 --inbound 1000,2000 --live": (
        "\n", "/update", {"interface": "vnet0", "settings": {"in_average": "1000", "in_peak": "2000", "in_burst": ""}, "live": True}),
    "domiftune linuxvm01 vnet0 --outbound 0": (
        "\n", "/update", {"interface": "vnet0", "settings": {"out_average": "", "out_peak": "", "out_burst": ""}}),
}


@pytest.mark.parametrize("line", SAID)
def test_what_is_said_and_asked(daemon, ctl, line):
    words, where, body = SAID[line]
    assert ctl(*line.split()) == (0, words, "")
    assert daemon.requests[-1] == ("POST", URL + where, body)


def test_what_holds(ctl):
    assert ctl("domif-getlink", "linuxvm01", "vnet0") == (0, "vnet0 down\n\n", "")
    assert ctl("domiftune", "linuxvm01", MAC) == (0, (
        "inbound.average: 1000\ninbound.peak   : 2000\ninbound.burst  : 0\ninbound.floor  : 0\noutbound.average: 0\noutbound.peak  : 0\n"
        "outbound.burst : 0\n\n"), "")


@pytest.mark.parametrize(("line", "words"), [
    ("domif-getlink linuxvm01 vnet7", "Interface (dev: vnet7) not found."),
    ("domiftune linuxvm01 52:54:00:00:00:99", "Interface (mac: 52:54:00:00:00:99) not found."),
    ("domiftune linuxvm01 vnet0 --inbound fast", "--inbound fast: expected AVERAGE[,PEAK[,BURST]]"),
    ("domiftune linuxvm01 vnet0 --inbound 1,2,3,4", "a floor is not kept here"),
    ("attach-interface linuxvm01 pigeon br0", "pigeon"),
    ("attach-interface linuxvm01 bridge br0 --live --current", "mutually exclusive"),
    ("domif-setlink linuxvm01 vnet0 sideways", "sideways")])
def test_bad_words(daemon, ctl, line, words):
    asked = len([one for one in daemon.requests if one[0] == "POST"])
    status, _, said = ctl(*line.split())
    assert status == 1 and words in said
    assert len([one for one in daemon.requests if one[0] == "POST"]) == asked


def test_a_refusal_says_what_was_tried(daemon, ctl):
    daemon.answers["POST", URL + "/detach"] = HostError("the guest is away")
    assert ctl("detach-interface", "linuxvm01", "user")[2] == "error: Failed to detach interface\nerror: the guest is away\n"
