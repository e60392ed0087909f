"""The real-time clock and its battery-backed memory: Motorola MC146818A, with the PC's second index port and century byte.

Port offset 0 takes an index (bit 7 is the PC's NMI mask, kept without effect), offset 1 reads or writes that byte. The clock is
the host's plus an offset, which the guest changes by setting it; both count ticks of 32,768 Hz, the chip's own. Flags are
computed from the time that passed whenever somebody looks; a timer runs only for interrupts that are enabled. Divider reset
stops the clock, and leaving it starts the next second half a second later, as drivers that set the time rely on.
Left out: daylight saving (DSE), the square-wave output (SQWE), other time bases than 32,768 Hz.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from kvmapp.abi.posix cimport (CLOCK_REALTIME, clock_gettime, gmtime_r, pthread_mutex_lock, pthread_mutex_unlock, timegm,
                               timespec, tm)
from kvmapp.devices cimport Device, IrqLine
from kvmapp.iothread cimport IoThread, Timer, monotonic_ns

from kvmapp.layout import HIGH_MEMORY_BASE, KIB, LOW_MEMORY_END, MIB
from kvmapp.state import StateReader

cdef enum:
    SECONDS = 0x00
    SECONDS_ALARM = 0x01
    MINUTES = 0x02
    MINUTES_ALARM = 0x03
    HOURS = 0x04
    HOURS_ALARM = 0x05
    WEEKDAY = 0x06
    DAY_OF_MONTH = 0x07
    MONTH = 0x08
    YEAR = 0x09
    REG_A = 0x0A
    REG_B = 0x0B
    REG_C = 0x0C
    REG_D = 0x0D
    CENTURY = 0x32
    SIZE = 128

    A_RATE = 0x0F
    A_DIVIDER = 0x70
    A_DIVIDER_32KHZ = 0x20
    A_DIVIDER_RESET = 0x60           # 11x stops and clears the chain
    A_UPDATE_IN_PROGRESS = 0x80
    B_24_HOURS = 0x02
    B_BINARY = 0x04
    B_UPDATE_ENABLE = 0x10           # the enable bits of B and the flags of C stand at the same places
    B_ALARM_ENABLE = 0x20
    B_PERIODIC_ENABLE = 0x40
    B_ENABLES = 0x70
    B_SET = 0x80
    C_UPDATE = 0x10
    C_ALARM = 0x20
    C_PERIODIC = 0x40
    C_INTERRUPT = 0x80
    D_VALID_RAM_AND_TIME = 0x80
    PM = 0x80                        # in the hours, with 12-hour format
    ALARM_ANY = 0xC0                 # an alarm byte from here up matches always

    TICK_BITS = 15                   # of a second: shifting a time right by this gives seconds, rounded down
    TICKS = 1 << TICK_BITS
    UPDATE_TICKS = 8                 # UIP shows for these 244 us before a second ends
    DAY = 86400                      # seconds

cdef int64_t NEVER = <int64_t>1 << 62

cdef struct CmosState:
    uint8_t index
    uint8_t bytes[SIZE]              # the time of day stands in here only while the clock is stopped
    int64_t offset                   # ticks from the host's clock to the guest's
    int64_t seen                     # guest time in ticks up to which flags were computed


cdef class CmosRtc(Device):
    """`memory` bytes of RAM and `vcpus` are told to firmware in the bytes that PC firmware keeps for them."""
    cdef CmosState state
    cdef IrqLine irq
    cdef RtcTimer timer
    cdef IoThread thread

    def __cinit__(self, str name not None, IrqLine irq not None, IoThread thread not None, *,
                  uint64_t memory=0, uint32_t vcpus=1):
        self.rename(name)
        self.width = 1
        self.irq = irq
        self.thread = thread
        self.timer = RtcTimer(self)
        thread.add(self.timer)
        self.state.bytes[REG_A] = A_DIVIDER_32KHZ | 6
        self.state.bytes[REG_B] = B_24_HOURS
        self.state.bytes[REG_D] = D_VALID_RAM_AND_TIME
        self.state.seen = self.now()
        self.lay_down_sizes(memory, vcpus)

    def lay_down_sizes(self, memory, vcpus):
        """What IBM's and later firmware keep in the memory: equipment, RAM sizes in several units, CPUs, a checksum."""
        low = min(memory, LOW_MEMORY_END)
        extended = min(max(low - MIB, 0) // KIB, 0xFFFF)
        above_16m = min(max(low - 16 * MIB, 0) // (64 * KIB), 0xFFFF)
        above_4g = min(max(memory - LOW_MEMORY_END, 0) // (64 * KIB), 0xFFFFFF)
        assert HIGH_MEMORY_BASE == 1 << 32
        for index, size, value in ((0x14, 1, 0x06), (0x15, 2, 640), (0x17, 2, extended), (0x30, 2, extended),
                                   (0x34, 2, above_16m), (0x5B, 3, above_4g), (0x5F, 1, min(vcpus - 1, 255))):
            for i in range(size):
                self.set_nvram(index + i, value >> (8 * i) & 0xFF)
        checksum = sum([self.state.bytes[i] for i in range(0x10, 0x2E)])
        self.set_nvram(0x2E, checksum >> 8 & 0xFF)
        self.set_nvram(0x2F, checksum & 0xFF)

    def set_nvram(self, uint32_t index, uint8_t value):
        """Lays down a byte of the memory, such as the boot order for firmware. The machine stands still."""
        if not REG_D < index < SIZE:
            raise ValueError(f"{self.name}: {index:#x} is not a byte of the memory")
        self.state.bytes[index] = value

    def reset(self):
        """The battery goes on; interrupts are off (MC146818A, RESET)."""
        self.state.bytes[REG_B] &= ~<uint8_t>B_ENABLES
        self.state.bytes[REG_C] = 0
        self.state.index = 0
        self.update_irq()
        self.arm()

    def save(self):
        return {"version": 1, "index": self.state.index, "bytes": (<char*>self.state.bytes)[:SIZE],
                "offset": self.state.offset, "seen": self.state.seen}

    def restore(self, dict saved not None):
        """The guest finds the host's time (plus its offset) and the interrupts that were due meanwhile."""
        cdef bytes data
        reader = StateReader(self.name, saved, version=1)
        cdef uint8_t index = reader.uint("index", 0xFF)
        data = reader.data("bytes", SIZE, SIZE)
        cdef int64_t offset = reader.uint("offset", NEVER, -NEVER)
        cdef int64_t seen = reader.uint("seen", NEVER, -NEVER)
        reader.done()
        self.state.index = index
        self.state.offset = offset
        self.state.seen = seen
        memcpy(self.state.bytes, <const char*>data, SIZE)
        self.update_irq()
        self.arm()

    def close(self):
        self.thread.remove(self.timer)

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        cdef uint8_t index = self.state.index & 0x7F
        cdef uint8_t flags
        if offset != 1:
            return 0xFF              # the index is write-only
        if index == REG_A:
            return self.state.bytes[REG_A] | (A_UPDATE_IN_PROGRESS if self.updating() else 0)
        if index == REG_C:
            self.catch_up()
            flags = self.state.bytes[REG_C]
            self.state.bytes[REG_C] = 0
            self.update_irq()
            self.arm()
            return flags
        if is_time(index) and self.runs():
            self.latch_time(self.now())
        return self.state.bytes[index]

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint8_t byte = value & 0xFF
        cdef uint8_t index = self.state.index & 0x7F
        if offset == 0:
            self.state.index = byte
            return
        if index == REG_C or index == REG_D:
            return
        self.catch_up()
        if index == REG_A:
            self.control(byte & ~A_UPDATE_IN_PROGRESS, self.state.bytes[REG_B])
        elif index == REG_B:
            self.control(self.state.bytes[REG_A], byte)
        elif is_time(index) and self.runs():
            self.latch_time(self.now())
            self.state.bytes[index] = byte
            self.set_time(self.now() & (TICKS - 1))
        else:
            self.state.bytes[index] = byte
        self.update_irq()
        self.arm()

    cdef int64_t now(self) noexcept nogil:
        """The guest's time in ticks since 1970, in the time zone that the guest likes."""
        return host_ticks() + self.state.offset

    cdef bint runs(self) noexcept nogil:
        return not self.state.bytes[REG_B] & B_SET and self.state.bytes[REG_A] & A_DIVIDER_RESET != A_DIVIDER_RESET

    cdef bint updating(self) noexcept nogil:
        return self.runs() and self.now() & (TICKS - 1) >= TICKS - UPDATE_TICKS

    cdef void control(self, uint8_t reg_a, uint8_t reg_b) noexcept nogil:
        """New values for A and B. The time is latched where the clock stops and taken over where it starts."""
        cdef bint ran = self.runs()
        cdef bint was_reset = self.state.bytes[REG_A] & A_DIVIDER_RESET == A_DIVIDER_RESET
        if ran:
            self.latch_time(self.now())
        self.state.bytes[REG_A] = reg_a
        self.state.bytes[REG_B] = reg_b & ~B_UPDATE_ENABLE if reg_b & B_SET else reg_b
        if not ran and self.runs():
            self.set_time(TICKS // 2 if was_reset else self.now() & (TICKS - 1))
        elif ran and self.runs():
            self.latch_time(self.now())          # in the format that may have changed

    cdef void latch_time(self, int64_t now) noexcept nogil:
        """Writes the time of day into its bytes, in the guest's format."""
        cdef tm broken
        cdef long seconds = now >> TICK_BITS
        cdef int hour, year
        gmtime_r(&seconds, &broken)
        hour, year = broken.tm_hour, broken.tm_year + 1900
        self.state.bytes[SECONDS] = self.encode(broken.tm_sec)
        self.state.bytes[MINUTES] = self.encode(broken.tm_min)
        self.state.bytes[HOURS] = self.encode_hour(hour)
        self.state.bytes[WEEKDAY] = self.encode(broken.tm_wday + 1)
        self.state.bytes[DAY_OF_MONTH] = self.encode(broken.tm_mday)
        self.state.bytes[MONTH] = self.encode(broken.tm_mon + 1)
        self.state.bytes[YEAR] = self.encode(year % 100)
        self.state.bytes[CENTURY] = to_bcd(year // 100 % 100)

    cdef void set_time(self, int64_t fraction) noexcept nogil:
        """Makes the bytes the guest's time, `fraction` ticks into that second. Whatever nonsense they hold is some time."""
        cdef tm broken
        memset(&broken, 0, sizeof(broken))
        broken.tm_sec = self.decode(self.state.bytes[SECONDS])
        broken.tm_min = self.decode(self.state.bytes[MINUTES])
        broken.tm_hour = self.decode_hour(self.state.bytes[HOURS])
        broken.tm_mday = self.decode(self.state.bytes[DAY_OF_MONTH])
        broken.tm_mon = self.decode(self.state.bytes[MONTH]) - 1
        broken.tm_year = from_bcd(self.state.bytes[CENTURY]) * 100 + self.decode(self.state.bytes[YEAR]) - 1900
        self.state.offset = (timegm(&broken) << TICK_BITS) + fraction - host_ticks()
        self.state.seen = self.now()

    cdef void catch_up(self) noexcept nogil:
        """Sets the flags of what happened since the last look."""
        cdef int64_t now = self.now()
        cdef int64_t seen = self.state.seen
        cdef int period_bits = self.period_bits()
        self.state.seen = now
        if period_bits >= 0 and now >> period_bits != seen >> period_bits:
            self.state.bytes[REG_C] |= C_PERIODIC
        if self.runs() and now >> TICK_BITS != seen >> TICK_BITS:
            self.state.bytes[REG_C] |= C_UPDATE
            if self.next_alarm(seen) <= now:
                self.state.bytes[REG_C] |= C_ALARM

    cdef void update_irq(self) noexcept nogil:
        cdef uint8_t flags = self.state.bytes[REG_C] & ~C_INTERRUPT
        cdef bint pending = flags & self.state.bytes[REG_B] & B_ENABLES != 0
        self.state.bytes[REG_C] = flags | C_INTERRUPT if pending else flags
        self.irq.set(pending)

    cdef void arm(self) noexcept nogil:
        """Sets the timer to the next event that would interrupt. One that waits to be acknowledged needs none."""
        cdef int64_t next = NEVER
        cdef int64_t seen = self.state.seen
        cdef int period_bits = self.period_bits()
        cdef uint8_t wanted = self.state.bytes[REG_B] & ~self.state.bytes[REG_C]
        if wanted & B_PERIODIC_ENABLE and period_bits >= 0:
            next = ((seen >> period_bits) + 1) << period_bits
        if wanted & B_UPDATE_ENABLE and self.runs():
            next = min(next, ((seen >> TICK_BITS) + 1) << TICK_BITS)
        if wanted & B_ALARM_ENABLE and self.runs():
            next = min(next, self.next_alarm(seen))
        if next == NEVER:
            self.timer.cancel()
            return
        # A day at most, then it looks again: no number that was restored can overflow the deadline.
        next = min(max(next - self.now(), 0), <int64_t>DAY << TICK_BITS)
        self.timer.arm(monotonic_ns() + ((next * 1000000000) >> TICK_BITS) + 1, 0)

    cdef int period_bits(self) noexcept nogil:
        """The periodic flag comes every 2 to the power of this ticks; -1: never. Rates 1 and 2 repeat 8 and 9 (table 5)."""
        cdef int rate = self.state.bytes[REG_A] & A_RATE
        if rate == 0 or self.state.bytes[REG_A] & A_DIVIDER != A_DIVIDER_32KHZ:
            return -1
        return rate + 6 if rate <= 2 else rate - 1

    cdef int64_t next_alarm(self, int64_t after) noexcept nogil:
        """The first second past `after` that the three alarm bytes match, or NEVER: hours, minutes, seconds, largest first."""
        cdef int64_t second = (after >> TICK_BITS) + 1
        cdef int64_t of_day = (second % DAY + DAY) % DAY
        cdef int64_t start = second - of_day
        cdef int wanted_h = self.alarm(HOURS_ALARM)
        cdef int wanted_m = self.alarm(MINUTES_ALARM)
        cdef int wanted_s = self.alarm(SECONDS_ALARM)
        cdef int64_t tried
        if wanted_s > 59 or wanted_m > 59 or wanted_h > 23:
            return NEVER
        # Each step skips to the next hour, minute or second that may match: no more than 24 + 60 + 60 in a row, twice.
        for steps in range(288):
            tried = of_day % DAY
            if wanted_h >= 0 and tried // 3600 != wanted_h:
                of_day += 3600 - tried % 3600
            elif wanted_m >= 0 and tried // 60 % 60 != wanted_m:
                of_day += 60 - tried % 60
            elif wanted_s >= 0 and tried % 60 != wanted_s:
                of_day += 1
            else:
                return (start + of_day) << TICK_BITS
        return NEVER

    cdef int alarm(self, uint32_t index) noexcept nogil:
        """The value of an alarm byte, -1 when it matches always."""
        cdef uint8_t byte = self.state.bytes[index]
        if byte >= ALARM_ANY:
            return -1
        return self.decode_hour(byte) if index == HOURS_ALARM else self.decode(byte)

    cdef uint8_t encode(self, int value) noexcept nogil:
        return <uint8_t>value if self.state.bytes[REG_B] & B_BINARY else to_bcd(value)

    cdef int decode(self, uint8_t byte) noexcept nogil:
        return byte if self.state.bytes[REG_B] & B_BINARY else from_bcd(byte)

    cdef uint8_t encode_hour(self, int hour) noexcept nogil:
        if self.state.bytes[REG_B] & B_24_HOURS:
            return self.encode(hour)
        return self.encode((hour + 11) % 12 + 1) | (PM if hour >= 12 else 0)

    cdef int decode_hour(self, uint8_t byte) noexcept nogil:
        if self.state.bytes[REG_B] & B_24_HOURS:
            return self.decode(byte)
        return self.decode(byte & ~PM) % 12 + (12 if byte & PM else 0)


cdef class RtcTimer(Timer):
    """Expires at the next event that interrupts."""
    cdef CmosRtc rtc

    def __cinit__(self, CmosRtc rtc not None):
        self.rtc = rtc

    cdef void expired(self) noexcept nogil:
        pthread_mutex_lock(&self.rtc.lock)
        self.rtc.catch_up()
        self.rtc.update_irq()
        self.rtc.arm()
        pthread_mutex_unlock(&self.rtc.lock)


cdef int64_t host_ticks() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_REALTIME, &now)
    return (<int64_t>now.tv_sec << TICK_BITS) + (<int64_t>now.tv_nsec << TICK_BITS) // 1000000000


cdef bint is_time(uint8_t index) noexcept nogil:
    """Whether the byte is part of the time of day; the alarm's are ordinary memory."""
    return index <= YEAR and index not in (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM) or index == CENTURY


cdef uint8_t to_bcd(int value) noexcept nogil:
    return <uint8_t>(value // 10 << 4 | value % 10)


cdef int from_bcd(uint8_t byte) noexcept nogil:
    return (byte >> 4) * 10 + (byte & 0xF)
