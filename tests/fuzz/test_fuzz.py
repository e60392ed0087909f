"""Every device holds against its corpus, and against a second or two of fuzzing with coverage and sanitizers.

`./build.sh fuzz SECONDS DEVICE` goes on for longer."""
import random
import shutil

import pytest

from tests.device.profiles import PROFILES
from tests.fuzz import build
from tests.fuzz.__main__ import fuzz
from tests.fuzz.target import Stream, Target, seeds
from tests.fuzz.worker import CORPUS, SEED, Worker, read_corpus

SECONDS_IN_ALL = 45


@pytest.fixture(params=PROFILES, ids=lambda profile: profile.name)
def profile(request):
    return request.param


def test_the_corpus_breaks_nothing(profile):
    target = Target(profile)
    for data in [*seeds(profile), *read_corpus(CORPUS / f"{profile.name}.hex")]:
        target.run(data)
    target.close()


@pytest.fixture(scope="module")
def instrumented():
    if shutil.which("gcc") is None:
        pytest.skip("no gcc: the devices cannot be built with instrumentation")
    build.build("sanitized")


@pytest.mark.timeout(600)                        # of which most is the first build
def test_a_bounded_run_finds_nothing(profile, instrumented, monkeypatch, tmp_path):
    monkeypatch.setenv(SEED, "1")                # the same inputs each time; what is new is found by `./build.sh fuzz`
    assert fuzz(profile.name, SECONDS_IN_ALL / len(PROFILES), "sanitized", folder=tmp_path) is None


class Interrupted(Worker):
    """Each input covers something new, and the user interrupts after so many."""

    def __init__(self, profile, folder, inputs):
        self.profile, self.folder, self.left = profile, folder, inputs
        self.inputs: list[bytes] = []

    def run(self, data):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return 1

    def mutate(self, data):
        return b"learnt" + self.left.to_bytes(1, "little")

    chance = random.Random(1)


def test_an_interrupted_run_keeps_what_it_learnt(tmp_path):
    [profile] = [profile for profile in PROFILES if profile.name == "port92"]
    working = tmp_path / "port92.hex"
    beginnings = len(Interrupted(profile, tmp_path, 0).beginnings())
    with pytest.raises(KeyboardInterrupt):
        Interrupted(profile, tmp_path, beginnings + 3).fuzz(3600)
    assert {b"learnt\2", b"learnt\1"} <= set(read_corpus(working))
    before = working.read_text()
    with pytest.raises(KeyboardInterrupt):               # before it has run all that was learnt earlier
        Interrupted(profile, tmp_path, 2).fuzz(3600)
    assert working.read_text() == before


def test_what_a_target_promises_can_fail():
    """A device that forgets a register on its way through saved state is found."""
    [profile] = [profile for profile in PROFILES if profile.name == "port92"]
    target = Target(profile)
    target.power_on["value"] = 0
    with pytest.raises(AssertionError, match="not as at power-on"):
        target.run(b"")
    target.close()


def test_every_string_of_bytes_is_an_input():
    stream = Stream(b"\xf0\x01")
    assert (stream.number(), stream.more(), stream.number()) == (1, False, 0)
