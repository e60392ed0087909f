"""Stock Debian with systemd on a virtio disk: login, a root file system that stays whole, shutdown, power button."""
import hashlib
import subprocess

import pytest

from tests.guest.guest import BOOT_SECONDS, POWERED_OFF, RESET


def assert_clean(disk):
    checked = subprocess.run(["e2fsck", "-fn", disk], stdout=subprocess.PIPE, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def content_of(disk, path):
    return subprocess.run(["debugfs", "-R", f"cat {path}", disk], stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.parametrize(("append", "vcpus", "end"), [
    ("", 1, "poweroff"),
    ("", 4, "power button"),
    ("acpi=off", 1, "reboot"),                           # without ACPI there is nothing that could switch it off
])
def test_login_work_and_a_clean_end(debian, root_disk, append, vcpus, end):
    log_in_work_and_end(debian(append, vcpus=vcpus), root_disk, vcpus, end)


def test_four_vcpus_of_an_mp_table(nested_paging, debian, root_disk, lab):
    log_in_work_and_end(debian("acpi=off", vcpus=4, kernel=lab / "vmlinux-amd64"), root_disk, 4, "reboot")


def log_in_work_and_end(guest, root_disk, vcpus, end):
    guest.log_in()
    assert guest.run("nproc") == str(vcpus)
    assert "rw" in guest.run("findmnt -no OPTIONS /").split(",")
    guest.run("dd if=/dev/urandom of=/var/data bs=1M count=16 2>&1 && sync && echo 3 >/proc/sys/vm/drop_caches")
    digest = guest.run("sha256sum </var/data").split()[0]
    guest.run(f"echo {digest} >/var/digest")
    if end == "power button":
        guest.press_power_button()
    else:
        guest.send(end)
    assert guest.wait(BOOT_SECONDS) == (RESET if end == "reboot" else POWERED_OFF)
    assert_clean(root_disk)
    assert content_of(root_disk, "/var/digest").decode().strip() == digest
    assert hashlib.sha256(content_of(root_disk, "/var/data")).hexdigest() == digest


def test_reboot_finds_the_disk_as_it_was_left(debian, root_disk):
    guest = debian(vcpus=2, reboots=True)
    guest.log_in()
    guest.run("echo before >/var/told")
    guest.send("reboot")
    guest.log_in()
    assert guest.run("cat /var/told") == "before"
    guest.send("poweroff")
    assert guest.wait(BOOT_SECONDS) == POWERED_OFF
    assert_clean(root_disk)


def test_more_disks_read_only_and_with_a_serial_number(debian, tmp_path):
    plain, sealed = tmp_path / "plain.img", tmp_path / "sealed.img"
    plain.write_bytes(bytes(32 << 20))
    sealed.write_bytes(b"sealed" + bytes((1 << 20) - 6))
    guest = debian(disks=[f"{plain},serial=PLAIN-7", f"{sealed},readonly=on"])
    guest.log_in()
    assert guest.run("cat /sys/block/vdb/serial") == "PLAIN-7"
    assert guest.run("cat /sys/block/vdb/ro /sys/block/vdc/ro").split() == ["0", "1"]
    assert guest.run("cat /sys/block/vdb/size /sys/block/vdc/size").split() == ["65536", "2048"]
    assert guest.run("head -c 6 /dev/vdc") == "sealed"
    assert "Operation not permitted" in guest.run("! dd if=/dev/zero of=/dev/vdc count=1 2>&1")
    guest.run("mke2fs -q /dev/vdb && mount /dev/vdb /mnt && head -c 8M /dev/urandom >/mnt/data && sync")
    used = plain.stat().st_blocks
    guest.run("rm /mnt/data && sync && fstrim /mnt && umount /mnt")
    assert plain.stat().st_blocks < used - (7 << 20) // 512
    guest.send("poweroff")
    assert guest.wait(BOOT_SECONDS) == POWERED_OFF
    assert_clean(plain)
    assert sealed.read_bytes()[:6] == b"sealed"
