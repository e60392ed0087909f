"""The part of a machine that lives in KVM, out of it and back: vCPU registers, FPU, MSRs, LAPIC, events; irqchip, PIT and clock.

Documentation/virt/kvm/api.rst. A reset puts back what was saved right after creation; a snapshot uses the same dicts. An MSR that
KVM lists and yet will not read or take is passed over (some hosts have such); anything else that it refuses is an error.

A `moment` is a time of the host's wall clock, ns: saved clocks are those of that moment, and are put back as the time since then has
moved them on, however long the saving and the restoring of one after the other take. 0: they are saved and put back as they stand.
"""
from libc.stdint cimport UINT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from kvmapp.abi.kvm cimport (KVM_GET_CLOCK, KVM_GET_DEBUGREGS, KVM_GET_IRQCHIP, KVM_GET_LAPIC, KVM_GET_MP_STATE, KVM_GET_MSR_INDEX_LIST,
                             KVM_GET_MSRS, KVM_GET_PIT2, KVM_GET_REGS, KVM_GET_SREGS, KVM_GET_TSC_KHZ, KVM_GET_VCPU_EVENTS,
                             KVM_GET_XCRS, KVM_GET_XSAVE,
                             KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_SET_CLOCK, KVM_SET_DEBUGREGS,
                             KVM_KVMCLOCK_CTRL, KVM_SET_IRQCHIP, KVM_SET_LAPIC, KVM_SET_MP_STATE, KVM_SET_MSRS, KVM_SET_PIT2,
                             KVM_SET_REGS, KVM_SET_SREGS, KVM_SET_TSC_KHZ, KVM_SET_VCPU_EVENTS, KVM_SET_XCRS, KVM_SET_XSAVE,
                             kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_msr_list,
                             kvm_msrs, kvm_pit_state2, kvm_regs, kvm_sregs,
                             kvm_vcpu_events, kvm_xcrs, kvm_xsave)
from kvmapp.abi.posix cimport CLOCK_REALTIME, clock_gettime, errno, ioctl, timespec

import os

from kvmapp.errors import HostError
from kvmapp.state import StateError, StateReader

cdef enum:
    MSR_IA32_TSC = 0x10
    MSR_IA32_TSC_DEADLINE = 0x6E0
    MSR_BATCH = 512
    XSTATE_BV = 512                                            # where in an XSAVE area it stands: the components that it holds
    TSC_PPM = 500                                              # a rate that differs by less is the same clock, measured again

cdef int64_t YEARS = <int64_t>100 * 365 * 86400 * 1000000000   # more time than this has not gone by, ns

VCPU_VERSION = 1
VM_VERSION = 1

# (name, get, set, bytes), in the order in which KVM wants them back: the FPU needs XCR0, MSRs and LAPIC need the registers,
# events come after all of them.
BEFORE_MSRS = (
    ("sregs", KVM_GET_SREGS, KVM_SET_SREGS, sizeof(kvm_sregs)),
    ("xcrs", KVM_GET_XCRS, KVM_SET_XCRS, sizeof(kvm_xcrs)),
    ("xsave", KVM_GET_XSAVE, KVM_SET_XSAVE, sizeof(kvm_xsave)),
    ("regs", KVM_GET_REGS, KVM_SET_REGS, sizeof(kvm_regs)),
    ("debugregs", KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, sizeof(kvm_debugregs)),
    ("lapic", KVM_GET_LAPIC, KVM_SET_LAPIC, sizeof(kvm_lapic_state)),
)
AFTER_MSRS = (
    ("events", KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, sizeof(kvm_vcpu_events)),
    ("mp_state", KVM_GET_MP_STATE, KVM_SET_MP_STATE, sizeof(kvm_mp_state)),
)
# Memory type range registers (AMD64 manual, volume 2, 7.7), which KVM keeps but does not list: pairs of base and mask, fixed ranges,
# the default.
MTRR_MSRS = (*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF)
IRQCHIPS = (("pic_master", KVM_IRQCHIP_PIC_MASTER), ("pic_slave", KVM_IRQCHIP_PIC_SLAVE), ("ioapic", KVM_IRQCHIP_IOAPIC))


cpdef list msr_indexes(int kvm_fd):
    """The MSRs that are saved and restored: those that this KVM lists (system ioctl KVM_GET_MSR_INDEX_LIST), and MTRR_MSRS."""
    cdef kvm_msr_list probe
    probe.nmsrs = 0
    ioctl(kvm_fd, KVM_GET_MSR_INDEX_LIST, &probe)              # E2BIG, and the count
    cdef kvm_msr_list* known = <kvm_msr_list*>calloc(1, sizeof(kvm_msr_list) + probe.nmsrs * sizeof(uint32_t))
    if known == NULL:
        raise MemoryError()
    try:
        known.nmsrs = probe.nmsrs
        if ioctl(kvm_fd, KVM_GET_MSR_INDEX_LIST, known) < 0:
            raise failed("KVM_GET_MSR_INDEX_LIST")
        return sorted({*MTRR_MSRS, *[known.indices[i] for i in range(known.nmsrs)]})
    finally:
        free(known)


cpdef dict save_vcpu(int fd, list indexes, uint64_t moment=0):
    """One paused vCPU's state, its TSC as it was at the moment. Raises HostError."""
    state = {"version": VCPU_VERSION}
    # mp_state first: the question makes KVM act on an INIT or SIPI that has come, and that changes the registers.
    for name, get, _, size in AFTER_MSRS[::-1] + BEFORE_MSRS:
        state[name] = get_block(fd, name, get, size)
    state["tsc_khz"] = tsc_khz(fd)
    state["msrs"] = get_msrs(fd, indexes, moment, state["tsc_khz"])
    return state


cpdef int restore_vcpu(int fd, dict state, uint64_t moment=0, uint64_t components=UINT64_MAX) except -1:
    """Puts a paused vCPU back, its TSC as if it had run since the moment. Raises StateError for a state that is not one, HostError
    where KVM refuses. 1: the TSC runs at another rate than it did, and this host cannot help it.

    `components`: the XSAVE state components that the guest can have (bits of XCR0). KVMs before Linux 6.6 save all that their host has,
    which another host refuses.
    """
    reader = StateReader("vcpu", state, VCPU_VERSION)
    blocks = {name: reader.data(name, size, size) for name, _, _, size in BEFORE_MSRS + AFTER_MSRS}
    blocks["xsave"] = only_components(blocks["xsave"], components)
    msrs = reader.data("msrs", MSR_BATCH * 12)
    cdef uint32_t khz = reader.uint("tsc_khz", 2**32 - 1)
    reader.done()
    cdef bint drifts = set_tsc_khz(fd, khz) < 0
    for name, _, put, size in BEFORE_MSRS:
        if name != "xcrs" or has_xcrs(fd):
            set_block(fd, name, put, blocks[name])
    set_msrs(fd, msrs, moment, khz)
    for name, _, put, size in AFTER_MSRS:
        set_block(fd, name, put, blocks[name])
    return drifts


cdef bint has_xcrs(int fd) except -1:
    """A CPU without XSAVE (before 2011, or hidden from a host that is a guest itself) has none: KVM answers a count of 0, and refuses
    every store."""
    return get_block(fd, "xcrs", KVM_GET_XCRS, sizeof(kvm_xcrs))[:4] != bytes(4)


cdef bytes only_components(bytes area, uint64_t components):
    """An XSAVE area of which the other components are as after a reset (Intel SDM 1, 13.4.2)."""
    held = int.from_bytes(area[XSTATE_BV:XSTATE_BV + 8], "little") & components
    return area[:XSTATE_BV] + held.to_bytes(8, "little") + area[XSTATE_BV + 8:]


cpdef int tell_stopped(int fd) except -1:
    """Marks in the guest's kvmclock page that the guest stood still, so that its watchdogs do not take the gap for a hang."""
    ioctl(fd, KVM_KVMCLOCK_CTRL, 0)                            # EINVAL: it uses no kvmclock
    return 0


cpdef uint32_t tsc_khz(int fd):
    """The rate of a vCPU's TSC; 0 where KVM does not tell."""
    return max(0, ioctl(fd, KVM_GET_TSC_KHZ, 0))


cdef int set_tsc_khz(int fd, uint32_t khz) except? -1:
    """0 when the TSC runs at this rate (or none is known), -1 when this host cannot make it."""
    cdef int64_t now = tsc_khz(fd)
    if khz == 0 or now == 0 or abs(<int64_t>khz - now) * 1000000 <= TSC_PPM * now:
        return 0
    return 0 if ioctl(fd, KVM_SET_TSC_KHZ, <unsigned long>khz) == 0 else -1


cpdef int set_level_triggered(int fd, lines) except -1:
    """Sets the bits of these lines (8 to 15) in the second 8259's ELCR. Raises HostError."""
    cdef kvm_irqchip chip
    chip.chip_id = KVM_IRQCHIP_PIC_SLAVE
    if ioctl(fd, KVM_GET_IRQCHIP, &chip) < 0:
        raise failed("KVM_GET_IRQCHIP")
    for line in lines:
        chip.chip.pic.elcr |= 1 << (line - 8)
    if ioctl(fd, KVM_SET_IRQCHIP, &chip) < 0:
        raise failed("KVM_SET_IRQCHIP")
    return 0


cpdef dict save_vm(int fd, uint64_t moment=0):
    """irqchip, PIT and kvmclock of a paused VM, the clock as it was at the moment. Raises HostError."""
    cdef kvm_irqchip chip
    cdef kvm_clock_data clock
    state = {"version": VM_VERSION}
    for name, number in IRQCHIPS:
        chip.chip_id = number
        if ioctl(fd, KVM_GET_IRQCHIP, &chip) < 0:
            raise failed("KVM_GET_IRQCHIP")
        state[name] = (<char*>&chip)[:sizeof(chip)]
    state["pit"] = get_block(fd, "pit", KVM_GET_PIT2, sizeof(kvm_pit_state2))
    memset(&clock, 0, sizeof(clock))
    if ioctl(fd, KVM_GET_CLOCK, &clock) < 0:
        raise failed("KVM_GET_CLOCK")
    state["clock"] = max(0, <int64_t>clock.clock - ns_since(moment))
    return state


cpdef int restore_vm(int fd, dict state, uint64_t moment=0) except -1:
    """Puts irqchip, PIT and kvmclock back, the clock as if it had run since the moment. Raises StateError or HostError."""
    cdef kvm_clock_data clock
    reader = StateReader("vm", state, VM_VERSION)
    chips = [reader.data(name, sizeof(kvm_irqchip), sizeof(kvm_irqchip)) for name, _ in IRQCHIPS]
    pit = reader.data("pit", sizeof(kvm_pit_state2), sizeof(kvm_pit_state2))
    memset(&clock, 0, sizeof(clock))
    clock.clock = reader.uint("clock", 2**63 - 1)
    reader.done()
    for (name, number), chip in zip(IRQCHIPS, chips):
        if int.from_bytes(chip[:4], "little") != number:
            raise StateError(f"vm: '{name}' holds another chip's state")
        set_block(fd, name, KVM_SET_IRQCHIP, chip)
    set_block(fd, "pit", KVM_SET_PIT2, pit)
    clock.clock += ns_since(moment)
    if ioctl(fd, KVM_SET_CLOCK, &clock) < 0:
        raise failed("KVM_SET_CLOCK")
    return 0


cdef int64_t ns_since(uint64_t moment) noexcept:
    """How long ago the moment was; 0 when it is none, or in the future."""
    cdef timespec now
    if moment == 0:
        return 0
    clock_gettime(CLOCK_REALTIME, &now)
    return min(max(0, <int64_t>now.tv_sec * 1000000000 + now.tv_nsec - <int64_t>moment), YEARS)


cdef uint64_t ticks_since(uint64_t moment, uint32_t khz):
    """How far a TSC of this rate has gone since."""
    return <object>ns_since(moment) * khz // 1000000 & 0xFFFF_FFFF_FFFF_FFFF


cdef bytes get_block(int fd, str name, unsigned long request, uint32_t size):
    cdef uint8_t block[8192]
    if size > sizeof(block):
        raise ValueError(f"{name}: {size} bytes")
    memset(block, 0, sizeof(block))
    if ioctl(fd, request, block) < 0:
        raise failed(f"saving {name}")
    return (<char*>block)[:size]


cdef int set_block(int fd, str name, unsigned long request, bytes value) except -1:
    cdef char* block = value
    if ioctl(fd, request, block) < 0:
        raise failed(f"restoring {name}")
    return 0


cdef bytes get_msrs(int fd, list indexes, uint64_t moment, uint32_t khz):
    """(index u32, value u64) pairs of those MSRs that this KVM lets us read, little-endian; the TSC, which comes first for it is read
    right after a look at the clock, as it was at the moment."""
    cdef kvm_msrs* batch = <kvm_msrs*>calloc(1, sizeof(kvm_msrs) + MSR_BATCH * sizeof(kvm_msr_entry))
    cdef uint64_t ticks
    cdef int done
    if batch == NULL:
        raise MemoryError()
    left = sorted(indexes[:MSR_BATCH], key=place)
    pairs = []
    try:
        while left:
            batch.nmsrs = len(left)
            for i, index in enumerate(left):
                batch.entries[i].index = index
            ticks = ticks_since(moment, khz)
            done = ioctl(fd, KVM_GET_MSRS, batch)
            if done < 0:
                raise failed("KVM_GET_MSRS")
            for i in range(done):
                if batch.entries[i].index == MSR_IA32_TSC:
                    batch.entries[i].data -= ticks
            pairs += [pack_msr(batch.entries[i].index, batch.entries[i].data) for i in range(done)]
            del left[:done + 1]                                # the one after the last read is refused: leave it out
        return b"".join(pairs)
    finally:
        free(batch)


cdef int set_msrs(int fd, bytes pairs, uint64_t moment, uint32_t khz) except -1:
    """Sets them, the TSC first (as above), its deadline last (it is relative to the TSC); an MSR that KVM refuses is passed over."""
    if len(pairs) % 12:
        raise StateError("vcpu: 'msrs' is not made of 12-byte pairs")
    cdef kvm_msrs* batch = <kvm_msrs*>calloc(1, sizeof(kvm_msrs) + MSR_BATCH * sizeof(kvm_msr_entry))
    cdef int done
    if batch == NULL:
        raise MemoryError()
    left = [(int.from_bytes(pairs[i:i + 4], "little"), int.from_bytes(pairs[i + 4:i + 12], "little"))
            for i in range(0, len(pairs), 12)]
    left.sort(key=lambda pair: place(pair[0]))
    try:
        while left:
            batch.nmsrs = len(left)
            for i, (index, value) in enumerate(left):
                batch.entries[i].index = index
                batch.entries[i].data = value
            if left[0][0] == MSR_IA32_TSC:
                batch.entries[0].data += ticks_since(moment, khz)
            done = ioctl(fd, KVM_SET_MSRS, batch)
            if done < 0:
                raise failed("KVM_SET_MSRS")
            del left[:done + 1]
        return 0
    finally:
        free(batch)


def place(index):
    """Where in the order of reading and writing."""
    return {MSR_IA32_TSC: 0, MSR_IA32_TSC_DEADLINE: 2}.get(index, 1)


cdef bytes pack_msr(uint32_t index, uint64_t value):
    return index.to_bytes(4, "little") + value.to_bytes(8, "little")


cdef object failed(str what):
    code = errno
    return HostError(f"KVM refuses {what}: {os.strerror(code)}")
