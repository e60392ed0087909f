"""vcpupin, emulatorpin, numatune, schedinfo, memtune of the daemon: files, running domains, and this host's control groups."""
import os
import re
import subprocess
from pathlib import Path

import pytest

from kvmapp import errors
from kvmapp.config import read_domain
from kvmapp.daemon.cgroups import Cgroups, group
from kvmapp.daemon.main import cgroup_name
from tests.unit.daemon.host import UUID

CPU = min(os.sched_getaffinity(0))
LIMITS = "[memtune]\nhard_limit = 2 GiB\nsoft_limit = 1 GiB\n[cputune]\nshares = 512\n"


def tune(running, name, /, live=None, config=None, **settings):
    chosen = {key: value for key, value in (("live", live), ("config", config)) if value is not None}
    return running.post(name, "tuning", settings={heading.replace("_", " "): texts for heading, texts in settings.items()}, **chosen)


def groups_of(running):
    groups = Cgroups(cgroup_name(running.paths))
    if not groups.bases:
        pytest.skip("this machine has no control groups that can be written")
    return groups


def in_group(groups, name, v1, v2):
    """What the kernel says: of version 1 the file's text, of version 2 its own."""
    return Path(groups.folder((v1 or v2).partition(".")[0], name), v2 if groups.unified else v1).read_text().strip()


def test_a_file_is_shown_and_changed(running):
    running.add("a", vcpus=2, rest="# by hand\n[cputune]\ncpuset = 0-9,^5        # mine\n")
    shown = running.get("a", "tuning")
    assert shown["vcpus"] == [{"number": 0, "cpus": "0-4,6-9"}, {"number": 1, "cpus": "0-4,6-9"}] and shown["emulator"] == "0-4,6-9"
    assert (shown["numa_nodeset"], shown["cpu_shares"], shown["vcpu_quota"], shown["hard_limit"]) == ("", 1024, -1, None)
    tune(running, "a", vcpu_1={"cpuset": "3"}, cputune={"emulatorpin": "0", "quota": "50000"}, numatune={"nodeset": "0"},
         memtune={"hard_limit": "1 GiB"})
    text = running.file("a").read_text()
    assert "cpuset = 0-9,^5        # mine" in text and "# by hand" in text and "[vcpu 1]\ncpuset = 3" in text
    shown = running.get("a", "tuning")
    assert shown["vcpus"][1]["cpus"] == "3" and shown["emulator"] == "0" and shown["vcpu_quota"] == 50000
    assert shown["numa_nodeset"] == "0" and shown["hard_limit"] == 1 << 30
    tune(running, "a", vcpu_1={"cpuset": ""}, numatune={"nodeset": ""}, cputune={"quota": ""}, memtune={"hard_limit": ""})
    config = read_domain(str(running.file("a")))
    assert config.vcpu_pins == [] and config.numatune is None and config.cputune.quota == -1 and config.memtune.hard_limit is None


@pytest.mark.parametrize(("settings", "words"), [
    ({"vcpu_2": {"cpuset": "0"}}, "[vcpu 2] the domain has vCPUs 0 to 1"), ({"vcpu_x": {"cpuset": "0"}}, "[vcpu x] is no heading"),
    ({"cputune": {"cpuset": "all"}}, "[cputune] cpuset = 'all': expected numbers of CPUs"),
    ({"cputune": {"pace": "5"}}, "[cputune] pace = '5': unknown key"),
    ({"disk_vda": {"source": "/x"}}, "[disk vda] is no section that tunes"),
    ({"memtune": {"swap_hard_limit": "1 GiB"}}, "is less than hard_limit = 2 GiB"),
    ({"numatune": {"mode": "preferred", "nodeset": "0-1"}}, "a single node")])
def test_what_is_refused_changes_nothing(running, settings, words):
    running.add("a", uuid=UUID, vcpus=2, rest=LIMITS)
    before = running.file("a").read_text()
    with pytest.raises(errors.ConfigError, match=re.escape(words)):
        tune(running, "a", **settings)
    assert running.file("a").read_text() == before


def test_a_running_domain_is_told(running):
    running.add("a", vcpus=2)
    running.post("a", "start")
    changed = tune(running, "a", vcpu_0={"cpuset": f"{CPU}"}, cputune={"emulatorpin": f"{CPU}"})
    assert changed["warnings"] == []
    told = running.told("a", "test-tuned")
    assert told["vcpu_pins"] == [{"index": 0, "cpuset": f"{CPU}"}] and told["cputune"]["emulatorpin"] == f"{CPU}"
    assert "[vcpu" not in running.file("a").read_text()
    assert running.get("a", "tuning", inactive=True)["vcpus"][0]["cpus"] != ""
    assert running.records()["a"]["config"]["vcpu_pins"] == told["vcpu_pins"]
    with pytest.raises(errors.Unsupported, match="can't change numatune for running domain"):
        tune(running, "a", live=True, numatune={"nodeset": "0"})
    tune(running, "a", config=True, numatune={"nodeset": "0"})
    assert running.get("a", "tuning")["numa_nodeset"] == ""
    assert running.get("a", "tuning", inactive=True)["numa_nodeset"] == "0"
    running.post("a", "destroy")


def test_a_domain_of_an_older_version(running):
    running.add("a", "old-tuning", vcpus=2)
    running.post("a", "start")
    with pytest.raises(errors.Unsupported, match="cannot be moved while domain 'a' runs under this version"):
        tune(running, "a", vcpu_0={"cpuset": "0"})
    assert running.records()["a"]["config"]["vcpu_pins"] == []
    running.post("a", "destroy")


def test_a_domain_that_is_shut_off_has_no_live_tuning(running):
    running.add("a", vcpus=2, rest=LIMITS)
    with pytest.raises(errors.DomainNotRunning):
        tune(running, "a", live=True, cputune={"shares": "5"})


def test_limits_are_there_before_the_process_and_change_while_it_runs(running):
    groups = groups_of(running)
    running.add("a", vcpus=2, rest=LIMITS)
    started = running.post("a", "start")
    assert started["warnings"] == []
    pid = str(started["domain"]["pid"])
    for base in groups.bases:
        assert Path(group(base, "a"), "cgroup.procs").read_text().split() == [pid]
    assert in_group(groups, "a", "memory.limit_in_bytes", "memory.max") == str(2 << 30)
    assert in_group(groups, "a", "memory.soft_limit_in_bytes", "memory.high") == str(1 << 30)
    assert in_group(groups, "a", "cpu.shares", "cpu.weight") == ("50" if groups.unified else "512")
    tune(running, "a", live=True, config=True, cputune={"shares": "4096", "global_quota": "30000"}, memtune={"hard_limit": "3 GiB"})
    assert in_group(groups, "a", "memory.limit_in_bytes", "memory.max") == str(3 << 30)
    assert in_group(groups, "a", "cpu.cfs_quota_us", "cpu.max").split()[0] == "30000"
    assert "hard_limit = 3 GiB" in running.file("a").read_text()
    tune(running, "a", live=True, memtune={"hard_limit": ""})
    assert in_group(groups, "a", "memory.limit_in_bytes", "memory.max") != str(3 << 30)
    running.post("a", "destroy")
    running.eventually(lambda: not any(os.path.exists(group(base, "a")) for base in groups.bases))


def test_limits_of_an_earlier_run_do_not_stay(running):
    """Its group is there as long as its process is not wholly gone."""
    groups = groups_of(running)
    for fd in groups.make("a").values():
        os.close(fd)
    hard = Path(groups.folder("memory", "a"), "memory.max" if groups.unified else "memory.limit_in_bytes")
    before = hard.read_text()
    hard.write_text(str(1 << 30))
    with subprocess.Popen(["sleep", "600"]) as old:
        for base in groups.bases:
            Path(group(base, "a"), "cgroup.procs").write_text(str(old.pid))
        running.add("a", vcpus=2)
        assert running.post("a", "start")["warnings"] == []
        assert hard.read_text() == before
        old.kill()
    running.post("a", "destroy")
    running.eventually(lambda: not hard.exists())


def test_a_limit_that_the_file_makes_doubtful_is_told_at_define(running):
    with running.client() as client:
        answer = client.post("/v1/domains", text="name = a\nmemory = 64 MiB\n[memtune]\nhard_limit = 32 MiB\n")
    assert answer["warnings"] == ["[memtune] hard_limit = 32 MiB: is not more than memory = 64 MiB; a guest that uses all of it is swapped "
                                  "out, or killed where there is no swap"]


def test_a_host_that_keeps_no_limits_says_so_at_the_start_and_in_the_log(host):
    """Its daemon finds nothing where control groups would be."""
    if os.geteuid():
        pytest.skip("a mount namespace needs root")
    host.launcher = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o ro none /sys/fs/cgroup && exec "$@"', "sh"]
    host.add("a", vcpus=2, rest=LIMITS)
    host.start()
    expected = [f"{what} is not kept: this host has no control groups that kvmapp may write"
                for what in ("[cputune] shares", "[memtune] soft_limit", "[memtune] hard_limit")]
    assert host.post("a", "start")["warnings"] == expected
    log = "\n".join(host.get("a", "log")["lines"])
    assert all(f"warning: {line}" in log for line in expected)
    with pytest.raises(errors.HostError, match="hard_limit is not kept"):
        tune(host, "a", live=True, memtune={"hard_limit": "1 GiB"})
    assert host.get("a", "tuning")["hard_limit"] == 2 << 30
