"""CPUID for a guest: topology leaves that agree with each other, hidden and shown features, and the baseline."""
import struct

import pytest

from kvmapp.boot.cpuid import address_bits, guest_cpuid, missing_features
from kvmapp.boot.topology import Topology
from kvmapp.errors import HostError, KvmappError

VMX, X2APIC, DEADLINE, OSXSAVE, HYPERVISOR, MONITOR = 1 << 5, 1 << 21, 1 << 24, 1 << 27, 1 << 31, 1 << 3
AVX = 1 << 28


def vendor(function: int, highest: int, name: bytes):
    ebx, edx, ecx = struct.unpack("<3I", name)
    return function, 0, 0, highest, ebx, ecx, edx


def host(name: bytes):
    """What KVM_GET_SUPPORTED_CPUID gives on a host of 8 cores with 2 threads, everything on."""
    caches = [0x1C00_4121, 0x1C00_4122, 0x1C00_4143, 0x1C03_C163]
    cache_leaf = 4 if name == b"GenuineIntel" else 0x8000_001D
    return [
        vendor(0, 0x1F, name),
        (1, 0, 0, 0x0009_06EA, 0x0510_0800, 0x7FFF_FFFF, 0xFFFF_FFFF),
        *((cache_leaf, index, 1, eax, 0x1C0_003F, 63, 0) for index, eax in enumerate(caches)),
        (5, 0, 0, 64, 64, 3, 0),
        (7, 0, 1, 1, 0xFFFF_FFFF, 0xFFFF_FFFF, 0xFFFF_FFFF),
        (0xB, 0, 1, 1, 2, 0x100, 5),
        (0xB, 1, 1, 4, 16, 0x201, 5),
        (0xD, 0, 1, 7, 832, 832, 0),
        (0x14, 0, 1, 1, 0xF, 7, 0),
        (0x16, 0, 0, 0, 0, 0, 0),
        (0x1F, 0, 1, 1, 2, 0x100, 5),
        (0x4000_0000, 0, 0, 0x4000_0001, 0x4B4D_564B, 0x564B_4D56, 0x4D),
        (0x4000_0001, 0, 0, 0x0100_7EFB, 0, 0, 0),
        vendor(0x8000_0000, 0x8000_0021, name),
        (0x8000_0001, 0, 0, 0, 0, 0xFFFF_FFFF, 0xFFFF_FFFF),
        *((0x8000_0002 + i, 0, 0, *struct.unpack("<4I", b"A quick processr")) for i in range(3)),
        (0x8000_0008, 0, 0, 0x3030, 0x1005, 0x400F, 0),
        (0x8000_000A, 0, 0, 1, 8, 0, 0xFF),
        (0x8000_001E, 0, 0, 5, 0x102, 0, 0),
        (0x8000_001F, 0, 0, 3, 0, 0, 0),
    ]


INTEL, AMD = host(b"GenuineIntel"), host(b"AuthenticAMD")
BOTH = pytest.mark.parametrize("supported", [INTEL, AMD], ids=["intel", "amd"])


def leaf(entries, function: int, index: int = 0):
    return next((entry[3:] for entry in entries if entry[:2] == (function, index)), None)


@BOTH
def test_every_vcpu_has_its_own_apic_id_in_every_leaf_that_tells_it(supported):
    topology = Topology(12, sockets=2, cores=3, threads=2)
    assert topology.apic_ids() == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]
    for vcpu, apic_id in enumerate(topology.apic_ids()):
        entries = guest_cpuid(supported, topology, vcpu)
        assert leaf(entries, 1)[1] >> 24 == apic_id
        for function in (0xB, 0x1F):
            assert [leaf(entries, function, index)[3] for index in range(3)] == [apic_id] * 3
        assert leaf(entries, 0x8000_001E)[0] == apic_id


@BOTH
def test_topology_leaves_agree(supported):
    entries = guest_cpuid(supported, Topology(12, sockets=2, cores=3, threads=2), 11)
    assert leaf(entries, 0xB, 0)[:3] == (1, 2, 0x100)
    assert leaf(entries, 0xB, 1)[:3] == (3, 6, 0x201)
    assert leaf(entries, 0xB, 2)[:3] == (0, 0, 2)
    assert leaf(entries, 1)[3] & 1 << 28
    assert leaf(entries, 1)[1] >> 16 & 0xFF == (6 if supported is AMD else 8)


def test_intel_caches_are_shared_as_the_guest_is_built():
    entries = guest_cpuid(INTEL, Topology(12, sockets=2, cores=3, threads=2), 0)
    sharing = [leaf(entries, 4, index)[0] >> 14 & 0xFFF for index in range(4)]
    assert sharing == [1, 1, 1, 7]
    assert {leaf(entries, 4, index)[0] >> 26 for index in range(4)} == {3}
    assert [leaf(entries, 4, index)[0] & 0x3FFF for index in range(4)] == [0x121, 0x122, 0x143, 0x163]


def test_amd_core_counts():
    entries = guest_cpuid(AMD, Topology(12, sockets=2, cores=3, threads=2), 9)
    assert leaf(entries, 0x8000_0008)[2] == 3 << 12 | 5
    assert leaf(entries, 0x8000_001E)[1:3] == (1 << 8 | 1, 1)
    assert [leaf(entries, 0x8000_001D, index)[0] >> 14 & 0xFFF for index in range(4)] == [1, 1, 1, 7]
    assert leaf(entries, 0x8000_001D, 3)[0] >> 26 == 0
    assert leaf(entries, 0x8000_0001)[2] & 1 << 1


@BOTH
def test_a_single_vcpu_claims_no_siblings(supported):
    entries = guest_cpuid(supported, Topology(1), 0)
    assert not leaf(entries, 1)[3] & 1 << 28
    assert leaf(entries, 0xB, 0)[:2] == (0, 1)
    assert leaf(entries, 0xB, 1)[:2] == (0, 1)
    assert not leaf(entries, 0x8000_0001)[2] & 1 << 1


@BOTH
def test_features_hidden_and_shown(supported):
    plain = leaf(guest_cpuid(supported, Topology(1), 0), 1)[2]
    assert plain & HYPERVISOR
    assert plain & X2APIC
    assert not plain & (VMX | MONITOR | OSXSAVE | DEADLINE)
    assert not leaf(guest_cpuid(supported, Topology(1), 0), 0x8000_0001)[2] & 1 << 2
    chosen = guest_cpuid(supported, Topology(1), 0, x2apic=False, tsc_deadline=True, nested=True)
    assert leaf(chosen, 1)[2] & (X2APIC | DEADLINE | VMX) == DEADLINE | VMX
    assert leaf(chosen, 0x8000_0001)[2] & 1 << 2
    assert leaf(chosen, 0x8000_000A)


@BOTH
def test_host_model_passes_the_rest_through(supported):
    entries = guest_cpuid(supported, Topology(1), 0)
    for function in (7, 0xD, 0x4000_0000, 0x4000_0001, 0x8000_0002):
        assert leaf(entries, function) == leaf(supported, function)
    for function in (5, 0x14, 0x8000_000A, 0x8000_001F):
        assert leaf(entries, function) is None
    assert leaf(entries, 0x16) is None, "an entry of zeroes only lengthens the list"


@BOTH
def test_baseline_is_the_same_whatever_else_the_host_has(supported):
    poorer = [entry if entry[0] not in (7, 0xD) else (*entry[:3], 0, 0, 0, 0) for entry in supported]
    poorer = [(*e[:5], e[5] & ~AVX, e[6]) if e[0] == 1 else e for e in poorer if e[0] not in (4, 0xB, 0x1F, 0x8000_001E)]
    wanted = guest_cpuid(supported, Topology(2), 1, model="baseline")
    assert guest_cpuid(poorer, Topology(2), 1, model="baseline") == wanted
    assert not leaf(wanted, 1)[2] & AVX
    assert leaf(wanted, 7) is None
    assert leaf(wanted, 0)[0] == 0xB
    assert leaf(wanted, 0x8000_0000)[0] == 0x8000_0008
    assert leaf(wanted, 1)[1] == 1 << 24 | 2 << 16 | 8 << 8
    assert len(wanted) == len({entry[:2] for entry in wanted})
    assert struct.pack("<4I", *leaf(wanted, 0x8000_0002)).startswith(b"kvmapp x86-64-v2")


def test_baseline_describes_caches_of_its_own():
    intel = guest_cpuid(INTEL, Topology(2), 1, model="baseline")
    assert [leaf(intel, 4, index)[0] for index in range(4)] == [0x0400_0121, 0x0400_0122, 0x0400_0143, 0x0400_4163]
    amd = guest_cpuid([entry for entry in AMD if entry[0] != 0x8000_001D], Topology(2), 1, model="baseline")
    assert leaf(amd, 0x8000_0005)[3] >> 16 & 0xFF == 2
    assert leaf(amd, 4) is leaf(amd, 0x8000_001D) is None


@BOTH
def test_baseline_demands_level_v2(supported):
    entries = guest_cpuid(supported, Topology(1), 0, model="baseline")
    assert missing_features(entries) == []
    sse42_popcnt = 1 << 20 | 1 << 23
    poorer = [(*e[:5], e[5] & ~sse42_popcnt, e[6]) if e[0] == 1 else e for e in supported]
    with pytest.raises(HostError, match="this host's CPU lacks sse4_2, popcnt") as refusal:
        guest_cpuid(poorer, Topology(1), 0, model="baseline")
    assert "host" in refusal.value.hint


def test_address_bits():
    assert address_bits(guest_cpuid(INTEL, Topology(1), 0)) == 48
    assert address_bits(guest_cpuid(INTEL, Topology(1), 0, model="baseline")) == 40
    assert address_bits([]) == 36


def test_unknown_model_and_impossible_topology():
    with pytest.raises(KvmappError, match="Unknown CPU model 'z80'") as refusal:
        guest_cpuid(INTEL, Topology(1), 0, model="z80")
    assert "baseline" in refusal.value.hint
    with pytest.raises(KvmappError, match="Cannot arrange 6 vCPUs as 2 sockets x 2 cores x 1 threads"):
        Topology(6, sockets=2, cores=2)
    with pytest.raises(KvmappError, match="Cannot arrange 5 vCPUs"):
        Topology(5, sockets=2)
