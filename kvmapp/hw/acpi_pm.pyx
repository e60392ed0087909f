"""ACPI's fixed hardware: the PM1a event and control blocks, the PM timer and a general-purpose event block (ACPI 6.5, 4.8).

Offsets: PM1a status +0 and enable +2, PM1a control +4, PM timer +8, GPE0 status +0x20 and enable +0x22. The machine is always in
ACPI mode (SCI_EN reads one, there is no SMI command port). The SCI is level triggered and stays up while an enabled event
stands. Writing SLP_EN with sleep type 5 (S5 in the DSDT) powers off; other types are no sleep states here and do nothing.
The timer is 32 bits wide and stands still while the machine is paused.
Left out: sleep button, RTC wake (the RTC has its own interrupt), global lock by SMI, GPE1.
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from kvmapp.abi.posix cimport pthread_mutex_lock, pthread_mutex_unlock
from kvmapp.devices cimport POWER_OFF, Device, IrqLine, Power
from kvmapp.iothread cimport IoThread, Timer, monotonic_ns

from kvmapp.layout import ACPI_GPE0_SIZE, ACPI_SLEEP_TYPE_S5
from kvmapp.state import StateReader

TICKS_ROUND = 1 << 56                # in saved state they begin again after 600 years

cdef enum:
    PM1_STATUS = 0x00                # two bytes each
    PM1_ENABLE = 0x02
    PM1_CONTROL = 0x04
    PM_TIMER = 0x08                  # four bytes
    GPE0_STATUS = 0x20               # two bytes each
    GPE0_ENABLE = 0x22
    END = 0x24

    TIMER_EVENT = 0x0001             # the same bits in status and enable
    GLOBAL_EVENT = 0x0020
    POWER_BUTTON_EVENT = 0x0100
    RTC_EVENT = 0x0400               # never comes, but Linux enables it whatever the FADT says and complains if that fails
    EVENTS = TIMER_EVENT | GLOBAL_EVENT | POWER_BUTTON_EVENT | RTC_EVENT
    WAKE_STATUS = 0x8000

    CONTROL_SCI_ENABLED = 0x0001
    CONTROL_BUS_MASTER_RELOAD = 0x0002
    CONTROL_SLEEP_TYPE = 0x1C00
    CONTROL_SLEEP_TYPE_SHIFT = 10
    CONTROL_SLEEP_ENABLE = 0x2000
    CONTROL_KEPT = CONTROL_BUS_MASTER_RELOAD | CONTROL_SLEEP_TYPE

    TIMER_HZ = 3579545
    HALF_TURN_BITS = 31              # the timer event comes when the highest bit changes
    SLEEP_TYPE_S5 = 5                # layout.ACPI_SLEEP_TYPE_S5, which the DSDT is made with

assert ACPI_SLEEP_TYPE_S5 == SLEEP_TYPE_S5 and GPE0_STATUS + ACPI_GPE0_SIZE == END

cdef struct AcpiPmState:
    uint16_t status
    uint16_t enable
    uint16_t control
    uint16_t gpe_status
    uint16_t gpe_enable
    uint64_t ticks                   # of the PM timer when it was last stopped
    uint64_t half_turns              # of the timer that were turned into events


cdef class AcpiPm(Device):
    """`irq` is the SCI's line. Made paused: the timer runs from `resume` on."""
    cdef AcpiPmState state
    cdef IrqLine irq
    cdef Power power
    cdef IoThread thread
    cdef PmTimerEvent timer
    cdef int64_t started             # ns of CLOCK_MONOTONIC at `ticks`; 0: the timer stands still

    def __cinit__(self, str name not None, IrqLine irq not None, Power power not None, IoThread thread not None):
        self.rename(name)
        self.width = 4
        self.irq = irq
        self.power = power
        self.thread = thread
        self.timer = PmTimerEvent(self)
        thread.add(self.timer)

    def press_power_button(self):
        """Tells the guest; whether it listens (a guest without ACPI, or without a driver for the button, does not)."""
        cdef bint listens
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.state.status |= POWER_BUTTON_EVENT
            self.update_irq()
            listens = self.state.enable & POWER_BUTTON_EVENT != 0
            pthread_mutex_unlock(&self.lock)
        return listens

    def raise_event(self, uint32_t event):
        """General-purpose event `event` (0-15) happened: the DSDT's method of that number runs, if the guest enabled it."""
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.state.gpe_status |= <uint16_t>(1 << (event & 15))
            self.update_irq()
            pthread_mutex_unlock(&self.lock)

    def reset(self):
        memset(&self.state, 0, sizeof(self.state))
        if self.started:
            self.started = monotonic_ns()
        self.timer.cancel()
        self.update_irq()

    def save(self):
        """Of a running machine the timer's value is that of this moment."""
        ticks = self.ticks() % TICKS_ROUND
        half_turns = min(self.state.half_turns % (TICKS_ROUND >> HALF_TURN_BITS), ticks >> HALF_TURN_BITS)
        return {"version": 1, "status": self.state.status, "enable": self.state.enable, "control": self.state.control,
                "gpe_status": self.state.gpe_status, "gpe_enable": self.state.gpe_enable, "ticks": ticks,
                "half_turns": half_turns}

    def restore(self, dict saved not None):
        cdef AcpiPmState state
        reader = StateReader(self.name, saved, version=1)
        state.status = reader.bits("status", EVENTS | WAKE_STATUS)
        state.enable = reader.bits("enable", EVENTS)
        state.control = reader.bits("control", CONTROL_KEPT)
        state.gpe_status = reader.uint("gpe_status", 0xFFFF)
        state.gpe_enable = reader.uint("gpe_enable", 0xFFFF)
        state.ticks = reader.uint("ticks", TICKS_ROUND - 1)
        state.half_turns = reader.uint("half_turns", state.ticks >> HALF_TURN_BITS)
        reader.done()
        self.state = state
        if self.started:
            self.started = monotonic_ns()
        self.update_irq()

    def pause(self):
        pthread_mutex_lock(&self.lock)
        self.state.ticks = self.ticks()
        self.started = 0
        self.timer.cancel()
        pthread_mutex_unlock(&self.lock)

    def resume(self):
        pthread_mutex_lock(&self.lock)
        if not self.started:
            self.started = monotonic_ns()
        self.catch_up()
        self.arm()
        pthread_mutex_unlock(&self.lock)

    def close(self):
        self.thread.remove(self.timer)

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        cdef uint64_t value = 0
        cdef uint32_t i, ticks
        if offset == PM_TIMER and size == 4:
            return <uint32_t>self.ticks()            # by far the most frequent access
        self.catch_up()
        ticks = <uint32_t>self.ticks()
        for i in range(size):
            value |= <uint64_t>self.load(<uint32_t>offset + i, ticks) << (8 * i)
        return value

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        """Byte for byte: of each register the bits that act together stand in one byte, and guests write any width."""
        cdef uint32_t i
        self.catch_up()
        for i in range(size):
            self.store(<uint32_t>offset + i, <uint8_t>(value >> (8 * i)))
        self.update_irq()
        self.arm()

    cdef uint8_t load(self, uint32_t offset, uint32_t ticks) noexcept nogil:
        cdef uint32_t shift = 8 * (offset & 1)
        if offset < PM1_ENABLE:
            return <uint8_t>(self.state.status >> shift)
        if offset < PM1_CONTROL:
            return <uint8_t>(self.state.enable >> shift)
        if offset < PM1_CONTROL + 2:
            return <uint8_t>((self.state.control | CONTROL_SCI_ENABLED) >> shift)
        if PM_TIMER <= offset < PM_TIMER + 4:
            return <uint8_t>(ticks >> 8 * (offset - PM_TIMER))
        if GPE0_STATUS <= offset < GPE0_ENABLE:
            return <uint8_t>(self.state.gpe_status >> shift)
        if GPE0_ENABLE <= offset < END:
            return <uint8_t>(self.state.gpe_enable >> shift)
        return 0

    cdef void store(self, uint32_t offset, uint8_t byte) noexcept nogil:
        cdef uint32_t shift = 8 * (offset & 1)
        cdef uint16_t bits = <uint16_t>byte << shift
        cdef uint16_t others = ~(<uint16_t>0xFF << shift)
        if offset < PM1_ENABLE:
            self.state.status &= ~bits               # status bits are cleared by writing ones
        elif offset < PM1_CONTROL:
            self.state.enable = (self.state.enable & others) | (bits & EVENTS)
        elif offset < PM1_CONTROL + 2:
            self.state.control = (self.state.control & others) | (bits & CONTROL_KEPT)
            if bits & CONTROL_SLEEP_ENABLE:
                self.sleep((bits & CONTROL_SLEEP_TYPE) >> CONTROL_SLEEP_TYPE_SHIFT)
        elif GPE0_STATUS <= offset < GPE0_ENABLE:
            self.state.gpe_status &= ~bits
        elif GPE0_ENABLE <= offset < END:
            self.state.gpe_enable = (self.state.gpe_enable & others) | bits

    cdef void sleep(self, uint32_t sleep_type) noexcept nogil:
        if sleep_type == SLEEP_TYPE_S5:
            self.power.request(POWER_OFF, 0)
        else:
            self.complain(b"a sleep state that the DSDT does not offer, type", sleep_type)

    cdef uint64_t ticks(self) noexcept nogil:
        cdef int64_t ns
        if not self.started:
            return self.state.ticks
        ns = monotonic_ns() - self.started
        # In two parts: ns * TIMER_HZ would overflow after 85 minutes.
        return self.state.ticks + ns // 1000000000 * TIMER_HZ + ns % 1000000000 * TIMER_HZ // 1000000000

    cdef void catch_up(self) noexcept nogil:
        """The timer's status bit stands when its highest bit changed since the last look (4.8.2.1)."""
        cdef uint64_t half_turns = self.ticks() >> HALF_TURN_BITS
        if half_turns != self.state.half_turns:
            self.state.half_turns = half_turns
            self.state.status |= TIMER_EVENT
            self.update_irq()

    cdef void update_irq(self) noexcept nogil:
        self.irq.set((self.state.status & self.state.enable | self.state.gpe_status & self.state.gpe_enable) != 0)

    cdef void arm(self) noexcept nogil:
        """A host timer runs only while the guest wants the timer's interrupt, which hardly any does."""
        cdef uint64_t turn, now
        if not self.started or not self.state.enable & ~self.state.status & TIMER_EVENT:
            self.timer.cancel()
            return
        turn, now = (self.state.half_turns + 1) << HALF_TURN_BITS, self.ticks()
        self.timer.arm(monotonic_ns() + (turn - now if turn > now else 0) * 1000000000 // TIMER_HZ + 1, 0)      # it may just have come


cdef class PmTimerEvent(Timer):
    """Expires when the PM timer's highest bit changes."""
    cdef AcpiPm pm

    def __cinit__(self, AcpiPm pm not None):
        self.pm = pm

    cdef void expired(self) noexcept nogil:
        pthread_mutex_lock(&self.pm.lock)
        self.pm.catch_up()
        self.pm.arm()
        pthread_mutex_unlock(&self.pm.lock)
