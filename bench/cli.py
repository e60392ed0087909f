"""What a command costs: `kvmappctl list --all` with 50 domains against `virsh list --all` with 50 domains, daemons running.

Method: both daemons are started in a temporary folder with 50 domains each, and the two commands run in turns, so that a busy moment
of the host falls on both. Ours from source as `python -I -S`. The peer's domains are those of libvirt's test driver in a libvirtd of
its own: they come over libvirtd's socket as QEMU's would, and nothing of the host is touched. Where libvirtd cannot run, the driver
runs inside virsh, which spares virsh the socket and so favours it; the table says which it was. CPU time is that of the command
alone, not of its daemon.
    python -m bench cli [--rounds N] [--domains N]
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.exits import order
from kvmapp.client import connect

ROOT = Path(__file__).resolve().parents[1]
GOAL = 0.5
PATIENCE = 60.0                                      # seconds that a daemon may take to answer
KVMAPPCTL = "import sys; sys.path.insert(0, sys.argv.pop(1)); from kvmapp.cli.main import run; run(sys.argv[1:])"


@dataclass(frozen=True)
class Sample:
    wall: float                                      # milliseconds
    cpu: float


@dataclass(frozen=True)
class Side:
    name: str
    words: list[str]                                 # before the verb's words


def measure(side: Side, verb: list[str]) -> Sample:
    """One run of a command; it must succeed."""
    words = [*side.words, *verb]
    silence = os.open(os.devnull, os.O_RDWR)
    began = time.perf_counter()
    child = os.posix_spawn(words[0], words, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, silence, number) for number in (0, 1)])
    _, status, usage = os.wait4(child, 0)
    wall = (time.perf_counter() - began) * 1e3
    os.close(silence)
    if status:
        raise SystemExit(f"error: {' '.join(words)} failed with status {os.waitstatus_to_exitcode(status)}")
    return Sample(wall, (usage.ru_utime + usage.ru_stime) * 1e3)


def await_socket(process: subprocess.Popen, path: Path, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            connect(str(path)).close()
            return
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.05)
    process.kill()
    process.wait()
    raise RuntimeError((log.read_text().strip().splitlines() or ["it ended without a word"])[-1])


def start_kvmapp(folder: Path, count: int) -> tuple[subprocess.Popen, Side]:
    domains = folder / "etc/kvmapp/domains"
    domains.mkdir(parents=True)
    group = "root" if os.getuid() == 0 else str(os.getgid())
    (folder / "etc/kvmapp/kvmapp.conf").write_text(f"unix_sock_group = {group}\n")
    for number in range(count):
        (domains / f"vm{number}.conf").write_text(f"name = vm{number}\nmemory = 1024 MiB\n[disk vda]\nsource = /data/vm{number}.img\n")
    program = "import sys; from kvmapp.daemon.main import main; sys.exit(main(sys.argv[1:]))"
    log = folder / "log"
    process = subprocess.Popen([sys.executable, "-c", program, "--root", folder], cwd=ROOT, stdout=log.open("w"),
                               stderr=subprocess.STDOUT)
    socket = folder / "run/kvmapp/kvmapp.sock"
    await_socket(process, socket, log)
    uri = f"kvmapp:///system?socket={socket}"
    return process, Side("kvmappctl", [sys.executable, "-I", "-S", "-c", KVMAPPCTL, str(ROOT), "-c", uri])


def start_libvirt(folder: Path, count: int) -> tuple[subprocess.Popen | None, Side]:
    """libvirtd and virsh, or virsh alone. Raises SystemExit without virsh."""
    virsh, libvirtd = shutil.which("virsh"), shutil.which("libvirtd")
    if not virsh:
        raise SystemExit("error: virsh is not installed\nhint: apt install libvirt-clients libvirt-daemon")
    nodes = folder / "node.xml"
    nodes.write_text("<node>" + "".join(
        f"<domain type='test'><name>vm{number}</name><memory>1048576</memory><os><type>hvm</type></os></domain>"
        for number in range(count)) + "</node>")
    process = None
    try:
        if not libvirtd:
            raise RuntimeError("it is not installed")
        (folder / "libvirtd.conf").write_text(f'unix_sock_dir = "{folder}"\nauth_unix_rw = "none"\n')
        log, no_drivers = folder / "log", folder / "drivers"
        no_drivers.mkdir()              # only the test driver, which is not a module: libvirtd leaves the host alone
        process = subprocess.Popen([libvirtd, "-f", folder / "libvirtd.conf", "-p", folder / "pid"], stdout=log.open("w"),
                                   stderr=subprocess.STDOUT, env={**os.environ, "LIBVIRT_DRIVER_DIR": str(no_drivers)})
        await_socket(process, folder / "libvirt-sock", log)
        side = Side("virsh, libvirtd", [virsh, "-c", f"test+unix://{nodes}?socket={folder}/libvirt-sock"])
        measure(side, ["list"])
    except (RuntimeError, SystemExit) as error:
        print(f"note: libvirtd does not run here ({error}); virsh runs its test driver by itself, without a daemon")
        process, side = None, Side("virsh, no daemon", [virsh, "-c", f"test://{nodes}"])
    return process, side


VERBS = {"list --all": ["list", "--all"], "list --name": ["list", "--all", "--name"], "dominfo": ["dominfo", "vm7"],
         "domstate": ["domstate", "vm7"], "nodeinfo": ["nodeinfo"]}


def turns_of(rounds: int, sides: list[tuple[Side, list[str]]]) -> list[list[Sample]]:
    """The sample of each side, turn by turn; every second turn begins with the last of them."""
    return [order(turn, [measure(*side) for side in order(turn, sides)]) for turn in range(rounds)]


def show(sides: tuple[Side, Side], bare: Side, rounds: int) -> bool:
    """One line a verb; whether the first one meets the goal."""
    ours, peer = sides
    print(f"{'':14}{'kvmappctl':>12}{'virsh':>12}{'ratio':>8}{'CPU ours':>12}{'CPU virsh':>12}{'ratio':>8}")
    met, floor = True, []
    for name, verb in VERBS.items():
        turns = turns_of(rounds, [(ours, verb), (peer, verb), (bare, [])])
        floor += [turn[2] for turn in turns]
        wall, cpu = ([median(getattr(turn[number], key) for turn in turns) for number in (0, 1)] for key in ("wall", "cpu"))
        ratio = median(mine.wall / other.wall for mine, other, _ in turns)
        cpu_ratio = median(mine.cpu / other.cpu for mine, other, _ in turns)
        print(f"{name:14}{wall[0]:>9.1f} ms{wall[1]:>9.1f} ms{ratio:>8.2f}{cpu[0]:>9.1f} ms{cpu[1]:>9.1f} ms{cpu_ratio:>8.2f}")
        if name == "list --all":
            met = ratio <= GOAL
    print(f"{'bare Python':14}{median(one.wall for one in floor):>9.1f} ms{'':20}{median(one.cpu for one in floor):>9.1f} ms"
          "   (what `python -I -S -c ''` alone costs)")
    return met


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench cli")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--domains", type=int, default=50)
    given = parser.parse_args(arguments)
    processes: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory(prefix="kvmapp-bench-") as text:
        folders = [Path(text) / name for name in ("kvmapp", "libvirt")]
        for folder in folders:
            folder.mkdir()
        try:
            peer_process, peer = start_libvirt(folders[1], given.domains)
            processes += [peer_process] if peer_process else []
            our_process, ours = start_kvmapp(folders[0], given.domains)
            processes.append(our_process)
            print(f"{given.domains} domains; peer: {peer.name} {version_of(peer)}; medians of {given.rounds} rounds")
            met = show((ours, peer), Side("bare Python", [sys.executable, "-I", "-S", "-c", ""]), given.rounds)
            print(f"goal for list --all: ratio at most {GOAL}: {'met' if met else 'NOT met'}")
        finally:
            for process in processes:
                process.terminate()
                process.wait()


def version_of(side: Side) -> str:
    return subprocess.run([side.words[0], "-v"], capture_output=True, text=True, check=True).stdout.strip()
