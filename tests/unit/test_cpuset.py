"""Sets of CPUs and nodes: libvirt's syntax in, the kernel's out; everything else is refused."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmapp.cpuset import CPUS_MOST, NODES_MOST, CpuSet, members, ranges


@pytest.mark.parametrize(("text", "plain"), [
    ("0", "0"), ("0-3", "0-3"), ("0-3,^2", "0-1,3"), ("0-3,^2,6", "0-1,3,6"), (" 3 , 1 - 2 ", "1-3"), ("5,4,4", "4-5"), ("1,^1,1", "1"),
    ("8191", "8191"), ("^7,0", "0")])
def test_what_libvirt_reads(text, plain):
    assert CpuSet().parse(text) == plain
    assert CpuSet().parse(plain) == plain


@pytest.mark.parametrize("text", ["", " ", "a", "3-1", "0-", "-1", "0--3", "^1", "0-3,^0-3", "0,,1",
                                  "8192", "0-99999999999", "1.5", "0x1", "²",
                                  "1 2", "^", "r"])
def test_what_it_does_not(text):
    with pytest.raises(ValueError, match="numbers of CPUs below 8192"):
        CpuSet().parse(text)


def test_nodes_have_their_own_bound():
    assert CpuSet("NUMA nodes", NODES_MOST).parse("0-1023") == "0-1023"
    with pytest.raises(ValueError, match="NUMA nodes below 1024"):
        CpuSet("NUMA nodes", NODES_MOST).parse("1024")


@given(st.sets(st.integers(0, CPUS_MOST - 1), min_size=1))
def test_text_and_back(numbers):
    assert members(ranges(sorted(numbers))) == sorted(numbers)


def test_nothing_is_no_members():
    assert members("") == [] and ranges([]) == ""
