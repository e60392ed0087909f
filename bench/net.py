"""A network card as a guest's programs meet it under `kvmapp run` and under QEMU, the same guest and load: throughput, packets, latency.

Method: a load of our own (bench/guests/netload.c, static) serves in two guests of each VMM and on the host, and one drives another for
the same time a row. The guests of both VMMs are up together and the VMMs take turns, row by row; the table shows medians over the rounds
and the median of the rounds' ratios, ours by QEMU's. What is counted is what arrived; the host's clock times it. A datagram has 64
bytes. With a tap: one a guest, in a bridge that bears the host's address, without and (where the host has it) with vhost-net. User mode:
libslirp in both; to the guest by a forwarded port. All in a network namespace that goes with its last process.
    python -m bench net [--kernel FILE --initrd FILE] [--append WORDS] [--machine pc|microvm] [--rounds N] [--seconds S]
                        [--peer-cpu MODEL] [--rows NAMES] [--ways NAMES]
The initrd's init must know `run=` (commas for spaces), as that of the lab does; the load is appended to it. Without a kernel:
Debian's stock cloud kernel, in the lab where this host's KVM only interprets guest code.
"""
import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import _guests
from bench._program import ROOT
from bench.exits import host, order

LOAD = _guests.LOADS / "netload"
OURS, PEER = "kvmapp", "QEMU"
PORT = 7000                                          # where every load serves; forwarded ports are counted from it
OUTSIDE = "198.18.0.1"                               # the host, as every guest reaches it; all are of RFC 2544's addresses
MEMORY = 256                                         # MiB
BOOT_PATIENCE, ROW_PATIENCE, END_PATIENCE = 180, 120, 20
NAMESPACE = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c",
             'mount -t sysfs sysfs /sys && exec "$@"', "sh"]


@dataclass(frozen=True)
class Row:
    """One load: who drives whom, `a` and `b` being guests."""
    title: str
    kind: str
    driver: str
    server: str
    scale: float = 1                                 # from what is counted to the unit that is shown


@dataclass(frozen=True)
class Way:
    """How guests are on the network, and what our goal is there."""
    title: str
    goal: float
    rows: tuple[str, ...]


ROWS = {"gh": Row("TCP guest -> host, Mbit/s", "tcp", "a", "host", 8e-6), "hg": Row("TCP host -> guest, Mbit/s", "tcp", "host", "a", 8e-6),
        "gg": Row("TCP guest -> guest, Mbit/s", "tcp", "a", "b", 8e-6), "ugh": Row("UDP guest -> host, packets/s", "udp", "a", "host"),
        "uhg": Row("UDP host -> guest, packets/s", "udp", "host", "a"), "rr": Row("TCP ping-pong, round trips/s", "rr", "a", "host")}
WAYS = {"tap": Way("tap, without vhost", 1, tuple(ROWS)), "vhost": Way("tap, with vhost", 0.9, tuple(ROWS)),
        "user": Way("user mode", 1, ("gh", "hg", "rr"))}
Rates = dict[str, dict[str, list[float]]]            # row → VMM → a figure a round


class Load:
    """A load that serves, in a guest or on the host: the host connects to `reached`, guests to `address`."""

    def __init__(self, command: list, log: Path, reached: tuple[str, int], address: str):
        self.command, self.log, self.reached, self.address = command, log, reached, address
        with open(log, "wb") as output:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)

    def await_it(self) -> None:
        deadline = time.monotonic() + BOOT_PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), self.connection("ping", 1) as lines:
                if lines.readline() == b"pong\n":
                    return
            time.sleep(0.05)
        self.give_up("no load answers")

    def drive(self, row: Row, server: "Load", seconds: float) -> float:
        """What arrived a second, as the host's clock has it."""
        times, word = {}, b""
        address, port = server.reached if row.driver == "host" else (server.address, PORT)
        try:
            with self.connection(f"drive {row.kind} {address} {port} {seconds:g}", seconds + ROW_PATIENCE) as lines:
                for line in lines:
                    word, *rest = line.split()
                    times[word] = time.monotonic()
                    if word == b"count" and int(rest[0]):
                        return int(rest[0]) * row.scale / (times[b"stop"] - times[b"start"])
        except (OSError, KeyError):
            pass
        return self.give_up(f"'{row.title}' ended after '{word.decode()}'")

    @contextlib.contextmanager
    def connection(self, order: str, timeout: float):
        with socket.create_connection(self.reached, timeout) as one:
            one.sendall(f"{order}\n".encode())
            with one.makefile("rb") as lines:
                yield lines

    def end(self) -> None:
        """In order where it can be; then it is killed."""
        with contextlib.suppress(OSError), self.connection("end", END_PATIENCE) as lines:
            lines.read()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_PATIENCE)
        self.process.kill()
        self.process.wait()

    def give_up(self, what: str) -> float:
        tail = self.log.read_bytes()[-1500:].decode(errors="replace")
        raise SystemExit(f"error: {what}, status {self.process.poll()}, from: {' '.join(map(str, self.command))}\n{tail}")


# -- the place

def lay_cables() -> None:
    """In our namespace: a bridge a VMM, with the host's address, and in it a tap a guest."""
    script = ["link set lo up", f"address add {OUTSIDE}/32 dev lo"]
    for vmm in (1, 2):
        script += [f"link add kvbench{vmm} type bridge", f"address add 198.18.{vmm}.1/24 dev kvbench{vmm}", f"link set kvbench{vmm} up"]
        for guest in "ab":
            tap = f"kvbench{vmm}{guest}"                                 # with room for all datagrams that are under way
            script += [f"tuntap add {tap} mode tap vnet_hdr", f"link set {tap} txqueuelen 2000 master kvbench{vmm} up"]
    for line in script:
        done = subprocess.run(["ip", *line.split()], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"error: ip {line}: {done.stderr.strip()}\nhint: it takes root, and a kernel with tun and bridge (modprobe)")


def check_place() -> None:
    if os.geteuid() != 0:
        raise SystemExit("error: network namespaces and taps take root\nhint: sudo .venv/bin/python -m bench net")
    for tool, package in (("ip", "iproute2"), ("unshare", "util-linux"), ("qemu-system-x86_64", "qemu-system-x86")):
        if shutil.which(tool) is None:
            raise SystemExit(f"error: {tool} is not installed\nhint: apt-get install {package}")
    if not LOAD.exists():
        raise SystemExit(f"error: there is no {LOAD}\nhint: python -m bench net, once where there is a gcc, builds it")


# -- guests

def ours(options, initrd: Path, append: str, net: str, _mac: str) -> list:
    return [*_guests.ours(options, options.machine, MEMORY, initrd, append), "--net", net]


def peers(options, initrd: Path, append: str, net: str, mac: str) -> list:
    card = f"virtio-net-pci,romfile=,netdev=net,mac={mac}" if options.machine == "pc" else f"virtio-net-device,netdev=net,mac={mac}"
    return [*_guests.peer(options, options.machine, MEMORY, initrd, append), "-netdev", net, "-device", card]


def start_guest(options, folder: Path, way: str, vmm: str, name: str) -> Load:
    """Guest `a` or `b` of a VMM."""
    number = 1 if vmm == OURS else 2
    last = 11 if name == "a" else 12
    mac = f"52:54:00:12:0{number}:{last}"
    if way == "user":
        address, reached, gateway = "10.0.2.15", ("127.0.0.1", PORT + number), ",10.0.2.2"
        nets = {OURS: f"user,forwards=tcp:{PORT + number}:{PORT},mac={mac}",
                PEER: f"user,id=net,hostfwd=tcp:127.0.0.1:{PORT + number}-{address}:{PORT}"}
    else:
        address, gateway, tap = f"198.18.{number}.{last}", f",198.18.{number}.1", f"kvbench{number}{name}"
        reached = address, PORT
        nets = {OURS: f"tap={tap},mac={mac},vhost={'yes' if way == 'vhost' else 'no'}",
                PEER: f"tap,id=net,ifname={tap},script=no,downscript=no,vhost={'on' if way == 'vhost' else 'off'}"}
    append = f"{options.append} run=netload,{PORT},eth0,{address}{gateway}"
    command = (ours if vmm == OURS else peers)(options, folder / "initrd.gz", append, nets[vmm], mac)
    return Load(command, folder / f"{vmm}-{name}.log", reached, address)


@contextlib.contextmanager
def guests(options, folder: Path, way: str) -> Iterator[dict[str, dict[str, Load]]]:
    """{VMM: {name: load}}, all of them serving."""
    with contextlib.ExitStack() as stack:
        loads: dict[str, dict[str, Load]] = {OURS: {}, PEER: {}}
        for vmm, theirs in loads.items():
            for name in "a" if way == "user" or "gg" not in options.rows else "ab":
                theirs[name] = start_guest(options, folder, way, vmm, name)
                stack.callback(theirs[name].end)
        for theirs in loads.values():
            for load in theirs.values():
                load.await_it()
        yield loads


# -- the measurement

def main(arguments: list[str]) -> None:
    parser = _guests.parser_of("bench net")
    parser.add_argument("--machine", choices=("pc", "microvm"), default="pc")
    parser.add_argument("--seconds", type=float, default=1)
    parser.add_argument("--rows", default=",".join(ROWS), metavar="NAMES", help=f"of {','.join(ROWS)}")
    parser.add_argument("--ways", default=",".join(WAYS), metavar="NAMES", help=f"of {','.join(WAYS)}")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)         # the namespace is entered
    options = parser.parse_args(arguments)
    options.rows, options.ways = options.rows.split(","), options.ways.split(",")
    for names, known in ((options.rows, ROWS), (options.ways, WAYS)):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"'{unknown[0]}': there are {', '.join(known)}")
    if options.inside:
        return measure(options)
    _guests.build_load(LOAD)
    if options.kernel is None:
        _guests.find_kernel(options, "bench net", arguments)
        arguments = [*arguments, "--kernel", str(options.kernel), "--initrd", str(options.initrd)]
        subprocess.run(["modprobe", "-aq", "tun", "bridge", "vhost_net"], check=False)
    check_place()
    status = subprocess.run([*NAMESPACE, sys.executable, "-m", "bench", "net", "--inside", *arguments], cwd=ROOT).returncode
    if status:
        raise SystemExit(status)
    return None


def measure(options) -> None:
    lay_cables()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _guests.add_load(options, LOAD, folder / "initrd.gz")
        here = Load([LOAD, str(PORT)], folder / "host.log", ("127.0.0.1", PORT), OUTSIDE)
        try:
            here.await_it()
            show_head(options)
            for way in options.ways:
                if way != "vhost" or Path("/dev/vhost-net").exists():
                    show(options, WAYS[way], rounds(options, folder, way, here))
                else:
                    print(f"\n{WAYS[way].title}: not measured, there is no /dev/vhost-net (modprobe vhost_net)")
        finally:
            here.end()


def rounds(options, folder: Path, way: str, here: Load) -> Rates:
    rates: Rates = {row: {OURS: [], PEER: []} for row in WAYS[way].rows if row in options.rows}
    with guests(options, folder, way) as loads:
        for turn in range(options.rounds):
            for name, figures in rates.items():
                for vmm, theirs in order(turn, loads.items()):
                    places = {"host": here, **theirs}
                    figures[vmm].append(places[ROWS[name].driver].drive(ROWS[name], places[ROWS[name].server], options.seconds))
    return rates


def show_head(options) -> None:
    print(f"\nA guest's network: {Path(options.kernel).name}, machine {options.machine}, one vCPU")
    print(f"host: {host()}")
    print(f"method: medians of {options.rounds} rounds in turns, {options.seconds:g} s a row; datagrams of 64 bytes", flush=True)


def show(options, way: Way, rates: Rates) -> None:
    print(f"\n{way.title + f'; goal: ratio >= {way.goal}':<42}{OURS:>10}{PEER:>12}{'ratio':>10}{'least':>8}")
    for row, figures in rates.items():
        ratios = [mine / its for mine, its in zip(figures[OURS], figures[PEER], strict=True)]
        print(f"{ROWS[row].title:<40}{median(figures[OURS]):>12.0f}{median(figures[PEER]):>12.0f}{median(ratios):>10.2f}{min(ratios):>8.2f}",
              flush=True)
