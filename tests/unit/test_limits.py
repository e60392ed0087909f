"""Limits as the files of control groups of both versions have them, in a tree that stands for /sys/fs/cgroup."""
import os
import re
from pathlib import Path

import pytest

from kvmapp.config import DomainConfig
from kvmapp.daemon import cgroups
from kvmapp.daemon.cgroups import Cgroups
from kvmapp.daemon.limits import Tunables, group_limits, vcpu_limits, weight

GIB = 1 << 30
UUID = "d340f42e-8611-52c5-949c-8013181e73d4"
FULL = {"cputune": {"shares": 2048, "period": 50000, "quota": 25000, "global_quota": 150000},
        "memtune": {"hard_limit": 4 * GIB, "soft_limit": 2 * GIB, "swap_hard_limit": 6 * GIB}}


def tunables(**sections):
    return Tunables(DomainConfig.from_dict({"name": "a", "uuid": UUID, "memory": GIB, "vcpus": 2, **sections}))


@pytest.fixture(params=["v2", "v1"])
def tree(request, tmp_path, monkeypatch):
    monkeypatch.setattr(cgroups, "own_group", lambda: "")
    if request.param == "v2":
        (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    else:
        for controller in ("cpu", "memory", "pids"):
            (tmp_path / controller).mkdir()
    return tmp_path


def written(tree, controller):
    """What the domain's group holds: {file: text}, without the files of its processes."""
    unified = (tree / "cgroup.controllers").exists()
    folder = tree / "kvmapp/domain-a" if unified else tree / controller / "kvmapp/domain-a"
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def limited(tree, new, old=None):
    """The groups of domain a with these limits, and what was complained of."""
    groups = Cgroups("kvmapp", str(tree))
    for base in groups.bases:
        os.makedirs(f"{base}/domain-a", exist_ok=True)
    old = old or Tunables()
    complaints = groups.limit("a", group_limits(new, old, groups.unified))
    return complaints + groups.limit_vcpus("a", {0: 1000, 1: 1001}, vcpu_limits(new, old, groups.unified))


def test_everything(tree):
    assert limited(tree, tunables(**FULL)) == []
    if (tree / "cgroup.controllers").exists():
        assert written(tree, "") == {
            "cpu.weight": "200", "cpu.max": "150000 100000", "memory.max": str(4 * GIB), "memory.high": str(2 * GIB),
            "memory.swap.max": str(2 * GIB), "cgroup.subtree_control": "+cpu",
            "vcpu0/cgroup.type": "threaded", "vcpu0/cgroup.threads": "1000", "vcpu0/cpu.max": "25000 50000",
            "vcpu1/cgroup.type": "threaded", "vcpu1/cgroup.threads": "1001", "vcpu1/cpu.max": "25000 50000"}
        return
    assert written(tree, "cpu") == {
        "cpu.shares": "2048", "cpu.cfs_quota_us": "150000", "vcpu0/tasks": "1000", "vcpu0/cpu.cfs_period_us": "50000",
        "vcpu0/cpu.cfs_quota_us": "25000", "vcpu1/tasks": "1001", "vcpu1/cpu.cfs_period_us": "50000", "vcpu1/cpu.cfs_quota_us": "25000"}
    assert written(tree, "memory") == {"memory.limit_in_bytes": str(4 * GIB), "memory.soft_limit_in_bytes": str(2 * GIB),
                                       "memory.memsw.limit_in_bytes": str(6 * GIB)}
    assert written(tree, "pids") == {}


def test_what_a_file_does_not_say_is_not_touched(tree):
    assert limited(tree, tunables()) == []
    assert written(tree, "cpu") == {} and written(tree, "memory") == {}


def test_a_change_writes_what_changes_and_takes_back(tree):
    limited(tree, tunables(**FULL))
    assert limited(tree, tunables(cputune={"quota": 25000, "period": 50000}), tunables(**FULL)) == []
    found = {**written(tree, "cpu"), **written(tree, "memory")}
    if (tree / "cgroup.controllers").exists():
        assert found["cpu.weight"] == "100" and found["cpu.max"] == "max 100000" and found["vcpu0/cpu.max"] == "25000 50000"
        assert found["memory.max"] == found["memory.high"] == found["memory.swap.max"] == "max"
    else:
        assert found["cpu.shares"] == "1024" and found["cpu.cfs_quota_us"] == "-1" and found["vcpu0/cpu.cfs_quota_us"] == "25000"
        assert found["memory.limit_in_bytes"] == found["memory.memsw.limit_in_bytes"] == "-1"


@pytest.mark.parametrize(("old", "new", "first"), [
    ((4, 6), (2, 3), "memory.limit_in_bytes"), ((2, 3), (4, 6), "memory.memsw.limit_in_bytes"),
    ((None, None), (4, 6), "memory.limit_in_bytes"), ((4, 6), (None, None), "memory.memsw.limit_in_bytes")])
def test_v1_never_has_a_limit_above_that_of_memory_and_swap(old, new, first):
    def memory(hard, swap):
        return tunables(memtune={"hard_limit": hard * GIB, "swap_hard_limit": swap * GIB} if hard else {})
    files = [limit.file for limit in group_limits(memory(*new), memory(*old), unified=False)]
    assert files[0] == first and sorted(files) == ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]


def test_a_host_without_groups_says_so_of_each_limit(tmp_path):
    assert limited(tmp_path, tunables(cputune={"shares": 2, "quota": 1000}, memtune={"hard_limit": 2 * GIB})) == [
        f"{what} is not kept: this host has no control groups that kvmapp may write"
        for what in ("[cputune] shares", "[memtune] hard_limit", "[cputune] quota")]


def test_a_host_without_one_controller(tree):
    if (tree / "cgroup.controllers").exists():
        pytest.skip("version 2 has one tree")
    (tree / "memory").rmdir()
    assert limited(tree, tunables(memtune={"hard_limit": 2 * GIB})) == [
        "[memtune] hard_limit is not kept: this host has no controller memory"]


def test_a_file_that_the_kernel_refuses(tree):
    groups = Cgroups("kvmapp", str(tree))
    folder = groups.folder("memory", "a")
    file = "memory.max" if groups.unified else "memory.limit_in_bytes"
    os.makedirs(f"{folder}/{file}")
    assert limited(tree, tunables(memtune={"hard_limit": 2 * GIB})) == [
        f"[memtune] hard_limit is not kept: {folder}/{file} = {2 * GIB}: Is a directory"]


def test_a_file_that_this_kernel_has_not(tree):
    """A kernel without swap accounting, say."""
    groups = Cgroups("kvmapp", str(tree))
    folder = groups.folder("memory", "a")
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    os.symlink("/proc/1", folder)                   # a folder where no file can be made
    file = "memory.max" if groups.unified else "memory.limit_in_bytes"
    limits = group_limits(tunables(memtune={"hard_limit": 2 * GIB}), Tunables(), groups.unified)
    assert groups.limit("a", limits) == [f"[memtune] hard_limit is not kept: this host has no {folder}/{file}"]


def test_groups_of_vcpus_go_with_their_domains(tree):
    groups = Cgroups("kvmapp", str(tree))
    folder = groups.folder("cpu", "a")
    os.makedirs(f"{folder}/vcpu0")
    assert groups.remove("a") and not os.path.exists(folder)


def test_a_kernel_without_one_controller_keeps_the_others(tmp_path, monkeypatch):
    """As with cgroup_disable=memory: one word that it does not know, and it takes none of a line."""
    asked = []

    def write(path, text):
        asked.append((path, text))
        if "memory" in text:
            raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(cgroups, "write", write)
    monkeypatch.setattr(cgroups, "own_group", lambda: "")
    (tmp_path / "cgroup.controllers").write_text("cpu pids\n")
    [base] = Cgroups("kvmapp", str(tmp_path)).bases
    for folder in (str(tmp_path), base):
        assert {(f"{folder}/cgroup.subtree_control", "+cpu"), (f"{folder}/cgroup.subtree_control", "+pids")} <= set(asked)


def test_as_systemds_unit_the_groups_are_another_units(tmp_path, monkeypatch):
    """For where domains' groups are, no daemon can be started."""
    monkeypatch.setattr(cgroups, "own_group", lambda: "/system.slice/kvmapp.service")
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    groups = Cgroups("kvmapp", str(tmp_path))
    assert groups.bases == [f"{tmp_path}/system.slice/kvmapp-domains.service"]
    groups.close(running=False)
    assert os.path.isdir(groups.bases[0]), "it is systemd's to remove"
    units = Path(cgroups.__file__).parents[2] / "init/systemd"
    assert "Delegate=yes\n" in (units / cgroups.DOMAINS_UNIT).read_text() and "Delegate" not in (units / cgroups.UNIT).read_text()
    assert re.search(rf"^Wants=.*{cgroups.DOMAINS_UNIT}$", (units / cgroups.UNIT).read_text(), re.MULTILINE)


def test_a_process_joins_by_a_file_that_is_open(tree):
    groups = Cgroups("kvmapp", str(tree))
    for base in groups.bases:
        os.makedirs(f"{base}/domain-a")
        with open(f"{base}/domain-a/cgroup.procs", "w"):
            pass
    files = groups.make("a")
    assert list(files) == [f"cgroup:{number}" for number in range(len(groups.bases))]
    from kvmapp.zygote import join_groups
    rest = {"log": 5, **files}
    join_groups(rest)
    assert rest == {"log": 5}
    for base in groups.bases:
        with open(f"{base}/domain-a/cgroup.procs") as file:
            assert file.read() == "0"


@pytest.mark.parametrize(("shares", "expected"), [(2, 1), (1024, 100), (2048, 200), (262144, 10000)])
def test_shares_are_a_weight_in_version_2(shares, expected):
    assert weight(shares) == expected
