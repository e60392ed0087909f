"""[cputune], [vcpu N], [numatune] and [memtune] in a file, and what a process makes of them on a host that has less."""
import os

import pytest

from kvmapp import tuning
from kvmapp.config import DomainConfig, read_domain
from kvmapp.errors import ConfigError, HostError
from kvmapp.snapshot import compare
from kvmapp.tuning import Tuning

TOP = "name = a\nmemory = 64\nvcpus = 4\n"
HERE = min(os.sched_getaffinity(0))


def read(text: str) -> DomainConfig:
    return read_domain("/etc/kvmapp/domains/a.conf", TOP + text)


def test_a_file_with_all_of_it():
    config = read("[cputune]\ncpuset = 0-3,^2\nemulatorpin = 0\nshares = 2048\nperiod = 1000\nquota = 17592186044415\n"
                  "[vcpu 1]\ncpuset = 7\n[vcpu 0]\ncpuset = 6\n[numatune]\nmode = interleave\nnodeset = 0-1\n"
                  "[memtune]\nhard_limit = 1 GiB\nsoft_limit = 512\nswap_hard_limit = 2G\n")
    assert (config.cputune.cpuset, config.cputune.emulatorpin, config.cputune.shares) == ("0-1,3", "0", 2048)
    assert [(pin.index, pin.cpuset) for pin in config.vcpu_pins] == [(0, "6"), (1, "7")]
    assert config.numatune and (config.numatune.mode, config.numatune.nodeset) == ("interleave", "0-1")
    assert (config.memtune.hard_limit, config.memtune.soft_limit, config.memtune.swap_hard_limit) == (1 << 30, 512 << 20, 2 << 30)
    assert config.warnings == ()
    assert DomainConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("text", "line", "words", "hint"), [
    ("[cputune]\ncpuset = 3-1\n", 5, "'3-1': expected numbers of CPUs", ""),
    ("[cputune]\nshares = 1\n", 5, "a whole number from 2 to 262144", ""),
    ("[cputune]\nperiod = 999\n", 5, "a whole number from 1000 to 1000000", ""),
    ("[cputune]\nquota = 999\n", 5, "a whole number from 1000 to 17592186044415, or -1 for no limit", ""),
    ("[cputune]\nemulatorpins = 0\n", 5, "unknown key", "did you mean emulatorpin?"),
    ("[vcpu 4]\ncpuset = 0\n", 4, "[vcpu 4] the domain has vCPUs 0 to 3", "raise vcpus, or take [vcpu 4] away"),
    ("[vcpu 0]\n", 4, "cpuset is missing", ""),
    ("[vcpu]\ncpuset = 0\n", 4, "wants a word behind it", ""),
    ("[numatune]\nmode = strickt\nnodeset = 0\n", 5, "expected strict, preferred or interleave", "did you mean strict?"),
    ("[numatune]\nmode = strict\n", 4, "nodeset is missing", ""),
    ("[numatune]\nmode = preferred\nnodeset = 0-1\n", 6, "mode = preferred wants a single node", "interleave"),
    ("[memtune]\nswap_hard_limit = 1 GiB\n", 5, "of no use without hard_limit", "memory and swap together"),
    ("[memtune]\nhard_limit = 2 GiB\nswap_hard_limit = 1 GiB\n", 6, "is less than hard_limit = 2 GiB", "memory and swap together"),
    ("[memtune]\nhard_limit = plenty\n", 5, "expected a size", "")])
def test_mistakes(text, line, words, hint):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert caught.value.line == line and words in caught.value.message and hint in caught.value.hint


def test_a_hard_limit_that_the_guest_may_reach_is_told():
    config = read("[memtune]\nhard_limit = 64 MiB\n")
    assert config.warnings == ("[memtune] hard_limit = 64 MiB: is not more than memory = 64 MiB; a guest that uses all of it is swapped "
                               "out, or killed where there is no swap",)
    assert read("[memtune]\nhard_limit = 65 MiB\n").warnings == ()


def test_a_hard_limit_that_the_start_would_reach_is_refused():
    with pytest.raises(ConfigError, match="locked = yes takes all of memory = 64 MiB at the start"):
        read("locked = yes\n[memtune]\nhard_limit = 32 MiB\n")
    assert read("hugepages = 2M\nprealloc = yes\n[memtune]\nhard_limit = 32 MiB\n").memtune.hard_limit == 32 << 20


def test_a_saved_guest_sees_none_of_it():
    plain, tuned = read(""), read("[cputune]\ncpuset = 0\n[vcpu 0]\ncpuset = 0\n[numatune]\nnodeset = 0\n[memtune]\nhard_limit = 1G\n")
    compare("x", plain, tuned)
    compare("x", tuned, plain)


def test_a_guest_sees_nothing_of_what_happens_on_a_full_host():
    pauses, reports = (DomainConfig.from_dict({"name": "x", "memory": 1 << 30, "disks": [
        {"name": "vda", "source": "/x", "error_policy": policy}]}) for policy in ("enospace", "report"))
    compare("x", pauses, reports)


# On this host.

def test_where_threads_go():
    places = Tuning(read(f"[cputune]\ncpuset = {HERE}\n"))
    assert places.emulator == {HERE} and places.vcpus == [{HERE}] * 4 and places.policy == 0
    places = Tuning(read(f"[cputune]\nemulatorpin = {HERE}\n"))
    assert places.emulator == {HERE} and places.vcpus == [os.sched_getaffinity(0)] * 4
    assert Tuning(read("")).emulator == os.sched_getaffinity(0)


@pytest.mark.parametrize(("text", "message"), [
    ("[cputune]\ncpuset = 8000\n", "[cputune] cpuset = 8000: this host has no CPU 8000"),
    (f"[cputune]\nemulatorpin = {HERE},8000-8001\n", f"[cputune] emulatorpin = {HERE},8000-8001: this host has no CPUs 8000-8001"),
    ("[vcpu 3]\ncpuset = 8000\n", "[vcpu 3] cpuset = 8000: this host has no CPU 8000")])
def test_a_cpu_that_is_not_there(text, message):
    with pytest.raises(HostError) as caught:
        Tuning(read(text))
    assert caught.value.message == message
    assert caught.value.hint == f"there are CPUs {tuning.ranges(sorted(tuning.available_cpus()))}"


def test_a_cpu_that_is_there_but_not_for_us(monkeypatch):
    monkeypatch.setattr(tuning, "available_cpus", lambda: {5})
    with pytest.raises(HostError, match=rf"CPU {HERE} may not be used by kvmapp \(a cpuset control group says so\)") as caught:
        Tuning(read(f"[vcpu 0]\ncpuset = {HERE}\n"))
    assert caught.value.hint == "there are CPUs 5"


def test_a_node_that_is_not_there():
    with pytest.raises(HostError) as caught:
        Tuning(read("[numatune]\nnodeset = 0,1000\n"))
    assert caught.value.message == "[numatune] nodeset = 0,1000: this host has no NUMA node 1000 with memory for kvmapp"
    assert caught.value.hint.startswith("there are nodes 0")


def test_huge_pages_that_a_node_does_not_have(monkeypatch):
    monkeypatch.setattr(tuning, "read_small", lambda path: "3" if path.endswith("free_hugepages") else "0")
    with pytest.raises(HostError, match="3 huge pages of 2048 KiB are free there, and the guest needs 32"):
        Tuning(read("hugepages = 2M\n[numatune]\nnodeset = 0\n"))


def test_a_restored_guest_goes_on_where_it_can():
    said: list[str] = []
    places = Tuning(read(f"[cputune]\ncpuset = 8000\n[vcpu 0]\ncpuset = {HERE},8000\n[numatune]\nnodeset = 1000\n"), said.append)
    assert places.vcpus == [{HERE}, *[os.sched_getaffinity(0)] * 3] and places.emulator == os.sched_getaffinity(0)
    assert places.policy == 0
    assert len(said) == 3
    assert said[0].startswith("[cputune] cpuset = 8000: this host has no CPU 8000; there are CPUs") and said[0].endswith(": going without")
    assert said[1].endswith(f": going by {HERE}")


def test_taskset_is_no_limit_of_the_hosts():
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {HERE})
    try:
        assert tuning.available_cpus() >= own
        assert os.sched_getaffinity(0) == {HERE}
    finally:
        os.sched_setaffinity(0, own)
