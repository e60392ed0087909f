"""What tests of several devices have: a guest, and a log of what it does wrong."""
import os

import pytest

from kvmapp.devices import set_log
from tests.device.virtio_driver import Guest


@pytest.fixture
def guest():
    with Guest() as guest:
        yield guest


@pytest.fixture
def quiet():
    """What guests do wrong is written nowhere."""
    sink = os.open(os.devnull, os.O_WRONLY)
    set_log(sink)
    yield
    set_log(2)
    os.close(sink)


@pytest.fixture
def log():
    """The text of the devices' log."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    set_log(write_end)
    text = bytearray()

    def so_far():
        try:
            text.extend(os.read(read_end, 65536))
        except BlockingIOError:
            pass
        return text.decode()

    yield so_far
    set_log(2)
    os.close(read_end)
    os.close(write_end)
