"""iface-bridge and iface-unbridge on a host in a network namespace, with a session to its outside that must not end."""
import json
import os
import sys

import pytest

from kvmapp import errors
from tests.network import namespaces

REASON = namespaces.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
# A session: the outside says a number, the host answers with the next one.
SERVER = ("import socket; s = socket.create_server(('', 22)); print('ready', flush=True); c = s.accept()[0]\n"
          "for line in c.makefile(): c.sendall(b'%d\\n' % (int(line) + 1))")
CLIENT = ("import socket, sys; c = socket.create_connection(('203.0.113.2', 22), 60); f = c.makefile()\n"
          "for line in sys.stdin: c.sendall(line.encode()); print(f.readline().strip(), flush=True)")


@pytest.fixture
def host():
    with namespaces.NetworkHost.temporary() as one:
        one.outside()
        one.run("ip", "route", "add", "default", "via", "203.0.113.1", "metric", "100")
        one.run("ip", "route", "add", "198.51.100.0/24", "via", "203.0.113.1")
        one.run("ip", "address", "add", "fd00:9::2/64", "dev", "eth0", "nodad")
        one.run("ip", "-6", "route", "add", "default", "via", "fd00:9::1")
        yield one.start()


class Session:
    def __init__(self, host):
        self.server = host.namespace.popen(sys.executable, "-c", SERVER)
        assert self.server.stdout.readline() == "ready\n"
        self.client = host.others[0].popen(sys.executable, "-c", CLIENT, stdin=-1)
        self.count = 0
        self.goes_on()

    def goes_on(self):
        self.client.stdin.write(f"{self.count}\n")
        self.client.stdin.flush()
        self.count += 1
        assert self.client.stdout.readline() == f"{self.count}\n"


def interface(host, *parts, **body):
    with host.client() as client:
        return client.post("/".join(("/v1/interfaces", *parts)), **body)


def known(host):
    with host.client() as client:
        return {one["name"]: one for one in client.get("/v1/interfaces")["interfaces"]}


def place(host):
    """Where the addresses and routes are."""
    addresses = {link["ifname"]: sorted(one["local"] for one in link["addr_info"] if one["scope"] == "global")
                 for link in json.loads(host.run("ip", "-json", "address"))}
    routes = [sorted((route["dst"], route["dev"], route.get("gateway"), route.get("metric"))
                     for route in json.loads(host.run("ip", family, "-json", "route"))
                     if route["dst"] != "fe80::/64" and not route["dst"].startswith("ff00")) for family in ("-4", "-6")]
    return {name: found for name, found in addresses.items() if found}, json.loads(json.dumps(routes, default=str))


def renamed(before, old, new):
    return json.loads(json.dumps(before).replace(f'"{old}"', f'"{new}"'))


def test_a_device_goes_into_a_bridge_and_out_again_and_the_session_stays(host):
    session, before, links = Session(host), place(host), host.traces()["links"]
    mac = known(host)["eth0"]["mac"]
    answer = interface(host, "eth0", "bridge", bridge="br0")
    assert (answer["bridge"], answer["device"], answer["timeout"]) == ("br0", "eth0", 30)
    session.goes_on()
    assert json.loads(json.dumps(place(host))) == renamed(before, "eth0", "br0")
    assert interface(host, "confirm") == {"what": "bridge br0 with eth0 in it"}
    now = known(host)
    assert (now["br0"]["mac"], now["br0"]["ports"], now["eth0"]["bridge"], now["br0"]["type"]) == (mac, ["eth0"], "br0", "bridge")
    with pytest.raises(errors.KvmappError, match="No change of the host's network waits"):
        interface(host, "confirm")
    guest = host.plug("br0", "g0")
    guest.run("ip", "address", "add", "203.0.113.9/24", "dev", "eth0")
    assert guest.run("busybox", "ping", "-c", "1", "-W", "5", "203.0.113.1", check=False).returncode == 0
    with pytest.raises(errors.HostError, match="Multiple interfaces attached to bridge br0: eth0, g0"):
        interface(host, "br0", "unbridge")
    host.run("ip", "link", "delete", "g0")
    interface(host, "br0", "unbridge")
    session.goes_on()
    interface(host, "confirm")
    session.goes_on()
    assert place(host) == before and host.traces()["links"] == links


def test_what_nobody_confirms_is_undone(host):
    session, before = Session(host), place(host)
    interface(host, "eth0", "bridge", bridge="br0", timeout=1)
    host.eventually(lambda: "br0" not in host.run("ip", "-br", "link"), "the end of the bridge")
    host.eventually(lambda: place(host) == before, "everything as it was")
    session.goes_on()
    host.eventually(lambda: not os.path.exists(os.path.join(host.paths.run, "interfaces.json")), "the end of the note")
    interface(host, "eth0", "bridge", bridge="br0", timeout=3600)
    with pytest.raises(errors.KvmappError, match="Another change of the host's network waits to be confirmed: bridge br0 with eth0"):
        interface(host, "eth0", "bridge", bridge="br1")
    interface(host, "undo")
    assert place(host) == before
    session.goes_on()


def test_a_killed_daemons_change_is_undone_by_the_next_one(host):
    before = place(host)
    interface(host, "eth0", "bridge", bridge="br0", timeout=1)
    host.kill()
    host.start()
    host.eventually(lambda: place(host) == before, "everything as it was")
    host.eventually(lambda: not os.path.exists(os.path.join(host.paths.run, "interfaces.json")), "the end of the note")


def test_a_change_that_fails_in_the_middle_leaves_everything_as_it_was(host, monkeypatch):
    before = place(host)
    from kvmapp.daemon import hostbridge
    monkeypatch.setattr(hostbridge, "ask", lambda words, what: json.loads(host.run(words[0], "-json", *words[1:]) or "[]"))
    monkeypatch.setattr(hostbridge, "run", lambda words, what, text=None: host.run(*words, **({"input": text} if text else {})))
    monkeypatch.setattr(hostbridge, "exists", lambda name: name == "eth0")
    move = hostbridge.bridging("eth0", "br0")
    flush = move.steps.index("address flush dev eth0 scope global")
    hostbridge.take(move.steps[:flush + 1], "try")
    assert place(host) != before
    monkeypatch.setattr(hostbridge, "run", lambda words, what, text=None: host.run(*words, check=False, input=text))
    hostbridge.take(move.undo, "undo", force=True)
    assert place(host) == before


@pytest.mark.parametrize(("device", "bridge", "words"), [
    ("eth7", "br0", "there is no device 'eth7'"), ("lo", "br0", "it is no card of the host"),
    ("eth0", "taken", "Network device taken already exists"),
    ("taken", "br0", "Existing device taken is already a bridge"), ("port", "br0", "'port' is in 'taken' already"),
    ("eth0", "a b", "is no device's name"), ("eth0", "x" * 16, "is no device's name")])
def test_what_cannot_be_is_refused_and_nothing_changes(host, device, bridge, words):
    host.run("ip", "link", "add", "taken", "type", "bridge")
    host.run("ip", "link", "add", "port", "type", "veth", "peer", "name", "other")
    host.run("ip", "link", "set", "port", "master", "taken")
    before = place(host), host.traces()
    with pytest.raises(errors.KvmappError, match=words):
        interface(host, device, "bridge", bridge=bridge)
    with pytest.raises(errors.KvmappError, match="Device eth0 is not a bridge"):
        interface(host, "eth0", "unbridge")
    assert (place(host), host.traces()) == before


def test_the_list_leaves_out_guests_taps(host):
    host.run("ip", "tuntap", "add", "vnet0", "mode", "tap")
    host.run("ip", "link", "add", "idle", "type", "bridge")
    found = known(host)
    assert set(found) == {"eth0", "idle", "lo"} and not found["idle"]["active"] and found["eth0"]["active"]
    assert "203.0.113.2/24" in found["eth0"]["addresses"]
