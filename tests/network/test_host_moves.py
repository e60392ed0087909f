"""What hostbridge.py's steps leave of a device's addresses and routes: a tap stands for the host's card, in a network namespace."""
import json
import sys

import pytest

from tests.network import namespaces

REASON = namespaces.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
# A tap is no card of the host: what says so is hidden from `bridging`.
MOVES = """
import json, subprocess, sys
from kvmapp.daemon import hostbridge
from kvmapp.errors import KvmappError

def shown(device):
    words = [["ip", "-4", "route", "show", "dev", device], ["ip", "-6", "route", "show", "dev", device, "scope", "global"],
             ["ip", "address", "show", "dev", device, "scope", "global"]]
    lines = [line for one in words for line in subprocess.check_output(one, text=True).splitlines()]
    bare = [hostbridge.re.sub(r"(mtu) lock|expires \\d+sec|lock", r"\\1", line) for line in lines if " link/" not in line]
    return sorted(" ".join(line.split()) for line in bare if "qdisc" not in line and "valid_lft" not in line)

def heeds(device):
    return open(f"/proc/sys/net/ipv6/conf/{device}/accept_ra").read().strip()

def said(work):
    try:
        work()
    except KvmappError as error:
        return str(error)

real, hostbridge.NET = hostbridge.NET, "/nowhere"
found = {}
if "multipath" in sys.argv:
    found["refusal"] = said(lambda: hostbridge.bridging("t0", "br0"))
else:
    found["before"] = shown("t0")
    move = hostbridge.bridging("t0", "br0")
    hostbridge.take(move.steps, "try")
    found["bridge"], found["heeds"], found["left"] = shown("br0"), heeds("br0"), shown("t0")
    found["missing"] = [len(hostbridge.missing("t0", move.before)), len(move.before)]
    hostbridge.take(move.undo, "undo", force=True)
    found["after"], found["missing after"] = shown("t0"), hostbridge.missing("t0", move.before)
    hostbridge.take(hostbridge.bridging("t0", "br0").steps, "try")
    hostbridge.NET = real
    subprocess.check_call(["ip", "link", "set", "br0", "type", "bridge", "stp_state", "1", "forward_delay", "300"])
    open("/proc/sys/net/ipv6/conf/t0/accept_ra", "w").write("0")
    _, move = hostbridge.unbridging("br0")
    hostbridge.take(move.steps, "try")
    found["out"], found["heeds out"] = shown("t0"), heeds("t0")
    hostbridge.take(move.undo, "undo", force=True)
    found["in"], found["heeds in"] = shown("br0"), [heeds("br0"), heeds("t0")]
    found["settings"] = [hostbridge.setting("br0", key) for key in ("stp_state", "forward_delay")]
print(json.dumps(found))
"""


@pytest.fixture
def place():
    one = namespaces.Namespace()
    for name in ("t0", "t1"):
        one.run("ip", "tuntap", "add", name, "mode", "tap")
        one.run("ip", "link", "set", name, "up")
    yield one
    one.delete()


def moved(place, *words):
    return json.loads(place.run(sys.executable, "-c", MOVES, *words))


def test_everything_goes_along_and_comes_back(place):
    """An address with a peer, by which the default route goes; metrics of routes; what a router advertised."""
    place.run("sysctl", "-w", "net.ipv6.conf.t0.accept_ra=2")
    for words in ("address add 203.0.113.2 peer 203.0.113.1/32 dev t0", "address add fd00::2/64 dev t0 nodad",
                  "address add fd55::2/64 dev t0 nodad valid_lft 3600 preferred_lft 1800",
                  "route add default via 203.0.113.1 dev t0 metric 50 mtu 1400 initcwnd 20 rto_min 300ms",
                  "route add 198.51.100.0/24 via 203.0.113.1 advmss 1200 quickack 1 features ecn",
                  "-6 route add default via fe80::1 dev t0 proto ra metric 1024 expires 1800 pref high"):
        place.run("ip", *words.split())
    found = moved(place)
    before = found["before"]
    assert sum("default via" in line for line in before) == 2 and any("initcwnd 20" in line for line in before)
    assert [line.replace("br0", "t0") for line in found["bridge"]] == before and found["heeds"] == "2"
    assert found["left"] == [] and found["missing"] == [6, 6]
    assert (found["after"], found["missing after"]) == (before, [])
    assert (found["out"], found["heeds out"]) == (before, "2")
    assert [line.replace("br0", "t0") for line in found["in"]] == before and found["heeds in"] == ["2", "0"]
    assert found["settings"] == ["1", "300"]


@pytest.mark.parametrize(("addresses", "target", "gateways"), [
    (("10.0.0.2/24", "10.0.1.2/24"), "192.0.2.0/24", ("10.0.0.1", "10.0.1.1")),
    (("fd00::2/64", "fd01::2/64"), "fd09::/64", ("fd00::1", "fd01::1"))])
def test_a_device_of_a_multipath_route_stays(place, addresses, target, gateways):
    hops = []
    for name, address, gateway in zip(("t0", "t1"), addresses, gateways, strict=True):
        place.run("ip", "address", "add", address, "dev", name)
        hops += ["nexthop", "via", gateway, "dev", name]
    place.run("ip", "route", "add", target, *hops)
    assert moved(place, "multipath")["refusal"].startswith(
        f"Cannot put 't0' into bridge 'br0': the route to {target} has several next hops, one of them by t0")
