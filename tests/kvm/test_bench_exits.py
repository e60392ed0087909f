"""The exit bench runs whole on a short round: both VMMs do every loop to its end, and take a time that can be."""
import pytest

pytestmark = pytest.mark.kvm


def test_both_sides_run_every_loop():
    from bench.exits import LOOPS, measure
    rows = measure(rounds=1, seconds=0.01)
    assert [name for name, *_ in rows] == LOOPS
    for _, count, ours, plain in rows:
        assert count >= 1000
        assert len(ours) == len(plain) == 1
        assert all(sample.wall > 0 and sample.cpu > 0 for sample in ours + plain)
