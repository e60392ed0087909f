"""The one file: kvmappctl from it against virsh, its size and first steps, and what its processes hold of memory.

    list        `kvmappctl list --all` of 50 domains from an installed tree, quick way and whole program, against virsh's in turns
    steps       the copied file's first run (a private copy), and setup of an image
    memory      private memory (smaps_rollup: clean and dirty) of the daemon, of the processes beside it, and of a guest of 32 MiB;
                against libvirtd's and QEMU's, where they are installed

The tree is laid down in a temporary folder, under which a daemon of its own runs; nothing of the host is touched.
    python -m bench onefile [--rounds N] [--domains N]
"""
import argparse
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

from bench import cli
from kvmapp import laying
from onefile import build

GOAL = 0.1
PROBE = build.ROOT / "kvmapp/probe/probe.elf"
COUNTER = ("name = counter\nmemory = 32 MiB\n[boot]\nkernel = {kernel}\ncmdline = steps=none mode=counter report=serial period=500\n"
           "[serial 0]\n")


class Installed:
    """A tree in `folder` and a daemon of it, with so many domains."""

    def __init__(self, folder: Path, file: Path, count: int):
        image = folder / "image"
        subprocess.run([file, "setup", "--no-enable", "--root", image], check=True, capture_output=True)
        library = folder / "lib"
        with laying.locked(str(library)):
            tree = (image / "usr/lib/kvmapp/current").resolve()
            (tree / "kvmappctl").unlink()
            laying.lay(str(tree), str(library), tree.name, str(library), lambda line: None)
        self.home, self.programs = folder / "home", library / "current"
        domains = self.home / "etc/kvmapp/domains"
        domains.mkdir(parents=True)
        (self.home / "etc/kvmapp/kvmapp.conf").write_text("unix_sock_group = root\n")
        (self.home / "etc/kvmapp/guest.conf").write_text("user = nobody\ngroup = nogroup\n")
        for number in range(count):
            (domains / f"vm{number}.conf").write_text(f"name = vm{number}\nmemory = 1024 MiB\n[disk vda]\nsource = /data/vm{number}.img\n")
        self.uri = f"kvmapp:///system?socket={self.home}/run/kvmapp/kvmapp.sock"
        subprocess.run([self.programs / "kvmapp", "daemon", "--background", "--root", self.home], check=True)

    def close(self) -> None:
        subprocess.run([self.programs / "kvmapp", "daemon", "--stop", "--root", self.home], check=True)

    def pid(self) -> int:
        return int((self.home / "run/kvmapp/kvmapp.pid").read_text())


def private_kib(pid: int) -> int:
    told = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(number) for number in re.findall(r"^Private_\w+:\s+(\d+) kB", told, re.MULTILINE))


def show_list(one: Installed, peer: cli.Side, rounds: int) -> None:
    quick = cli.Side("quick", [str(one.programs / "kvmappctl")])
    whole = cli.Side("whole", [str(one.programs / "kvmappctl"), "-c", one.uri])
    os.environ["KVMAPP_DEFAULT_URI"] = one.uri
    verb = ["list", "--all"]
    cli.measure(quick, verb)
    turns = cli.turns_of(rounds, [(quick, verb), (whole, verb), (peer, verb)])
    print(f"{'':24}{'milliseconds':>14}{'of the peer':>14}")
    for number, name in enumerate(("kvmappctl, quick way", "kvmappctl, whole program", peer.name)):
        ratio = median(turn[number].wall / turn[2].wall for turn in turns)
        print(f"{name:24}{median(turn[number].wall for turn in turns):>14.1f}{ratio:>14.2f}")
        if number == 0:
            met = ratio <= GOAL
    print(f"goal for the quick way: ratio at most {GOAL}: {'met' if met else 'NOT met'}")


def seconds_of(*words: object) -> float:
    began = time.perf_counter()
    subprocess.run([str(word) for word in words], check=True, capture_output=True)
    return time.perf_counter() - began


def show_steps(file: Path, folder: Path, rounds: int) -> None:
    print(f"\nsize of the file: {file.stat().st_size / 1e6:.1f} MB (goal: at most 25)")
    copied = shutil.copy(file, folder / "copied")
    print(f"first run of the copied file (--version): {median(seconds_of(copied, '--version') for _ in range(rounds)):.2f} s")
    times = [seconds_of(copied, "setup", "--no-enable", "--root", folder / f"image{number}") for number in range(rounds)]
    print(f"setup: {median(times):.2f} s")


def show_memory(one: Installed, folder: Path, libvirtd: int | None) -> None:
    print("\nprivate memory, KiB")
    children = Path(f"/proc/{one.pid()}/task/{one.pid()}/children").read_text().split()
    print(f"{'kvmapp daemon':40}{private_kib(one.pid()):>8}")
    for pid in map(int, children):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().split(" ")
        print(f"{'  beside it: ' + ('zygote' if 'zygote' in words else words[1]):40}{private_kib(pid):>8}")
    if libvirtd:
        print(f"{'libvirtd (one driver)':40}{private_kib(libvirtd):>8}")
    if os.path.exists("/dev/kvm"):
        show_guests(one, folder)


def show_guests(one: Installed, folder: Path) -> None:
    """The same guest of 32 MiB, which prints a line twice a second."""
    kernel = Path(shutil.copy(PROBE, one.home))
    for path in (folder, one.home):
        path.chmod(0o755)
    conf = folder / "counter.conf"
    conf.write_text(COUNTER.format(kernel=kernel))
    for verb in (["define", str(conf)], ["start", "counter"]):
        subprocess.run([one.programs / "kvmappctl", *verb], check=True, capture_output=True)
    [pid] = subprocess.run(["pgrep", "-fx", "kvmapp: counter"], capture_output=True, text=True, check=True).stdout.split()
    time.sleep(2)
    print(f"{'a guest of 32 MiB, kvmapp':40}{private_kib(int(pid)):>8}")
    subprocess.run([one.programs / "kvmappctl", "destroy", "counter"], check=True, capture_output=True)
    if qemu := shutil.which("qemu-system-x86_64"):
        words = [qemu, "-nodefaults", "-no-user-config", "-M", "microvm", "-accel", "kvm", "-m", "32", "-display", "none",
                 "-serial", "null", "-kernel", str(kernel), "-append", "steps=none mode=counter report=serial period=500"]
        with subprocess.Popen(words, stderr=subprocess.PIPE) as peer:
            time.sleep(2)
            if peer.poll() is None:
                print(f"{'a guest of 32 MiB, QEMU microvm':40}{private_kib(peer.pid):>8}")
            peer.kill()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench onefile")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--domains", type=int, default=50)
    given = parser.parse_args(arguments)
    file = build.obtain() / "kvmapp"
    with tempfile.TemporaryDirectory(prefix="kvmapp-bench-") as text:
        folder = Path(text)
        (folder / "libvirt").mkdir()
        process, peer = cli.start_libvirt(folder / "libvirt", given.domains)
        one = Installed(folder, file, given.domains)
        try:
            print(f"{given.domains} domains; peer: {peer.name} {cli.version_of(peer)}; medians of {given.rounds} rounds in turns")
            show_list(one, peer, given.rounds)
            show_steps(file, folder, 3)
            show_memory(one, folder, process.pid if process else None)
        finally:
            one.close()
            if process:
                process.terminate()
                process.wait()
