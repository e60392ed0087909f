"""What both directions of an 82540EM share (e1000.pyx): registers, statistics, interrupts, rings of descriptors.

Registers are an array of words, of which BITS tells what each can hold.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from kvmapp.abi.posix cimport (atomic_load_u32, atomic_store_u32, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
                               pthread_mutex_unlock)
from kvmapp.hw.e1000_rom cimport phy_is_on
from kvmapp.hw.pci cimport PciFunction
from kvmapp.iothread cimport Doorbell, Timer, monotonic_ns
from kvmapp.memory cimport GuestMemory
from kvmapp.net.backend cimport NetBackend

from kvmapp.state import StateError

cdef uint32_t ALL = 0xFFFFFFFF
memset(BITS, 0, sizeof(BITS))
for offset, bits in ((CTRL, 0x7BFFFFFF), (EERD, ALL), (0x18, ALL), (MDIC, ALL), (0x28, ALL), (0x2C, ALL), (0x30, ALL), (VET, 0xFFFF),
                     (ICR, CAUSES), (ITR, 0xFFFF), (IMS, CAUSES), (RCTL, 0x07FFFFFF), (0x170, 0xFFFF), (0x178, ALL), (TCTL, 0x03FFFFFE),
                     (0x410, ALL), (0x458, 0xFFFF), (0xE00, ALL), (PBA, 0xFFFF_FFFF), (0x2160, 0xFFFF), (0x2168, 0xFFFF),
                     (0x2820, 0xFFFF), (0x2828, ALL), (0x282C, 0xFFFF), (0x2C00, 0xFFFF), (0x3820, 0xFFFF), (0x3828, ALL),
                     (0x382C, 0xFFFF), (0x3830, ALL), (RXCSUM, 0xFFFF), (0x5800, ALL), (0x5808, ALL), (0x5810, ALL), (0x5820, ALL),
                     (0x5838, ALL)):
    BITS[offset >> 2] = bits
for offset in (RDBAL, TDBAL):
    for place, bits in ((0, 0xFFFFFFF0), (RING_HIGH, ALL), (RING_LENGTH, 0xFFF80), (RING_HEAD, 0xFFFF), (RING_TAIL, 0xFFFF)):
        BITS[(offset + place) >> 2] = bits
for offset in (*range(STATISTICS, STATISTICS_END, 4), *range(MTA, MTA + TABLE_SIZE, 4), *range(RAL, RAL + 8 * RECEIVE_ADDRESSES, 8),
               *range(VFTA, VFTA + TABLE_SIZE, 4)):
    BITS[offset >> 2] = ALL
for offset in range(RAL, RAL + 8 * RECEIVE_ADDRESSES, 8):
    BITS[(offset + 4) >> 2] = 0x8003FFFF


def check_words(name, bytes registers not None):
    """No register holds bits that it has not got. Raises StateError."""
    cdef const uint32_t* words = <const uint32_t*><const char*>registers
    for i in range(REGISTERS):
        if words[i] & ~BITS[i]:
            raise StateError(f"{name}: 'registers' holds {words[i]:#x} at {4 * i:#x}, with bits outside of {BITS[i]:#x}")


cdef class E1000Chip(PciFunction):
    """`rings` guards what the I/O thread works with, `causes` ICR, IMS and the pin; tail registers are atomic."""

    def __cinit__(self, str name not None, GuestMemory memory not None, NetBackend backend not None, *args, **kwargs):
        pthread_mutex_init(&self.rings, NULL)
        pthread_mutex_init(&self.causes, NULL)
        self.rename(name)
        self.memory, self.backend = memory, backend
        self.bell, self.throttle = Doorbell(), Throttle(self)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.rings)
        pthread_mutex_destroy(&self.causes)

    cdef bint is_up(self) noexcept nogil:
        return self.cable and phy_is_on(self.phy) and self.registers[CTRL >> 2] & CTRL_LINK != 0

    # ---- statistics, with `rings` held

    cdef uint32_t take_statistic(self, uint32_t offset) noexcept nogil:
        """Read clears; of the long ones their upper half, both (13.7)."""
        cdef bint is_long = offset & ~4 in (GORC, GOTC, TOR, TOT)
        cdef uint32_t value
        pthread_mutex_lock(&self.rings)
        value = self.registers[offset >> 2]
        if not is_long or offset & 4:
            self.registers[offset >> 2] = 0
            if is_long:
                self.registers[(offset >> 2) - 1] = 0
        pthread_mutex_unlock(&self.rings)
        return value

    cdef void count(self, uint32_t offset) noexcept nogil:
        """They stick at their largest value."""
        if self.registers[offset >> 2] != ALL:
            self.registers[offset >> 2] += 1

    cdef void count_bytes(self, uint32_t offset, uint32_t length) noexcept nogil:
        cdef uint64_t total = self.registers[offset >> 2] + (<uint64_t>self.registers[(offset >> 2) + 1] << 32)
        total = total + length if total <= <uint64_t>-1 - length else <uint64_t>-1
        self.registers[offset >> 2] = <uint32_t>total
        self.registers[(offset >> 2) + 1] = <uint32_t>(total >> 32)

    cdef void count_size(self, uint32_t offset, uint32_t length) noexcept nogil:
        """One of six groups: up to 64 bytes, 127, 255, 511, 1023, and more."""
        cdef uint32_t group = 0
        while group < 5 and length >= (65 if group == 0 else <uint32_t>64 << group):
            group += 1
        self.count(offset + 4 * group)

    # ---- interrupts

    cdef uint32_t take_causes(self) noexcept nogil:
        """ICR is read, which clears it (13.4.17)."""
        cdef uint32_t value
        pthread_mutex_lock(&self.causes)
        value = self.registers[ICR >> 2]
        self.registers[ICR >> 2] = 0
        self.settle_pin()
        pthread_mutex_unlock(&self.causes)
        return value

    cdef void store_interrupts(self, uint32_t offset, uint32_t value) noexcept nogil:
        pthread_mutex_lock(&self.causes)
        if offset == ICR:
            self.registers[ICR >> 2] &= ~value
        elif offset == ICS:
            self.registers[ICR >> 2] |= value & CAUSES
        elif offset == IMS:
            self.registers[IMS >> 2] |= value & CAUSES
        elif offset == IMC:
            self.registers[IMS >> 2] &= ~value
        elif offset == ITR:
            self.registers[ITR >> 2] = value & BITS[ITR >> 2]
        self.settle_pin()
        pthread_mutex_unlock(&self.causes)

    cdef void raise_causes(self, uint32_t causes) noexcept nogil:
        pthread_mutex_lock(&self.causes)
        self.registers[ICR >> 2] |= causes
        self.settle_pin()
        pthread_mutex_unlock(&self.causes)

    cdef void settle_pin(self) noexcept nogil:
        """The pin tells whether a cause is there that the driver wants to hear of; it rises no sooner than ITR allows. `causes` is held."""
        cdef int64_t now
        if not self.registers[ICR >> 2] & self.registers[IMS >> 2]:
            if self.intx_level:
                self.set_intx(False)
        elif not self.intx_level and not self.throttled:
            now = monotonic_ns() if self.registers[ITR >> 2] else self.quiet_until
            if now >= self.quiet_until:
                self.quiet_until = now + <int64_t>self.registers[ITR >> 2] * ITR_UNIT
                self.set_intx(True)
            else:
                self.throttled = True
                self.throttle.arm(self.quiet_until, 0)

    cdef void throttle_over(self) noexcept nogil:
        pthread_mutex_lock(&self.causes)
        self.throttled = False
        self.settle_pin()
        pthread_mutex_unlock(&self.causes)

    # ---- rings, with `rings` held

    cdef bint open_ring(self, Ring* ring, uint32_t first) noexcept nogil:
        """The ring whose registers begin at `first`; False while there is none that could be used."""
        cdef uint32_t* words = &self.registers[first >> 2]
        cdef uint64_t gpa = words[0] | <uint64_t>words[RING_HIGH >> 2] << 32
        ring.count = words[RING_LENGTH >> 2] // DESCRIPTOR
        ring.head = words[RING_HEAD >> 2]
        if not ring.count or not self.is_bus_master():
            return False
        ring.base = self.memory.translate(gpa, ring.count * <uint64_t>DESCRIPTOR)
        if ring.base == NULL:
            self.complain(b"a ring outside of RAM", gpa)
        elif ring.head >= ring.count:
            self.complain(b"a ring's head is behind its end", ring.head)
        return ring.base != NULL and ring.head < ring.count

    cdef uint32_t ready(self, Ring* ring, uint32_t first) noexcept nogil:
        """How many descriptors are the card's."""
        cdef uint32_t tail = atomic_load_u32(&self.registers[(first + RING_TAIL) >> 2])
        if tail >= ring.count:
            self.complain(b"a ring's tail is behind its end", tail)
            return 0
        return tail - ring.head if tail >= ring.head else tail + ring.count - ring.head

    cdef void advance(self, Ring* ring, uint32_t first) noexcept nogil:
        ring.head = ring.head + 1 if ring.head + 1 < ring.count else 0
        atomic_store_u32(&self.registers[(first + RING_HEAD) >> 2], ring.head)


cdef class Throttle(Timer):
    def __cinit__(self, E1000Chip chip not None):
        self.chip = chip

    cdef void expired(self) noexcept nogil:
        self.chip.throttle_over()
