"""The serial port as drivers use it: probing, sending and receiving with and without FIFOs, interrupts and their priorities."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmapp.chardev import CharBackend
from kvmapp.devices import Bus, Interrupts
from kvmapp.hw.ns16550 import Ns16550
from kvmapp.state import StateError

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7
DLAB, LOOPBACK, OUT2 = 0x80, 0x10, 0x08
READY, OVERRUN, THRE, EMPTY = 1, 2, 0x20, 0x40
NONE, THR_EMPTY, RECEIVED, LINE_STATUS, TIMEOUT, MODEM = 0x01, 0x02, 0x04, 0x06, 0x0C, 0x00
GSI = 4


class Rig:
    def __init__(self):
        self.interrupts = Interrupts()
        self.backend = CharBackend("serial0", output_size=32)
        self.port = Ns16550("serial0", self.interrupts.line(GSI), self.backend)
        self.bus = Bus("pio")
        self.bus.map(0x3F8, 8, self.port)

    def get(self, register):
        return self.bus.read(0x3F8 + register, 1)

    def put(self, register, value):
        self.bus.write(0x3F8 + register, 1, value)

    @property
    def irq(self):
        return self.interrupts.level(GSI)


@pytest.fixture
def rig():
    return Rig()


def test_linux_autoconfig_sees_a_16550a(rig):
    """The probes of 8250_port.c: IER bits, loopback status, FIFO bits, no 16650, 16750 or XScale features."""
    rig.put(IER, 0)
    assert rig.get(IER) == 0
    rig.put(IER, 0x0F)
    assert rig.get(IER) == 0x0F
    rig.put(IER, 0)
    rig.put(MCR, LOOPBACK | 0x0A)
    assert rig.get(MSR) & 0xF0 == 0x90
    rig.put(MCR, 0)
    rig.put(LCR, 0xBF)
    assert rig.get(FCR) != 0
    rig.put(LCR, 0)
    rig.put(FCR, 0x01)
    assert rig.get(IIR) >> 6 == 3
    rig.put(FCR, 0x21)
    assert rig.get(IIR) >> 5 == 6
    rig.put(IER, 0x40)
    assert rig.get(IER) == 0


def test_scratch_divisor_and_line_control_are_kept(rig):
    rig.put(SCR, 0xA5)
    rig.put(LCR, DLAB | 3)
    rig.put(DATA, 0x34)
    rig.put(IER, 0x12)
    assert (rig.get(DATA), rig.get(IER)) == (0x34, 0x12)
    rig.put(LCR, 3)
    assert (rig.get(SCR), rig.get(LCR), rig.get(IER)) == (0xA5, 3, 0)
    assert rig.backend.take() == b""


def test_bytes_go_out_at_once_and_the_transmitter_is_empty_again(rig):
    for byte in b"hello":
        assert rig.get(LSR) == THRE | EMPTY
        rig.put(DATA, byte)
    assert rig.backend.take() == b"hello"


def test_a_wide_store_goes_to_the_registers_it_covers(rig):
    rig.bus.write(0x3F8 + 6, 2, 0x5A00)
    assert rig.get(SCR) == 0x5A


def test_a_full_backend_turns_thre_off_and_interrupts_when_it_is_taken(rig):
    rig.put(FCR, 1)
    rig.put(MCR, OUT2)
    rig.put(IER, 2)
    for byte in range(32):
        rig.put(DATA, byte)
    rig.get(IIR)
    rig.put(DATA, 32)
    rig.put(DATA, 33)
    assert rig.get(LSR) & (THRE | EMPTY) == 0
    assert rig.get(IIR) & 0xF == NONE and not rig.irq
    assert rig.backend.take() == bytes(range(32))
    assert rig.get(LSR) & (THRE | EMPTY) == THRE | EMPTY
    assert rig.irq and rig.get(IIR) & 0xF == THR_EMPTY
    assert rig.backend.take() == b" !"


def test_the_thre_interrupt_is_cleared_by_reading_iir_and_raised_by_enabling(rig):
    rig.put(MCR, OUT2)
    rig.put(IER, 2)
    assert rig.irq
    assert rig.get(IIR) == THR_EMPTY
    assert rig.get(IIR) == NONE and not rig.irq
    rig.put(IER, 0)
    rig.put(IER, 2)
    assert rig.get(IIR) == THR_EMPTY, "Linux's test for UARTs with broken THRE interrupts"
    edges = rig.interrupts.edge_count(GSI)
    rig.put(DATA, 0x41)
    assert rig.interrupts.edge_count(GSI) == edges + 1
    assert rig.get(IIR) == THR_EMPTY


@pytest.mark.parametrize(("fcr", "level"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_the_trigger_level_tells_received_from_timeout(rig, fcr, level):
    rig.put(FCR, fcr)
    rig.put(IER, 1)
    rig.put(MCR, OUT2)
    if level > 1:
        rig.backend.give(bytes(level - 1))
        assert rig.get(IIR) == 0xC0 | TIMEOUT and rig.irq
        rig.backend.give(b"x")
    else:
        rig.backend.give(b"x")
    assert rig.get(IIR) == 0xC0 | RECEIVED and rig.irq
    for _ in range(level):
        assert rig.get(LSR) & READY
        rig.get(DATA)
    assert not rig.get(LSR) & READY and rig.get(IIR) == 0xC0 | NONE and not rig.irq


def test_input_waits_in_the_backend_and_is_never_overrun(rig):
    rig.put(FCR, 1)
    text = bytes(range(100))
    assert rig.backend.give(text) == 100
    assert rig.backend.waiting == (0, 84)
    heard = []
    while rig.get(LSR) & READY:
        heard.append(rig.get(DATA))
    assert bytes(heard) == text
    assert not rig.get(LSR) & OVERRUN
    assert rig.get(DATA) == 0, "an empty receiver"


def test_without_fifos_one_byte_waits(rig):
    rig.backend.give(b"ab")
    assert rig.backend.waiting == (0, 1)
    assert (rig.get(DATA), rig.get(DATA)) == (ord("a"), ord("b"))


def test_loopback_returns_what_is_sent_and_can_overrun(rig):
    rig.put(FCR, 1)
    rig.put(MCR, LOOPBACK)
    rig.put(IER, 0x05)
    rig.backend.give(b"from outside")
    for byte in range(17):
        rig.put(DATA, byte)
    assert rig.get(IIR) & 0xF == LINE_STATUS
    assert rig.get(LSR) == OVERRUN | READY | THRE | EMPTY
    assert rig.get(LSR) == READY | THRE | EMPTY, "reading the status clears the overrun"
    assert bytes(rig.get(DATA) for _ in range(16)) == bytes(range(16))
    assert rig.backend.take() == b""
    assert not rig.irq, "OUT2's pin is off in loopback"
    rig.put(MCR, OUT2)
    assert rig.irq and rig.get(DATA) == ord("f")


def test_without_fifos_an_overrun_keeps_the_newest_byte(rig):
    rig.put(MCR, LOOPBACK)
    rig.put(DATA, 1)
    rig.put(DATA, 2)
    assert rig.get(LSR) & OVERRUN
    assert rig.get(DATA) == 2


def test_modem_status_shows_what_changed_until_it_is_read(rig):
    assert rig.get(MSR) == 0xB0
    rig.put(IER, 8)
    rig.put(MCR, LOOPBACK | 0x04)
    assert rig.get(IIR) == MODEM
    assert rig.get(MSR) == 0x4B, "CTS, DSR and DCD dropped, RI rose"
    assert rig.get(MSR) == 0x40 and rig.get(IIR) == NONE
    rig.put(MCR, LOOPBACK)
    assert rig.get(MSR) == 0x04, "the trailing edge of RI"
    rig.put(MCR, 0)
    assert rig.get(MSR) == 0xBB


def test_interrupts_come_by_priority(rig):
    rig.put(FCR, 1)
    rig.put(MCR, LOOPBACK)
    for byte in range(17):
        rig.put(DATA, byte)
    rig.put(IER, 0x0F)
    seen = [rig.get(IIR) & 0xF]
    rig.get(LSR)
    seen.append(rig.get(IIR) & 0xF)
    for _ in range(16):
        rig.get(DATA)
    seen += [rig.get(IIR) & 0xF, rig.get(IIR) & 0xF]
    rig.get(MSR)
    seen.append(rig.get(IIR) & 0xF)
    assert seen == [LINE_STATUS, RECEIVED, THR_EMPTY, MODEM, NONE]


def test_the_interrupt_passes_only_the_open_gate(rig):
    rig.put(IER, 2)
    assert rig.get(IIR) == THR_EMPTY
    rig.put(DATA, 0)
    assert not rig.irq
    rig.put(MCR, OUT2)
    assert rig.irq


def test_clearing_the_fifos_keeps_what_is_still_on_the_line(rig):
    rig.put(FCR, 1)
    rig.backend.give(bytes(range(20)))
    rig.put(FCR, 3)
    assert rig.get(DATA) == 16
    rig.put(FCR, 0)
    assert rig.get(IIR) == NONE


def test_reset_is_power_on(rig):
    fresh = rig.port.save()
    for register in range(8):
        rig.put(register, 0x7F)
    rig.port.reset()
    assert rig.port.save() == fresh and not rig.irq


def test_a_restored_port_goes_on_where_it_was(rig):
    rig.put(FCR, 1)
    rig.put(MCR, OUT2)
    rig.put(IER, 3)
    for byte in range(40):
        rig.put(DATA, byte)
    rig.backend.give(b"input")
    saved = rig.port.save()
    other = Rig()
    other.port.restore(saved)
    assert other.port.save() == saved
    assert other.irq and other.get(IIR) == 0xC0 | RECEIVED
    assert bytes(other.get(DATA) for _ in range(5)) == b"input"
    other.port.resume()
    assert other.backend.take() == bytes(range(32, 40)), "what the first backend had not taken yet"


@pytest.mark.parametrize("change", [{"ier": 0x10}, {"fcr": 0x02}, {"mcr": 0x20}, {"receiver": b"xy"}, {"transmitter": bytes(17)}])
def test_an_impossible_state_is_refused(rig, change):
    state = rig.port.save()
    with pytest.raises(StateError, match="serial0"):
        rig.port.restore({**state, **change})
    assert rig.port.save() == state


@given(st.lists(st.tuples(st.integers(0, 7), st.none() | st.integers(0, 255)), max_size=100))
def test_no_sequence_of_accesses_breaks_the_rules_of_the_lines(accesses):
    rig = Rig()
    for register, value in accesses:
        if value is None:
            rig.get(register)
        else:
            rig.put(register, value)
        if register == SCR:
            rig.backend.give(b"abc")
            rig.backend.take()
    pending = rig.get(IIR) & 1 == 0
    if not pending:
        assert not rig.irq
