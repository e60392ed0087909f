"""KVM's binary statistics, read from files made here as the kernel lays them out."""
import os
import struct

import pytest

from kvmapp.kvmstats import read_counters

NAME = 48
CUMULATIVE, INSTANT, PEAK, LINEAR_HISTOGRAM = range(4)


@pytest.fixture
def open_stats(tmp_path):
    """A descriptor of these (name, type, values)."""
    fds = []

    def make(*counters, count: int | None = None) -> int:
        table, data = b"", b""
        for name, kind, values in counters:
            table += struct.pack("=IhHII", kind | 0x40, 0, len(values), len(data), 0) + name.encode().ljust(NAME, b"\0")
            data += struct.pack(f"={len(values)}Q", *values)
        start = 24 + NAME                                # after the header and the id
        header = struct.pack("=6I", 0, NAME, len(counters) if count is None else count, 24, start, start + len(table))
        path = tmp_path / "stats"
        path.write_bytes(header + b"kvm-1/vcpu-0".ljust(NAME, b"\0") + table + data)
        fds.append(os.open(path, os.O_RDONLY))
        return fds[-1]

    yield make
    for fd in fds:
        os.close(fd)


def test_single_values_bear_the_ending_of_their_type(open_stats):
    fd = open_stats(("exits", CUMULATIVE, [2**63]), ("blocking", INSTANT, [1]), ("histogram", LINEAR_HISTOGRAM, [7, 8]),
                    ("largest", PEAK, [3]))
    assert read_counters(fd) == {"exits.sum": 2**63, "blocking.cur": 1, "largest.max": 3}
    assert read_counters(fd) == read_counters(fd)        # the descriptor's position does not move


def test_a_host_without_them(open_stats):
    assert read_counters(-1) == {}
    assert read_counters(open_stats()) == {}


def test_a_table_that_promises_too_much(open_stats):
    assert read_counters(open_stats(("exits", CUMULATIVE, [5]), count=2**31)) == {"exits.sum": 5}
