"""What the tables have in common whose guests are Linux, under `kvmapp run` and under QEMU: the kernel, the commands, a load for them."""
import argparse
import shutil
import subprocess
from pathlib import Path

from bench._program import ROOT, program
from bench.exits import is_older
from kvmapp.core import Kvm
from tests.lab import initramfs

LAB_KERNEL, LAB_INITRD = Path("/lab/vmlinuz"), Path("/lab/initramfs.gz")
APPEND = "console=ttyS0 quiet reboot=t panic=-1 then=reboot"
LOADS = ROOT / "build" / "bench"
QBOOT = next((path for path in map(Path, ("/usr/share/qemu/qboot.rom", "/usr/share/qboot/bios.bin")) if path.exists()), None)
MACHINES = {"pc": ["-M", "pc"], "microvm": ["-M", "microvm,rtc=on,ioapic2=off", "-bios", str(QBOOT)]}


def parser_of(table: str, append: str | None = APPEND, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that all have."""
    parser = argparse.ArgumentParser(prog=table)
    parser.add_argument("--kernel")
    parser.add_argument("--initrd")
    parser.add_argument("--append", default=append)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--peer-cpu", default="host", metavar="MODEL")
    return parser


def find_kernel(options, table: str, arguments: list[str]) -> None:
    """Without a kernel, that of the lab, where the table is told anew on a host whose KVM interprets."""
    if options.kernel is None:
        if not LAB_KERNEL.exists():
            words = ["python3", "-m", *table.split(), *arguments]
            if not Kvm().interprets:
                raise SystemExit(f"error: which kernel?\nhint: {' '.join(words)} --kernel FILE --initrd FILE, or in the lab")
            raise SystemExit(subprocess.run([ROOT / "tests/lab/run", *words]).returncode)
        options.kernel, options.initrd = LAB_KERNEL, LAB_INITRD


def ours(options, machine: str, memory: object, initrd: object, append: str) -> list:
    return [*program(), "run", "--kernel", options.kernel, "--initrd", initrd, "--append", append, "--memory", str(memory),
            "--no-reboot", "--machine", machine]


def peer(options, machine: str, memory: object, initrd: object, append: str) -> list:
    return ["qemu-system-x86_64", *MACHINES[machine], "-enable-kvm", "-cpu", options.peer_cpu, "-m", str(memory), "-nodefaults",
            "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", options.kernel, "-initrd", initrd,
            "-append", append]


def build_load(load: Path) -> None:
    """A program of LOADS, static; before the lab is entered, which has no compiler."""
    source = ROOT / "bench" / "guests" / f"{load.name}.c"
    if shutil.which("gcc") and is_older(load, source):
        LOADS.mkdir(parents=True, exist_ok=True)
        subprocess.run(["gcc", "-O2", "-Wall", "-static", "-o", load, source], check=True)


def add_load(options, load: Path, initrd: Path) -> None:
    """Writes the guest's initrd with the load in it."""
    initrd.write_bytes(Path(options.initrd).read_bytes() + initramfs.archive({f"bin/{load.name}": initramfs.program(load)}))
