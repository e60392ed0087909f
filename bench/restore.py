"""A saved guest to its first sign of life: `kvmapp run --restore` against QEMU's `-incoming`, the same kernel, initrd and memory.

Method: under each VMM the guest boots, fills part of its memory and then prints without end; it is saved (SIGUSR1; QMP `migrate` to a
file by cat). Then both are restored in turns; the time is from the start of the process to the first byte on the guest's
serial port, which is a few instructions after its first. The file lies in the page cache for both.
    python -m bench restore --kernel FILE --initrd FILE --append WORDS [--memory MIB] [--rounds N] [--peer-cpu MODEL]
The guest's /init must print --marker without end.
"""
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

from bench._guests import ours, parser_of, peer
from bench._program import ROOT, program
from bench.boot import show_times
from bench.exits import host, in_turns

GOAL = 0.1


def monitored_peer(options, monitor: Path) -> list:
    """It is stopped when it is saved, and would come back so: the file must not tell."""
    return [*peer(options, "microvm", options.memory, options.initrd, options.append), "-qmp", f"unix:{monitor},server=on,wait=off",
            "-global", "migration.store-global-state=off"]


def start(command: list) -> subprocess.Popen:
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            bufsize=0)


def await_marker(process: subprocess.Popen, marker: bytes) -> None:
    seen = b""
    while marker not in seen:
        part = process.stdout.read(65536)
        if not part:
            raise SystemExit(f"error: the guest ended before it showed {marker!r}: {seen[-500:]!r} {process.stderr.read()[-500:]!r}")
        seen += part


def save_ours(options, path: Path) -> None:
    process = start([*ours(options, "pc", options.memory, options.initrd, options.append), "--save", path])
    await_marker(process, options.marker.encode())
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=300)
    if process.returncode != 6:
        raise SystemExit(f"error: not saved, status {process.returncode}")


def save_peer(options, path: Path, monitor: Path) -> None:
    process = start(monitored_peer(options, monitor))
    await_marker(process, options.marker.encode())
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(monitor))
        lines = client.makefile("rw")
        lines.readline()
        for command in ({"execute": "qmp_capabilities"}, {"execute": "stop"},
                        {"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": 1 << 40}},
                        {"execute": "migrate", "arguments": {"uri": f"exec:cat > {path}"}}):
            ask(lines, command)
        while ask(lines, {"execute": "query-migrate"}).get("status") not in ("completed", "failed"):
            time.sleep(0.05)
    process.kill()
    process.communicate()


def ask(lines, command: dict) -> dict:
    lines.write(json.dumps(command) + "\n")
    lines.flush()
    while True:
        answer = json.loads(lines.readline())
        if "error" in answer:
            raise SystemExit(f"error: QEMU: {answer['error']}")
        if "return" in answer:
            return answer["return"]


def first_byte(command: list) -> float:
    began = time.monotonic()
    process = start(command)
    part = process.stdout.read(1)
    seconds = time.monotonic() - began
    process.kill()
    rest = process.communicate()
    if not part:
        raise SystemExit(f"error: nothing came back: {rest[1][-500:]!r}")
    return seconds


def main(arguments: list[str]) -> None:
    parser = parser_of("bench restore", append=None, rounds=7)
    parser.add_argument("--memory", type=int, default=512, metavar="MIB")
    parser.add_argument("--marker", default="tick")
    options = parser.parse_args(arguments)
    if options.kernel is None or shutil.which("qemu-system-x86_64") is None:
        print("restore: left out\nhint: needs qemu-system-x86_64, and --kernel, --initrd and --append of a guest that prints for ever")
        return
    with tempfile.TemporaryDirectory(prefix="kvmapp-bench-") as folder, contextlib.suppress(KeyboardInterrupt):
        mine, its, monitor = Path(folder, "kvmapp.save"), Path(folder, "qemu.save"), Path(folder, "qmp")
        save_ours(options, mine)
        save_peer(options, its, monitor)
        restored, incoming = in_turns(
            options.rounds, partial(first_byte, [*program(), "run", "--restore", mine]),
            partial(first_byte, [*monitored_peer(options, monitor), "-incoming", f"exec:cat {its}"]))
        show(options, {"kvmapp run --restore": restored, "QEMU microvm -incoming": incoming}, mine.stat().st_size, its.stat().st_size)


def show(options, times: dict[str, list[float]], mine: int, its: int) -> None:
    print(f"\nRestore: a guest of {options.memory} MiB to its first byte on the serial port")
    print(f"host: {host()}; files of {mine >> 20} and {its >> 20} MiB")
    print(f"method: medians of {options.rounds} rounds in turns, process start to first byte; goal: ratio <= {GOAL}\n")
    show_times(times)
