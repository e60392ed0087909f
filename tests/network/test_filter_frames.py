"""Which frames a filter lets through, by two taps of one bridge in a network namespace: no other kind of device is needed."""
import json
import sys

import pytest

from tests.network import frames, namespaces
from tests.network.test_cards import FOREIGN, HONEST, MAC, OWN, SPOOFED

REASON = namespaces.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
# One frame at a time, and a last one that comes through.
SENDER = """
import json, os, select, subprocess, sys
from kvmapp.daemon import cardfilter, taps
from tests.network.frames import bare
given = json.load(sys.stdin)
subprocess.check_call(["ip", "link", "add", "br0", "type", "bridge", "mcast_snooping", "0", "forward_delay", "0"])
guest, other = taps.open_tun(), taps.open_tun()
for fd, name in ((guest, "t0"), (other, "t1")):
    taps.attach(fd, name, 0)
    subprocess.check_call(["ip", "link", "set", name, "master", "br0", "up"])
subprocess.check_call(["ip", "link", "set", "br0", "up"])
cardfilter.apply("interface 0", "t0", given["mac"], given["known"], given["learns"], new=True)
def came():
    select.select([other], [], [], 60)
    return bare(os.read(other, 65536)[10:]).hex()
found = []
for frame in given["frames"]:
    for one in (frame, given["last"]):
        os.write(guest, bytes(10) + bytes.fromhex(one))
    seen = set()
    while (one := came()) != bare(bytes.fromhex(given["last"])).hex():
        seen.add(one)
    found.append(bare(bytes.fromhex(frame)).hex() in seen)
print(json.dumps(found))
"""


@pytest.fixture
def place():
    one = namespaces.Namespace()
    yield one
    one.delete()


def passes(place, *tried, known=(OWN, "fd00::10"), learns=False):
    """Which of these frames of the guest come through."""
    last = frames.dhcp(MAC, kind=8)
    given = {"mac": MAC, "known": known, "learns": learns, "frames": [frame.hex() for frame in tried], "last": last.hex()}
    return json.loads(place.run(sys.executable, "-c", SENDER, input=json.dumps(given)))


def test_honest_and_spoofed_frames(place):
    """Among them what DHCP servers take for a neighbour's word: its MAC in the message, or a fragment that hides it."""
    tried = {**HONEST, **SPOOFED}
    assert dict(zip(tried, passes(place, *tried.values()), strict=True)) == {**dict.fromkeys(HONEST, True), **dict.fromkeys(SPOOFED, False)}


def test_an_address_of_those_without_any_is_not_learned(place):
    """A guest takes it while DHCP does not answer; what it gets then is its own."""
    tried = [frames.arp(MAC, MAC, "169.254.7.7"), frames.udp4(MAC, "169.254.7.7"), frames.udp4(MAC, OWN), frames.udp4(MAC, FOREIGN)]
    assert passes(place, *tried, known=[], learns=True) == [False, False, True, False]
