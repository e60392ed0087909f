"""Errors render for people and cross a socket as they are."""
import json

import pytest

from kvmapp.errors import BY_CODE, ConfigError, JobRunning, KvmappError, error_from_dict


def test_rendered_with_hint_and_place():
    error = ConfigError("vcpus = 0: expected more", "write 1", file="/etc/x.conf", line=3)
    assert error.render() == "error: /etc/x.conf:3: vcpus = 0: expected more\nhint: write 1"
    assert ConfigError("is a directory", file="/etc").render() == "error: /etc: is a directory"
    assert KvmappError("no").render() == "error: no"


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_every_error_comes_back_from_json(code):
    cls = BY_CODE[code]
    sent = cls("what failed", "what to do", **dict.fromkeys(cls.facts, 7))
    received = error_from_dict(json.loads(json.dumps(sent.to_dict())))
    assert type(received) is cls
    assert received.to_dict() == sent.to_dict()
    assert received.render() == sent.render()


def test_unknown_code_is_a_plain_error():
    assert type(error_from_dict({"code": "from-the-future", "message": "m"})) is KvmappError


def test_facts_are_checked():
    assert JobRunning("busy", verb="save", who="root", since=1.5).verb == "save"
    with pytest.raises(TypeError):
        KvmappError("m", line=3)
