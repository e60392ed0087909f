"""What each verb asks the daemon for, and the words and columns of its answer, against a daemon of canned answers."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmapp import __version__
from kvmapp.errors import (
    DomainNotRunning,
    DomainRunning,
    GuestIgnored,
    JobRunning,
    KvmappError,
)
from kvmapp.ini import Ini
from tests.unit.canned_daemon import UUID, config_answer, domain, stats

ROOT = Path(__file__).resolve().parents[2]


LISTS = {
    "list": " Id   Name        State\n---------------------------\n 1    linuxvm01   running\n 2    linuxvm02   paused\n\n",
    "list --all": " Id   Name        State\n----------------------------\n 1    linuxvm01   running\n 2    linuxvm02   paused\n"
                  " -    linuxvm03   shut off\n\n",
    "list --inactive": " Id   Name        State\n----------------------------\n -    linuxvm03   shut off\n\n",
    "list --state-running --state-paused": " Id   Name        State\n---------------------------\n 1    linuxvm01   running\n"
                                           " 2    linuxvm02   paused\n\n",
    "list --state-shutoff": " Id   Name        State\n----------------------------\n -    linuxvm03   shut off\n\n",
    "list --inactive --state-running": " Id   Name   State\n--------------------\n\n",
    "list --autostart": " Id   Name   State\n--------------------\n\n",
    "list --state-running --title": " Id   Name        State     Title\n-------------------------------------\n"
                                    " 1    linuxvm01   running   Title 1\n\n",
    "list --name": "linuxvm01\nlinuxvm02\n\n",
    "list --all --id": "1\n2\n\n",
    "list --all --name --id": "1 linuxvm01\n2 linuxvm02\n- linuxvm03\n\n",
    "list --uuid --name": f"{UUID}1 linuxvm01\n{UUID}2 linuxvm02\n\n",
}


def test_list_of_what_autostart_is_still_to_start(daemon, ctl):
    daemon.add(domain("linuxvm04", autostart=True, waiting={"since": 1.0, "missing": ["its turn"]}), domain("linuxvm05", autostart=True))
    assert ctl("list", "--all", "--name", "--waiting") == (0, "linuxvm04\n\n", "")


@pytest.mark.parametrize("line", LISTS)
def test_list(ctl, line):
    assert ctl(line) == (0, LISTS[line], "")


def test_quiet_list_is_rows_only(ctl):
    assert ctl("-q", "list", "--all") == (0, " 1   linuxvm01   running\n 2   linuxvm02   paused\n -   linuxvm03   shut off\n", "")


def test_wide_letters_keep_the_columns(daemon, ctl):
    daemon.add(domain("虚拟机4", 4))
    assert ctl("list", "--state-running")[1].splitlines()[-2:] == [" 4    虚拟机4     running", ""]


def test_a_broken_file_and_a_stuck_domain_are_listed(daemon, ctl):
    daemon.add(domain("bad", state="broken", text="/etc/kvmapp/domains/bad.conf:3: unknown key 'memroy'", uuid=None, vcpus=None,
                      memory=None, current_memory=None),
               domain("stuck", 9, state="no response"))
    out = ctl("list", "--all")[1]
    assert " 9    stuck       no response\n" in out
    assert " -    bad         broken (/etc/kvmapp/domains/bad.conf:3: unknown key 'memroy')\n" in out
    assert "bad" not in ctl("list")[1]


def test_dominfo(daemon, ctl):
    expected = (f"Id:             1\nName:           linuxvm01\nUUID:           {UUID}1\nOS Type:        hvm\nState:          running\n"
                "CPU(s):         2\nCPU time:       251.7s\nMax memory:     8388608 KiB\nUsed memory:    8388608 KiB\n"
                "Persistent:     yes\nAutostart:      disable\nManaged save:   no\n\n")
    assert ctl("dominfo", "linuxvm01") == (0, expected, "")


def test_dominfo_tells_what_holds_a_domain_up(daemon, ctl):
    daemon.add(domain("linuxvm03", job={"verb": "start", "who": "root (pid 12)", "since": 0.0, "progress": "opening disks"},
                      waiting={"since": 0.0, "missing": ["bridge br0", "disk vda (/data/x.img)"]}, warnings=["a warning"]))
    lines = ctl("dominfo", "linuxvm03")[1].splitlines()
    assert lines[0] == "Id:             -"
    assert [line[16:].partition(", since")[0].partition("since")[0] for line in lines if line[:9] == "Messages:" or line[:1] == " "] == [
        "start (opening disks) by root (pid 12)", "waiting ", "a warning"]
    assert "for bridge br0, disk vda (/data/x.img)" in "\n".join(lines)


SAID = {
    "start linuxvm03": ("Domain linuxvm03 started", "start", {}),
    "start linuxvm03 --paused": ("Domain linuxvm03 started", "start", {"paused": True}),
    "shutdown linuxvm01": ("Domain linuxvm01 is being shutdown", "shutdown", {}),
    "shutdown linuxvm01 --timeout 5": ("Domain linuxvm01 has shut down", "shutdown", {"timeout": 5}),
    "reboot linuxvm01": ("Domain linuxvm01 is being rebooted", "reboot", {}),
    "reset linuxvm01": ("Domain linuxvm01 was reset", "reset", {}),
    "destroy linuxvm01": ("Domain linuxvm01 destroyed", "destroy", {}),
    "destroy linuxvm01 --graceful": ("Domain linuxvm01 destroyed", "destroy", {"graceful": True}),
    "suspend linuxvm01": ("Domain linuxvm01 suspended", "suspend", {}),
    "resume linuxvm02": ("Domain linuxvm02 resumed", "resume", {}),
    "domjobabort linuxvm01": ("", "job/abort", {}),
    "save linuxvm01 /x.save": ("\nDomain 'linuxvm01' saved to /x.save", "save", {"file": "/x.save"}),
    "save linuxvm01 /x.save --running": ("\nDomain 'linuxvm01' saved to /x.save", "save", {"file": "/x.save", "paused": False}),
    "managedsave linuxvm01 --paused --verbose": ("\nDomain 'linuxvm01' state saved by kvmapp", "managedsave", {"paused": True}),
    "managedsave linuxvm01": ("\nDomain 'linuxvm01' state saved by kvmapp", "managedsave", {}),
    "start linuxvm02 --force-boot": ("Domain linuxvm02 started", "start", {"force_boot": True}),
    "autostart linuxvm02": ("Domain linuxvm02 marked as autostarted", "autostart", {"enabled": True}),
    "autostart linuxvm02 --disable": ("Domain linuxvm02 unmarked as autostarted", "autostart", {"enabled": False}),
    "domrename linuxvm03 web": ("Domain successfully renamed", "rename", {"name": "web"}),
    "setvcpus linuxvm03 4 --config": ("", "vcpus", {"count": 4, "config": True}),
    "desc linuxvm03 --new-desc new text": ("Domain description updated successfully", "description", {"description": "new text"}),
    "desc linuxvm03 --title --new-desc ''": ("Domain title updated successfully", "description", {"title": None}),
}


@pytest.mark.parametrize("line", SAID)
def test_what_verbs_say_and_send(daemon, ctl, line):
    text, path, body = SAID[line]
    assert ctl(line) == (0, f"{text}\n\n" if text else "\n", "")
    assert daemon.requests[-1] == ("POST", f"/v1/domains/{line.split()[1]}/{path}", body)
    status, out, _ = ctl("-q", *line.replace("''", "").split(), *([""] if line.endswith("''") else []))
    assert (status, out) == (0, "")


def test_an_id_is_answered_by_the_name(ctl):
    assert ctl("destroy", "2")[1] == "Domain linuxvm02 destroyed\n\n"


def test_warnings_are_for_people_even_with_quiet(daemon, ctl):
    daemon.answers["POST", "/v1/domains/linuxvm03/start"] = {"domain": domain("linuxvm03", 3), "warnings": ["disk vda is nearly full"]}
    assert ctl("-q", "start", "linuxvm03") == (0, "", "warning: disk vda is nearly full\n")


REFUSED = {
    "start": (DomainRunning("domain 'linuxvm01' is running"), "error: Domain is already active\n"),
    "shutdown": (GuestIgnored("the guest ignores ACPI", "kvmappctl destroy linuxvm01"),
                 "error: Failed to shutdown domain 'linuxvm01'\nerror: the guest ignores ACPI\nhint: kvmappctl destroy linuxvm01\n"),
    "resume": (JobRunning("job 'start' holds it", verb="start", who="ann", since=1.0),
               "error: Failed to resume domain 'linuxvm01'\nerror: job 'start' holds it\n"),
    "destroy": (DomainNotRunning("domain is not running"), "error: Failed to destroy domain 'linuxvm01'\nerror: domain is not running\n"),
}


@pytest.mark.parametrize("verb", REFUSED)
def test_refusals_say_what_was_tried_then_why(daemon, ctl, verb):
    error, expected = REFUSED[verb]
    daemon.answers["POST", f"/v1/domains/linuxvm01/{verb}"] = error
    assert ctl(verb, "linuxvm01") == (1, "\n", expected)


def test_unknown_domain(ctl):
    for verb in ("start", "dominfo", "undefine", "domstate", "console", "edit"):
        if verb != "console":
            assert ctl(verb, "nosuch") == (1, "\n", "error: failed to get domain 'nosuch'\n")


def test_several_commands_go_on_after_a_failure(ctl):
    status, out, err = ctl("domid nosuch; domuuid 1; domname 1; domid linuxvm03")
    assert (status, out, err) == (0, f"\n{UUID}1\n\nlinuxvm01\n\n-\n\n", "error: failed to get domain 'nosuch'\n")
    assert ctl("domid 1; domid nosuch")[0] == 1
    assert ctl("domid 1; quit; domid 2")[1] == "1\n\n"


def test_nothing_runs_when_one_command_cannot_be_read(daemon, ctl):
    assert ctl("destroy 1; nosuch") == (1, "", "error: unknown command: 'nosuch'\nhint: kvmappctl help lists the commands\n")
    assert daemon.requests == []


def test_help_of_each_verb(ctl):
    out = ctl("help", "setmem")[1]
    assert out.startswith("  NAME\n    setmem - change how much memory the guest may use\n\n  SYNOPSIS\n"
                          "    setmem <domain> <size> [--config] [--live] [--current]\n")
    assert "    [--domain] <string>  the domain's name, Id or UUID\n" in out
    assert ctl("help", "host")[1].startswith(" Host and Hypervisor (help keyword 'host'):\n    capabilities ")
    assert ctl("help", "lst")[2] == "error: command or command group 'lst' doesn't exist\nhint: did you mean list?\n"


def test_inactive_parts_come_from_the_file(daemon, ctl):
    daemon.answers["GET", "/v1/domains/1/config"] = config_answer(disks=[{"name": "vdb", "source": "/data/new.img"}], interfaces=[
        {"index": 0, "type": "network", "source": "default", "target": None, "model": "virtio", "mac": "52:54:00:00:00:01"}])
    assert ctl("domblklist", "1", "--inactive")[1] == " Target   Source\n-------------------------\n vdb      /data/new.img\n\n"
    assert " -           network   default   virtio   52:54:00:00:00:01\n" in ctl("domiflist", "1", "--inactive")[1]


def test_node_verbs(daemon, ctl):
    daemon.answers["GET", "/v1/node"] = {"model": "x86_64", "cpus": 2, "mhz": 1603, "sockets": 1, "cores": 1, "threads": 2,
                                         "numa_cells": 1, "memory": 4008652 << 10, "hostname": "host1", "cpu_name": "x"}
    daemon.answers["GET", "/v1/node/cpustats"] = {"cpus": [{"number": None, "user_ns": 1, "system_ns": 2, "idle_ns": 3, "iowait_ns": 4}]}
    assert ctl("nodeinfo")[1] == (
        "CPU model:           x86_64\nCPU(s):              2\nCPU frequency:       1603 MHz\nCPU socket(s):       1\n"
        "Core(s) per socket:  1\nThread(s) per core:  2\nNUMA cell(s):        1\nMemory size:         4008652 KiB\n\n")
    assert ctl("hostname")[1] == "host1\n\n"
    assert ctl("-q", "nodecpustats")[1].splitlines()[0] == "user:                              1"
    daemon.answers["GET", "/v1/node/cpustats"] = {"cpus": []}
    assert ctl("nodecpustats", "--cpu", "7")[2] == "error: This host has no CPU 7\n"
    assert daemon.requests[-1] == ("GET", "/v1/node/cpustats", {"cpu": "7"})


def test_autostart_stop(daemon, ctl):
    daemon.answers["POST", "/v1/autostart/stop"] = {"left": ["linuxvm02", "linuxvm03"]}
    assert ctl("autostart-stop") == (0, "Autostart stopped until the host's next boot; left off: linuxvm02, linuxvm03\n\n", "")
    daemon.answers["POST", "/v1/autostart/stop"] = {"left": []}
    assert ctl("autostart-stop") == (0, "Autostart stopped until the host's next boot\n\n", "")


def test_version_and_reload(daemon, ctl):
    daemon.answers["GET", "/v1/version"] = {"kvmapp": "9.9.9", "api": 1, "python": "3.11.2", "kernel": "6.1.0"}
    assert ctl("version", "--daemon")[1] == (
        f"Compiled against library: kvmapp {__version__}\nUsing library: kvmapp {__version__}\nUsing API: kvmapp 1\n"
        "Running hypervisor: KVM 6.1.0\nRunning against daemon: 9.9.9\n\n")
    assert ctl("uri")[1] == f"{daemon.uri}\n\n"
    daemon.answers["POST", "/v1/daemon/reload"] = {"domains": 3, "broken": ["bad"], "refused": [], "warnings": ["two MACs clash"]}
    assert ctl("reload") == (0, "Configuration read again: 3 domains\nbroken: bad\n\n", "warning: two MACs clash\n")


def test_capabilities_are_an_ini_text(daemon, ctl):
    daemon.answers["GET", "/v1/capabilities"] = {
        "host": {"uuid": None, "arch": "x86_64", "cpu": "A CPU", "vendor": "GenuineIntel", "features": ["fpu", "vmx"],
                 "topology": {"sockets": 1, "cores": 2, "threads": 1}, "pages": [4096, 2 << 20],
                 "cells": [{"id": 0, "memory": 1 << 30, "cpus": [0, 1, 3]}], "virtualization": "vmx"},
        "guest": {"os_type": "hvm", "arch": "x86_64", "kvm": True, "max_vcpus": 254, "max_memory": 1 << 40, "devices": ["disk"]}}
    text = ctl("capabilities")[1]
    sections = Ini(text).sections
    assert sections["host"]["pages"] == "4 KiB, 2048 KiB" and sections["host"]["virtualization"] == "vmx"
    assert sections["host cell 0"] == {"memory": "1048576 KiB", "cpus": "0-1,3"}
    assert sections["guest"]["kvm"] == "yes" and sections["guest"]["max_memory"] == "1073741824 KiB"


def test_domlog_shows_no_control_characters(daemon, ctl):
    daemon.answers["GET", "/v1/domains/1/log"] = {"file": "/x", "lines": ["one", "two \x1b[2J"]}
    assert ctl("domlog", "1", "--lines", "2")[1] == "one\ntwo \\x1b[2J\n\n"
    assert daemon.requests[-1] == ("GET", "/v1/domains/1/log", {"lines": "2"})


def test_nodecpustats_in_percent(daemon, ctl, monkeypatch):
    turn = iter(range(1, 9))
    daemon.answers["GET", "/v1/node/cpustats"] = lambda *_: {"cpus": [
        {"number": None, **dict.fromkeys(("user_ns", "idle_ns"), (number := next(turn)) * 10), "system_ns": 5 * number, "iowait_ns": 0}]}
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    assert ctl("nodecpustats", "--percent")[1] == ("usage:           60.0%\nuser:            40.0%\nsystem:          20.0%\n"
                                                   "idle:            40.0%\niowait:           0.0%\n\n")


MEMORY = {"current": 1 << 30, "maximum": 2 << 30, "rss": 300 << 20, "swap_in": 0, "swap_out": None, "major_fault": 7,
          "minor_fault": None, "unused": 900 << 20, "available": 1000 << 20, "usable": None, "last_update": 1700000000,
          "disk_caches": None, "hugetlb_pgalloc": None, "hugetlb_pgfail": None}


def test_dommemstat(daemon, ctl):
    daemon.answers["GET", "/v1/domains/linuxvm01/stats"] = stats("linuxvm01", balloon=MEMORY)
    assert ctl("dommemstat", "linuxvm01")[1] == """actual 1048576
swap_in 0
major_fault 7
unused 921600
available 1024000
last_update 1700000000
rss 307200

"""
    assert "balloon.last-update=1700000000\n" in ctl("domstats", "--balloon", "linuxvm01")[1]
    daemon.answers["GET", "/v1/domains/linuxvm01/stats"] = stats("linuxvm01", balloon=None)
    status, _, errors = ctl("dommemstat", "linuxvm01")
    assert status == 1 and errors.splitlines()[-1].startswith("hint: start it")


def test_domstats(daemon, ctl):
    rest = dict.fromkeys(("wr_reqs", "wr_bytes", "wr_ns", "fl_reqs", "fl_ns", "errors"), 0)
    more = dict.fromkeys(("rx_drop", "tx_bytes", "tx_packets", "tx_drop"), 0)
    daemon.answers["GET", "/v1/domains/linuxvm01/stats"] = stats(
        "linuxvm01", disks=[{"name": "vda", "source": "/data/x1.img", "rd_reqs": 4, "rd_bytes": 2048, "rd_ns": 7, **rest}],
        interfaces=[{"index": 0, "target": "vnet0", "mac": "52:54:00:00:00:01", "rx_bytes": 9, "rx_packets": 1, **more}],
        balloon={**dict.fromkeys(MEMORY), "current": 1 << 30, "maximum": 2 << 30})
    assert ctl("domstats", "linuxvm01")[1] == """Domain: 'linuxvm01'
  state.state=1
  state.reason=1
  cpu.time=5000000
  cpu.user=3000000
  cpu.system=2000000
  balloon.current=1048576
  balloon.maximum=2097152
  vcpu.current=1
  vcpu.maximum=1
  vcpu.0.state=1
  vcpu.0.time=4000000
  vcpu.0.exits.sum=9
  vcpu.0.blocking.cur=0
  net.count=1
  net.0.name=vnet0
  net.0.rx.bytes=9
  net.0.rx.pkts=1
  net.0.rx.drop=0
  net.0.tx.bytes=0
  net.0.tx.pkts=0
  net.0.tx.drop=0
  block.count=1
  block.0.name=vda
  block.0.path=/data/x1.img
  block.0.rd.reqs=4
  block.0.rd.bytes=2048
  block.0.rd.times=7
  block.0.wr.reqs=0
  block.0.wr.bytes=0
  block.0.wr.times=0
  block.0.fl.reqs=0
  block.0.fl.times=0
  block.0.errors=0
  vm.exits.io=7
  vm.exits.mmio=2

"""
    assert ctl("domstats", "linuxvm01", "--state")[1] == "Domain: 'linuxvm01'\n  state.state=1\n  state.reason=1\n\n"
    daemon.answers["GET", "/v1/stats"] = {"domains": [stats("a"), stats("b", None)]}
    assert ctl("domstats", "--state")[1] == ("Domain: 'a'\n  state.state=1\n  state.reason=1\n\n"
                                             "Domain: 'b'\n  state.state=5\n  state.reason=0\n\n")
    assert "'a'" not in ctl("domstats", "--list-inactive")[1]


def test_vcpuinfo(daemon, ctl):
    daemon.answers["GET", "/v1/domains/1/vcpus"] = {"vcpus": [
        {"number": 0, "state": "running", "cpu": 1, "cpu_time_ns": 1_500_000_000, "affinity": "yy-y"},
        {"number": 1, "state": "offline", "cpu": None, "cpu_time_ns": 0, "affinity": "yyyy"}]}
    assert ctl("vcpuinfo", "1")[1] == (
        "VCPU:           0\nCPU:            1\nState:          running\nCPU time:       1.5s\nCPU Affinity:   yy-y\n\n"
        "VCPU:           1\nCPU:            N/A\nState:          N/A\nCPU time:       N/A\nCPU Affinity:   yyyy\n\n")
    assert "CPU Affinity:   0-1,3 (out of 4)\n" in ctl("vcpuinfo", "1", "--pretty")[1]


def test_vcpucount(daemon, ctl):
    """linuxvm01 runs with two, and its file has got three; a bare --active or --maximum is of what runs, as in virsh."""
    daemon.answers["GET", "/v1/domains/1/config"] = config_answer(vcpus=3)
    assert ctl("vcpucount", "1")[1] == ("maximum      config         3\nmaximum      live           2\n"
                                        "current      config         3\ncurrent      live           2\n\n")
    for words, count in (("--active", 2), ("--maximum", 2), ("--current", 2), ("--live", 2), ("--config", 3), ("--maximum --config", 3)):
        assert ctl("vcpucount", "1", *words.split(" ")) == (0, f"{count}\n\n", "")
    daemon.add(domain("linuxvm04", 4, persistent=False))
    daemon.answers["GET", "/v1/domains/linuxvm04/config"] = KvmappError("Domain 'linuxvm04' is transient")
    assert ctl("vcpucount", "linuxvm04", "--config") == (1, "\n", "error: Domain 'linuxvm04' is transient\n")


def test_wait(daemon, ctl):
    daemon.answers["GET", "/v1/domains/1/wait"] = lambda query, _: {"domain": domain("linuxvm01"), "reached": "timeout" not in query}
    assert ctl("wait", "1") == (0, "Domain linuxvm01 is shut off\n\n", "")
    assert daemon.requests[-1] == ("GET", "/v1/domains/1/wait", {"state": "shut off"})
    assert ctl("wait", "1", "--state", "paused,crashed", "--timeout", "3") == (
        1, "\n", "error: Domain 'linuxvm01' is shut off, not paused,crashed, after 3 s\n")
    assert ctl("wait", "1", "--state", "runing")[2].startswith("error: Unknown state 'runing'\n")


EVENTS = [{"time": 1.5, "event": "lifecycle", "domain": "linuxvm01", "uuid": None, "id": 1, "type": "Suspended", "detail": "Paused"},
          {"time": 2.0, "event": "reboot", "domain": "linuxvm01", "uuid": None, "id": 1, "type": None, "detail": None}]


def test_event(daemon, ctl):
    daemon.answers["GET", "/v1/events"] = [*EVENTS, None]
    assert ctl("event", "--all") == (0, "event 'lifecycle' for domain 'linuxvm01': Suspended Paused\nevents received: 1\n\n", "")
    status, out, _ = ctl("event", "--all", "--loop", "--timestamp", "--timeout", "3")
    assert (status, out) == (0, "1970-01-01 00:00:01.500+0000: event 'lifecycle' for domain 'linuxvm01': Suspended Paused\n"
                                "1970-01-01 00:00:02.000+0000: event 'reboot' for domain 'linuxvm01'\n"
                                "event loop timed out\nevents received: 2\n\n")
    out = ctl("event", "--event", "lifecycle", "--domain", "1", "--json")[1]
    assert json.loads(out)["type"] == "Suspended"
    assert daemon.requests[-1] == ("GET", "/v1/events", {"domain": "linuxvm01", "event": "lifecycle"})


def test_event_that_does_not_come(daemon, ctl):
    daemon.answers["GET", "/v1/events"] = [None]
    assert ctl("event", "--all", "--timeout", "1")[:2] == (1, "event loop timed out\nevents received: 0\n\n")
    assert ctl("event")[2] == "error: one of --list, --all, or --event <type> is required\n"
    assert ctl("event", "--event", "foo")[2].startswith("error: unknown event type foo\n")


def test_top_in_a_pipe_prints_turns(daemon, ctl):
    turn = iter(range(100))
    daemon.answers["GET", "/v1/stats"] = lambda *_: {"domains": [stats("linuxvm01", time=float(number := next(turn)),
                                                                       cpu_time_ns=number * 500_000_000, exits={"io": number * 1500})]}
    status, out, _ = ctl("top", "-n", "1")
    assert status == 0
    row = out.splitlines()[2].split()
    assert row[:4] == ["1", "linuxvm01", "running", "50.0"] and row[5] == "1.5K"
    usage = json.loads(ctl("top", "-n", "1", "--json")[1])["domains"][0]
    assert usage["cpu_percent"] == 50.0 and usage["exits_per_second"] == 1500.0


def test_stats_is_top_once(daemon, ctl):
    turn = iter(range(100))
    daemon.answers["GET", "/v1/stats"] = lambda *_: {"domains": [stats(name, time=float(number), cpu_time_ns=number * 500_000_000)
                                                                 for number in [next(turn)] for name in ("linuxvm01", "linuxvm02")]}
    status, out, error = ctl("stats", "--interval", "1")
    assert error == ""
    assert status == 0 and [row.split()[1:4] for row in out.splitlines()[2:4]] == [["linuxvm01", "running", "50.0"],
                                                                                   ["linuxvm02", "running", "50.0"]]
    assert [one["name"] for one in json.loads(ctl("stats", "linuxvm02", "--json")[1])["domains"]] == ["linuxvm02"]
    assert "failed to get domain 'nobody'" in ctl("stats", "nobody")[2]


@pytest.mark.parametrize("sort", ["cpu", "id"])
def test_top_leaves_out_what_ends_meanwhile(daemon, ctl, sort):
    daemon.answers["GET", "/v1/stats"] = {"domains": [stats("linuxvm01", None), stats("linuxvm02", 2)]}
    status, out, err = ctl("top", "-n", "1", "--sort", sort)
    assert (status, err) == (0, "") and "linuxvm02" in out and "linuxvm01" not in out


def test_kvmappctl_is_light(daemon):
    """What list imports: none of the slow modules, and of our own only what it needs."""
    slow = ("re", "enum", "json", "socket", "http", "argparse", "asyncio", "typing", "subprocess", "select", "readline", "os")
    program = ("import sys; sys.path.insert(0, sys.argv[1]); from kvmapp.cli.main import main; main(['list', '--all'])\n"
               f"print([name for name in {slow} if name in sys.modules and name not in sys.builtin_module_names])\n"
               "print(sorted(name for name in sys.modules if name.startswith('kvmapp.')))")
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program, str(ROOT)], capture_output=True, text=True, check=True,
                          env={**os.environ, "KVMAPP_DEFAULT_URI": daemon.uri})
    assert done.stdout.splitlines()[-2:] == ["[]", str(sorted(
        f"kvmapp.{name}" for name in ("cli", "cli.index", "cli.listing", "cli.main", "cli.parse", "cli.render", "cli.session",
                                      "cli.table", "cli.uri", "client", "errors")))]
