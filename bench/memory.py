"""What a running Linux guest costs the host beyond its own memory: a domain of the daemon, `kvmapp run`, and QEMU microvm.

Method: the same guest boots to its /init and sleeps, twice under each VMM: a program's text is private to the one process that has it
mapped, and no second one pays for it. Then the mappings of the second are added up (/proc/PID/smaps), without the largest one, which is
the guest's memory. Private is what one more guest costs; Pss shares out what several processes have together, such as the pages that a
domain of the daemon has from the process that it was forked from. The kernel's own memory is not in it.
    python -m bench memory [the options of bench boot]
The guest must go on after it has shown --marker: the init of the lab's guest and of a native one sleep with `run=sleep,600`.
"""
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import boot
from bench.exits import host
from bench.start import Kvmapp, run
from kvmapp.client import Client, of

GOAL = 5.0                                           # MiB
MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ")
SLEEP = "run=sleep,600"
NAMES = ("bench1", "bench2")
LOOKS, LOOK_EVERY = 40, 0.5                          # seconds


@dataclass(frozen=True)
class Cost:
    pss: float                                       # MiB
    private: float


def beyond_ram(pid: int) -> Cost:
    """Of all mappings but the largest."""
    mappings: list[dict[str, int]] = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if found := MAPPING.match(line):
            mappings.append({"size": int(found[2], 16) - int(found[1], 16)})
        elif line.endswith(" kB"):
            name, _, rest = line.partition(":")
            mappings[-1][name] = int(rest.split()[0])
    mappings.remove(max(mappings, key=lambda one: one["size"]))
    return Cost(sum(one["Pss"] for one in mappings) / 1024,
                sum(one["Private_Clean"] + one["Private_Dirty"] for one in mappings) / 1024)


def settled(pid: int) -> Cost:
    """When it no longer changes: a VMM gives back what it needed for the start."""
    last = beyond_ram(pid)
    for _ in range(LOOKS):
        time.sleep(LOOK_EVERY)
        now = beyond_ram(pid)
        if abs(now.private - last.private) < 0.1:
            return now
        last = now
    return last


def of_process(command: list, marker: str) -> Cost:
    """Of the second one of it."""
    with booted(command, marker), booted(command, marker) as process:
        return settled(process.pid)


@contextmanager
def booted(command: list, marker: str) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(list(map(str, command)), cwd=boot.ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    try:
        assert process.stdout
        seen = b""
        while marker.encode() not in seen:
            part = process.stdout.read1()
            if not part:
                raise SystemExit(f"error: no '{marker}' from: {' '.join(map(str, command))}\n{seen[-1500:].decode(errors='replace')}")
            seen += part
        yield process
    finally:
        process.kill()
        process.communicate()


def of_domain(options, folder: Path) -> Cost:
    """The second domain that the daemon started."""
    ours = Kvmapp(folder, 0)
    try:
        for name in ("kernel", "initrd"):
            (folder / name).write_bytes(Path(getattr(options, name)).read_bytes())
        for name in NAMES:
            file, output = folder / f"{name}.conf", folder / f"{name}.out"
            file.write_text(f"name = {name}\nmemory = {options.memory} MiB\n[boot]\nkernel = {folder}/kernel\ninitrd = {folder}/initrd\n"
                            f'cmdline = "{options.append}"\n[serial 0]\ntype = file\npath = {output}\n')
            output.touch()
            run([*ours.words, "define", file])
            run([*ours.words, "start", name])
            while options.marker not in output.read_text(errors="replace"):
                time.sleep(0.05)                         # a file cannot be awaited
        with Client(str(ours.socket)) as client:
            return settled(client.get(of(name))["pid"])
    finally:
        for name in NAMES:                               # it would outlive its daemon
            subprocess.run([*ours.words, "destroy", name], capture_output=True, check=False)
        ours.process.terminate()
        ours.process.wait()


def main(arguments: list[str]) -> None:
    options = boot.parse("bench memory", arguments)
    options.append = f"{options.append} {SLEEP}"
    vmms = boot.commands(options)
    with tempfile.TemporaryDirectory(prefix="kvmapp-bench-", dir="/var/tmp") as folder:
        costs = {"kvmappctl start": of_domain(options, Path(folder))}
    costs |= {name: of_process(command, options.marker) for name, command in vmms.items()}
    show(costs, options)


def show(costs: dict[str, Cost], options) -> None:
    print(f"\nMemory beyond the guest's own: {Path(options.kernel).name}, {options.memory} MiB, one vCPU, asleep after its boot")
    print(f"host: {host()}")
    print(f"method: /proc/PID/smaps of the second of two, without the guest's memory, MiB; goal: at most {GOAL:g}\n")
    print(f"{'VMM':<22}{'Pss':>10}{'private':>10}{'private, kvmappctl start / it':>32}")
    mine = costs["kvmappctl start"].private
    for name, cost in costs.items():
        print(f"{name:<22}{cost.pss:>10.1f}{cost.private:>10.1f}{mine / cost.private:>32.2f}")
