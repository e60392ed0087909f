"""The generated samples and man pages are committed as generated, can be read, and name every honoured key."""
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmapp import samples, schema
from kvmapp.config import read_domain
from kvmapp.hostconfig import DaemonConfig, GuestDefaults, read_daemon, read_guest_defaults, read_network
from kvmapp.ini import Ini

ROOT = Path(__file__).resolve().parents[2]
GENERATED = samples.generate()


@pytest.mark.parametrize("path", GENERATED)
def test_committed_as_generated(path):
    assert (ROOT / path).read_text() == GENERATED[path], "run python -m kvmapp.samples and commit"


def test_samples_can_be_used_as_they_are():
    domain = read_domain(str(ROOT / "conf/domains/example.conf.sample"))
    assert domain.warnings == ()
    assert (domain.name, domain.disks[0].name, domain.interfaces[0].source) == ("linuxvm02", "vda", "br0")
    network = read_network(str(ROOT / "conf/networks/default.conf"))
    assert network.ipv4 is not None
    assert (network.name, network.mode, network.ipv4.address) == ("default", "nat", "192.168.122.1/24")
    assert read_daemon(str(ROOT / "conf/kvmapp.conf")) == DaemonConfig()
    assert read_guest_defaults(str(ROOT / "conf/guest.conf")) == GuestDefaults()


FILES = {"conf/kvmapp.conf": schema.DAEMON, "conf/guest.conf": schema.GUEST,
         "conf/domains/example.conf.sample": schema.DOMAIN, "conf/networks/default.conf": schema.NETWORK}


@pytest.mark.parametrize("path", FILES)
def test_everything_commented_out_can_be_uncommented(path):
    text = "\n".join(line[1:] if line[:1] == "#" and line[1:2] not in ("", " ") else line
                     for line in GENERATED[path].splitlines())
    ini = Ini(text)
    for section in samples.sections_of(FILES[path]):
        texts = ini.sections[samples.heading_of(section)]
        assert set(texts) == {setting.key for setting in samples.honoured(section.settings)}
        for key, value in texts.items():
            section.settings[key].kind.parse(value)


def test_what_is_not_honoured_yet_is_not_shown():
    everything = "".join(GENERATED.values())
    assert "graphics" not in everything
    assert "vnc_listen" not in everything


@pytest.mark.skipif(not shutil.which("groff"), reason="groff is not installed")
@pytest.mark.parametrize("path", [path for path in GENERATED if path.startswith("docs/man/")])
def test_man_pages_are_roff_without_warnings(path):
    done = subprocess.run(["groff", "-man", "-Tutf8", "-ww"], input=GENERATED[path].encode(), capture_output=True, check=True)
    assert done.stderr == b""
    assert b"Expected: " in done.stdout
