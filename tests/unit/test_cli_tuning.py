"""vcpupin, emulatorpin, numatune, schedinfo, memtune: what they ask the daemon for, and virsh's words."""
import json

import pytest

from kvmapp.daemon import shapes
from kvmapp.errors import Unsupported
from tests.unit.canned_daemon import CannedDaemon, domain

URL = "/v1/domains/linuxvm01/tuning"
TUNING = {"vcpus": [{"number": 0, "cpus": "2"}, {"number": 1, "cpus": "0-3"}], "emulator": "0-1", "numa_mode": "strict",
          "numa_nodeset": "0", "cpu_shares": 1024, "vcpu_period": 100000, "vcpu_quota": -1, "global_period": 100000, "global_quota": -1,
          "hard_limit": 2 << 30, "soft_limit": None, "swap_hard_limit": None}
SCHEDULER = ("Scheduler      : posix\ncpu_shares     : 1024\nvcpu_period    : 100000\nvcpu_quota     : -1\nglobal_period  : 100000\n"
             "global_quota   : -1\n\n")


@pytest.fixture
def daemon(tmp_path):
    with CannedDaemon(tmp_path) as canned:
        for one in (domain("linuxvm01", 1), domain("linuxvm02")):
            canned.add(one)
            summary = {key: one[key] for key in shapes.DOMAIN["properties"]}
            url = f"/v1/domains/{one['name']}/tuning"
            canned.answers["GET", url] = TUNING
            canned.answers["POST", url] = {"domain": summary, "warnings": []}
        yield canned


SHOWN = {
    "vcpupin linuxvm01": " VCPU   CPU Affinity\n----------------------\n 0      2\n 1      0-3\n\n",
    "vcpupin linuxvm01 --vcpu 1": " VCPU   CPU Affinity\n----------------------\n 1      0-3\n\n",
    "emulatorpin linuxvm01": "emulator: CPU Affinity\n----------------------------------\n       *: 0-1\n\n",
    "numatune linuxvm01": "numa_mode      : strict\nnuma_nodeset   : 0\n\n",
    "schedinfo linuxvm01": SCHEDULER,
    "memtune linuxvm01": "hard_limit     : 2097152\nsoft_limit     : unlimited\nswap_hard_limit: unlimited\n\n",
}


@pytest.mark.parametrize("line", SHOWN)
def test_what_is_shown(daemon, ctl, line):
    assert ctl(*line.split()) == (0, SHOWN[line], "")
    assert daemon.requests[-1][:2] == ("GET", URL)


@pytest.mark.parametrize(("line", "answer"), [
    ("vcpupin linuxvm01 0", {"vcpus": [{"number": 0, "cpus": "2"}]}), ("emulatorpin linuxvm01", {"emulator": "0-1"}),
    ("numatune linuxvm01", {"numa_mode": "strict", "numa_nodeset": "0"}),
    ("memtune linuxvm01", {"hard_limit": 2 << 30, "soft_limit": None, "swap_hard_limit": None})])
def test_as_json(ctl, line, answer):
    status, said, _ = ctl(*line.split(), "--json")
    assert status == 0 and json.loads(said) == answer


CHANGED = {
    "vcpupin linuxvm01 0 2-3,^2": ({"vcpu 0": {"cpuset": "2-3,^2"}}, {}),
    "vcpupin linuxvm01 --vcpu 1 --cpulist r --live --config": ({"vcpu 1": {"cpuset": ""}}, {"live": True, "config": True}),
    "emulatorpin linuxvm01 0 --current": ({"cputune": {"emulatorpin": "0"}}, {}),
    "numatune linuxvm01 interleave 0-1 --config": ({"numatune": {"mode": "interleave", "nodeset": "0-1"}}, {"config": True}),
    "numatune linuxvm01 --mode preferred --config": ({"numatune": {"mode": "preferred"}}, {"config": True}),
    "memtune linuxvm01 1048576": ({"memtune": {"hard_limit": "1073741824 B"}}, {}),
    "memtune linuxvm01 --hard-limit 2GiB --soft-limit -1 --live": (
        {"memtune": {"hard_limit": "2147483648 B", "soft_limit": ""}}, {"live": True}),
}


@pytest.mark.parametrize("line", CHANGED)
def test_what_is_changed(daemon, ctl, line):
    settings, where = CHANGED[line]
    assert ctl(*line.split()) == (0, "\n", "")
    assert daemon.requests[-1] == ("POST", URL, {"settings": settings, **where})


@pytest.mark.parametrize(("words", "settings"), [
    (["--set", "cpu_shares=2048"], {"shares": "2048"}),
    (["vcpu_quota=50000", "vcpu_period=100000"], {"quota": "50000", "period": "100000"}),
    (["--set", "vcpu_quota=-5", "--set", "global_quota=0"], {"quota": "-1", "global_quota": ""})])
def test_schedinfo_sets_then_shows(daemon, ctl, words, settings):
    assert ctl("schedinfo", "linuxvm01", *words, "--live") == (0, SCHEDULER, "")
    assert ("POST", URL, {"settings": {"cputune": settings}, "live": True}) in daemon.requests


@pytest.mark.parametrize(("line", "words"), [
    ("vcpupin linuxvm01 --cpulist 0", "vcpupin: Missing vCPU number in pin mode."),
    ("vcpupin linuxvm01 7", "vcpupin: vCPU index out of range."),
    ("vcpupin linuxvm01 one 0", "malformed or out of range"),
    ("vcpupin linuxvm01 0 1 --live --current", "mutually exclusive"),
    ("vcpupin linuxvm01 --live --config", "cannot query both live and config at once"),
    ("vcpupin linuxvm02 --live", "Requested operation is not valid: domain is not running"),
    ("numatune linuxvm01 loose 0", "Unknown mode 'loose'\nhint: it may be strict, preferred, interleave"),
    ("schedinfo linuxvm01 --set emulator_quota=5", "invalid scheduler option: emulator_quota"),
    ("schedinfo linuxvm01 --weight 5", "invalid scheduler option: weight"),
    ("schedinfo linuxvm01 cpu_shares", "invalid scheduler option: cpu_shares"),
    ("memtune linuxvm01 lots", "Scaled numeric value 'lots' for <hard-limit> option is malformed or out of range"),
    ("memtune linuxvm01 --min-guarantee 5", "no memory is guaranteed")])
def test_bad_words(daemon, ctl, line, words):
    status, _, said = ctl(*line.split())
    assert status == 1 and words in said
    assert not [one for one in daemon.requests if one[0] == "POST"]


def test_numatune_wants_nodes_when_there_are_none(daemon, ctl):
    daemon.answers["GET", URL] = {**TUNING, "numa_nodeset": ""}
    assert "--nodeset is missing" in ctl("numatune", "linuxvm01", "--mode", "strict")[2]
    assert ctl("numatune", "linuxvm01")[1] == "numa_mode      : strict\nnuma_nodeset   : \n\n"


def test_a_refusal_is_shown(daemon, ctl):
    daemon.answers["POST", URL] = Unsupported("can't change it", "with --config")
    assert ctl("numatune", "linuxvm01", "strict", "0") == (1, "\n", "error: can't change it\nhint: with --config\n")


def test_warnings_are_shown(daemon, ctl):
    daemon.answers["POST", URL]["warnings"] = ["too small"]
    assert ctl("memtune", "linuxvm01", "1024")[2] == "warning: too small\n"
    assert ctl("schedinfo", "linuxvm01", "cpu_shares=2")[2] == "warning: too small\n"
