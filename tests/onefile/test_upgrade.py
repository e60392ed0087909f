"""Setup over a version that runs: the daemon is replaced, a guest counts on under the old version, and that goes with its last guest.

Chapters of one story, on a host that is this machine's root under a layer of its own.
"""
import os
import re

import pytest

from onefile import build
from tests.onefile.host import OverlayHost, newer

pytestmark = [pytest.mark.timeout(900), pytest.mark.kvm, pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/kvm"), reason="needs root and /dev/kvm")]
NEWER = "9.9.9-newer"
COUNTER = """name = counter
memory = 32 MiB
[boot]
kernel = /var/lib/kvmapp/boot/probe.elf
cmdline = steps=none mode=counter report=serial period=100
[serial 0]
type = file
path = /var/lib/kvmapp/images/count
"""
COUNT = "tail -n 2 /var/lib/kvmapp/images/count"


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    try:
        one = OverlayHost(tmp_path_factory.mktemp("host"))
    except OSError as error:
        pytest.skip(f"no layer over this root: {error}")
    try:
        file = build.obtain() / "kvmapp"
        one.copy(file, "kvmapp")
        one.copy(newer(file, NEWER, tmp_path_factory.mktemp("newer")), "kvmapp-newer")
        yield one
    finally:
        one.close()


def current(host):
    return host.says("readlink /usr/lib/kvmapp/current").strip()


def pid(host):
    return host.says("pgrep -fx 'kvmapp: counter'").strip()


def test_setup_and_a_guest_that_counts(host):
    said = host.says("./kvmapp setup")
    assert "linked /usr/sbin/kvmapp\n" in said and "FAIL" not in said
    assert said.splitlines()[-1] == "start it: /etc/init.d/kvmapp start"
    assert host.says("/etc/init.d/kvmapp start") == "Starting kvmapp daemon: OK\n"
    host.says("cp /usr/lib/kvmapp/current/runtime/lib/kvmapp/probe/probe.elf /var/lib/kvmapp/boot/")
    said = host.run(f"cat >counter.conf <<'END'\n{COUNTER}END\nkvmappctl define counter.conf && kvmappctl start counter")
    assert (said.status, said.out) == (0, "Domain counter defined from counter.conf\n\nDomain counter started\n\n"), said
    assert host.says("kvmappctl list") == " Id   Name      State\n-------------------------\n 1    counter   running\n"
    assert host.says("ps -o user=,comm= -p $(pgrep -fx 'kvmapp: counter')").split(None, 1) == ["kvmapp", "kvmapp: counter\n"]
    host.eventually(COUNT, r"^count \d+")


def test_nothing_of_ours_is_in_a_childs_environment(host):
    host.run("EDITOR='env >$HOME/environment; true' kvmappctl edit counter")
    found = host.says("cat environment")
    assert "PATH=" in found and not re.search("PYI|^LD_|PYTHON|MEI", found, re.MULTILINE)


def test_upgrade(host):
    old, process = current(host), pid(host)
    said = host.says("./kvmapp-newer setup")
    assert "ran: /etc/init.d/kvmapp restart\n" in said and current(host) == NEWER
    assert said.splitlines()[-1] == f"kvmapp {NEWER} serves; guests that run stay with their version until their next start"
    before = int(host.eventually(COUNT, r"^count (\d+)\r?$")[1])
    host.eventually(COUNT, rf"^count (?!{before}\b)\d+\r?$")
    assert pid(host) == process
    counts = [int(number) for number in re.findall(r"count (\d+)\r?\n", host.says("cat /var/lib/kvmapp/images/count"))]
    assert counts == list(range(counts[0], counts[0] + len(counts)))            # it missed nothing, and never began anew
    listed = host.run("kvmappctl list --all")
    assert listed.err == "note: under another kvmapp until the next start: counter\n"
    assert f"it runs under kvmapp {old} until its next start" in host.says("kvmappctl dominfo counter")
    assert sorted(host.says("ls /usr/lib/kvmapp").split()) == sorted([old, NEWER, "current"])


def test_the_old_version_goes_with_its_last_guest(host):
    assert host.says("kvmappctl destroy counter") == "Domain counter destroyed\n"
    host.eventually("ls /usr/lib/kvmapp", rf"\A{re.escape(NEWER)}\ncurrent\n\Z")
    host.says("kvmappctl start counter")
    assert host.run("kvmappctl list --all").err == ""


def test_downgrade(host):
    process = pid(host)
    assert "ran: /etc/init.d/kvmapp restart\n" in host.says("./kvmapp setup")
    assert pid(host) == process and current(host) != NEWER
    assert host.run("kvmappctl list --all").err == "note: under another kvmapp until the next start: counter\n"


def test_a_killed_daemon_leaves_nothing_in_the_way(host):
    host.run("kill -9 $(cat /run/kvmapp/kvmapp.pid)")
    host.eventually("/etc/init.d/kvmapp status", "^kvmapp dead but pid file exists$")
    refused = host.run("kvmappctl list")
    assert refused.status == 1 and "Failed to connect socket to '/run/kvmapp/kvmapp.sock': Connection refused\n" in refused.err
    assert host.says("/etc/init.d/kvmapp start") == "Starting kvmapp daemon: OK\n"
    host.eventually("kvmappctl domstate counter", "^running$")      # it may be late with its first word to the new daemon


def test_remove_leaves_guests_and_what_they_run_from(host):
    said = host.says("kvmapp setup --remove")
    assert f"left /usr/lib/kvmapp/{NEWER}: guests run from it\n" in said and "removed /usr/sbin/kvmapp\n" in said
    assert pid(host) and host.says("ls /usr/lib/kvmapp").split() == [NEWER]
    assert host.says("ls /etc/kvmapp/domains") == "counter.conf\n"
