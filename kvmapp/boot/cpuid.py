"""What CPUID tells the guest: what KVM supports on this host, with the guest's own topology, for a model of CPU.

Follows Intel SDM 2A (CPUID), AMD APM volume 3 appendix E and Linux Documentation/virt/kvm/x86/cpuid.rst; the baseline is level
x86-64-v2 of the x86-64 psABI. Takes and gives entries as KVM_GET_SUPPORTED_CPUID and KVM_SET_CPUID2 have them:
(function, index, flags, eax, ebx, ecx, edx). Leaves out: Hyper-V's leaves, and what KVM itself keeps current (OSXSAVE, sizes of
XSAVE areas).
"""
import struct

from kvmapp.boot.topology import Topology
from kvmapp.errors import HostError, KvmappError

Entry = tuple[int, int, int, int, int, int, int]

MODELS = ("host", "baseline")
SIGNIFICANT_INDEX = 1                                            # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
AMD_VENDORS = (b"AuthenticAMD", b"HygonGenuine")

# Leaf 1.
ECX_MONITOR, ECX_VMX, ECX_X2APIC, ECX_TSC_DEADLINE, ECX_OSXSAVE, ECX_HYPERVISOR = (1 << bit for bit in (3, 5, 21, 24, 27, 31))
EDX_HTT = 1 << 28
# Leaf 0x8000_0001.
ECX_CMP_LEGACY, ECX_SVM = 1 << 1, 1 << 2

# Host facts that say nothing true of a guest, or that need a setting of KVM which it does not get: MONITOR, SGX, processor
# trace, SEV, and topologies beyond leaf 0x1F. SVM's own leaf is kept for nested guests only.
DROPPED = {5, 0x12, 0x14, 0x8000_001B, 0x8000_001C, 0x8000_001F, 0x8000_0026}
SVM_LEAF = 0x8000_000A
TOPOLOGY_LEAVES = (0xB, 0x1F)
LEVEL_THREAD, LEVEL_CORE = 1, 2
X87_AND_SSE = 3                                                  # the XSAVE state components of every CPU

# x86-64-v2: what it demands, as (function, register) -> {bit: name}; registers are positions in an Entry.
EAX, EBX, ECX, EDX = 3, 4, 5, 6
V2_DEMANDS = {
    (1, ECX): {0: "sse3", 9: "ssse3", 13: "cx16", 19: "sse4_1", 20: "sse4_2", 23: "popcnt"},
    (1, EDX): {0: "fpu", 3: "pse", 4: "tsc", 5: "msr", 6: "pae", 8: "cx8", 9: "apic", 13: "pge", 15: "cmov", 16: "pat",
               19: "clflush", 23: "mmx", 24: "fxsr", 25: "sse", 26: "sse2"},
    (0x8000_0001, ECX): {0: "lahf_lm"},
    (0x8000_0001, EDX): {11: "syscall", 20: "nx", 29: "lm"},
}
# ... and what it shows besides where the host has it: x2APIC; DE, MCE, SEP, MTRR, MCA, PSE36; ARAT; the features of an old KVM.
V2_ALSO = {
    (1, ECX): ECX_X2APIC,
    (1, EDX): 1 << 2 | 1 << 7 | 1 << 11 | 1 << 12 | 1 << 14 | 1 << 17,
    (6, EAX): 1 << 2,
    (0x4000_0001, EAX): 0x0100_00FB,
}
# Where features stand, and the bits there that we or KVM set without the host's having them.
FEATURE_REGISTERS: dict[tuple[int, int], dict[int, int]] = {
    (1, 0): {ECX: ECX_HYPERVISOR | ECX_OSXSAVE, EDX: EDX_HTT},
    (7, 0): {EBX: 0, ECX: 1 << 4, EDX: 0},                       # OSPKE is the guest's own CR4.PKE
    (7, 1): {EAX: 0, EBX: 0, ECX: 0, EDX: 0},
    (0xD, 0): {EAX: 0, EDX: 0},
    (0xD, 1): {EAX: 0},
    (0x4000_0001, 0): {EAX: 0},
    (0x8000_0001, 0): {ECX: ECX_CMP_LEGACY, EDX: 0},
    (0x8000_0008, 0): {EBX: 0},
    (0x8000_0021, 0): {EAX: 0},
}
NAMES = {(1, ECX, 1): "pclmulqdq", (1, ECX, 12): "fma", (1, ECX, 21): "x2apic", (1, ECX, 22): "movbe", (1, ECX, 24): "tsc_deadline_timer",
         (1, ECX, 25): "aes", (1, ECX, 26): "xsave", (1, ECX, 28): "avx", (1, ECX, 29): "f16c", (1, ECX, 30): "rdrand",
         (7, EBX, 3): "bmi1", (7, EBX, 5): "avx2", (7, EBX, 8): "bmi2", (7, EBX, 16): "avx512f", (7, EBX, 18): "rdseed",
         (7, EBX, 29): "sha_ni", (7, ECX, 16): "la57", (0x8000_0001, EDX, 26): "pdpe1gb", (0x8000_0001, EDX, 27): "rdtscp"}
V2_LEAVES = {0, 1, 6, 0x4000_0000, 0x4000_0001, *range(0x8000_0000, 0x8000_0005), 0x8000_0008}
V2_WHOLE = {0, 0x4000_0000, 0x8000_0000, 0x8000_0008}            # leaves in which no feature stands
V2_SIGNATURES = {False: 0x0001_06A3, True: 0x0060_0F12}          # by AMD?: the first CPUs of this level (Nehalem, Bulldozer)
# Their caches, since the host's may be told in other leaves or not at all: Linux divides by the ways of an AMD L1.
V2_CACHES = {
    False: ((2, 0, 0, 0xFF01, 0, 0, 0),                          # "see leaf 4"
            (4, 0, SIGNIFICANT_INDEX, 0x121, 7 << 22 | 63, 63, 1),
            (4, 1, SIGNIFICANT_INDEX, 0x122, 7 << 22 | 63, 63, 1),
            (4, 2, SIGNIFICANT_INDEX, 0x143, 7 << 22 | 63, 511, 1),
            (4, 3, SIGNIFICANT_INDEX, 0x163, 15 << 22 | 63, 8191, 2),
            (0x8000_0006, 0, 0, 0, 0, 0x0100_6040, 0)),
    True: ((0x8000_0005, 0, 0, 0x01FF_01FF, 0x01FF_01FF, 0x4002_0140, 0x4002_0140),
           (0x8000_0006, 0, 0, 0, 0, 0x0200_8140, 0x0080_8140)),
}
V2_BRAND = b"kvmapp x86-64-v2 virtual CPU".ljust(48, b"\0")
V2_ADDRESS_BITS = 40


def guest_cpuid(supported: list[Entry], topology: Topology, vcpu: int, *, model: str = "host", x2apic: bool = True,
                tsc_deadline: bool = False, nested: bool = False) -> list[Entry]:
    """The entries for KVM_SET_CPUID2 of one vCPU.

    `tsc_deadline` tells whether KVM has KVM_CAP_TSC_DEADLINE_TIMER; `nested` leaves VMX or SVM to the guest.
    Raises HostError where the host lacks what the model demands.
    """
    if model not in MODELS:
        raise KvmappError(f"Unknown CPU model '{model}'", f"known models: {', '.join(MODELS)}")
    vendor = vendor_of(supported)
    if model == "baseline":
        supported = _baseline(supported, vendor in AMD_VENDORS)
    rewrite = _Rewrite(topology, vcpu, vendor in AMD_VENDORS, x2apic, tsc_deadline, nested)
    dropped = DROPPED if nested else DROPPED | {SVM_LEAF}
    # An entry of zeroes reads the same when it is absent, and KVM walks the list at every CPUID.
    entries = [rewrite(entry) for entry in supported
               if entry[0] not in dropped and entry[0] not in TOPOLOGY_LEAVES and any(entry[3:])]
    for leaf in TOPOLOGY_LEAVES:
        if leaf == 0xB or any(entry[0] == leaf for entry in supported):
            entries += rewrite.topology_leaf(leaf)
    return entries


def vendor_of(supported: list[Entry]) -> bytes:
    """The vendor string of leaf 0, as b"GenuineIntel"; empty where KVM gives no leaf 0."""
    return next((struct.pack("<3I", ebx, edx, ecx) for function, _, _, _, ebx, ecx, edx in supported if function == 0), b"")


def address_bits(entries: list[Entry]) -> int:
    """How wide a physical address the CPU takes; 36 where it does not tell."""
    return next((eax & 0xFF for function, _, _, eax, *_ in entries if function == 0x8000_0008), 36)


def missing_features(supported: list[Entry]) -> list[str]:
    """The names of the features that x86-64-v2 demands and this host lacks."""
    leaves = {entry[0]: entry for entry in reversed(supported)}
    return [name for (function, register), bits in V2_DEMANDS.items() for bit, name in bits.items()
            if not leaves.get(function, (0,) * 7)[register] >> bit & 1]


def lacking_features(shown: list[Entry], supported: list[Entry], *, tsc_deadline: bool = False) -> list[str]:
    """The features that a CPU with the entries `shown` has and this host cannot give: a guest that saw them may not run here."""
    mine = {entry[:2]: entry for entry in supported}
    lacking = []
    for entry in shown:
        host = mine.get(entry[:2], (0,) * 7)
        for register, ours in FEATURE_REGISTERS.get(entry[:2], {}).items():
            ours |= ECX_TSC_DEADLINE if tsc_deadline and (entry[0], register) == (1, ECX) else 0
            bits = entry[register] & ~host[register] & ~ours
            lacking += [feature_name(entry[0], register, bit) for bit in range(32) if bits >> bit & 1]
    return lacking


def require_features(name: str, shown: list[Entry], supported: list[Entry], *, tsc_deadline: bool) -> None:
    """The guest of that domain goes on with the CPU that it knows, or not at all. Raises HostError."""
    lacking = lacking_features(shown, supported, tsc_deadline=tsc_deadline)
    if lacking:
        raise HostError(f"Domain '{name}' uses what this host's CPU or KVM lacks: {', '.join(lacking[:8])}",
                        "restore it on a host like the one where it was saved; with cpu = baseline it could move to any")


def xsave_components(shown: list[Entry]) -> int:
    """The XSAVE state components (bits of XCR0; Intel SDM 1, 13.1) that a CPU with the entries `shown` may have in use."""
    leaf = next((entry for entry in shown if entry[:2] == (0xD, 0)), (0,) * 7)
    return X87_AND_SSE | leaf[EAX] | leaf[EDX] << 32


def feature_name(function: int, register: int, bit: int) -> str:
    """As /proc/cpuinfo has it where we know it, else the place."""
    known = V2_DEMANDS.get((function, register), {}).get(bit) or NAMES.get((function, register, bit))
    return known or f"CPUID {function:#x} {('eax', 'ebx', 'ecx', 'edx')[register - EAX]} bit {bit}"


class _Rewrite:
    """Turns the host's entries into one vCPU's, leaf by leaf."""

    def __init__(self, topology: Topology, vcpu: int, amd: bool, x2apic: bool, tsc_deadline: bool, nested: bool):
        self.topology, self.amd = topology, amd
        self.apic_id = topology.apic_id(vcpu)
        self.socket, self.core, _ = topology.place(vcpu)
        self.clear1 = ECX_MONITOR | ECX_OSXSAVE | (0 if x2apic else ECX_X2APIC) | (0 if nested else ECX_VMX)
        self.clear1 |= 0 if tsc_deadline else ECX_TSC_DEADLINE
        self.set1 = ECX_HYPERVISOR | (ECX_TSC_DEADLINE if tsc_deadline else 0)
        self.nested = nested
        self.rules = {0: self.leaf_0, 1: self.leaf_1, 4: self.cache_leaf, 0x8000_0001: self.leaf_8000_0001,
                      0x8000_0008: self.leaf_8000_0008, 0x8000_001D: self.cache_leaf, 0x8000_001E: self.leaf_8000_001e}

    def __call__(self, entry: Entry) -> Entry:
        rule = self.rules.get(entry[0])
        return (*entry[:3], *rule(*entry[3:])) if rule else entry

    def leaf_0(self, eax, ebx, ecx, edx):
        """The highest leaf must reach the topology."""
        return max(eax, 0xB), ebx, ecx, edx

    def leaf_1(self, eax, ebx, ecx, edx):
        siblings = self.topology.threads_per_socket if self.amd else 1 << self.topology.package_shift
        ebx = ebx & 0xFFFF | min(siblings, 255) << 16 | (self.apic_id & 0xFF) << 24
        edx = edx | EDX_HTT if self.topology.threads_per_socket > 1 else edx & ~EDX_HTT
        return eax, ebx, ecx & ~self.clear1 | self.set1, edx

    def cache_leaf(self, eax, ebx, ecx, edx):
        """Intel's leaf 4 and AMD's 0x8000_001D: L1 and L2 belong to a core, L3 to the socket."""
        if not eax & 0x1F:
            return eax, ebx, ecx, edx
        level = eax >> 5 & 7
        sharing = 1 << (self.topology.package_shift if level >= 3 else self.topology.thread_shift)
        cores = 1 << (self.topology.package_shift - self.topology.thread_shift)
        eax = eax & 0x3FFF | min(sharing - 1, 0xFFF) << 14
        return eax | (0 if self.amd else min(cores - 1, 0x3F) << 26), ebx, ecx, edx

    def leaf_8000_0001(self, eax, ebx, ecx, edx):
        ecx &= ~ECX_CMP_LEGACY & (~0 if self.nested else ~ECX_SVM)
        return eax, ebx, ecx | (ECX_CMP_LEGACY if self.amd and self.topology.threads_per_socket > 1 else 0), edx

    def leaf_8000_0008(self, eax, ebx, ecx, edx):
        """AMD: threads in the socket, and the APIC ID bits that number them."""
        if self.amd:
            ecx = ecx & ~0xF0FF | min(self.topology.threads_per_socket - 1, 0xFF) | self.topology.package_shift << 12
        return eax, ebx, ecx, edx

    def leaf_8000_001e(self, eax, ebx, ecx, edx):
        """AMD: extended APIC ID, core with its threads, node."""
        return self.apic_id, self.core & 0xFF | self.topology.threads - 1 << 8, self.socket & 0xFF, 0

    def topology_leaf(self, leaf: int) -> list[Entry]:
        """Extended topology: a sub-leaf for threads, one for cores, one that ends the list."""
        thread, core = self.topology.thread_shift, self.topology.package_shift
        rows = ((thread, self.topology.threads, LEVEL_THREAD), (core, self.topology.threads_per_socket, LEVEL_CORE), (0, 0, 0))
        return [(leaf, index, SIGNIFICANT_INDEX, shift, count, level << 8 | index, self.apic_id)
                for index, (shift, count, level) in enumerate(rows)]


def _baseline(supported: list[Entry], amd: bool) -> list[Entry]:
    """x86-64-v2 and not one feature more, whichever host it is, so that a guest can move between hosts."""
    missing = missing_features(supported)
    if missing:
        raise HostError(f"Cannot offer CPU model 'baseline' (x86-64-v2): this host's CPU lacks {', '.join(missing)}",
                        "set cpu = host")
    return [*(_baseline_entry(entry, amd) for entry in supported if entry[0] in V2_LEAVES), *V2_CACHES[amd]]


def _baseline_entry(entry: Entry, amd: bool) -> Entry:
    function, index, flags, eax, ebx, ecx, edx = entry
    if function == 0:
        eax = 0xB
    elif function == 0x8000_0000:
        eax = 0x8000_0008
    elif 0x8000_0002 <= function <= 0x8000_0004:
        eax, ebx, ecx, edx = struct.unpack_from("<4I", V2_BRAND, 16 * (function - 0x8000_0002))
    elif function == 0x8000_0008:
        eax, ebx = 48 << 8 | min(eax & 0xFF, V2_ADDRESS_BITS), 0
    elif function not in V2_WHOLE:
        kept = [_mask(entry, register) for register in (EAX, EBX, ECX, EDX)]
        if function in (1, 0x8000_0001):
            kept[0] = V2_SIGNATURES[amd]
        if function == 1:
            kept[1] = 8 << 8                                     # CLFLUSH works on 64 bytes
        eax, ebx, ecx, edx = kept
    return function, index, flags, eax, ebx, ecx, edx


def _mask(entry: Entry, register: int) -> int:
    key = entry[0], register
    demanded = sum(1 << bit for bit in V2_DEMANDS.get(key, ()))
    return entry[register] & (demanded | V2_ALSO.get(key, 0))
