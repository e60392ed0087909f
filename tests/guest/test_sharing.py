"""Folders of the host's, as a stock kernel mounts them by virtio-fs."""
import hashlib
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.guest.guest import ANSWER_SECONDS, BOOT_SECONDS, POWERED_OFF
from tests.processes import descendants

BUS = {"pc": "virtio_pci", "microvm": "virtio_mmio"}
MEGABYTE = 1 << 20


def boot_sharing(boot, *shares, machine="pc", **settings):
    """A guest that has loaded what it takes, at its prompt."""
    guest = boot(append=f"console=ttyS0 panic=-1 quiet shell=ttyS0 modules={BUS[machine]},virtiofs",
                 options=["--machine", machine, *(word for share in shares for word in ("--share", share))], **settings)
    come_up(guest)
    return guest


def come_up(guest):
    guest.expect("GUEST UP", BOOT_SECONDS)
    guest.expect("# ")
    guest.run("mkdir -p /mnt/data /mnt/public; mount -t virtiofs data /mnt/data")


def kill_file_servers(guest):
    """The guest's own, not others of the machine; the old virtiofsd is two processes."""
    for pid in descendants(guest.process.pid):
        with suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text() == "virtiofsd\n":
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("machine", ["pc", "microvm"])
def test_files_go_both_ways(boot, tmp_path, machine):
    folder, public = tmp_path / "data", tmp_path / "public"
    folder.mkdir()
    public.mkdir()
    sent = os.urandom(4 * MEGABYTE)
    (folder / "from-host").write_bytes(sent)
    (public / "notice").write_text("read me\n")
    guest = boot_sharing(boot, f"data={folder}", f"public={public},readonly=on,cache=none", machine=machine)
    guest.run("mount -t virtiofs public /mnt/public")
    assert guest.run("md5sum </mnt/data/from-host", 4 * ANSWER_SECONDS).split()[0] == hashlib.md5(sent).hexdigest()
    guest.run("dd if=/dev/urandom of=/mnt/data/from-guest bs=256k count=12; sync", 4 * ANSWER_SECONDS)
    guest.run("mkdir /mnt/data/folder; mv /mnt/data/from-guest /mnt/data/folder/x")
    digest = guest.run("md5sum </mnt/data/folder/x").split()[0]
    written = (folder / "folder" / "x").read_bytes()
    assert len(written) == 3 * MEGABYTE and hashlib.md5(written).hexdigest() == digest
    (folder / "later").write_text("the host was here\n")
    assert guest.run("cat /mnt/data/later; rm /mnt/data/later") == "the host was here"
    assert sorted(os.listdir(folder)) == ["folder", "from-host"]
    assert guest.run("cat /mnt/public/notice; touch /mnt/public/x 2>&1 || true").split("\n")[-1].endswith("Read-only file system")
    assert os.listdir(public) == ["notice"]
    guest.send("poweroff -f")
    assert guest.wait() == POWERED_OFF


def test_a_guest_that_reboots_mounts_again(boot, tmp_path):
    (tmp_path / "file").write_text("still here\n")
    guest = boot_sharing(boot, f"data={tmp_path}", reboots=True)
    assert guest.run("cat /mnt/data/file") == "still here"
    guest.send("reboot -f")
    come_up(guest)
    assert guest.run("cat /mnt/data/file") == "still here"
    guest.send("poweroff -f")
    assert guest.wait() == POWERED_OFF


def test_a_file_server_that_dies_costs_the_mount_and_nothing_else(boot, tmp_path):
    (tmp_path / "file").write_text("there\n")
    guest = boot_sharing(boot, f"data={tmp_path}")
    assert guest.run("ls /mnt/data") == "file"
    kill_file_servers(guest)
    guest.expect("fs-data: host error: the file server has gone")
    assert "not connected" in guest.run("cat /mnt/data/new 2>&1 || true")
    assert guest.run("echo alive") == "alive"
    guest.send("poweroff -f")
    assert guest.wait() == POWERED_OFF
