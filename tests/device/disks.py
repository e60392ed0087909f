"""Raw disks on files of the test's own."""
import os

import pytest

from kvmapp.block.raw import RawDisk
from kvmapp.block.session import DiskSession
from kvmapp.errors import KvmappError


def open_raw(path, **settings):
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return RawDisk(fd, name="vda", path=str(path), **settings)
    except BaseException:
        os.close(fd)
        raise


def skip_what_the_host_lacks(path, **settings):
    """io_uring, or O_DIRECT on this file system. Every other error is one."""
    try:
        with open_raw(path, **settings) as disk:
            DiskSession(disk).close()
    except KvmappError as error:
        if "io_uring" in str(error) or "page cache" in str(error):
            pytest.skip(str(error))
        raise
