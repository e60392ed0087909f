"""The keyboard controller of the PC (Intel 8042 as in the IBM PS/2 Hardware Reference) with a keyboard that has no keys.

Offset 0 is the data port (0x60), offset 4 status and commands (0x64). Every command that drivers probe with is answered at once:
a missing answer costs Linux half a second, a missing mouse told as an error costs nothing. So the keyboard identifies itself,
takes its commands and tests well, and the auxiliary port is not there. Port 0x61 is the timer's and lives in KVM.
Left out: key presses, a mouse, the A20 gate (always open; its bit is kept), the password, the controller's RAM beyond byte 0.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove, memset

from kvmapp.devices cimport RESET, Device, IrqLine, Power

from kvmapp.state import StateReader

cdef enum:
    DATA = 0
    STATUS_COMMAND = 4

    STATUS_OUTPUT_FULL = 0x01
    STATUS_SYSTEM = 0x04             # a copy of the configuration's bit
    STATUS_WAS_COMMAND = 0x08        # the last write went to the command port
    STATUS_UNLOCKED = 0x10

    CONFIG_INTERRUPT = 0x01
    CONFIG_SYSTEM = 0x04
    CONFIG_KEYBOARD_OFF = 0x10
    CONFIG_AUXILIARY_OFF = 0x20
    CONFIG_TRANSLATE = 0x40
    CONFIG_WRITABLE = 0x7F
    CONFIG_POWER_ON = CONFIG_INTERRUPT | CONFIG_SYSTEM | CONFIG_AUXILIARY_OFF | CONFIG_TRANSLATE

    # Commands to the controller.
    READ_CONFIG = 0x20               # to 0x3F: bytes of its RAM
    WRITE_CONFIG = 0x60              # to 0x7F
    PASSWORD_TEST = 0xA4
    AUXILIARY_OFF = 0xA7
    AUXILIARY_ON = 0xA8
    AUXILIARY_TEST = 0xA9
    SELF_TEST = 0xAA
    KEYBOARD_TEST = 0xAB
    KEYBOARD_OFF = 0xAD
    KEYBOARD_ON = 0xAE
    READ_INPUT_PORT = 0xC0
    READ_OUTPUT_PORT = 0xD0
    WRITE_OUTPUT_PORT = 0xD1
    WRITE_KEYBOARD_BUFFER = 0xD2
    WRITE_AUXILIARY_BUFFER = 0xD3
    WRITE_AUXILIARY = 0xD4
    A20_CLOSE = 0xDD
    A20_OPEN = 0xDF
    PULSE = 0xF0                     # to 0xFF: pulls the output port's bits that are 0 in it low for a moment

    SELF_TEST_PASSED = 0x55
    CLOCK_STUCK_HIGH = 0x02          # the auxiliary port's test fails: nothing there
    NO_PASSWORD = 0xF1
    INPUT_PORT = 0x80                # not locked
    OUTPUT_PORT_NO_RESET = 0x01
    OUTPUT_PORT_A20 = 0x02

    # Commands to the keyboard.
    SET_LAMPS = 0xED
    ECHO = 0xEE
    SCANCODE_SET = 0xF0
    IDENTIFY = 0xF2
    SET_REPEAT = 0xF3
    RESEND = 0xFE
    RESET_KEYBOARD = 0xFF
    ACKNOWLEDGE = 0xFA
    KEYBOARD_TEST_PASSED = 0xAA
    FIRST_COMMAND = 0x80             # parameters are below

    QUEUE_SIZE = 16

cdef struct I8042State:
    uint8_t config
    uint8_t output_port
    uint8_t command                  # of the controller, waiting for its data byte; 0: none
    uint8_t keyboard_command         # of the keyboard, likewise
    uint8_t scancode_set
    uint8_t data                     # what was read last, and is read again while nothing is there
    uint8_t reply                    # of the controller, before anything of the keyboard
    bint reply_full
    bint was_command
    uint8_t queue[QUEUE_SIZE]        # from the keyboard
    uint32_t queued


cdef class I8042(Device):
    """`irq` is the keyboard's line; a pulse on the reset line goes to `power`."""
    cdef I8042State state
    cdef IrqLine irq
    cdef Power power

    def __cinit__(self, str name not None, IrqLine irq not None, Power power not None):
        self.rename(name)
        self.width = 1
        self.irq = irq
        self.power = power
        self.reset()

    def reset(self):
        memset(&self.state, 0, sizeof(self.state))
        self.state.config = CONFIG_POWER_ON
        self.state.output_port = OUTPUT_PORT_NO_RESET | OUTPUT_PORT_A20
        self.state.scancode_set = 2
        self.irq.set(False)

    def save(self):
        return {"version": 1, "config": self.state.config, "output_port": self.state.output_port,
                "command": self.state.command, "keyboard_command": self.state.keyboard_command,
                "scancode_set": self.state.scancode_set, "data": self.state.data, "reply": self.state.reply,
                "reply_full": bool(self.state.reply_full), "was_command": bool(self.state.was_command),
                "queue": (<char*>self.state.queue)[:self.state.queued]}

    def restore(self, dict saved not None):
        cdef I8042State state
        memset(&state, 0, sizeof(state))
        reader = StateReader(self.name, saved, version=1)
        state.config = reader.bits("config", CONFIG_WRITABLE)
        state.output_port = reader.bits("output_port", OUTPUT_PORT_NO_RESET | OUTPUT_PORT_A20)
        state.command = reader.uint("command", 0xFF)
        state.keyboard_command = reader.uint("keyboard_command", 0xFF)
        state.scancode_set = reader.uint("scancode_set", 3, least=1)
        state.data = reader.uint("data", 0xFF)
        state.reply = reader.uint("reply", 0xFF)
        state.reply_full = reader.flag("reply_full")
        state.was_command = reader.flag("was_command")
        queue = reader.data("queue", QUEUE_SIZE)
        reader.done()
        memcpy(state.queue, <const char*>queue, len(queue))
        state.queued = len(queue)
        self.state = state
        self.update_irq()

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        if offset == DATA:
            return self.take()
        if offset == STATUS_COMMAND:
            return ((STATUS_OUTPUT_FULL if self.output_full() else 0) | (self.state.config & CONFIG_SYSTEM) |
                    (STATUS_WAS_COMMAND if self.state.was_command else 0) | STATUS_UNLOCKED)
        return 0xFF

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint8_t byte = value & 0xFF
        if offset == STATUS_COMMAND:
            self.state.was_command = True
            self.state.command = 0
            self.order(byte)
        elif offset == DATA:
            self.state.was_command = False
            if self.state.command:
                self.order_data(self.state.command, byte)
                self.state.command = 0
            else:
                self.state.config &= ~<uint8_t>CONFIG_KEYBOARD_OFF       # to speak to it turns it on
                self.tell_keyboard(byte)
        self.update_irq()

    cdef bint output_full(self) noexcept nogil:
        return self.state.reply_full or (self.state.queued > 0 and not self.state.config & CONFIG_KEYBOARD_OFF)

    cdef uint8_t take(self) noexcept nogil:
        """The byte in the output buffer; the line goes low, and high again when another follows."""
        if self.state.reply_full:
            self.state.reply_full = False
            self.state.data = self.state.reply
        elif self.output_full():
            self.state.data = self.state.queue[0]
            self.state.queued -= 1
            memmove(self.state.queue, self.state.queue + 1, self.state.queued)
        self.irq.set(False)
        self.update_irq()
        return self.state.data

    cdef void order(self, uint8_t command) noexcept nogil:
        """A command to the controller."""
        if command == SELF_TEST:
            self.state.config |= CONFIG_SYSTEM
            self.answer(SELF_TEST_PASSED)
        elif command == KEYBOARD_TEST:
            self.answer(0)
        elif command == AUXILIARY_TEST:
            self.answer(CLOCK_STUCK_HIGH)
        elif command == PASSWORD_TEST:
            self.answer(NO_PASSWORD)
        elif command == READ_INPUT_PORT:
            self.answer(INPUT_PORT)
        elif command == READ_OUTPUT_PORT:
            self.answer(self.state.output_port)
        elif command & 0xE0 == READ_CONFIG:
            self.answer(self.state.config if command == READ_CONFIG else 0)
        elif command & 0xE0 == WRITE_CONFIG or WRITE_OUTPUT_PORT <= command <= WRITE_AUXILIARY:
            self.state.command = command
        elif command == KEYBOARD_OFF:
            self.state.config |= CONFIG_KEYBOARD_OFF
        elif command == KEYBOARD_ON:
            self.state.config &= ~<uint8_t>CONFIG_KEYBOARD_OFF
        elif command == AUXILIARY_OFF:
            self.state.config |= CONFIG_AUXILIARY_OFF
        elif command == AUXILIARY_ON:
            self.state.config &= ~<uint8_t>CONFIG_AUXILIARY_OFF
        elif command == A20_CLOSE:
            self.state.output_port &= ~<uint8_t>OUTPUT_PORT_A20
        elif command == A20_OPEN:
            self.state.output_port |= OUTPUT_PORT_A20
        elif command >= PULSE and not command & OUTPUT_PORT_NO_RESET:
            self.power.request(RESET, 0)

    cdef void order_data(self, uint8_t command, uint8_t byte) noexcept nogil:
        """The data byte of a command to the controller."""
        if command == WRITE_CONFIG:
            self.state.config = byte & CONFIG_WRITABLE
        elif command == WRITE_OUTPUT_PORT:
            self.state.output_port = byte & OUTPUT_PORT_A20 | OUTPUT_PORT_NO_RESET
            if not byte & OUTPUT_PORT_NO_RESET:
                self.power.request(RESET, 0)
        elif command == WRITE_KEYBOARD_BUFFER or command == WRITE_AUXILIARY_BUFFER:
            self.answer(byte)        # never marked as the mouse's, which tells drivers that there is no such port

    cdef void answer(self, uint8_t byte) noexcept nogil:
        self.state.reply = byte
        self.state.reply_full = True

    cdef void tell_keyboard(self, uint8_t byte) noexcept nogil:
        """A byte to the keyboard: a command, or the parameter of the last one."""
        cdef uint8_t command = self.state.keyboard_command
        self.state.keyboard_command = 0
        if command and byte < FIRST_COMMAND:
            self.queue(ACKNOWLEDGE)
            if command == SCANCODE_SET and byte == 0:
                self.queue(self.state.scancode_set)
            elif command == SCANCODE_SET and byte <= 3:
                self.state.scancode_set = byte
        elif byte == ECHO:
            self.queue(ECHO)
        elif byte == RESEND:
            self.queue(self.state.data)
        elif byte == IDENTIFY:
            self.queue(ACKNOWLEDGE)
            self.queue(0xAB)
            self.queue(0x41 if self.state.config & CONFIG_TRANSLATE else 0x83)
        elif byte == RESET_KEYBOARD:
            self.state.queued = 0
            self.state.scancode_set = 2
            self.queue(ACKNOWLEDGE)
            self.queue(KEYBOARD_TEST_PASSED)
        elif byte >= SET_LAMPS:
            self.queue(ACKNOWLEDGE)
            if byte in (SET_LAMPS, SCANCODE_SET, SET_REPEAT):
                self.state.keyboard_command = byte
        else:
            self.queue(RESEND)

    cdef void queue(self, uint8_t byte) noexcept nogil:
        """A guest that asks without reading loses what does not fit."""
        if self.state.queued < QUEUE_SIZE:
            self.state.queue[self.state.queued] = byte
            self.state.queued += 1

    cdef void update_irq(self) noexcept nogil:
        self.irq.set(self.output_full() and self.state.config & CONFIG_INTERRUPT != 0)
