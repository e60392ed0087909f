"""Networks' files, and what a host may lack or have already that a network wants; on a host in a network namespace."""
import sys
from pathlib import Path

import pytest

from kvmapp import errors
from tests.network import namespaces

REASON = namespaces.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture
def host():
    with namespaces.NetworkHost.temporary("nft") as one:
        yield one


def test_files_of_networks(host):
    host.start()
    text = "# mine\nname = lab\nmode = isolated\n[ipv4]\naddress = 10.7.0.1/24\n"
    with host.client() as client:
        made = client.post("/v1/networks", text=text)
        assert made["created"] and made["made"] == ["uuid", "mac"]
        path = Path(host.paths.networks, "lab.conf")
        assert path.read_text().startswith("# mine\nname = lab\n")
        config = client.get("/v1/networks/lab/config")
        changed = config["text"].replace("10.7.0.1", "10.8.0.1")
        client.put("/v1/networks/lab/config", text=changed, digest=config["digest"])
        with pytest.raises(errors.KvmappError, match="was changed meanwhile"):
            client.put("/v1/networks/lab/config", text=changed, digest=config["digest"])
        with pytest.raises(errors.ConfigError, match=r"lab\.conf:"):
            client.put("/v1/networks/lab/config", text="name = lab\nmode = nut\n")
        with pytest.raises(errors.NameInUse, match="network 'lab' is already defined with uuid"):
            client.post("/v1/networks", text=changed.replace("name = lab", "name = copy"))
        with pytest.raises(errors.NetworkNotFound) as caught:
            client.get("/v1/networks/lob")
        assert caught.value.hint == "did you mean lab?"
        assert client.get(f"/v1/networks/{made['network']['uuid']}")["ipv4"] == "10.8.0.1/24"
        assert client.delete("/v1/networks/lab")["still_active"] is False
        assert client.get("/v1/networks") == {"networks": []} and not path.exists()


def test_without_dnsmasq_or_nft_it_says_what_to_install(host, monkeypatch):
    from kvmapp.daemon import hostnet
    monkeypatch.setattr(hostnet, "SEARCH", "/nowhere")
    with pytest.raises(errors.HostError, match="the program 'dnsmasq' is not installed") as caught:
        hostnet.run(["dnsmasq"], "start DHCP")
    assert "dnsmasq" in caught.value.hint


def test_the_port_of_another_dns_server(host):
    host.network()
    host.start()
    code = ("import socket, time; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 53)); print('up', flush=True)\n"
            "time.sleep(99)")
    assert host.namespace.popen(sys.executable, "-c", code).stdout.readline() == "up\n"
    before = host.traces()
    with pytest.raises(errors.HostError) as caught:
        host.net("post", "default", "start")
    assert "start DHCP and DNS of network 'default'" in str(caught.value) and "ss -lnup" in caught.value.hint
    assert host.traces() == before


def test_many_networks_at_once(host):
    for number in range(20):
        host.network(f"n{number}", f"name = n{number}\nmode = isolated\n[ipv4]\naddress = 10.{number}.0.1/24\n[dns]\nenabled = no\n")
    host.start()
    before = host.traces()
    for number in range(20):
        host.net("post", f"n{number}", "start")
    assert len({network["bridge"] for network in host.net("get")["networks"]}) == 20
    for number in range(20):
        host.net("post", f"n{number}", "destroy")
    assert host.traces() == before
