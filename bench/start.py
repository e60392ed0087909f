"""What a start costs: `kvmappctl start` and `destroy` against virsh, libvirt and QEMU with the same guest, and a hundred starts at once.

Method: both daemons run in the nested host (or on this host, where it has vmx or svm and libvirt: libvirtd then sees folders of its own
in the place of the host's, in a mount namespace), each with a domain of the same memory whose kernel is our probe guest and whose serial
port is a file; the two take turns. Measured are the command's return, the first byte that the guest prints, and the return of `destroy`.
kvmapp runs from a copy on the host's disk, from source. QEMU's guest comes up by way of SeaBIOS, as libvirt starts it. The hundred starts
are sent by as many threads to kvmapp's socket. Memory is the proportional set size (Pss) of each daemon with its domains defined and none
running.
    python -m bench start [--rounds N] [--parallel N] [--domains N]
"""
import argparse
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median, quantiles

from bench.cli import KVMAPPCTL, await_socket
from bench.exits import host, in_turns
from kvmapp.client import Client, of
from kvmapp.core import Kvm
from kvmapp.probe import IMAGE

ROOT = Path(__file__).resolve().parents[1]
GOAL = 0.5
PEER_PACKAGES = "libvirt-daemon,libvirt-daemon-driver-qemu,libvirt-clients"
PATIENCE = 120.0                                     # seconds that a guest may take to say something
CMDLINE = "steps=none mode=counter period=1000 report=serial"
MEBIBYTES = 32
NESTED_LAB = Path("/lab")                            # is there in the nested host, which nobody else uses
INSIDE = "KVMAPP_BENCH_APART"                        # in the environment: libvirt's folders are ours
APART = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", "for folder in /etc/libvirt /var/lib/libvirt /var/cache/libvirt "
         '/run/libvirt; do mkdir -p $folder; mount -t tmpfs libvirt $folder; done; exec "$@"', "sh"]
DAEMON = "import sys; sys.path.insert(0, sys.argv.pop(1)); from kvmapp.daemon.main import main; sys.exit(main(sys.argv[1:]))"


class Kvmapp:
    name = "kvmappctl"

    def __init__(self, folder: Path, count: int):
        self.folder = folder
        copy = folder / "program"
        shutil.copytree(ROOT / "kvmapp", copy / "kvmapp", ignore=shutil.ignore_patterns("*.c", "*.pyx"))
        self.kernel = copy / "kvmapp/probe/probe.elf"
        (folder / "etc/kvmapp/domains").mkdir(parents=True)
        folder.chmod(0o711)
        (folder / "etc/kvmapp/kvmapp.conf").write_text("unix_sock_group = root\n")
        (folder / "etc/kvmapp/guest.conf").write_text("user = nobody\ngroup = nogroup\n")
        for number in range(count):
            self.define(f"vm{number}", "type = null")
        self.define("measured", f"type = file\npath = {self.output}")
        self.socket = folder / "run/kvmapp/kvmapp.sock"
        log = folder / "log"
        self.process = subprocess.Popen([sys.executable, "-c", DAEMON, copy, "--root", folder], stdout=log.open("w"),
                                        stderr=subprocess.STDOUT)
        await_socket(self.process, self.socket, log)
        self.words = [sys.executable, "-I", "-S", "-c", KVMAPPCTL, copy, "-c", f"kvmapp:///system?socket={self.socket}"]

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def define(self, name: str, serial: str) -> None:
        (self.folder / f"etc/kvmapp/domains/{name}.conf").write_text(
            f"name = {name}\nmemory = {MEBIBYTES} MiB\n[boot]\nkernel = {self.kernel}\ncmdline = {CMDLINE}\n[serial 0]\n{serial}\n")

    def pids(self) -> list[int]:
        """The daemon and its zygote."""
        return [self.process.pid, *children(self.process.pid)]


class Libvirt:
    name = "virsh, QEMU"

    def __init__(self, folder: Path, count: int):
        self.folder = folder
        kernel = folder / "probe.elf"
        shutil.copy(IMAGE, kernel)
        folder.chmod(0o711)
        Path("/etc/libvirt/qemu.conf").write_text('user = "root"\ngroup = "root"\nsecurity_driver = "none"\nstdio_handler = "file"\n')
        (folder / "libvirtd.conf").write_text(f'unix_sock_dir = "{folder}"\nauth_unix_rw = "none"\n')
        make_user("libvirt-qemu")
        log = folder / "log"
        self.process = subprocess.Popen([shutil.which("libvirtd") or "libvirtd", "-f", folder / "libvirtd.conf", "-p", folder / "pid"],
                                        stdout=log.open("w"), stderr=subprocess.STDOUT)
        await_socket(self.process, folder / "libvirt-sock", log)
        self.words = ["virsh", "-q", "-c", f"qemu+unix:///system?socket={folder}/libvirt-sock"]
        for name in [*(f"vm{number}" for number in range(count)), "measured"]:
            file = folder / f"{name}.xml"
            file.write_text(f"<domain type='kvm'><name>{name}</name><memory unit='MiB'>{MEBIBYTES}</memory><os><type machine='pc'>hvm"
                            f"</type><kernel>{kernel}</kernel><cmdline>{CMDLINE}</cmdline></os><features><acpi/></features><devices>"
                            f"<serial type='file'><source path='{self.output}'/></serial><controller type='usb' model='none'/>"
                            "<memballoon model='none'/></devices></domain>")
            run([*self.words, "define", file])

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def pids(self) -> list[int]:
        return [self.process.pid]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def apart(words: list[str]) -> int:
    """Runs them where libvirt's folders are empty ones of their own; the status. The host's libvirtd, if there is one, notices nothing."""
    if os.geteuid():
        raise SystemExit("error: a libvirtd of QEMU guests takes root\nhint: run it as root, or tests/lab/run python3 -m bench start")
    return subprocess.run([*APART, *words], cwd=ROOT, env={**os.environ, INSIDE: "1"}).returncode


def make_user(name: str) -> None:
    """libvirtd looks for it though it is told of another; its package makes it, and brings much else."""
    with suppress(KeyError):
        pwd.getpwnam(name)
        return
    if not NESTED_LAB.is_dir():
        raise SystemExit(f"error: libvirtd wants a user {name}, and this host has none\nhint: apt-get install libvirt-daemon-system, or "
                         f"useradd --system --user-group {name}")
    run(["useradd", "--system", "--user-group", name])


def run(words: list) -> None:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(map(str, words))}: status {done.returncode}\n{done.stdout}{done.stderr}")


def measure(side: Kvmapp | Libvirt) -> dict[str, float]:
    """One life of the domain, seconds."""
    with open(side.output, "w"):
        pass                                         # empty: what is in it later, this guest printed
    began = time.monotonic()
    run([*side.words, "start", "measured"])
    returned = time.monotonic()
    while side.output.stat().st_size == 0:
        if time.monotonic() - began > PATIENCE:
            raise SystemExit(f"error: the guest of {side.name} said nothing in {PATIENCE:g} s")
        time.sleep(0.001)
    printed = time.monotonic()
    run([*side.words, "destroy", "measured"])
    return {"start returns": returned - began, "guest's first byte": printed - began, "destroy returns": time.monotonic() - printed}


def start_together(ours: Kvmapp, count: int) -> list[float]:
    """Seconds of each of `count` starts that are asked for at the same time; all must be up then."""
    gate = threading.Barrier(count)
    seconds: list[float] = []

    def start(name: str) -> None:
        with Client(str(ours.socket), timeout=600) as client:
            gate.wait()
            began = time.monotonic()
            client.post(of(name, "start"))
            seconds.append(time.monotonic() - began)

    threads = [threading.Thread(target=start, args=(f"vm{number}",)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Client(str(ours.socket), timeout=600) as client:
        states = {domain["name"]: domain["state"] for domain in client.get("/v1/domains")["domains"]}
        up = [name for name in states if name != "measured" and states[name] == "running"]
        for name in up:
            client.post(of(name, "destroy"))
    if len(seconds) != count or len(up) != count:
        raise SystemExit(f"error: {len(up)} of {count} domains run")
    return seconds


def memory_of(pids: list[int]) -> float:
    """Pss of these processes, MiB (proc(5), smaps_rollup)."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench start")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parallel", type=int, default=100)
    parser.add_argument("--domains", type=int, default=50)
    given = parser.parse_args(arguments)
    if Kvm().interprets:
        raise SystemExit(subprocess.run([ROOT / "tests/lab/run", "--packages", PEER_PACKAGES, "--", "python3", "-m", "bench", "start",
                                         *arguments]).returncode)
    if not shutil.which("libvirtd"):
        raise SystemExit(f"error: no peer: libvirtd is not installed\nhint: apt-get install {PEER_PACKAGES.replace(',', ' ')}")
    if not NESTED_LAB.is_dir() and INSIDE not in os.environ:
        raise SystemExit(apart([sys.executable, "-m", "bench", "start", *arguments]))
    with tempfile.TemporaryDirectory(prefix="kvmapp-bench-", dir="/var/tmp") as text:
        folders = [Path(text) / name for name in ("kvmapp", "libvirt")]
        for folder in (Path(text), *folders):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o711)
        ours, peer = Kvmapp(folders[0], max(given.domains, given.parallel)), Libvirt(folders[1], given.domains)
        try:
            show(ours, peer, given)
        finally:
            for process in (ours.process, peer.process):
                process.terminate()
                process.wait()


def show(ours: Kvmapp, peer: Libvirt, given: argparse.Namespace) -> None:
    mine, its = in_turns(given.rounds, partial(measure, ours), partial(measure, peer))
    print(f"\nStart and end of a domain with {MEBIBYTES} MiB: kvmapp against libvirt and QEMU, same guest")
    print(f"host: {host()}")
    print(f"method: medians of {given.rounds} rounds in turns; milliseconds; goal: ratio <= {GOAL}\n")
    print(f"{'':22}{ours.name:>14}{peer.name:>14}{'ratio':>8}")
    for key in mine[0]:
        ratio = median(one[key] / two[key] for one, two in zip(mine, its, strict=True))
        print(f"{key:22}{median(one[key] for one in mine) * 1e3:>14.1f}{median(two[key] for two in its) * 1e3:>14.1f}{ratio:>8.2f}")
    memory = memory_of(ours.pids()), memory_of(peer.pids())
    print(f"{'daemon, Pss in MiB':22}{memory[0]:>14.1f}{memory[1]:>14.1f}{memory[0] / memory[1]:>8.2f}"
          f"   (kvmapp with its zygote, and {max(given.domains, given.parallel)} domains; libvirtd with {given.domains})")
    seconds = start_together(ours, given.parallel)
    print(f"{given.parallel} starts at once: all up; median {median(seconds) * 1e3:.0f} ms, "
          f"p99 {quantiles(seconds, n=100)[98] * 1e3:.0f} ms, last {max(seconds) * 1e3:.0f} ms")
