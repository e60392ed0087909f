"""A card's descriptors: their names, and which cards /dev/vhost-net is opened for."""
import os

import pytest

from kvmapp import cardfiles
from kvmapp.config import InterfaceConfig
from kvmapp.daemon import taps
from kvmapp.errors import HostError


def card(**settings) -> InterfaceConfig:
    return InterfaceConfig(**{"index": 1, "type": "tap", "target": "t0", "mac": "52:54:00:7f:0d:cb", "vhost": "yes", **settings})


@pytest.fixture
def opened(monkeypatch, request):
    """Stands for a host that lets /dev/vhost-net, or the device that the test is given, be opened twice; what is open of it."""
    fds: list[int] = []

    def open_it(path, flags):
        assert path == getattr(request, "param", "/dev/vhost-net")
        if len(fds) == 2:
            raise OSError(24, "Too many open files")
        fds.append(100 + len(fds))
        return fds[-1]

    monkeypatch.setattr(os, "open", open_it)
    monkeypatch.setattr(os, "close", fds.remove)
    return fds


def test_the_first_queue_has_the_short_name():
    assert [cardfiles.file_name("vhost", 1, pair) for pair in range(2)] == ["vhost:1", "vhost:1.1"]


def test_vhost_once_a_pair_of_queues(opened):
    assert cardfiles.open_vhost(card(queues=2)) == opened == [100, 101]


@pytest.mark.parametrize("settings", [{"vhost": "no"}, {"model": "e1000"}, {"type": "user"}])
def test_vhost_only_for_cards_that_use_it(opened, settings):
    assert cardfiles.open_vhost(card(**settings)) == opened == []


def test_no_half_of_the_queues_has_vhost(opened):
    assert cardfiles.open_vhost(card(queues=3, vhost="auto")) == opened == []
    with pytest.raises(HostError, match="Cannot open /dev/vhost-net for interface 1: Too many open files"):
        cardfiles.open_vhost(card(queues=3))
    assert opened == []


@pytest.mark.parametrize("opened", ["/dev/net/tun"], indirect=True)
def test_a_tap_that_does_not_get_all_of_its_queues_is_not_left_open(opened, monkeypatch):
    """Its first descriptors would keep it in the host for as long as the daemon runs."""
    monkeypatch.setattr(taps, "attach", lambda fd, name, flags: "vnet7")
    with pytest.raises(HostError, match="Too many open files"):
        taps.make_tap(card(queues=3, target=None))
    assert opened == []
