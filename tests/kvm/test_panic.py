"""Small guests under `kvmapp run` that panic, or hang with a watchdog: what the domain file says happens."""
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.boot_images import elf, pvh_note

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
CRASHED, RESET = 4, 3
PANIC = bytes.fromhex("66ba0505 b001 ee f4 ebfd")              # mov dx, 0x505; mov al, 1; out dx, al; hlt; jmp $-1


def config_store(place: int, value: int) -> bytes:
    """To the configuration space of slot 1: mov dx, port; mov eax, value; out dx, eax, for 0xCF8 and 0xCFC."""
    stores = ((0xCF8, 0x8000_0800 | place), (0xCFC, value))
    return b"".join(b"\x66\xba" + port.to_bytes(2, "little") + b"\xb8" + word.to_bytes(4, "little") + b"\xef" for port, word in stores)


def memory_store(address: int, value: int) -> bytes:
    """mov dword [address], value"""
    return b"\xc7\x05" + address.to_bytes(4, "little") + value.to_bytes(4, "little")


def watchdog_started(bar: int) -> bytes:
    """Both stages of a millisecond, then nothing any more."""
    steps = config_store(0x10, bar) + config_store(0x04, 2) + config_store(0x60, 7)       # decoding on; fast, no interrupt
    for register in (0, 4):
        steps += memory_store(bar + 0xC, 0x80) + memory_store(bar + 0xC, 0x86) + memory_store(bar + register, 1042)
    return steps + config_store(0x68, 2) + b"\xf4\xeb\xfd"


def run(tmp_path, code, text):
    image = tmp_path / "guest"
    image.write_bytes(elf(bits=32, entry=MIB, segments=((MIB, MIB, code, 4096),), notes=pvh_note(MIB)))
    file = tmp_path / "x.conf"
    file.write_text(f"name = x\nmemory = 16 MiB\n{text}\n[boot]\nkernel = {image}\n")
    return subprocess.run([sys.executable, "-m", "kvmapp", "run", str(file)], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=60)


@pytest.mark.kvm
def test_a_guest_that_panics_ends_as_crashed(tmp_path):
    done = run(tmp_path, PANIC, "[panic]")
    assert done.returncode == CRASHED, done.stderr
    assert done.stderr.endswith("shut off: the guest panicked\n")


@pytest.mark.kvm
@pytest.mark.parametrize(("text", "status", "said"), [
    ("on_reboot = destroy\n[watchdog]", RESET, "shut off: its watchdog expired"),
    ("[watchdog]\naction = poweroff", 0, "shut off: its watchdog expired"),
])
def test_a_guest_that_hangs_is_ended_by_its_watchdog(tmp_path, text, status, said):
    done = run(tmp_path, watchdog_started(0xC000_0000), text)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
