"""The control socket's verbs for devices: what they ask of the machine, and what they refuse."""
import gc
import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from kvmapp.control import Connection
from kvmapp.errors import BadRequest, GuestImageError, KvmappError
from kvmapp.loop import Loop
from kvmapp.vmdevices import DeviceNotFound, DeviceVerbs


class Card:
    def __init__(self):
        self.link = True

    def set_link(self, up):
        self.link = up


@pytest.fixture
def domain():
    cards = {"net0": Card()}
    verbs = DeviceVerbs()
    verbs.machine = SimpleNamespace(  # type: ignore[assignment]
        config=SimpleNamespace(name="web"), network_cards=lambda: cards, cards=cards)
    return verbs


def test_link_plugs_the_cable_in_and_out(domain):
    for up in (False, True):
        assert domain.verb_link(None, {"device": "net0", "up": up}) == {"device": "net0", "up": up}
        assert domain.machine.cards["net0"].link is up


@pytest.mark.parametrize(("request_", "words"), [({}, "'device' is None"), ({"device": 1, "up": True}, "'device' is 1"),
                                                 ({"device": "net0"}, "'up' is None"), ({"device": "net0", "up": 1}, "'up' is 1")])
def test_a_link_request_of_another_shape_is_refused(domain, request_, words):
    with pytest.raises(BadRequest, match=words):
        domain.verb_link(None, request_)


def test_a_disk_is_resized(domain):
    def resize_disk(name, size, *, shrink):
        assert name == "vda"
        asked.append((size, shrink))
        if size == 7:
            raise GuestImageError("7 bytes are no multiple of 512")
        return size or 1024
    asked: list[tuple] = []
    domain.log, domain.require = [].append, lambda *_states: None
    domain.machine.disks, domain.machine.resize_disk = lambda: {"vda": None}, resize_disk
    request = {"device": "vda", "bytes": 512, "shrink": True}
    assert domain.verb_resize_disk(None, request) == {"device": "vda", "bytes": 512}
    assert domain.verb_resize_disk(None, {**request, "bytes": None, "shrink": False}) == {"device": "vda", "bytes": 1024}
    with pytest.raises(GuestImageError):
        domain.verb_resize_disk(None, {**request, "bytes": 7})
    assert asked == [(512, True), (None, False), (7, True)]
    for change in {"device": 1}, {"bytes": "1"}, {"bytes": True}, {"bytes": 1.0}, {"shrink": 1}, {"shrink": None}:
        with pytest.raises(BadRequest, match=f"'{min(change)}' is"):
            domain.verb_resize_disk(None, {**request, **change})
    with pytest.raises(DeviceNotFound, match="Domain 'web' has no disk 'net0'"):
        domain.verb_resize_disk(None, {**request, "device": "net0"})
    assert len(asked) == 3


class PluggedIn(Exception):
    pass


@pytest.mark.parametrize(("waits", "outcome"), [(True, PluggedIn), (False, BadRequest)])
def test_a_card_that_nobody_waits_for_any_more_stays_out(domain, waits, outcome):
    def plug(_section):
        raise PluggedIn
    domain.require, domain.with_interface = lambda *_states: None, plug
    loop, (asker, ours) = Loop(), socket.socketpair()
    with asker:
        server: Any = SimpleNamespace(loop=loop, connections=set())
        connection = Connection(server, ours)
        asker.send(b"the request")
        if not waits:
            asker.close()
        with pytest.raises(outcome):
            domain.verb_attach_device(connection, {"interface": {}})
    ours.close()
    loop.close()


@pytest.mark.parametrize(("error", "words"), [(OSError(24, "Too many open files"), "Cannot attach disk vdb to .*Too many open"),
                                              (GuestImageError("No such file"), "No such file")])
def test_what_is_left_of_an_attach_that_fails_is_collected(domain, error, words):
    """But later: as long as the error is there, so are its frames."""
    def plug(_section, files, _wanted):
        raise error
    read, write = os.pipe()
    later: list = []
    domain.loop, domain.require = SimpleNamespace(call=later.append), lambda *_states: None
    domain.with_disk = lambda _: (SimpleNamespace(name="web"), SimpleNamespace(name="vdb", heading="disk vdb"))
    domain.machine.attach_disk = plug
    with pytest.raises(KvmappError, match=words):
        domain.verb_attach_disk(SimpleNamespace(fds=[read], deserted=lambda: False), {"disk": {}, "files": ["disk:vdb"]})
    assert later == [gc.collect]
    with pytest.raises(OSError):
        os.fstat(read)
    os.close(write)


def test_a_card_that_is_not_there_is_named_with_those_that_are(domain):
    with pytest.raises(DeviceNotFound, match="Domain 'web' has no network card 'net1'") as refusal:
        domain.verb_link(None, {"device": "net1", "up": True})
    assert refusal.value.hint == "it has: net0"
