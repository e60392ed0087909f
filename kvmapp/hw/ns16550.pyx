"""The serial port: National Semiconductor PC16550D (its datasheet, section 8), as COM1 and COM2 wire it up.

Eight registers at offsets 0-7. Bytes move at once: the transmitter is empty again as soon as the backend took the byte, and
while the backend is full they wait in the transmit FIFO with THRE off, as on a slow line. The receive FIFO is filled from the
backend, which holds back what does not fit, so only the loopback can overrun it. The line is never idle for less than the
timeout of four characters: what lies in the FIFO below the trigger level is reported as a timeout at once.
On the PC the interrupt passes a gate that OUT2 opens; in loopback OUT2's pin is off.
Left out: line speed, parity and framing (a divisor and a format are kept, nothing depends on them), breaks, DMA mode.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove, memset

from kvmapp.abi.posix cimport pthread_mutex_lock, pthread_mutex_unlock
from kvmapp.chardev cimport CharBackend, CharUser
from kvmapp.devices cimport Device, IrqLine

from kvmapp.state import StateReader

cdef enum:
    RBR_THR_DLL = 0
    IER_DLM = 1
    IIR_FCR = 2
    LCR = 3
    MCR = 4
    LSR = 5
    MSR = 6
    SCR = 7

    IER_RECEIVED = 0x01
    IER_THR_EMPTY = 0x02
    IER_LINE_STATUS = 0x04
    IER_MODEM_STATUS = 0x08
    IER_WRITABLE = 0x0F

    IIR_MODEM_STATUS = 0x00
    IIR_NONE = 0x01
    IIR_THR_EMPTY = 0x02
    IIR_RECEIVED = 0x04
    IIR_LINE_STATUS = 0x06
    IIR_TIMEOUT = 0x0C
    IIR_FIFO = 0xC0

    FCR_ENABLE = 0x01
    FCR_CLEAR_RECEIVER = 0x02
    FCR_CLEAR_TRANSMITTER = 0x04
    FCR_KEPT = 0xC9                  # trigger level, DMA mode, enable

    LCR_DLAB = 0x80

    MCR_DTR = 0x01
    MCR_RTS = 0x02
    MCR_OUT1 = 0x04
    MCR_OUT2 = 0x08
    MCR_LOOPBACK = 0x10
    MCR_WRITABLE = 0x1F

    LSR_DATA_READY = 0x01
    LSR_OVERRUN = 0x02
    LSR_THR_EMPTY = 0x20
    LSR_TRANSMITTER_EMPTY = 0x40

    MSR_DELTAS = 0x0F
    MSR_RING_ENDED = 0x04
    MSR_CTS = 0x10
    MSR_DSR = 0x20
    MSR_RI = 0x40
    MSR_DCD = 0x80
    MSR_CONNECTED = 0xB0             # the other end is always there and ready

    FIFO_SIZE = 16

cdef uint8_t[4] TRIGGER_LEVELS = [1, 4, 8, 14]

cdef struct Fifo:
    uint8_t data[FIFO_SIZE]
    uint32_t count

cdef struct Ns16550State:
    uint8_t ier
    uint8_t fcr
    uint8_t lcr
    uint8_t mcr
    uint8_t msr
    uint8_t scr
    uint16_t divisor
    bint overrun
    bint thr_empty_pending           # the THRE interrupt: set when the transmitter empties, cleared by reading IIR
    Fifo receiver
    Fifo transmitter


cdef class Ns16550(Device):
    """One port; `irq` is its line and `backend` the other end of its cable."""
    cdef Ns16550State state
    cdef IrqLine irq
    cdef CharBackend backend
    cdef CharUser user

    def __cinit__(self, str name not None, IrqLine irq not None, CharBackend backend not None):
        self.rename(name)
        self.width = 1
        self.irq = irq
        self.backend = backend
        self.user = SerialUser(self)
        backend.connect(self.user)
        self.reset()

    def reset(self):
        memset(&self.state, 0, sizeof(self.state))
        self.state.divisor = 12      # 9600 baud, what firmware leaves
        self.state.msr = MSR_CONNECTED
        self.irq.set(False)

    def save(self):
        return {"version": 1, "ier": self.state.ier, "fcr": self.state.fcr, "lcr": self.state.lcr, "mcr": self.state.mcr,
                "msr": self.state.msr, "scr": self.state.scr, "divisor": self.state.divisor,
                "overrun": bool(self.state.overrun), "thr_empty_pending": bool(self.state.thr_empty_pending),
                "receiver": (<char*>self.state.receiver.data)[:self.state.receiver.count],
                "transmitter": (<char*>self.state.transmitter.data)[:self.state.transmitter.count]}

    def restore(self, dict saved not None):
        cdef Ns16550State state
        cdef bytes receiver, transmitter
        memset(&state, 0, sizeof(state))
        reader = StateReader(self.name, saved, version=1)
        state.ier = reader.uint("ier", IER_WRITABLE)
        state.fcr = reader.bits("fcr", FCR_KEPT)
        state.lcr = reader.uint("lcr", 0xFF)
        state.mcr = reader.uint("mcr", MCR_WRITABLE)
        state.msr = reader.uint("msr", 0xFF)
        state.scr = reader.uint("scr", 0xFF)
        state.divisor = reader.uint("divisor", 0xFFFF)
        state.overrun = reader.flag("overrun")
        state.thr_empty_pending = reader.flag("thr_empty_pending")
        receiver = reader.data("receiver", FIFO_SIZE if state.fcr & FCR_ENABLE else 1)
        transmitter = reader.data("transmitter", FIFO_SIZE if state.fcr & FCR_ENABLE else 1)
        reader.done()
        state.receiver.count, state.transmitter.count = len(receiver), len(transmitter)
        memcpy(state.receiver.data, <const char*>receiver, state.receiver.count)
        memcpy(state.transmitter.data, <const char*>transmitter, state.transmitter.count)
        self.state = state
        self.update_irq()

    def resume(self):
        """Takes up what the backend may have said or accepted while nobody listened."""
        self.user.input_ready()
        self.user.output_space()

    def close(self):
        self.backend.connect(None)

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        cdef uint8_t value = 0
        if offset == RBR_THR_DLL:
            value = self.state.divisor & 0xFF if self.state.lcr & LCR_DLAB else self.receive()
        elif offset == IER_DLM:
            value = self.state.divisor >> 8 if self.state.lcr & LCR_DLAB else self.state.ier
        elif offset == IIR_FCR:
            value = self.identify()
            if value == IIR_THR_EMPTY:
                self.state.thr_empty_pending = False
            if self.state.fcr & FCR_ENABLE:
                value |= IIR_FIFO
        elif offset == LCR:
            value = self.state.lcr
        elif offset == MCR:
            value = self.state.mcr
        elif offset == LSR:
            value = self.line_status()
            self.state.overrun = False
        elif offset == MSR:
            value = self.state.msr
            self.state.msr &= ~<uint8_t>MSR_DELTAS
        elif offset == SCR:
            value = self.state.scr
        self.update_irq()
        return value

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint8_t byte = value & 0xFF
        if offset == RBR_THR_DLL:
            if self.state.lcr & LCR_DLAB:
                self.state.divisor = (self.state.divisor & 0xFF00) | byte
            else:
                self.transmit(byte)
        elif offset == IER_DLM:
            if self.state.lcr & LCR_DLAB:
                self.state.divisor = <uint16_t>(byte << 8) | (self.state.divisor & 0xFF)
            else:
                self.enable_interrupts(byte & IER_WRITABLE)
        elif offset == IIR_FCR:
            self.control_fifos(byte)
        elif offset == LCR:
            self.state.lcr = byte
        elif offset == MCR:
            self.control_modem(byte & MCR_WRITABLE)
        elif offset == SCR:
            self.state.scr = byte
        self.update_irq()

    cdef uint32_t depth(self) noexcept nogil:
        return FIFO_SIZE if self.state.fcr & FCR_ENABLE else 1

    cdef uint8_t receive(self) noexcept nogil:
        """The oldest byte received; the FIFO is filled again when it runs empty."""
        cdef uint8_t byte = 0
        if self.state.receiver.count:
            byte = self.state.receiver.data[0]
            self.state.receiver.count -= 1
            memmove(self.state.receiver.data, self.state.receiver.data + 1, self.state.receiver.count)
        if self.state.receiver.count == 0:
            self.fill()
        return byte

    cdef void fill(self) noexcept nogil:
        cdef Fifo* fifo = &self.state.receiver
        if not self.state.mcr & MCR_LOOPBACK and fifo.count < self.depth():
            fifo.count += self.backend.get(fifo.data + fifo.count, self.depth() - fifo.count)

    cdef void transmit(self, uint8_t byte) noexcept nogil:
        """Sends a byte, or keeps it while the backend is full. A guest that does not look at THRE loses what it overwrites."""
        cdef Fifo* fifo = &self.state.transmitter
        self.state.thr_empty_pending = False
        if self.state.mcr & MCR_LOOPBACK:
            self.loop_back(byte)
        elif fifo.count or self.backend.put(&byte, 1) == 0:
            if fifo.count < self.depth():
                fifo.count += 1
            fifo.data[fifo.count - 1] = byte
            return
        self.state.thr_empty_pending = True

    cdef void loop_back(self, uint8_t byte) noexcept nogil:
        """The transmitter's output is the receiver's input. An overrun keeps the FIFO but loses the byte; without FIFOs it
        overwrites the one that waits."""
        cdef Fifo* fifo = &self.state.receiver
        if fifo.count < self.depth():
            fifo.data[fifo.count] = byte
            fifo.count += 1
            return
        self.state.overrun = True
        if not self.state.fcr & FCR_ENABLE:
            fifo.data[0] = byte

    cdef void drain(self) noexcept nogil:
        """Hands the transmit FIFO on, as far as the backend takes it."""
        cdef Fifo* fifo = &self.state.transmitter
        cdef uint32_t sent
        if fifo.count == 0:
            return
        sent = self.backend.put(fifo.data, fifo.count)
        fifo.count -= sent
        memmove(fifo.data, fifo.data + sent, fifo.count)
        if fifo.count == 0:
            self.state.thr_empty_pending = True

    cdef void enable_interrupts(self, uint8_t ier) noexcept nogil:
        """Enabling the THRE interrupt while the transmitter is empty raises it, which drivers rely on to start sending."""
        if ier & ~self.state.ier & IER_THR_EMPTY and self.state.transmitter.count == 0:
            self.state.thr_empty_pending = True
        self.state.ier = ier

    cdef void control_fifos(self, uint8_t fcr) noexcept nogil:
        """Switching the FIFOs on or off clears both; the other bits count only with the enable bit."""
        if (fcr ^ self.state.fcr) & FCR_ENABLE:
            fcr |= FCR_CLEAR_RECEIVER | FCR_CLEAR_TRANSMITTER
        self.state.fcr = fcr & FCR_KEPT if fcr & FCR_ENABLE else 0
        if fcr & FCR_CLEAR_RECEIVER:
            self.state.receiver.count = 0
            self.fill()
        if fcr & FCR_CLEAR_TRANSMITTER and self.state.transmitter.count:
            self.state.transmitter.count = 0
            self.state.thr_empty_pending = True

    cdef void control_modem(self, uint8_t mcr) noexcept nogil:
        """In loopback the four outputs are the four inputs (8.6.6); each change of an input leaves its delta bit."""
        cdef uint8_t old = self.state.msr
        cdef uint8_t msr = MSR_CONNECTED
        self.state.mcr = mcr
        if mcr & MCR_LOOPBACK:
            msr = ((MSR_DSR if mcr & MCR_DTR else 0) | (MSR_CTS if mcr & MCR_RTS else 0) |
                   (MSR_RI if mcr & MCR_OUT1 else 0) | (MSR_DCD if mcr & MCR_OUT2 else 0))
        msr |= (old & MSR_DELTAS) | ((old ^ msr) >> 4 & (MSR_DELTAS & ~MSR_RING_ENDED))
        if old & MSR_RI and not msr & MSR_RI:
            msr |= MSR_RING_ENDED
        self.state.msr = msr
        if not mcr & MCR_LOOPBACK:
            self.drain()
            self.fill()

    cdef uint8_t line_status(self) noexcept nogil:
        return ((LSR_DATA_READY if self.state.receiver.count else 0) | (LSR_OVERRUN if self.state.overrun else 0) |
                (LSR_THR_EMPTY | LSR_TRANSMITTER_EMPTY if self.state.transmitter.count == 0 else 0))

    cdef uint8_t identify(self) noexcept nogil:
        """The pending interrupt of the highest priority (8.6.3, table V)."""
        cdef uint8_t ier = self.state.ier
        if ier & IER_LINE_STATUS and self.state.overrun:
            return IIR_LINE_STATUS
        if ier & IER_RECEIVED and self.state.receiver.count:
            if not self.state.fcr & FCR_ENABLE or self.state.receiver.count >= TRIGGER_LEVELS[self.state.fcr >> 6]:
                return IIR_RECEIVED
            return IIR_TIMEOUT
        if ier & IER_THR_EMPTY and self.state.thr_empty_pending:
            return IIR_THR_EMPTY
        if ier & IER_MODEM_STATUS and self.state.msr & MSR_DELTAS:
            return IIR_MODEM_STATUS
        return IIR_NONE

    cdef void update_irq(self) noexcept nogil:
        self.irq.set(self.identify() != IIR_NONE and self.state.mcr & (MCR_OUT2 | MCR_LOOPBACK) == MCR_OUT2)


cdef class SerialUser(CharUser):
    """What the backend calls for a port."""
    cdef Ns16550 port

    def __cinit__(self, Ns16550 port not None):
        self.port = port

    cdef void input_ready(self) noexcept nogil:
        pthread_mutex_lock(&self.port.lock)
        self.port.fill()
        self.port.update_irq()
        pthread_mutex_unlock(&self.port.lock)

    cdef void output_space(self) noexcept nogil:
        pthread_mutex_lock(&self.port.lock)
        self.port.drain()
        self.port.update_irq()
        pthread_mutex_unlock(&self.port.lock)
