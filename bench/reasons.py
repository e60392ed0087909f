"""Why a booting guest's vCPU leaves the guest: KVM's own counters for one boot, under `kvmapp run` and under QEMU microvm and pc.

Method: each VMM boots the same kernel and initrd once, from its start to the guest's reset (bench boot's guest); then KVM's binary
statistics of the vCPU are read: ours as `kvmapp run --timing` prints them, QEMU's by QMP's query-stats. They are counts, not times: a
second run gives nearly the same. Those that leave for user space are counted by us alone (the `io` and `mmio` of KVM_RUN); of QEMU
the kernel knows only the MMIO ones.
    python -m bench reasons [the options of bench boot]
"""
import json
import re
import socket
import subprocess
import tempfile
from pathlib import Path

from bench import boot
from bench.exits import host
from bench.restore import ask

TOLD = re.compile(r"^ +(\d+) +([\w:. ]+)$", re.MULTILINE)
SHOWN = {"exits": "all exits", "io": "  to the VMM: port I/O", "mmio": "  to the VMM: memory-mapped I/O",
         "mmio_exits": "  MMIO, by the kernel's count", "halt_exits": "  HLT", "irq_exits": "  a host interrupt",
         "irq_window_exits": "  a window for an interrupt", "pf_taken": "page faults taken", "pf_fixed": "  of them mended",
         "insn_emulation": "instructions emulated", "irq_injections": "interrupts injected", "tlb_flush": "TLB flushes",
         "invlpg": "INVLPG"}


def ours(command: list) -> dict[str, int]:
    done = subprocess.run([*map(str, command), "--timing"], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                          cwd=boot.ROOT, timeout=300)
    counters = {name.removeprefix("to kvmapp: ").removesuffix(".sum"): int(number) for number, name in TOLD.findall(done.stderr)}
    if done.returncode not in (0, boot.RESET) or "exits" not in counters:
        raise SystemExit(f"error: status {done.returncode}, no counters from: {' '.join(map(str, command))}\n{done.stderr[-1500:]}")
    return counters


def peer(command: list, folder: Path) -> dict[str, int]:
    """The guest's reset leaves QEMU there, stopped, to be asked."""
    path = folder / "qmp"
    words = [*map(str, command), "-no-shutdown", "-qmp", f"unix:{path},server=on,wait=on"]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        with connect(path, process) as client, client.makefile("rw") as lines:
            client.settimeout(300)
            lines.readline()                             # the greeting
            ask(lines, {"execute": "qmp_capabilities"})
            while json.loads(lines.readline()).get("event") not in ("SHUTDOWN", "STOP"):
                pass
            answer = ask(lines, {"execute": "query-stats", "arguments": {"target": "vcpu"}})
    finally:
        process.kill()
        process.communicate()
        path.unlink(missing_ok=True)
    return {one["name"].replace("-", "_"): one["value"] for one in answer[0]["stats"] if isinstance(one["value"], int)}


def connect(path: Path, process: subprocess.Popen) -> socket.socket:
    """QEMU waits for this before its guest starts."""
    while process.poll() is None:
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(str(path))
            return client
        except (FileNotFoundError, ConnectionRefusedError):
            client.close()
    raise SystemExit(f"error: QEMU ended: {process.communicate()[1][-500:]}")


def main(arguments: list[str]) -> None:
    options = boot.parse("bench reasons", arguments)
    vmms = boot.commands(options)
    counters: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory(prefix="kvmapp-bench-") as folder:
        for name, command in vmms.items():
            counters[name] = ours(command) if name.startswith("kvmapp") else peer(command, Path(folder))
    show(counters, options)


def show(counters: dict[str, dict[str, int]], options) -> None:
    print(f"\nWhy the vCPU left the guest: one boot of {Path(options.kernel).name} to /init and its end, {options.memory} MiB")
    print(f"host: {host()}")
    print("method: KVM's binary statistics of the vCPU at the end; the rows of the VMM's own count are ours alone\n")
    print(f"{'':32}" + "".join(f"{name:>22}" for name in counters))
    for key, title in SHOWN.items():
        cells = [counts.get(key, 0 if key not in ("io", "mmio") else None) for counts in counters.values()]
        if any(cells):
            print(f"{title:32}" + "".join(f"{'-' if cell is None else cell:>22}" for cell in cells))
