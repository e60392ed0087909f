"""A stock guest under the daemon in a control group of version 2: its limits are there, change, hold, and end it.

Documentation/admin-guide/cgroup-v2.rst. The other tests of limits run on whichever version the machine has.
"""
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from kvmapp.cli.main import main
from kvmapp.daemon.cgroups import MOUNT
from kvmapp.daemon.counters import vcpu_numbers
from kvmapp.daemon.main import cgroup_name
from tests.guest.guest import BOOT_SECONDS, Guest
from tests.unit.daemon.host import Host

pytestmark = pytest.mark.skipif(not Path(MOUNT, "cgroup.controllers").exists(), reason="no control groups of version 2 here")
MIB = 1 << 20
# Quotas that hardly hold it back while it boots: with two vCPUs of a half CPU each, nothing was heard of it for seven minutes in a busy
# lab, twice of four times.
DOMAIN = """name = web
memory = 512 MiB
[boot]
kernel = {lab}/vmlinuz
initrd = {lab}/initramfs.gz
cmdline = console=ttyS0 panic=-1 quiet modules=none shell=ttyS0
[serial 0]
[cputune]
shares = 512
quota = 95000
global_quota = 190000
[memtune]
hard_limit = 400 MiB
soft_limit = 300 MiB
"""


@pytest.fixture
def host(lab):
    root = tempfile.mkdtemp(prefix="kvmapp-")
    one = Host(root)
    one.file("web").write_text(DOMAIN.format(lab=lab))
    try:
        yield one.start("--domain-module", "kvmapp.vmprocess")
    finally:
        one.clean_up()
        shutil.rmtree(root)


@pytest.fixture
def ctl(host, capsys):
    """kvmappctl; the lines that it says."""
    def run(*words):
        assert main(["-c", f"kvmapp:///system?socket={host.paths.socket}", *words]) == 0, capsys.readouterr()
        return [line for line in capsys.readouterr().out.splitlines() if line]

    return run


@pytest.fixture
def guest(host):
    one = Guest([sys.executable, "-m", "kvmapp", "ctl", "-c", f"kvmapp:///system?socket={host.paths.socket}", "start", "web", "--console"])
    yield one
    print(one.console)
    one.kill()


class Group:
    """The domain's."""

    def __init__(self, host):
        self.folder = Path(MOUNT, cgroup_name(host.paths), "domain-web")

    def says(self, file):
        return (self.folder / file).read_text().strip()

    def counter(self, file, name):
        return int(re.search(rf"^{name} (\d+)$", self.says(file), re.MULTILINE)[1])


def test_limits_of_a_guest(host, ctl, guest):
    guest.expect("GUEST UP", BOOT_SECONDS)
    guest.expect("# ")
    group, pid = Group(host), host.domain("web")["pid"]
    [thread] = vcpu_numbers(pid).values()
    assert str(pid) in group.says("cgroup.procs").split()          # KVM's own thread that works for it is there, too
    others = {int(other) for other in os.listdir(f"/proc/{pid}/task")} - {thread}
    assert set(map(int, group.says("cgroup.threads").split())) >= others
    assert group.says("vcpu0/cgroup.threads") == str(thread)
    assert (group.says("cpu.weight"), group.says("cpu.max"), group.says("vcpu0/cpu.max")) == ("50", "190000 100000", "95000 100000")
    assert (group.says("memory.max"), group.says("memory.high")) == (str(400 * MIB), str(300 * MIB))
    assert 60 * MIB < int(group.says("memory.current")) < 300 * MIB, "the guest's memory counts, whichever thread touched it"
    # They change, and hold.
    ctl("schedinfo", "web", "--live", "--set", "vcpu_quota=20000", "cpu_shares=2048", "global_quota=-1")
    assert (group.says("cpu.weight"), group.says("cpu.max"), group.says("vcpu0/cpu.max")) == ("200", "max 100000", "20000 100000")
    before = group.counter("vcpu0/cpu.stat", "nr_throttled")
    guest.send("while :; do :; done &")
    host.eventually(lambda: group.counter("vcpu0/cpu.stat", "nr_throttled") > before + 5, "a vCPU's rest")
    guest.send("kill $!")
    assert "vcpu_quota     : -1" in ctl("schedinfo", "web", "--live", "--set", "vcpu_quota=-1")
    assert group.says("vcpu0/cpu.max") == "max 100000"
    ctl("memtune", "web", "--live", "--hard-limit", "256MiB", "--soft-limit", "-1")
    assert ctl("memtune", "web") == ["hard_limit     : 262144", "soft_limit     : unlimited", "swap_hard_limit: unlimited"]
    assert (group.says("memory.max"), group.says("memory.high")) == (str(256 * MIB), "max")
    # And end it: 256 MiB for the guest and its VMM, of which the guest alone wants 300 now.
    guest.send("mount -t tmpfs -o size=300m none /tmp; dd if=/dev/zero of=/tmp/much bs=1M count=300")
    host.eventually(lambda: host.domain("web")["state"] == "shut off", "the guest's end")
    assert ctl("domstate", "web", "--reason") == ["shut off (out of memory)"]
    host.eventually(lambda: not group.folder.exists(), "the end of its group")
