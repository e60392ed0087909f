"""What every device promises: it comes back from saved state byte for byte, takes no state that it cannot trust, and survives
whatever a guest does. Devices are found by themselves; one without a profile (profiles.py) fails here."""
import copy
import importlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmapp.devices import Device
from kvmapp.state import StateError
from tests.device.profiles import PROFILES, Board
from tests.leaves import leaves

ROOT = Path(__file__).resolve().parents[2]
EXTREMES: list = [None, "", b"", True, {}, [], -1, 2**16, 2**32, 2**63, 2**64, 2**70, -2**70, 1.5]

pytestmark = pytest.mark.usefixtures("quiet")


def kinds(base=Device):
    """Every subclass of Device that a room of devices defines."""
    for path in ROOT.glob("kvmapp/*/*.pyx"):
        if path.parent.name in ("hw", "virtio"):
            importlib.import_module(f"kvmapp.{path.parent.name}.{path.stem}")
    found, queue = set(), [base]
    while queue:
        for kind in queue.pop().__subclasses__():
            if kind.__module__.startswith("kvmapp.") and kind not in found:
                found.add(kind)
                queue.append(kind)
    return sorted(found, key=lambda kind: kind.__name__)


@pytest.fixture(params=PROFILES, ids=lambda profile: profile.name)
def profile(request):
    return request.param


def last_word(path):
    return next(word for word in reversed(path) if isinstance(word, str))


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_every_device_has_a_profile(kind):
    assert any(kind in profile.kinds for profile in PROFILES), \
        f"{kind.__module__}.{kind.__name__} has no profile in tests/device/profiles.py"


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_every_device_saves_and_restores(kind):
    """`Device.restore` takes whatever it is given: who inherits that has none."""
    assert kind.restore is not Device.restore, f"{kind.__module__}.{kind.__name__} has no restore of its own"


def test_every_profile_is_fuzzed(profile):
    corpus = ROOT / "tests" / "fuzz" / "corpus" / f"{profile.name}.hex"
    assert corpus.exists() and corpus.read_text(), \
        f"{profile.name} has no corpus: run ./build.sh fuzz 60 {profile.name} --keep, mend what that finds, and commit {corpus.name}"


def test_the_disturbance_reaches_every_value(profile):
    with Board(profile) as board:
        before = leaves(board.saved())
        board.thread.resume()
        board.device.resume()
        board.disturb()
        after = leaves(board.saved())
        moved = {last_word(path) for path in before if before[path] != after.get(path)}
        assert {last_word(path) for path in before} - moved - profile.still == set(), "still as at power-on"


def test_save_disturb_restore_save_gives_the_same_bytes(profile):
    with Board(profile) as board, Board(profile) as other:
        power_on = board.saved()
        board.thread.resume()
        board.device.resume()
        board.disturb()
        disturbed = board.saved()
        for state in (power_on, disturbed):
            for target in (board, other):
                target.saved()
                target.device.restore(copy.deepcopy(state))
                assert target.device.save() == state


def test_reset_is_power_on_for_the_guest(profile):
    with Board(profile) as board:
        power_on = leaves(board.saved())
        board.thread.resume()
        board.device.resume()
        board.disturb()
        board.saved()
        board.reset()
        differs = {path for path, value in leaves(board.device.save()).items() if value != power_on.get(path)}
        assert {last_word(path) for path in differs} <= profile.kept


def mutate(state, draw):
    """A copy with one thing wrong somewhere: what it was, and what is there now (or that it is gone)."""
    state = copy.deepcopy(state)
    container, path = state, []
    while True:
        key = draw(st.sampled_from(sorted(container) if isinstance(container, dict) else range(len(container))))
        path.append(key)
        inner = container[key]
        if isinstance(inner, (dict, list)) and inner and draw(st.booleans()):
            container = inner
            continue
        break
    kind = draw(st.sampled_from(["replace", "remove", "add", "resize", "flip"]))
    if kind == "remove":
        del container[key]
    elif kind == "add" and isinstance(container, dict):
        container["no such key"] = 0
    elif kind == "resize" and isinstance(inner, bytes):
        container[key] = draw(st.sampled_from([inner[:-1], inner + b"\0", inner * 3]))
    elif kind == "flip" and isinstance(inner, bytes) and inner:
        i = draw(st.integers(0, len(inner) - 1))
        container[key] = inner[:i] + bytes([inner[i] ^ draw(st.integers(1, 255))]) + inner[i + 1:]
    else:
        container[key] = draw(st.sampled_from(EXTREMES))
    return state


@settings(max_examples=150)
@given(data=st.data())
def test_restore_takes_over_or_refuses_and_then_changes_nothing(data):
    profile = data.draw(st.sampled_from(PROFILES))
    with Board(profile) as board:
        board.disturb()
        good = board.saved()
        bad = mutate(good, data.draw)
        try:
            board.device.restore(bad)
        except StateError as error:
            assert board.device.name in str(error)
            assert board.device.save() == good
        else:
            taken = board.device.save()
            assert leaves(taken).keys() == leaves(bad).keys()
            board.device.restore(taken)
            assert board.device.save() == taken


@pytest.mark.parametrize("spoil", [
    lambda state: state.update(version=2), lambda state: state.update(version=0), lambda state: state.pop("version"),
    lambda state: state.update(unknown=1),
])
def test_restore_refuses_other_versions_and_unknown_keys(profile, spoil):
    with Board(profile) as board:
        state = board.saved()
        spoil(state)
        with pytest.raises(StateError):
            board.device.restore(state)


def test_restore_refuses_any_missing_key(profile):
    with Board(profile) as board:
        good = board.saved()
        for path in leaves(good):
            state = copy.deepcopy(good)
            container = state
            for key in path[:-1]:
                container = container[key]
            del container[path[-1]]
            with pytest.raises(StateError):
                board.device.restore(state)
        assert board.device.save() == good


def test_every_offset_takes_every_width(profile):
    with Board(profile) as board:
        for bus, base, size in board.windows():
            for address in range(base - 7, base + min(size, 4096) + 1):
                for width in (1, 2, 4, 8):
                    bus.read(address, width)
                    for value in (0, 2**64 - 1):
                        bus.write(address, width, value)
        state = board.saved()
        board.device.restore(state)
        assert board.device.save() == state


@settings(max_examples=100)
@given(data=st.data())
def test_no_sequence_of_accesses_breaks_a_device(data):
    profile = data.draw(st.sampled_from(PROFILES))
    with Board(profile) as board:
        if data.draw(st.booleans()):
            board.disturb()
        for _ in range(data.draw(st.integers(1, 80))):
            bus, base, size = data.draw(st.sampled_from(board.windows()))
            address = base + data.draw(st.integers(0, min(size, 0x100) - 1) | st.integers(0, size - 1))
            width = data.draw(st.sampled_from([1, 2, 4, 8]))
            if data.draw(st.booleans()):
                bus.read(address, width)
            else:
                bus.write(address, width, data.draw(st.integers(0, 15) | st.integers(0, 2**64 - 1)))
        state = board.saved()
        board.device.restore(copy.deepcopy(state))
        assert board.device.save() == state
        board.device.reset()
