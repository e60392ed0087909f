"""Networks that start with the host, on a host in a network namespace."""
import os
from pathlib import Path

import pytest

from tests.network import namespaces

REASON = namespaces.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
CARD = "[interface 0]\ntype = network\nsource = {}\n"


@pytest.fixture
def host():
    with namespaces.NetworkHost.temporary("nft") as one:
        yield one


def test_with_the_host_networks_come_before_domains(host):
    host.network()
    host.network("bad", "name = bad\n[ipv4]\naddress = 127.0.0.1/33\n")
    host.start()
    host.net("post", "default", "autostart", enabled=True)
    assert os.readlink(os.path.join(host.paths.network_autostart, "default.conf")) == "../default.conf"
    host.file("web").write_text(f"name = web\nmemory = 64\n{CARD.format('default')}")
    host.post("web", "autostart", enabled=True)
    host.stop()
    for note in (os.path.join(host.paths.network_run, "autostarted"), os.path.join(host.paths.run, "autostarted")):
        os.unlink(note)                                                # as a reboot does
    host.start()
    host.eventually(lambda: host.states().get("web") == "running", "the domain")
    assert host.net("get", "bad")["state"] == "broken"
    host.net("post", "default", "autostart", enabled=False)
    assert os.listdir(host.paths.network_autostart) == []


def test_a_network_whose_bridge_comes_late_is_started_with_the_host_all_the_same(host):
    host.network("lan", "name = lan\nmode = bridge\nbridge = br9\n")
    host.network("other", "name = other\nmode = bridge\nbridge = br8\n")
    host.file("web").write_text(f"name = web\nmemory = 64\n{CARD.format('lan')}")
    for folder, names in ((host.paths.network_autostart, ("lan", "other")), (host.paths.autostart, ("web",))):
        os.makedirs(folder, exist_ok=True)
        for name in names:
            os.symlink(f"../{name}.conf", os.path.join(folder, f"{name}.conf"))
    host.start()
    host.eventually(lambda: (host.get("web")["waiting"] or {}).get("missing") == ["network lan"], "the domain to wait")
    assert Path(host.log).read_text().count("'lan' is not started") == 1
    host.net("post", "other", "autostart", enabled=False)               # nobody waits for it any more
    host.kill()
    host.start()                                                        # the next daemon goes on with the waiting
    for bridge in ("br8", "br9"):
        host.run("ip", "link", "add", bridge, "type", "bridge")
    host.eventually(lambda: host.states().get("web") == "running", "the domain")
    assert host.net("get", "lan")["state"] == "active" and host.net("get", "other")["state"] == "inactive"
    host.post("web", "destroy")
    host.net("post", "lan", "destroy")
