"""The bench around its tables: one that cannot be had costs no other, turns are fair, and the host's libvirt is left alone."""
import importlib
import os
import subprocess
import sys

import pytest

from bench import __main__ as bench
from bench import exits, start


def test_each_table_can_be_told():
    assert {"exits", "boot", "memory"} <= set(bench.TABLES)
    for name in bench.TABLES:
        assert callable(importlib.import_module(f"bench.{name}").main), name


def refuse(what):
    def main(arguments):
        raise what
    return main


@pytest.mark.parametrize(("end", "told"), [
    (SystemExit("error: no peer"), "error: no peer"), (SystemExit(3), "status 3"), (FileNotFoundError(2, "gone", "qemu"), "qemu")])
def test_a_table_that_cannot_be_had_costs_a_line_and_the_status(monkeypatch, capsys, end, told):
    ran = []
    monkeypatch.setattr(bench, "TABLES", ["exits", "boot", "memory"])
    monkeypatch.setattr("bench.exits.main", lambda arguments: ran.append("exits"))
    monkeypatch.setattr("bench.boot.main", refuse(end))
    monkeypatch.setattr("bench.memory.main", lambda arguments: ran.append("memory"))
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(SystemExit, match=r"no table from boot$"):
        bench.main()
    assert ran == ["exits", "memory"]
    assert told in capsys.readouterr().err


def test_a_table_that_was_told_in_the_lab_is_no_failure(monkeypatch):
    ran = []
    monkeypatch.setattr(bench, "TABLES", ["boot", "exits"])
    monkeypatch.setattr("bench.boot.main", refuse(SystemExit(0)))
    monkeypatch.setattr("bench.exits.main", lambda arguments: ran.append("exits"))
    monkeypatch.setattr(sys, "argv", ["bench"])
    bench.main()
    assert ran == ["exits"]


def test_each_is_the_first_in_every_second_turn():
    turns: list[str] = []

    def measure(name):
        turns.append(name)
        return name

    ours, peer = exits.in_turns(4, lambda: measure("ours"), lambda: measure("peer"))
    assert (ours, peer) == (["ours"] * 4, ["peer"] * 4)
    assert turns[::2] == ["ours", "peer", "ours", "peer"]
    assert [exits.order(turn, "ab") for turn in range(3)] == [["a", "b"], ["b", "a"], ["a", "b"]]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_libvirts_folders_are_not_the_hosts():
    """The host is one whose folders can be thrown away."""
    host = ["unshare", "--mount", "sh", "-ec", "for one in /etc /run /var/lib /var/cache; do mount -t tmpfs host $one; done\n"
            '"$@"; echo "$PLACES"; ls $PLACES', "sh"]
    places = "/etc/libvirt /run/libvirt /var/cache/libvirt /var/lib/libvirt"
    inside = ["sh", "-ec", "for one in $PLACES; do ls $one; touch $one/bench; done; ls /etc/libvirt"]
    done = subprocess.run([*host, *start.APART, *inside], env={**os.environ, "PLACES": places}, capture_output=True, text=True, check=False)
    if done.returncode and "permission denied" in done.stderr.lower():
        pytest.skip("this host lets nobody mount")
    assert done.stdout.split() == ["bench", *places.split(), *(f"{place}:" for place in places.split())], done.stderr
