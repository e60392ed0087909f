"""The watchdog timer of Intel's 6300ESB (300641-003, chapter 16): a PCI card that acts when the guest does not reload it in time.

Two stages count down one after the other, each from its own preload value; the end of the first may interrupt, the end of the
second asks the host to act (Power, WATCHDOG) and is remembered across resets. Preload and reload registers take a store only
after the unlocking sequence 0x80, 0x86. Left out: SMI as the first stage's interrupt, and stages shorter than a millisecond.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from kvmapp.abi.posix cimport pthread_mutex_lock, pthread_mutex_unlock
from kvmapp.devices cimport WATCHDOG, Power
from kvmapp.hw.pci cimport BAR_MEM32, PciFunction
from kvmapp.iothread cimport IoThread, Timer, monotonic_ns

from kvmapp.state import StateError, StateReader

cdef enum:
    # configuration space
    WDT_CONFIG = 0x60
    CONFIG_INTERRUPT = 0x03          # 0: the pin; 2: SMI; 3: none
    CONFIG_FAST = 0x04               # a tick of 2^5 PCI clocks instead of 2^15
    CONFIG_OUTPUT_OFF = 0x20         # the second stage acts on nothing
    CONFIG_WRITABLE = CONFIG_INTERRUPT | CONFIG_FAST | CONFIG_OUTPUT_OFF
    WDT_LOCK = 0x68
    LOCK_LOCKED = 0x01               # until the next reset
    LOCK_ENABLED = 0x02
    LOCK_FREE_RUN = 0x04             # starts over after the second stage
    LOCK_WRITABLE = LOCK_LOCKED | LOCK_ENABLED | LOCK_FREE_RUN

    # BAR 0
    BAR = 0
    BAR_SIZE = 0x10
    PRELOAD_1 = 0x0
    PRELOAD_2 = 0x4
    INTERRUPT_STATUS = 0x8
    RELOAD = 0xC
    PRELOAD_BITS = 0xFFFFF
    STATUS_ACTIVE = 0x01
    RELOAD_NOW = 0x100
    RELOAD_TIMED_OUT = 0x200         # the second stage ended; cleared by writing it
    UNLOCK_FIRST = 0x80
    UNLOCK_SECOND = 0x86

    PCI_CLOCK_NS = 30
    SLOW_SHIFT = 15
    FAST_SHIFT = 5
    STAGE_LEAST_NS = 1000000
    UNLOCKED = 2

STAGE_MOST_NS = (<uint64_t>PRELOAD_BITS << SLOW_SHIFT) * PCI_CLOCK_NS

cdef struct WatchdogState:
    uint32_t preload[2]
    uint32_t unlocking               # how many words of the sequence have come
    uint32_t stage                   # 1 or 2; 0: the timer stands
    uint64_t left                    # ns of the stage when the machine was last stopped
    bint timed_out
    bint asked                       # the host was told, and the guest has not reloaded since


cdef class I6300Esb(PciFunction):
    """Made paused: time goes on from `resume` on. `thread` runs its timer."""
    cdef WatchdogState state
    cdef Power power
    cdef IoThread thread
    cdef StageTimer timer
    cdef bint running                # the machine is
    cdef int64_t deadline            # ns of CLOCK_MONOTONIC of the stage's end, while running

    def __cinit__(self, str name not None, Power power not None, IoThread thread not None):
        self.rename(name)
        self.width = 4
        self.power = power
        self.identify(0x8086, 0x25AB, 0x088000, pin=1)
        self.add_bar(BAR, BAR_SIZE, BAR_MEM32)
        self.define(WDT_CONFIG, 2, 0, CONFIG_WRITABLE)
        self.define(WDT_LOCK, 1, 0, LOCK_WRITABLE)
        self.clear()
        self.timer = StageTimer(self)
        self.thread = thread
        thread.add(self.timer)

    def reset(self):
        PciFunction.reset(self)
        pthread_mutex_lock(&self.lock)
        self.clear()
        self.arm()
        pthread_mutex_unlock(&self.lock)

    def save(self):
        """Of a running machine the time left is that of this moment."""
        return {"version": 1, "pci": PciFunction.save(self), "preload": [self.state.preload[0], self.state.preload[1]],
                "unlocking": self.state.unlocking, "stage": self.state.stage, "left": self.left(),
                "timed_out": bool(self.state.timed_out), "asked": bool(self.state.asked)}

    def restore(self, dict saved not None):
        cdef WatchdogState state
        reader = StateReader(self.name, saved, version=1)
        pci = reader.take("pci", dict)
        state.preload[0], state.preload[1] = reader.uints("preload", 2, PRELOAD_BITS)
        state.unlocking = reader.uint("unlocking", UNLOCKED)
        state.stage = reader.uint("stage", 2)
        state.left = reader.uint("left", STAGE_MOST_NS)
        state.timed_out = reader.flag("timed_out")
        state.asked = reader.flag("asked")
        reader.done()
        if state.left and not state.stage:
            raise StateError(f"{self.name}: 'left' is {state.left}, but no stage runs")
        PciFunction.restore(self, pci)
        pthread_mutex_lock(&self.lock)
        self.state = state
        self.deadline = monotonic_ns() + <int64_t>state.left
        self.arm()
        pthread_mutex_unlock(&self.lock)

    def pause(self):
        pthread_mutex_lock(&self.lock)
        self.state.left = self.left()
        self.running = False
        self.arm()
        pthread_mutex_unlock(&self.lock)

    def resume(self):
        pthread_mutex_lock(&self.lock)
        if not self.running:
            self.running = True
            self.deadline = monotonic_ns() + <int64_t>self.state.left
            self.arm()
        pthread_mutex_unlock(&self.lock)

    def close(self):
        self.thread.remove(self.timer)

    # ---- registers

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        cdef uint32_t value = 0
        if offset & ~3 == PRELOAD_1:
            value = self.state.preload[0]
        elif offset & ~3 == PRELOAD_2:
            value = self.state.preload[1]
        elif offset & ~3 == INTERRUPT_STATUS:
            value = STATUS_ACTIVE if self.intx_level else 0
        elif self.state.timed_out:
            value = RELOAD_TIMED_OUT
        return value >> 8 * (offset & 3)

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        if offset == INTERRUPT_STATUS:
            if value & STATUS_ACTIVE:
                self.set_intx(False)
        elif offset == RELOAD and value == UNLOCK_FIRST:
            self.state.unlocking = 1
        elif offset == RELOAD and value == UNLOCK_SECOND and self.state.unlocking == 1:
            self.state.unlocking = UNLOCKED
        else:
            if self.state.unlocking == UNLOCKED:
                self.set_register(<uint32_t>offset, <uint32_t>value)
            self.state.unlocking = 0

    cdef void set_register(self, uint32_t offset, uint32_t value) noexcept nogil:
        """A store after the unlocking sequence."""
        if offset == PRELOAD_1:
            self.state.preload[0] = value & PRELOAD_BITS
        elif offset == PRELOAD_2:
            self.state.preload[1] = value & PRELOAD_BITS
        elif offset == RELOAD:
            if value & RELOAD_TIMED_OUT:
                self.state.timed_out = False
            if value & RELOAD_NOW:
                self.state.asked = False
                if self.config[WDT_LOCK] & LOCK_ENABLED:
                    self.start_stage(1)

    cdef void config_write(self, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint8_t before = self.config[WDT_LOCK], now
        PciFunction.config_write(self, offset, size, value)
        if before & LOCK_LOCKED:
            self.config[WDT_LOCK] = before
        now = self.config[WDT_LOCK]
        if now & ~before & LOCK_ENABLED:
            self.start_stage(1)
        elif before & ~now & LOCK_ENABLED:
            self.start_stage(0)

    # ---- time

    cdef void clear(self) noexcept nogil:
        """As after a reset, which a time-out outlives: the guest can see why it was reset."""
        cdef bint timed_out = self.state.timed_out
        memset(&self.state, 0, sizeof(self.state))
        self.state.timed_out = timed_out
        self.state.preload[0] = self.state.preload[1] = PRELOAD_BITS

    cdef void start_stage(self, uint32_t stage) noexcept nogil:
        """0 stops the timer."""
        cdef uint32_t shift = FAST_SHIFT if self.config[WDT_CONFIG] & CONFIG_FAST else SLOW_SHIFT
        self.state.stage = stage
        self.state.left = 0
        if stage:
            self.state.left = max((<uint64_t>self.state.preload[stage - 1] << shift) * PCI_CLOCK_NS, <uint64_t>STAGE_LEAST_NS)
        self.deadline = monotonic_ns() + <int64_t>self.state.left
        self.arm()

    cdef uint64_t left(self) noexcept nogil:
        if not self.running or not self.state.stage:
            return self.state.left
        return <uint64_t>max(self.deadline - monotonic_ns(), <int64_t>0)

    cdef void arm(self) noexcept nogil:
        if self.running and self.state.stage:
            self.timer.arm(self.deadline, 0)
        else:
            self.timer.cancel()

    cdef void stage_over(self) noexcept nogil:
        """The timer's call, with the lock held; it may come late, for a stage that was started anew meanwhile."""
        if not self.running or not self.state.stage or monotonic_ns() < self.deadline:
            return
        if self.state.stage == 1:
            if not self.config[WDT_CONFIG] & CONFIG_INTERRUPT:
                self.set_intx(True)
            self.start_stage(2)
            return
        self.state.timed_out = True
        if not self.config[WDT_CONFIG] & CONFIG_OUTPUT_OFF and not self.state.asked:
            self.state.asked = True
            self.power.request(WATCHDOG, 0)
        self.start_stage(1 if self.config[WDT_LOCK] & LOCK_FREE_RUN else 0)


cdef class StageTimer(Timer):
    cdef I6300Esb watchdog

    def __cinit__(self, I6300Esb watchdog not None):
        self.watchdog = watchdog

    cdef void expired(self) noexcept nogil:
        pthread_mutex_lock(&self.watchdog.lock)
        self.watchdog.stage_over()
        pthread_mutex_unlock(&self.watchdog.lock)
