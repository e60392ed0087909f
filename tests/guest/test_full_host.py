"""The host's file system fills up under a stock guest that writes to its ext4: nothing of it fails, and nothing is lost."""
import subprocess

from tests.guest.guest import ANSWER_SECONDS, BOOT_SECONDS, POWERED_OFF
from tests.smalldisk import make_room, small_disk, sparse

MIB = 1 << 20


def test_a_file_system_under_which_the_room_ends(boot, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    with small_disk(folder, 16 * MIB):
        disk = sparse(folder / "disk.img", 64 * MIB)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=1", disk], check=True)
        guest = boot(append="console=ttyS0 panic=-1 quiet shell=ttyS0", disks=[str(disk)])
        guest.expect("GUEST UP", BOOT_SECONDS)
        guest.expect("# ")
        guest.run("mkdir -p /mnt && mount -t ext4 /dev/vda /mnt && dd if=/dev/urandom of=/tmp/data bs=1M count=32 2>/dev/null")
        digest = guest.run("md5sum </tmp/data")
        guest.send("cp /tmp/data /mnt/data && sync && echo WRIT''TEN")
        for _ in range(2):                               # it tries again by itself, and there is no room yet
            guest.expect("the host has no room for what the guest writes to vda: paused", BOOT_SECONDS)
        make_room(folder, 128 * MIB)
        guest.expect("WRITTEN", 2 * ANSWER_SECONDS)
        guest.run("umount /mnt && mount -t ext4 /dev/vda /mnt")
        assert guest.run("md5sum </mnt/data") == digest
        assert "rw," in guest.run("grep /mnt /proc/mounts") and guest.run("dmesg | grep -i 'i/o error' || true") == ""
        guest.send("umount /mnt; poweroff -f")
        assert guest.wait() == POWERED_OFF
        checked = subprocess.run(["e2fsck", "-fn", disk], stdout=subprocess.PIPE, text=True, check=False)
        assert checked.returncode == 0, checked.stdout
