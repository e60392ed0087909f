"""The verbs of disks: what they ask the daemon for, and virsh's words and columns."""
import json

import pytest

from kvmapp.cli.disks import COUNTERS
from kvmapp.errors import GuestImageError, UsageError
from tests.unit.canned_daemon import domain, stats

GIB = 1 << 30
SIZES = {"name": "vda", "source": "/data/x1.img", "capacity": 20 * GIB, "allocation": 3 << 19, "physical": 20 * GIB, "error": None}
GONE = {**SIZES, "name": "vdb", "source": "/data/y.img", "capacity": None, "allocation": None, "physical": None,
        "error": "No such file or directory"}


@pytest.mark.parametrize(("words", "body"), [
    (["vda", "20G"], {"disk": "vda", "bytes": 20 * GIB, "shrink": False}),
    (["/data/x1.img", "--size", "20971520"], {"disk": "/data/x1.img", "bytes": 20 * GIB, "shrink": False}),
    (["--path", "vda", "--size", "1024b", "--shrink"], {"disk": "vda", "bytes": 1024, "shrink": True}),
    (["vda", "--capacity"], {"disk": "vda", "bytes": None, "shrink": False})])
def test_blockresize(daemon, ctl, words, body):
    path = body["disk"]
    assert ctl("blockresize", "linuxvm01", *words) == (0, f"Block device '{path}' is resized\n\n", "")
    assert daemon.requests[-1] == ("POST", "/v1/domains/linuxvm01/disks/resize", body)


def test_blockresize_refused(daemon, ctl):
    status, _, error = ctl("blockresize", "linuxvm01", "vda")
    assert status == 1 and error == ("error: command 'blockresize' requires --size option\n"
                                     "hint: kvmappctl blockresize linuxvm01 vda --size 20G; or --capacity\n")
    assert "mutually exclusive" in ctl("blockresize", "linuxvm01", "vda", "20G", "--capacity")[2] and not daemon.requests
    daemon.answers["POST", "/v1/domains/linuxvm01/disks/resize"] = GuestImageError("it would be lost", "--shrink")
    assert ctl("blockresize", "linuxvm01", "vda", "20G") == (
        1, "\n", "error: Failed to resize block device 'vda'\nerror: it would be lost\nhint: --shrink\n")


def test_domblkerror(daemon, ctl):
    assert ctl("domblkerror", "linuxvm01") == (0, "No errors found\n\n", "")
    full = domain("linuxvm01", 1)
    full["disks"][0]["error"] = "no space"
    daemon.answers["GET", "/v1/domains/linuxvm01"] = full
    assert ctl("domblkerror", "linuxvm01") == (0, "vda: no space\n\n", "")
    assert json.loads(ctl("domblkerror", "linuxvm01", "--json")[1]) == {"errors": {"vda": "no space"}}


def test_domblkinfo(daemon, ctl):
    daemon.answers["GET", "/v1/domains/linuxvm01/disks"] = {"disks": [SIZES, GONE]}
    expected = "Capacity:       21474836480\nAllocation:     1572864\nPhysical:       21474836480\n\n"
    for path in "vda", "/data/x1.img":
        assert ctl("domblkinfo", "linuxvm01", path) == (0, expected, "")
    assert ctl("domblkinfo", "linuxvm01", "vda", "--human")[1] == (
        "Capacity:       20.000 GiB\nAllocation:     1.500 MiB\nPhysical:       20.000 GiB\n\n")
    assert json.loads(ctl("domblkinfo", "linuxvm01", "vda", "--json")[1]) == SIZES
    lines = ctl("domblkinfo", "linuxvm01", "--all")[1].splitlines()
    assert [line.split() for line in lines if line] == [
        ["Target", "Capacity", "Allocation", "Physical"], ["-" * len(lines[1])], ["vda", "21474836480", "1572864", "21474836480"],
        ["vdb", "-", "-", "-"]]
    assert json.loads(ctl("domblkinfo", "linuxvm01", "--all", "--json")[1]) == {"disks": [SIZES, GONE]}


def test_domblkinfo_of_what_is_not_there(daemon, ctl):
    daemon.answers["GET", "/v1/domains/linuxvm01/disks"] = {"disks": [SIZES, GONE]}
    assert ctl("domblkinfo", "linuxvm01", "vdb") == (1, "\n", "error: Cannot look at disk 'vdb' (/data/y.img): No such file or directory\n")
    assert ctl("domblkinfo", "linuxvm01", "vdx") == (1, "\n", "error: invalid argument: invalid path vdx not assigned to domain\n"
                                                     "hint: it has: vda, vdb; see kvmappctl domblklist linuxvm01\n")
    assert "requires <device> option" in ctl("domblkinfo", "linuxvm01")[2]


def test_domblkstat(daemon, ctl):
    def counted(name, first):
        return {"name": name, "source": f"/data/{name}.img", **{key: first + number for number, key in enumerate(COUNTERS)}}
    daemon.answers["GET", "/v1/domains/linuxvm01/stats"] = stats("linuxvm01", disks=[counted("vda", 1), counted("vdb", 11)])
    assert ctl("domblkstat", "linuxvm01", "vda") == (0, "".join(f"vda {line}\n" for line in (
        "rd_req 1", "rd_bytes 2", "wr_req 3", "wr_bytes 4", "errs 5", "flush_operations 6", "rd_total_times 7", "wr_total_times 8",
        "flush_total_times 9")) + "\n", "")
    assert ctl("domblkstat", "linuxvm01", "/data/vda.img")[1].startswith("/data/vda.img rd_req 1\n")
    assert ctl("domblkstat", "linuxvm01")[1].startswith(" rd_req 12\n rd_bytes 14\n")
    assert ctl("domblkstat", "linuxvm01", "vda", "--human")[1].startswith("Device: vda\n number of read operations:      1\n")
    assert ctl("domblkstat", "linuxvm01", "vdx")[2] == (
        "error: Failed to get block stats linuxvm01 vdx\nerror: invalid path: vdx\n"
        "hint: it has: vda, vdb; see kvmappctl domblklist linuxvm01\n")
    daemon.answers["GET", "/v1/domains/linuxvm01/stats"] = stats("linuxvm01", None)
    assert ctl("domblkstat", "linuxvm01", "vda")[2].endswith("error: Requested operation is not valid: domain is not running\n")


@pytest.mark.parametrize(("words", "body"), [
    (["/data/y.img", "vdb"], {"name": "vdb", "settings": {"source": "/data/y.img"}}),
    (["/data/y.img", "vdb", "--cache", "none", "--io=threads", "--serial", "Y", "--mode", "readonly", "--targetbus", "virtio",
      "--subdriver", "raw", "--driver", "qemu", "--type", "disk", "--sourcetype", "file", "--live"],
     {"name": "vdb", "settings": {"source": "/data/y.img", "bus": "virtio", "format": "raw", "cache": "none", "io": "threads",
                                  "serial": "Y", "readonly": "yes"}, "live": True}),
    (["--source", "/data/../y.img", "--target", "vdb", "--persistent"],
     {"name": "vdb", "settings": {"source": "/y.img"}, "persistent": True}),
    (["/y.img", "vdb", "--address", "pci:0000.00.0x1f.0x0"], {"name": "vdb", "settings": {"source": "/y.img", "slot": "31"}})])
def test_attach_disk(daemon, ctl, words, body):
    assert ctl("attach-disk", "linuxvm01", *words) == (0, "Disk attached successfully\n\n", "")
    assert daemon.requests[-1] == ("POST", "/v1/domains/linuxvm01/disks", body)


@pytest.mark.parametrize("address", ["", "9", "pci:9", "pci:0000.00.09", "pci:0000.00.xx.0", "usb:0000.00.09.0", "pci:0001.00.09.0",
                                     "pci:0000.01.09.0", "pci:0000.00.09.1", "pci:0000.00.00.0", "pci:0000.00.20.0",
                                     "pci:0000.00.1_f.0", "pci:0000.00.09.-0", "pci:0000.00. 9.0"])
def test_attach_disk_at_no_address(daemon, ctl, address):
    status, _, error = ctl("attach-disk", "linuxvm01", "/y.img", "vdb", "--address", address)
    assert status == 1 and error.startswith(f"error: Invalid address: {address}") and error.endswith("hint: --address pci:0000.00.09.0\n")
    assert not daemon.requests


def test_attach_disk_by_a_path_from_here(daemon, ctl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ctl("attach-disk", "linuxvm01", "y.img", "vdb", "--config")
    assert daemon.requests[-1][2] == {"name": "vdb", "settings": {"source": f"{tmp_path}/y.img"}, "config": True}


def test_detach_disk(daemon, ctl):
    assert ctl("detach-disk", "linuxvm01", "vdb", "--live", "--config") == (0, "Disk detached successfully\n\n", "")
    assert daemon.requests[-1] == ("POST", "/v1/domains/linuxvm01/disks/detach", {"disk": "vdb", "live": True, "config": True})
    daemon.answers["POST", "/v1/domains/linuxvm01/disks/detach"] = UsageError("No disk found whose source path or target is vdb")
    assert ctl("detach-disk", "linuxvm01", "vdb")[2] == "error: No disk found whose source path or target is vdb\n"
