"""A guest that works: stock Debian whose disk and network are busy (loads/), saved and restored as often as one likes.

Its loads tell of every file and message on the console, so that what a restored guest gets done is awaited there. By itself, in the
nested host, for a guest that is to go on under another kernel:

    python3 -m tests.guest.working start DISK FILE      boots Debian from the disk, sees it work, saves it
    python3 -m tests.guest.working go-on DISK FILE      restores it, sees it work with the right clock, saves it again
    python3 -m tests.guest.working end DISK FILE        restores it, sees it work, ends it; its disk is whole and holds what was written
"""
import hashlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.guest.guest import BOOT_SECONDS, POWERED_OFF, SAVED, Guest, Machine, kvmapp_command

LOADS = Path(__file__).parent / "loads"
GUEST_ADDRESS = "10.77.0.2"
ECHO_PORT = 7
DONE = 1                                                # whole files and messages that a guest is seen to get done
WORK_SECONDS = 120                                      # upper bounds, for a nested host on a busy machine
SAVE_SECONDS = 120
CLOCK_SECONDS = 1.0
LOAD_LINE = re.compile(r"^(?:disk|net) \d+ ok\n", re.MULTILINE)
TROUBLE = re.compile(r"stall|lockup|oops|\bbug\b|panic|hung|blocked for|error|warning|unstable|timed? ?out|call trace|reset", re.IGNORECASE)


def furnish(disk: Path) -> None:
    """Puts the loads on Debian's root disk."""
    for load in LOADS.iterdir():
        subprocess.run(["debugfs", "-w", "-R", f"write {load} /opt/{load.name}", disk], check=True, capture_output=True)


def restored(file: Path) -> Guest:
    return Guest([sys.executable, "-m", "kvmapp", "run", "--restore", str(file), "--save", str(file)])


@dataclass
class Look:
    """How the guest is."""

    clock_error: float                                  # of its wall clock, in seconds
    up: float                                           # CLOCK_BOOTTIME, which no setting of the wall clock changes
    before: float                                       # the host's time around the look
    after: float
    sectors: int                                        # read from its disk since it booted

    def gained(self, earlier: "Look") -> float:
        """Seconds that CLOCK_BOOTTIME went more than the host's clock."""
        passed = self.up - earlier.up
        return error_within(passed - (self.after - earlier.before), passed - (self.before - earlier.after))


def error_within(least: float, most: float) -> float:
    """The smallest error that there may be, where it is known between two bounds."""
    return max(least, 0.0) + min(most, 0.0)


class Worker:
    """The guest. After a restore its console is another process's."""

    def __init__(self, console: Guest, loads: tuple[str, ...], file: Path):
        self.consoles = [console]                       # of this process and the one before it
        self.loads = loads
        self.file = file                                # where it is saved to

    @classmethod
    def boot(cls, disk: Path, file: Path, echo: str = "", tap: str = "", lab: Path = Path("/lab")) -> "Worker":
        """Debian with its loads at work: the disk's, and with a tap the network's, against the echo server at the address."""
        furnish(disk)
        machine = Machine(lab / "vmlinuz", lab / "initrd.gz", append="console=ttyS0 root=/dev/vda panic=-1 quiet", memory=256, vcpus=2,
                          disks=[str(disk)], taps=[tap] if tap else [], options=["--save", str(file)])
        worker = cls(Guest(kvmapp_command(machine)), ("disk", "net") if tap else ("disk",), file)
        with worker.shown_when_it_fails():
            worker.console.log_in()
            worker.start_loads({"disk": "", "net": f"{echo} {ECHO_PORT}"})
            worker.works()
        return worker

    @classmethod
    def restore(cls, file: Path, loads: tuple[str, ...]) -> "Worker":
        worker = cls(restored(file), loads, file)
        with worker.shown_when_it_fails():
            worker.await_sign()
        return worker

    @contextmanager
    def shown_when_it_fails(self) -> Iterator[None]:
        """Its consoles; and it does not outlive the failure."""
        try:
            yield
        except BaseException:
            print(*(console.console for console in self.consoles), sep="\n-- then:\n")
            self.console.kill()
            raise

    @property
    def console(self) -> Guest:
        return self.consoles[-1]

    def start_loads(self, arguments: dict[str, str]) -> None:
        """No echo: it would run into the loads' lines."""
        self.console.run("stty -echo; set +m; dmesg -C")
        if "net" in self.loads:
            self.console.run("card=$(ls /sys/class/net | grep -v lo); "
                             f"ip address add {GUEST_ADDRESS}/24 dev $card; ip link set $card up")
        for load in self.loads:
            self.console.run(f"((perl /opt/{load} {arguments[load]} && echo {load} ended || echo {load} failed) &)")

    def run(self, command: str) -> str:
        """What a command prints between the lines of the loads."""
        return LOAD_LINE.sub("", self.console.run(command) + "\n").strip()

    def works(self) -> dict[str, int]:
        """Waits until every load got something done; the numbers of what they have done."""
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        while any(last.get(load, 0) < first.get(load, 0) + DONE for load in self.loads) or len(last) < len(self.loads):
            found = self.console.expect(r"^(disk|net) (?:(\d+) ok|failed)\n", WORK_SECONDS)
            assert found[2], f"the guest's {found[1]} load found something wrong"
            last[found[1]] = int(found[2])
            first.setdefault(found[1], last[found[1]])
        return last

    def save(self) -> None:
        self.console.process.send_signal(signal.SIGUSR1)
        assert self.console.wait(SAVE_SECONDS) == SAVED

    def go_on(self) -> None:
        """From the saved file, in a new process."""
        self.console.kill()
        self.consoles[:] = [self.console, restored(self.file)]
        self.await_sign()

    def await_sign(self) -> None:
        """Something is heard of the restored guest: before, its terminal would not take what is typed."""
        self.console.expect(r" ok\n", WORK_SECONDS)

    def look(self) -> "Look":
        """Checks that the guest's wall clock is the host's, within the time that the question takes, and that its kernel complains of
        nothing."""
        before, wall = time.monotonic(), time.time()
        answer = self.run("read up idle </proc/uptime; read reads merged sectors more </sys/block/vda/stat; "
                          "echo $EPOCHREALTIME $up $sectors; dmesg")
        after, end = time.monotonic(), time.time()
        told, *log = answer.splitlines()
        now, up, sectors = map(float, told.split())
        error = error_within(now - end, now - wall)
        assert abs(error) < CLOCK_SECONDS, f"the guest's clock is wrong by {error:+.3f} s"
        assert not [line for line in log if TROUBLE.search(line)]
        return Look(error, up, before, after, int(sectors))

    def end(self, disk: Path) -> None:
        """The loads find everything in order, it powers off, and its disk is whole and holds what they wrote."""
        self.console.run("touch /run/stop")
        left = set(self.loads)
        while left:
            found = self.console.expect(r"^(disk|net) (ended|failed)\n", WORK_SECONDS)
            assert found[2] == "ended", f"the guest's {found[1]} load found something wrong"
            left.discard(found[1])
        sums = [line.split() for line in self.run("cd /var/load; md5sum *").splitlines()]
        self.console.send("poweroff")
        assert self.console.wait(BOOT_SECONDS) == POWERED_OFF
        checked = subprocess.run(["e2fsck", "-fn", disk], stdout=subprocess.PIPE, text=True, check=False)
        assert checked.returncode == 0, checked.stdout
        assert sums
        for digest, name in sums:
            content = subprocess.run(["debugfs", "-R", f"cat /var/load/{name}", disk], stdout=subprocess.PIPE, check=True).stdout
            assert hashlib.md5(content).hexdigest() == digest, f"{name} on the disk is not what the guest wrote"


def main(step: str, disk: Path, file: Path) -> None:
    worker = Worker.boot(disk, file) if step == "start" else Worker.restore(file, ("disk",))
    with worker.shown_when_it_fails():
        done = worker.works()
        print(f"{step}: {done['disk']} files, clock {worker.look().clock_error:+.3f} s")
        if step == "end":
            worker.end(disk)
        else:
            worker.save()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
