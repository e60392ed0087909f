"""The fixtures of the virtio disk's tests: see machine.py."""
import pytest

from tests.device.virtio_blk.machine import SECTORS, Machine
from tests.device.virtio_wirings import ALL


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SECTORS * 512))
    return path


@pytest.fixture(params=ALL)
def machine(image, request):
    with Machine(image, serial="SN-1234", wiring=request.param) as machine:
        yield machine
