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


def test_one_who_listens_and_is_busy_is_alive(tmp_path):
    """Its backlog is full: a connect that waited would wait for as long as he is."""
    path = str(tmp_path / "s")
    clients = []
    with listen("vsock", path, 96):
        with pytest.raises(BlockingIOError):
            while True:
                clients.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
                clients[-1].connect(path)
        with pytest.raises(HostError, match="Address already in use"):
            listen("vsock", path, 96)
    for client in clients:
        client.close()
