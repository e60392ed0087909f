"""The second half of `./build.sh demo`: stock Debian on a virtio disk, from its kernel to a login prompt, and off by the power button.

Runs where tests/guest runs: here when KVM is hardware virtualization, else in the lab.
"""
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.guest.guest import BOOT_SECONDS, Guest, Machine, kvmapp_command
from tests.guest.place import CHECKOUT, hardware_virtualization

NESTED_LAB = Path("/lab")


def main() -> int:
    if hardware_virtualization():
        return show()
    print("This host's KVM interprets guest code, too slowly for a stock kernel: the lab's nested host is started for it.\n", flush=True)
    return subprocess.call([CHECKOUT / "tests/lab/run", "--timeout", "600", "python3", "-m", "tests.guest.demo"])


def show() -> int:
    lab = NESTED_LAB
    if not lab.is_dir():
        from tests.lab import images
        lab = images.guests()
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "debian.img"
        subprocess.run(["e2image", "-ra", lab / "root.img", disk], check=True, capture_output=True)
        machine = Machine(kernel=lab / "vmlinuz", initrd=lab / "initrd.gz", append="console=ttyS0 root=/dev/vda quiet",
                          disks=[str(disk)], rng=True, vcpus=2)
        command = kvmapp_command(machine)
        print("$ kvmapp " + " ".join(f"'{word}'" if " " in word else word for word in command[3:]), flush=True)
        return watch(Guest(command))


def watch(guest: Guest) -> int:
    """Boots, logs in, looks around, presses the power button."""
    started = time.monotonic()
    try:
        guest.expect("login: ", BOOT_SECONDS)
        print(guest.console, flush=True)
        print(f"-- at the prompt after {time.monotonic() - started:.0f} s; logging in", flush=True)
        guest.send("root")
        guest.expect(r"root@\S+# ")
        for command in ("uname -sr", "systemd-detect-virt", "lsblk -o NAME,SIZE,TYPE,MOUNTPOINTS"):
            print(f"root@guest:~# {command}\n{guest.run(command)}", flush=True)
        print("-- pressing the power button", flush=True)
        guest.press_power_button()
        status = guest.wait(120)
        print(f"-- the guest powered off; exit status {status}")
        return status
    finally:
        guest.kill()


if __name__ == "__main__":
    sys.exit(main())
