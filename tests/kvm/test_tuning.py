"""Guests of our own that run where their files say, by what the kernel tells of their threads, their memory and their groups."""
import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvmapp import errors
from kvmapp.config import config_from_options
from kvmapp.cpuset import members, ranges
from kvmapp.daemon.cgroups import Cgroups
from kvmapp.daemon.counters import vcpu_numbers
from kvmapp.daemon.main import cgroup_name
from kvmapp.errors import HostError
from kvmapp.memory import GuestMemory
from kvmapp.probe import IMAGE
from kvmapp.tuning import POLICIES, available_cpus
from tests.kvm.host import needs_root
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
CPUS = sorted(available_cpus())
FIRST, LAST = CPUS[0], CPUS[-1]
ALL = ranges(sorted(os.sched_getaffinity(0)))
GUEST = (f"name = a\nmemory = 32 MiB\nvcpus = 2\non_reboot = destroy\n[boot]\nkernel = {IMAGE}\n"
         "cmdline = steps=none mode=counter period=20\n[serial 0]\n[disk vda]\nsource = disk.img\n")
NUMA = Path("/proc/self/numa_maps").exists()

pytestmark = pytest.mark.kvm
needs_numa = pytest.mark.skipif(not NUMA, reason="this kernel is without NUMA")


class Run:
    """`kvmapp run` of a file, which counts on its serial port."""

    def __init__(self, folder, text, *words):
        (folder / "a.conf").write_text(GUEST + text)
        (folder / "disk.img").write_bytes(bytes(65536))
        self.process = subprocess.Popen([sys.executable, "-m", "kvmapp", "run", str(folder / "a.conf"), *map(str, words)], cwd=ROOT,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def count(self):
        """Waits until it runs."""
        while b"count " not in (line := self.process.stdout.readline()):
            assert line, self.process.stderr.read().decode()
        return self

    def threads(self):
        return threads_of(self.process.pid)

    def memory(self):
        """The policies of its mappings that have one, as numa(7) shows them: of the guest's memory, or of its parts."""
        lines = Path(f"/proc/{self.process.pid}/numa_maps").read_text().splitlines()
        return [line.split()[1] for line in lines if not line.split()[1].startswith("default")]

    def end(self, number=signal.SIGQUIT):
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=60)
        return said.decode()


def threads_of(pid):
    """{name of the thread: the CPUs that it may use} without those that the kernel makes and places itself, and those that are ending."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            name, status = (task / "comm").read_text().strip(), (task / "status").read_text()
            if not name.startswith(("kvm-nx", "iou-", "vhost")):
                found["main" if int(task.name) == pid else name] = re.findall(r"Cpus_allowed_list:\t(.*)", status)[0]
    return found


def test_every_thread_is_where_the_file_says(tmp_path):
    guest = Run(tmp_path, f"[cputune]\ncpuset = {FIRST}\nemulatorpin = {LAST}\n[vcpu 1]\ncpuset = {ranges(CPUS)}\n").count()
    until(lambda: guest.threads() == {"main": str(LAST), "io": str(LAST), "disk vda": str(LAST), "vcpu 0": str(FIRST),
                                      "vcpu 1": ranges(CPUS)})              # a thread has its name once it runs itself
    guest.end()


def test_without_emulatorpin_all_follow_cpuset_and_without_cpuset_only_the_named_vcpu(tmp_path):
    guest = Run(tmp_path, f"[cputune]\ncpuset = {LAST}\n").count()
    until(lambda: set(guest.threads().values()) == {str(LAST)})
    guest.end()
    guest = Run(tmp_path, f"[vcpu 0]\ncpuset = {LAST}\n").count()
    until(lambda: guest.threads() == {"main": ALL, "io": ALL, "disk vda": ALL, "vcpu 0": str(LAST), "vcpu 1": ALL})
    guest.end()


@needs_numa
@pytest.mark.parametrize(("mode", "shown"), [("strict", "bind:0"), ("preferred", "prefer:0"), ("interleave", "interleave:0")])
def test_memory_is_bound_before_it_is_touched(tmp_path, mode, shown):
    guest = Run(tmp_path, f"[numatune]\nmode = {mode}\nnodeset = 0\n").count()
    assert set(guest.memory()) == {shown}
    guest.end()


@needs_numa
def test_a_restored_guests_memory_is_bound_for_what_it_writes(tmp_path):
    guest = Run(tmp_path, "[numatune]\nnodeset = 0\n", "--save", tmp_path / "saved").count()
    assert "saved to" in guest.end(signal.SIGUSR1)
    again = Run(tmp_path, f"[numatune]\nnodeset = 0\n[cputune]\ncpuset = {LAST}\n", "--restore", tmp_path / "saved").count()
    assert set(again.memory()) == {"bind:0"} and len(again.memory()) > 1
    until(lambda: set(again.threads().values()) == {str(LAST)})
    again.end()


def test_a_restore_on_a_lesser_host_warns_and_goes_on(tmp_path):
    guest = Run(tmp_path, "", "--save", tmp_path / "saved").count()
    guest.end(signal.SIGUSR1)
    again = Run(tmp_path, "[vcpu 1]\ncpuset = 8000\n[numatune]\nnodeset = 1000\n", "--restore", tmp_path / "saved").count()
    until(lambda: again.threads().get("vcpu 1") == ALL)
    said = again.end()
    assert f"warning: [vcpu 1] cpuset = 8000: this host has no CPU 8000; there are CPUs {ranges(CPUS)}: going without" in said
    assert "warning: [numatune] nodeset = 1000: this host has no NUMA node 1000 with memory for kvmapp" in said


@pytest.mark.parametrize(("text", "message", "hint"), [
    ("[cputune]\ncpuset = 0,8000\n", "[cputune] cpuset = 0,8000: this host has no CPU 8000", f"there are CPUs {ranges(CPUS)}"),
    ("[vcpu 0]\ncpuset = 8000-8191\n", "[vcpu 0] cpuset = 8000-8191: this host has no CPUs 8000-8191", f"there are CPUs {ranges(CPUS)}"),
    ("[numatune]\nnodeset = 1000\n", "[numatune] nodeset = 1000: this host has no NUMA node 1000 with memory for kvmapp",
     "there are nodes 0")])
def test_what_the_host_has_not_is_one_clear_error(tmp_path, text, message, hint):
    guest = Run(tmp_path, text)
    out, said = guest.process.communicate(timeout=60)
    assert guest.process.returncode == 1 and out == b""
    assert said.decode().startswith(f"error: {message}\nhint: {hint}")


def test_kvmapp_run_says_what_it_does_not_keep(tmp_path):
    guest = Run(tmp_path, "[cputune]\nshares = 5\nquota = 1000\n[memtune]\nhard_limit = 1 GiB\n").count()
    said = guest.end()
    for what in ("[cputune] shares", "[cputune] quota", "[memtune] hard_limit"):
        assert f"warning: {what} is not kept by kvmapp run: only the daemon makes control groups\n" in said


@needs_numa
def test_what_the_kernel_refuses_is_said_plainly():
    with pytest.raises(HostError, match="Cannot bind 16 MiB of guest memory to its NUMA nodes: Invalid argument"):
        GuestMemory(16 << 20, policy=POLICIES["strict"], nodes=[1000])


# Under the daemon.

@pytest.fixture
def host(host):
    """Its daemon runs."""
    return host.start()


def tune(host, **settings):
    return host.post("a", "tuning", settings={heading.replace("_", " "): texts for heading, texts in settings.items()})


def added(host, rest="", top=""):
    host.guest("a", "steps=none mode=counter period=20", f"vcpus = 2\n{top}", rest)


@needs_root
def test_a_running_guest_is_moved(host):
    added(host, f"[vcpu 0]\ncpuset = {FIRST}\n")
    pid = host.post("a", "start")["domain"]["pid"]
    host.eventually(lambda: threads_of(pid) == {"main": ALL, "io": ALL, "vcpu 0": str(FIRST), "vcpu 1": ALL})
    tune(host, vcpu_1={"cpuset": str(LAST)}, cputune={"emulatorpin": str(FIRST)})
    assert threads_of(pid) == {"main": str(FIRST), "io": str(FIRST), "vcpu 0": str(FIRST), "vcpu 1": str(LAST)}
    shown = host.get("a", "tuning")
    assert [vcpu["cpus"] for vcpu in shown["vcpus"]] == [str(FIRST), str(LAST)] and shown["emulator"] == str(FIRST)
    affinity = host.get("a", "vcpus")["vcpus"][1]["affinity"]
    assert [cpu for cpu, letter in enumerate(affinity) if letter == "y"] == [LAST]
    tune(host, vcpu_0={"cpuset": ""}, vcpu_1={"cpuset": ""}, cputune={"emulatorpin": ""})
    assert set(threads_of(pid).values()) == {ALL}


@needs_root
def test_a_cpu_that_is_not_there_moves_nothing(host):
    added(host)
    pid = host.post("a", "start")["domain"]["pid"]
    with pytest.raises(errors.HostError, match=r"\[vcpu 1\] cpuset = 8000: this host has no CPU 8000") as caught:
        tune(host, vcpu_0={"cpuset": str(FIRST)}, vcpu_1={"cpuset": "8000"})
    assert caught.value.hint == f"there are CPUs {ranges(CPUS)}"
    assert set(threads_of(pid).values()) == {ALL}
    assert host.get("a", "tuning")["vcpus"][0]["cpus"] == ALL


@needs_root
def test_a_start_on_a_cpu_that_is_not_there_fails_and_says_why(host):
    added(host, "[cputune]\nemulatorpin = 8000\n")
    with pytest.raises(errors.HostError, match="emulatorpin = 8000: this host has no CPU 8000"):
        host.post("a", "start")
    assert host.domain("a")["state"] == "shut off" and host.records() == {}


@needs_root
def test_a_paused_guest_has_its_vcpus_already(host):
    added(host, f"[vcpu 1]\ncpuset = {LAST}\n")
    pid = host.post("a", "start", paused=True)["domain"]["pid"]
    host.eventually(lambda: threads_of(pid).get("vcpu 1") == str(LAST))
    assert host.printed("a") == ""
    host.post("a", "resume")
    host.eventually(lambda: host.counts("a"))


@needs_root
def test_a_saved_guest_keeps_its_places(host):
    added(host, f"[vcpu 1]\ncpuset = {LAST}\n")
    host.post("a", "start")
    tune(host, vcpu_0={"cpuset": str(FIRST)})
    host.post("a", "managedsave")
    pid = host.post("a", "start")["domain"]["pid"]
    host.eventually(lambda: threads_of(pid).get("vcpu 0") == str(FIRST) and threads_of(pid).get("vcpu 1") == str(LAST))


@needs_root
def test_a_restore_on_a_lesser_host_is_told_to_whoever_asks_for_it(host):
    added(host, "[vcpu 1]\ncpuset = 8000\n")
    with pytest.raises(errors.HostError):
        host.post("a", "start")
    added(host)
    host.post("a", "start")
    saved = f"{host.root}/a.save"
    host.post("a", "save", file=saved)
    rewrite(saved, vcpu_pins=[{"index": 1, "cpuset": "8000"}])
    with host.client() as client:
        restored = client.post("/v1/restore", file=saved, trust=True)
    assert restored["warnings"] == [f"[vcpu 1] cpuset = 8000: this host has no CPU 8000; there are CPUs {ranges(CPUS)}: going without"]
    host.eventually(lambda: threads_of(restored["domain"]["pid"]).get("vcpu 1") == ALL)


def rewrite(path, **settings):
    """The saved state as a host with more CPUs would have made it."""
    from kvmapp import statefile
    with open(path, "rb") as file:
        saved = statefile.read(os.dup(file.fileno()), path)
        memory = GuestMemory(saved.config["memory"])
        for gpa, length, offset in saved.stretches():
            memory.write(gpa, os.pread(file.fileno(), length, offset))
    fd = os.open(f"{path}.new", os.O_RDWR | os.O_CREAT)
    statefile.write(fd, {**saved.config, **settings}, saved.state, memory, lambda done: None)
    os.close(fd)
    os.rename(f"{path}.new", path)


@needs_root
def test_limits_hold_from_the_first_page(host):
    groups = Cgroups(cgroup_name(host.paths))
    if not groups.bases:
        pytest.skip("this machine has no control groups that can be written")
    added(host, "[memtune]\nhard_limit = 256 MiB\n[cputune]\nquota = 50000\n", "prealloc = yes\n")
    started = host.post("a", "start")
    assert started["warnings"] == []
    folder = Path(groups.folder("memory", "a"))
    used = int((folder / ("memory.current" if groups.unified else "memory.usage_in_bytes")).read_text())
    assert 32 << 20 < used < 256 << 20
    cpu = Path(groups.folder("cpu", "a"))
    threads = vcpu_numbers(started["domain"]["pid"])
    assert set(threads) == {0, 1}
    quota = "cpu.max" if groups.unified else "cpu.cfs_quota_us"
    for number, thread in threads.items():
        vcpu = cpu / f"vcpu{number}"
        assert (vcpu / ("cgroup.threads" if groups.unified else "tasks")).read_text().split() == [str(thread)]
        assert (vcpu / quota).read_text().split()[0] == "50000"
    tune(host, cputune={"quota": "-1"})
    assert (cpu / "vcpu0" / quota).read_text().split()[0] in ("-1", "max")
    host.post("a", "destroy")
    host.eventually(lambda: not cpu.exists())


@needs_root
def test_a_hard_limit_that_is_too_low_for_anything_is_named(host):
    if not Cgroups(cgroup_name(host.paths)).bases:
        pytest.skip("this machine has no control groups that can be written")
    added(host, "[memtune]\nhard_limit = 1 MiB\n")
    with pytest.raises(errors.HostError, match="killed the process of domain 'a' for want of memory before its guest ran") as caught:
        host.post("a", "start")
    assert caught.value.hint == "raise [memtune] hard_limit"
    host.eventually(lambda: host.domain("a")["state"] == "shut off")


@needs_root
def test_a_quota_for_a_guest_that_runs_already(host):
    groups = Cgroups(cgroup_name(host.paths))
    if not groups.bases:
        pytest.skip("this machine has no control groups that can be written")
    added(host)
    host.post("a", "start")
    tune(host, cputune={"quota": "20000", "period": "50000"})
    vcpu = Path(groups.folder("cpu", "a")) / "vcpu1"
    if groups.unified:
        assert (vcpu / "cpu.max").read_text().split() == ["20000", "50000"]
    else:
        assert [(vcpu / f"cpu.cfs_{what}_us").read_text().strip() for what in ("quota", "period")] == ["20000", "50000"]


def test_members_are_those_of_this_host():
    assert set(members(ALL)) <= set(CPUS)
    assert config_from_options([], None).cputune.cpuset is None
