"""The command line of tests/lab/run: finds the parts, boots the nested host, runs the command, hands on its status."""
import argparse
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.lab import images
from tests.lab.errors import LabError, NestedHostDied, TimeIsUp
from tests.lab.nested import BOOT_TIMEOUT, Hardware, NestedHost, SavedTerminal, Share, new_folder

CHECKOUT = Path(__file__).resolve().parents[2]
TIMED_OUT = 124
DIED = 125


def main(arguments: list[str]) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if not (options.command or options.keep or options.stop):
        parser.error("name a command, or --keep for a shell")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))             # and tidy up on the way out
    try:
        if options.name or options.stop:
            return _run_in_named(options)
        return _run_in_fresh(options)
    except LabError as error:
        print(f"lab: error: {error}", file=sys.stderr)
        return {NestedHostDied: DIED, TimeIsUp: TIMED_OUT}.get(type(error), 1)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tests/lab/run",
        description="Runs CMD in /src (this checkout) of the nested host, a plain Debian host with a true /dev/kvm. "
        "Exit status: the command's; 124 when the time was up; 125 when the nested host died.")
    add = parser.add_argument
    add("--keep", action="store_true", help="then an interactive root shell")
    add("--cpus", type=int, default=2, metavar="N")
    add("--memory", type=int, default=3072, metavar="MIB")
    add("--timeout", type=float, default=1800, metavar="S", help="seconds for CMD (1800; 0: no limit)")
    add("--out", type=Path, metavar="DIR", help="a folder of this machine that is /out there")
    add("--disk", type=Path, metavar="FILE", help="the host's disk, kept for the next boot (made when absent)")
    add("--boot", action="store_true", help="boot with the scripts of /etc/init.d, shut down with them")
    add("--systemd", action="store_true", help="the same with systemd and its units")
    add("--name", help="use the nested host NAME, boot it if it is not up, leave it up")
    add("--stop", metavar="NAME", help="end the nested host NAME")
    add("--packages", default="", metavar="LIST", help="Debian packages that its disk has besides, with commas between")
    add("--kernel", default="", metavar="VERSION", help="another kernel for the nested host: 6.12 (Debian's linux-image-6.12-amd64)")
    add("--qemu", action="append", default=[], metavar="WORD", help="one more word on QEMU's command line")
    add("command", nargs=argparse.REMAINDER, metavar="CMD", help="one word: a script; several: a program")
    return parser


def _run_in_fresh(options: argparse.Namespace) -> int:
    folder = new_folder()
    host = NestedHost(folder, options.out or folder / "shared")
    try:
        with SavedTerminal():
            _boot(host, options)
            status = _run(host, options)
            if options.keep:
                host.shell()
            host.power_off()
            return status
    except (TimeIsUp, SystemExit):                      # somebody waits no longer: why it took so long
        print(host.last_words(), flush=True)
        raise
    finally:
        host.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _run_in_named(options: argparse.Namespace) -> int:
    checkout = hashlib.sha256(str(CHECKOUT).encode()).hexdigest()[:8]       # the name is this checkout's own
    folder = Path("/tmp") / f"kvmapp-lab-{os.getuid()}-{checkout}-{options.name or options.stop}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        host = NestedHost(folder, options.out or folder / "shared")
        if options.stop:
            if host.alive():
                host.attach()
                host.power_off()
            shutil.rmtree(folder)
            return 0
        if host.alive():
            host.attach()
        else:
            _boot(host, options)
        try:
            return _run(host, options)
        except (TimeIsUp, NestedHostDied):
            host.kill()                                 # the command would go on, and answer in the place of the next
            raise


def _boot(host: NestedHost, options: argparse.Namespace) -> None:
    found = images.obtain(options.packages.split(",") if options.packages else [], options.kernel,
                          "systemd" if options.systemd else "sysvinit")
    host.out.mkdir(parents=True, exist_ok=True)
    disk = overlay(options.disk, found)
    hardware = Hardware(options.cpus, options.memory, disk, options.boot or options.systemd, options.keep, options.qemu)
    begin = time.monotonic()
    host.start(found, hardware, Share(CHECKOUT, site_packages(), host.out), outlive=bool(options.name))
    try:
        host.run(["true"], BOOT_TIMEOUT)
    except TimeIsUp:
        host.kill()
        raise LabError(f"the nested host did not come up within {BOOT_TIMEOUT} s", "the machine may be too busy; "
                       "tests/lab/README.md tells how to watch it boot") from None
    print(f"lab: the nested host was up in {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)


def _run(host: NestedHost, options: argparse.Namespace) -> int:
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    return host.run(command, options.timeout) if command else 0


def overlay(disk: Path | None, found: images.Images) -> Path | None:
    """The persistent disk, made over the image when it is not there yet."""
    if disk and not disk.exists():
        command: list[str | Path] = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", found.disk.resolve(), disk]
        made = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if made.returncode:
            raise LabError(f"cannot make the disk {disk}: {made.stderr.strip()}")
    return disk


def site_packages() -> Path:
    """The Python packages that build.sh has installed; the nested host's Python 3.11 shares them."""
    found = sorted((CHECKOUT / ".venv").resolve().glob("lib/python3.*/site-packages"))
    if not found:
        raise LabError(f"there is no Python environment for the nested host to share ({CHECKOUT}/.venv)", "./build.sh build")
    if found[0].parent.name != "python3.11":
        raise LabError(f"the nested host has Python 3.11, this build is for {found[0].parent.name}",
                       "PYTHON=python3.11 ./build.sh lab ...")
    return found[0]
