"""The disk bench runs whole on a short round: both sides carry every load, and no request fails."""
import shutil

import pytest

from tests.device.disks import skip_what_the_host_lacks


@pytest.mark.skipif(not shutil.which("gcc"), reason="the bench compiles its peer")
def test_both_sides_carry_every_load(tmp_path):
    from bench.block import ROWS, measure
    probe = tmp_path / "probe"
    probe.write_bytes(bytes(4096))
    skip_what_the_host_lacks(probe, io="io_uring", cache="none")
    rows = list(measure(tmp_path, rounds=1, seconds=0.005))
    assert [row for row, *_ in rows] == ROWS
    for _, ours, plain in rows:
        assert len(ours) == len(plain) == 1
        assert all(sample.rate > 0 and sample.cpu > 0 for sample in ours + plain)
