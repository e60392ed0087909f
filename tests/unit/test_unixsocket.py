"""A dead socket is replaced; a live one and a file of somebody's are not."""
import socket

import pytest

from kvmapp.errors import HostError
from kvmapp.unixsocket import listen


def test_a_dead_socket_is_replaced(tmp_path):
    path = str(tmp_path / "s")
    listen("vsock", path, 96).close()
    with listen("vsock", path, 96), socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        with pytest.raises(HostError, match="Address already in use"):
            listen("vsock", path, 96)


def test_a_file_is_kept(tmp_path):
    (tmp_path / "s").write_text("mine")
    with pytest.raises(HostError, match=r"cannot listen at .*/s: Address already in use"):
        listen("vsock", str(tmp_path / "s"), 96)
    assert (tmp_path / "s").read_text() == "mine"
