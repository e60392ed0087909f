"""The keyboard controller as drivers probe it, its ways to a reset, and a guest that does not read what it asked for."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmapp.devices import Bus, Interrupts, Power, PowerEvent
from kvmapp.hw.i8042 import I8042
from kvmapp.hw.port92 import Port92
from kvmapp.state import StateError

DATA, COMMAND = 0x60, 0x64
FULL, SYSTEM, WAS_COMMAND, AUXILIARY = 0x01, 0x04, 0x08, 0x20
ACK = 0xFA
GSI = 1


class Rig:
    def __init__(self):
        self.interrupts, self.power, self.bus = Interrupts(), Power(), Bus("pio")
        self.chip = I8042("i8042", self.interrupts.line(GSI), self.power)
        self.bus.map(DATA, 1, self.chip, 0)
        self.bus.map(COMMAND, 1, self.chip, 4)

    @property
    def status(self):
        return self.bus.read(COMMAND, 1)

    def command(self, command, *data):
        """Sends a command and its data; what comes back."""
        self.bus.write(COMMAND, 1, command)
        for byte in data:
            self.bus.write(DATA, 1, byte)
        return self.answers()

    def keyboard(self, *data):
        """Sends bytes to the keyboard; what comes back."""
        for byte in data:
            self.bus.write(DATA, 1, byte)
        return self.answers()

    def answers(self):
        answers = []
        while self.status & FULL:
            answers.append(self.bus.read(DATA, 1))
        return answers


@pytest.fixture
def rig():
    return Rig()


def test_the_controller_passes_linux_probing(rig):
    """i8042.c: flush, self-test, configuration read twice, the auxiliary port found missing without a timeout."""
    assert not rig.status & FULL
    assert rig.command(0xAA) == [0x55]
    assert rig.status & SYSTEM and rig.status & WAS_COMMAND
    assert rig.command(0x20) == rig.command(0x20) == [0x65]
    assert rig.command(0x60, 0x74) == []
    assert rig.command(0x20) == [0x74]
    rig.bus.write(COMMAND, 1, 0xD3)
    rig.bus.write(DATA, 1, 0x5A)
    assert rig.status & (FULL | AUXILIARY) == FULL, "the loopback's answer is not the mouse's"
    assert rig.command(0xA9) == [0x02]
    assert rig.command(0xAB) == [0]


def test_the_keyboard_passes_linux_probing(rig):
    """atkbd.c: identify, LEDs, repeat rate, enable; and a reset."""
    assert rig.keyboard(0xF2) == [ACK, 0xAB, 0x41]
    rig.command(0x60, 0x25)
    assert rig.keyboard(0xF2) == [ACK, 0xAB, 0x83]
    assert rig.keyboard(0xF5) == [ACK]
    assert rig.keyboard(0xED, 0x02) == [ACK, ACK]
    assert rig.keyboard(0xF3, 0x00) == [ACK, ACK]
    assert rig.keyboard(0xF4) == [ACK]
    assert rig.keyboard(0xFF) == [ACK, 0xAA]
    assert rig.keyboard(0xEE) == [0xEE]
    assert rig.keyboard(0x55) == [0xFE]


def test_the_scancode_set_is_kept(rig):
    assert rig.keyboard(0xF0, 0) == [ACK, ACK, 2]
    assert rig.keyboard(0xF0, 3) == [ACK, ACK]
    assert rig.keyboard(0xF0, 0) == [ACK, ACK, 3]
    assert rig.keyboard(0xF0, 0xF4) == [ACK, ACK], "a command in place of the parameter is a command"


def test_every_byte_raises_an_edge_of_its_own(rig):
    rig.command(0x60, 0x65)
    edges = rig.interrupts.edge_count(GSI)
    rig.bus.write(DATA, 1, 0xF2)
    assert rig.interrupts.level(GSI)
    for i in range(3):
        assert rig.interrupts.edge_count(GSI) == edges + i + 1
        rig.bus.read(DATA, 1)
    assert not rig.interrupts.level(GSI)
    assert rig.bus.read(DATA, 1) == 0x41, "an empty buffer shows the last byte"


def test_no_interrupt_unless_configured(rig):
    rig.command(0x60, 0x64)
    rig.bus.write(DATA, 1, 0xF2)
    assert not rig.interrupts.level(GSI) and rig.status & FULL


def test_a_disabled_keyboard_keeps_its_bytes(rig):
    rig.bus.write(DATA, 1, 0xF2)
    rig.bus.write(COMMAND, 1, 0xAD)
    assert not rig.status & FULL
    assert rig.command(0x20) == [0x75]
    assert rig.command(0xAE) == [ACK, 0xAB, 0x41]


def test_ports_and_buffers(rig):
    assert rig.command(0xC0) == [0x80]
    assert rig.command(0xD0) == [0x03]
    rig.command(0xD1, 0x01)
    assert rig.command(0xD0) == [0x01]
    rig.command(0xDF)
    assert rig.command(0xD0) == [0x03]
    rig.command(0xDD)
    assert rig.command(0xD0) == [0x01]
    assert rig.command(0xD2, 0x1C) == [0x1C]
    assert rig.command(0xA4) == [0xF1]
    assert rig.command(0xD4, 0xFF) == [] and rig.command(0x99) == []
    assert rig.command(0x3F) == [0]
    assert rig.power.take() == (PowerEvent.RUNNING, 0)


@pytest.mark.parametrize("command", [(0xFE,), (0xF0,), (0xD1, 0x02)])
def test_the_ways_to_a_reset(rig, command):
    rig.command(*command)
    assert rig.power.take() == (PowerEvent.RESET, 0)


@pytest.mark.parametrize("command", [(0xFF,), (0xF1,), (0xD1, 0x03)])
def test_pulsing_other_lines_resets_nothing(rig, command):
    rig.command(*command)
    assert rig.power.take() == (PowerEvent.RUNNING, 0)


def test_what_is_asked_and_never_read_is_lost_beyond_the_buffer(rig):
    for _ in range(100):
        rig.bus.write(DATA, 1, 0xEE)
    assert rig.answers() == [0xEE] * 16


def test_save_and_restore_in_the_middle_of_everything(rig):
    rig.command(0xDD)
    rig.bus.write(DATA, 1, 0xED)
    rig.bus.write(COMMAND, 1, 0xAA)
    rig.bus.write(COMMAND, 1, 0xD2)
    saved = rig.chip.save()
    other = Rig()
    other.chip.restore(saved)
    assert other.chip.save() == saved
    assert other.interrupts.level(GSI)
    other.bus.write(DATA, 1, 0x77)
    assert other.answers() == [0x77, ACK]
    assert other.keyboard(0x07) == [ACK], "the lamps' parameter"


@pytest.mark.parametrize("change", [{"config": 0x80}, {"output_port": 0x10}, {"scancode_set": 0}, {"queue": bytes(17)}, {"x": 1}])
def test_an_impossible_state_is_refused(rig, change):
    with pytest.raises(StateError, match="i8042"):
        rig.chip.restore({**rig.chip.save(), **change})


@given(st.lists(st.tuples(st.sampled_from([DATA, COMMAND]), st.none() | st.integers(0, 255)), max_size=100))
def test_the_line_tells_the_buffer_whatever_the_guest_does(accesses):
    rig = Rig()
    for port, value in accesses:
        if value is None:
            rig.bus.read(port, 1)
        else:
            rig.bus.write(port, 1, value)
    full = rig.status & FULL != 0
    assert rig.interrupts.level(GSI) == (full and rig.chip.save()["config"] & 1 != 0)


def test_port_92_keeps_a20_and_resets_on_a_rising_edge():
    power, bus = Power(), Bus("pio")
    port = Port92("port92", power)
    bus.map(0x92, 1, port)
    assert bus.read(0x92, 1) == 0x02
    bus.write(0x92, 1, 0xFC)
    assert bus.read(0x92, 1) == 0
    assert power.take() == (PowerEvent.RUNNING, 0)
    bus.write(0x92, 1, 0x01)
    assert power.take() == (PowerEvent.RESET, 0)
    bus.write(0x92, 1, 0x03)
    assert power.take() == (PowerEvent.RUNNING, 0)
    port.reset()
    assert bus.read(0x92, 1) == 0x02
