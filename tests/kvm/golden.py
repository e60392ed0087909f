"""Makes this version's golden files (golden/README.md). Needs a KVM."""
import gzip
import re
import shutil
import sys
import tempfile
from pathlib import Path

from kvmapp import __version__, snapshot, statefile
from kvmapp.boot.cpuid import ECX, ECX_HYPERVISOR, EDX, FEATURE_REGISTERS, V2_DEMANDS
from kvmapp.probe import IMAGE
from tests.kvm.counting import Guest

FOLDER = Path(__file__).with_name("golden")
# The features of a CPU as every host has it, those too whose KVM interprets.
KEPT = {(1, ECX): ECX_HYPERVISOR, **{place: sum(1 << bit for bit in V2_DEMANDS[place]) for place in ((1, EDX), (0x8000_0001, EDX))}}


def main() -> int:
    for machine in ("pc", "microvm"):
        with tempfile.TemporaryDirectory() as folder:
            saved, golden = (Path(folder, name) for name in ("saved", "golden"))
            guest = Guest(lay_out(machine, Path(folder)), "--save", saved)
            try:
                guest.count(3)
                log = guest.save()
            finally:
                guest.close()
            if guest.process.returncode != 6 or re.search("^fail ", log, re.MULTILINE):
                print(log, file=sys.stderr)
                return 1
            simplify(saved, golden)
            target = FOLDER / f"{__version__}-{machine}.save.gz"
            target.write_bytes(gzip.compress(golden.read_bytes(), mtime=0))
            print(f"{target}: {target.stat().st_size} bytes")
    return 0


def lay_out(machine: str, folder: Path) -> Path:
    """The domain file of golden/MACHINE.conf in this folder, with the files that it names."""
    (folder / "disk.img").write_bytes(bytes(1 << 20))
    shutil.copy(IMAGE, folder)
    return Path(shutil.copy(FOLDER / f"{machine}.conf", folder))


def simplify(saved: Path, golden: Path) -> None:
    """The same state, of a guest that was shown no feature but KEPT: hosts differ, and each of them shall restore it."""
    with open(saved, "rb") as source, open(golden, "wb") as target:
        state = statefile.read(source.fileno(), saved.name)
        machine = snapshot.restore(state)
        try:
            machine_state = state.state["machine"]
            machine_state["cpuids"] = [[simple(entry) for entry in one] for one in machine_state["cpuids"]]
            statefile.write(target.fileno(), state.config, state.state, machine.memory)
        finally:
            machine.close()


def simple(entry: list) -> list:
    registers = FEATURE_REGISTERS.get((entry[0], entry[1]), {})
    return [value & KEPT.get((entry[0], place), 0) if place in registers else value for place, value in enumerate(entry)]


if __name__ == "__main__":
    sys.exit(main())
