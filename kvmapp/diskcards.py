"""Disks, each made from its [disk] section with the host's file or block device that it is; at the start or later.

machine.py puts them into slots. A file that others have opened and locked comes in `files`, as `disk:NAME`.
"""
import os

from kvmapp.block.raw import RawDisk
from kvmapp.imagefile import open_image
from kvmapp.iothread import IoThread
from kvmapp.virtio.blk import VirtioBlk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.config import DiskConfig


def make_device(disk: "DiskConfig", files: dict[str, int], memory, power) -> tuple[VirtioBlk, list[IoThread]]:
    """The disk, not in a slot yet, and the threads that do its I/O, each its share of the queues, which do not run yet. `power` hears of a
    host that has no room. Raises KvmappError.

    What it uses of `files` is taken out.
    """
    backend = open_disk(disk, files.pop(f"disk:{disk.name}", None))
    threads: list[IoThread] = []
    try:
        device = VirtioBlk(disk.name, memory, backend, serial=disk.serial or "", queues=disk.queues,
                           power=power if disk.error_policy == "enospace" else None)
        count = disk.threads or disk.queues
        for number in range(count):
            threads.append(IoThread(f"disk {disk.name}" + (f" {number}" if number else ""), poll=disk.poll * 1000))
            device.run_on(threads[number], None if count == 1 else range(number, len(device.queues), count))
    except BaseException:
        for thread in threads:
            thread.close()
        backend.close()
        raise
    return device, threads


def open_disk(config: "DiskConfig", fd: int | None = None) -> RawDisk:
    """What the disk's bytes are. `fd`: its file, already opened and locked; taken over. Raises GuestImageError, HostError."""
    if fd is None:
        fd = open_image(config.name, config.source, read_only=config.readonly)
    try:
        return RawDisk(fd, name=config.name, path=config.source, read_only=config.readonly, cache=config.cache, io=config.io,
                       discard=config.discard == "unmap")
    except BaseException:
        os.close(fd)
        raise
