"""Stock drivers on each way to a virtio device: the interface of before VIRTIO 1.0, virtio-mmio, packed rings, several queues."""
import hashlib
import os
import re
import socket
import subprocess
import threading

import pytest

from tests.guest.guest import BOOT_SECONDS, POWERED_OFF

QUIET = "console=ttyS0 panic=-1 quiet"
MEGABYTE = 1 << 20
VERSION_1, RING_PACKED = 32, 34                         # feature bits

# {kind: (options, feature bits that Linux must have agreed to, and must not)}
KINDS = {
    "transitional": ([], {VERSION_1}, {RING_PACKED}),
    "legacy": (["--virtio", "legacy"], set(), {VERSION_1, RING_PACKED}),
    "mmio": (["--machine", "microvm"], {VERSION_1}, {RING_PACKED}),
    "legacy-mmio": (["--machine", "microvm", "--virtio", "legacy"], set(), {VERSION_1, RING_PACKED}),
    "packed": (["--packed"], {VERSION_1, RING_PACKED}, set()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_disk_and_network(boot, tap, tmp_path, kind):
    options, agreed, refused = KINDS[kind]
    image = tmp_path / "disk.img"
    content = os.urandom(8 * MEGABYTE)
    image.write_bytes(content + bytes(8 * MEGABYTE))
    guest = boot(append=f"{QUIET} net=10.77.0.2/24 shell=ttyS0", taps=[tap], disks=[str(image)], rng=True, options=options)
    guest.expect("GUEST UP", BOOT_SECONDS)
    guest.expect("# ")
    devices = guest.run("cat /sys/bus/virtio/devices/*/features").split()
    assert len(devices) == 3
    for features in devices:
        bits = {number for number, bit in enumerate(features) if bit == "1"}
        assert agreed <= bits and not refused & bits
    check_disk(guest, image, content)
    check_network(guest)
    assert re.fullmatch(r"[0-9a-f ]+", guest.run("dd if=/dev/hwrng bs=16 count=1 2>/dev/null | od -An -tx1"))
    guest.send("poweroff -f")
    assert guest.wait() == POWERED_OFF


def check_disk(guest, image, content):
    """What is on the disk is read, and a copy of it arrives in the image by the time that sync returns."""
    digest = hashlib.md5(content).hexdigest()
    assert guest.run("dd if=/dev/vda bs=1M count=8 2>/dev/null | md5sum").split()[0] == digest
    guest.run("dd if=/dev/vda of=/dev/vda bs=64k count=128 seek=128 2>/dev/null; sync")
    assert image.read_bytes() == content * 2


def check_network(guest):
    assert " 0% packet loss" in guest.run("ping -c 4 -i 0.2 -s 1400 10.77.0.1")
    subprocess.run(["ping", "-c", "4", "-i", "0.2", "-q", "10.77.0.2"], check=True)
    sent = os.urandom(2 * MEGABYTE)
    digest = hashlib.md5(sent).hexdigest()
    with socket.create_server(("10.77.0.1", 7000)) as server:
        def serve() -> None:
            for number in range(2):
                with server.accept()[0] as connection:
                    if number == 0:
                        connection.sendall(sent)
                        continue
                    while data := connection.recv(65536):
                        received.update(data)

        received = hashlib.md5()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        assert guest.run("nc 10.77.0.1 7000 >/tmp/data </dev/null; md5sum </tmp/data").split()[0] == digest
        guest.run("nc 10.77.0.1 7000 </tmp/data >/dev/null")
        thread.join(60)
        assert received.hexdigest() == digest


def test_a_disk_of_several_queues(boot, tmp_path):
    """Each vCPU has a queue and a thread of its own behind it; the file system they wrote together is whole."""
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        file.truncate(64 * MEGABYTE)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", image], check=True)
    guest = boot(append=f"{QUIET} shell=ttyS0", disks=[f"{image},queues=4"], vcpus=4)
    guest.expect("GUEST UP", BOOT_SECONDS)
    guest.expect("# ")
    assert guest.run("ls /sys/block/vda/mq | wc -w") == "4"
    guest.run("mkdir /d; mount /dev/vda /d; dd if=/dev/urandom of=/tmp/a bs=1M count=4 2>/dev/null")
    guest.run("for n in 0 1 2 3; do taskset $((1 << n)) sh -c "
              "\"for m in 1 2 3; do cp /tmp/a /d/$n.\\$m; sync; done\" & done; wait", timeout=240)
    sums = guest.run("sync; echo 3 >/proc/sys/vm/drop_caches; md5sum /d/?.? /tmp/a").splitlines()
    assert len(sums) == 13 and len({line.split()[0] for line in sums}) == 1
    busy = guest.run("awk '/virtio.*-req/ { for (n = 2; n <= 5; n++) sum += $n; print sum; sum = 0 }' /proc/interrupts").split()
    assert len(busy) == 4 and all(int(count) > 0 for count in busy)
    guest.run("umount /d")
    guest.send("poweroff -f")
    assert guest.wait() == POWERED_OFF
    check = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout
