"""Every device holds against its corpus, and against a minute of fuzzing with coverage and sanitizers.

`./build.sh fuzz SECONDS DEVICE` goes on for longer."""
import shutil

import pytest

from tests.device.profiles import PROFILES
from tests.fuzz import build
from tests.fuzz.__main__ import fuzz
from tests.fuzz.target import Stream, Target, seeds
from tests.fuzz.worker import CORPUS, SEED, read_corpus

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
def test_a_bounded_run_finds_nothing(profile, instrumented, monkeypatch):
    monkeypatch.setenv(SEED, "1")                # a test says the same twice; what is new is found by `./build.sh fuzz`
    assert fuzz(profile.name, SECONDS_IN_ALL / len(PROFILES), "sanitized") is None


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
