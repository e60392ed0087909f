"""Tests of this folder run small guests of our own on the machine's /dev/kvm; where there is none they are skipped, loudly."""
import os

import pytest

from tests.kvm.counting import Guest
from tests.kvm.host import KvmHost


def why_not() -> str | None:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError as error:
        return f"NO KVM HERE: /dev/kvm: {error.strerror}. The run loop is NOT tested on this machine."
    return None


WHY_NOT = why_not()


@pytest.fixture
def host():
    """A host of the test's own, whose daemon is not started yet."""
    with KvmHost.temporary() as one:
        yield one


@pytest.fixture
def guest():
    """guest(...) starts a guest that counts; none outlives the test."""
    started = []

    def start(*words):
        started.append(Guest(*words))
        return started[-1]

    yield start
    for each in started:
        each.close()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("kvm") and WHY_NOT:
            item.add_marker(pytest.mark.skip(reason=WHY_NOT))


def pytest_terminal_summary(terminalreporter):
    if WHY_NOT:
        terminalreporter.section("kvm tests skipped", sep="!", red=True, bold=True)
        terminalreporter.line(WHY_NOT)
