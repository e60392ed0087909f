"""ACPI's fixed hardware: the button and the SCI, power-off, the timer, GPEs; and the ports that end or reset the machine."""
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmapp.chardev import CharBackend
from kvmapp.devices import Bus, Interrupts, Power, PowerEvent
from kvmapp.hw.acpi_pm import AcpiPm
from kvmapp.hw.debug_exit import DebugExit
from kvmapp.hw.debug_port import DebugPort
from kvmapp.hw.pci_host import PciHost
from kvmapp.hw.reset_control import ResetControl
from kvmapp.iothread import IoThread
from kvmapp.layout import ACPI_RESET_VALUE, ACPI_SLEEP_TYPE_S5
from kvmapp.state import StateError
from tests.waiting import until

PM = 0x600
STATUS, ENABLE, CONTROL, TIMER, GPE_STATUS, GPE_ENABLE = PM, PM + 2, PM + 4, PM + 8, PM + 0x20, PM + 0x22
BUTTON, TIMER_EVENT, SLEEP = 0x100, 0x001, 0x2000
GSI = 9
TIMER_HZ = 3579545


class Rig:
    def __init__(self):
        self.interrupts, self.power, self.bus, self.thread = Interrupts(), Power(), Bus("pio"), IoThread("io")
        self.pm = AcpiPm("acpi", self.interrupts.line(GSI), self.power, self.thread)
        self.bus.map(PM, 0x24, self.pm)

    @property
    def sci(self):
        return self.interrupts.level(GSI)


@pytest.fixture
def rig():
    rig = Rig()
    yield rig
    rig.thread.close()


def test_the_button_raises_the_sci_until_its_status_is_cleared(rig):
    rig.bus.write(ENABLE, 2, BUTTON | 0x20)
    assert rig.pm.press_power_button()
    assert rig.sci and rig.bus.read(STATUS, 2) == BUTTON
    rig.bus.write(STATUS, 2, 0x0001)
    assert rig.sci, "another event's bit"
    rig.bus.write(STATUS, 2, BUTTON)
    assert not rig.sci and rig.bus.read(STATUS, 4) == (BUTTON | 0x20) << 16


def test_a_guest_that_does_not_listen_is_told_of(rig):
    assert not rig.pm.press_power_button()
    assert not rig.sci
    rig.bus.write(ENABLE, 2, BUTTON)
    assert rig.sci, "the press was kept"


def test_the_machine_is_always_in_acpi_mode(rig):
    assert rig.bus.read(CONTROL, 2) == 1
    rig.bus.write(CONTROL, 2, 0x1402)
    assert rig.bus.read(CONTROL, 2) == 0x1403


@pytest.mark.parametrize("size", [1, 2, 4])
def test_sleep_type_5_powers_off_at_any_width(rig, size):
    value = ACPI_SLEEP_TYPE_S5 << 10 | SLEEP
    if size == 1:
        rig.bus.write(CONTROL + 1, 1, value >> 8)
    else:
        rig.bus.write(CONTROL, size, value)
    assert rig.power.take() == (PowerEvent.POWER_OFF, 0)
    assert not rig.bus.read(CONTROL, 2) & SLEEP, "SLP_EN is write-only"


def test_other_sleep_types_and_no_enable_do_nothing(rig):
    for value in (0x0400 | SLEEP, 0x1C00 | SLEEP, ACPI_SLEEP_TYPE_S5 << 10):
        rig.bus.write(CONTROL, 2, value)
    assert rig.power.take() == (PowerEvent.RUNNING, 0)


def test_the_timer_runs_at_its_rate_and_stands_still_while_paused(rig):
    assert rig.bus.read(TIMER, 4) == rig.bus.read(TIMER, 4) == 0
    before = time.monotonic()
    rig.pm.resume()
    started = time.monotonic()
    until(lambda: rig.bus.read(TIMER, 4) >= TIMER_HZ // 50)
    inner = time.monotonic() - started
    ticks = rig.bus.read(TIMER, 4)
    outer = time.monotonic() - before
    assert inner * TIMER_HZ - 1 <= ticks <= outer * TIMER_HZ + 1
    rig.pm.pause()
    stopped = rig.bus.read(TIMER, 4)
    assert stopped >= ticks and rig.bus.read(TIMER, 4) == stopped
    assert rig.bus.read(TIMER + 1, 1) == stopped >> 8 & 0xFF
    assert rig.bus.read(TIMER + 2, 2) == stopped >> 16
    rig.bus.write(TIMER, 4, 0)
    assert rig.bus.read(TIMER, 4) == stopped


def test_the_timer_goes_on_where_it_was_saved(rig):
    rig.pm.restore({**rig.pm.save(), "ticks": 0x1_2345_6789, "half_turns": 2})
    assert rig.bus.read(TIMER, 4) == 0x2345_6789
    rig.pm.resume()
    assert 0x2345_6789 <= rig.bus.read(TIMER, 4) < 0x2345_6789 + 60 * TIMER_HZ


def test_a_timer_that_has_counted_for_ages_can_be_saved_and_restored_again(rig):
    """Found by the fuzzer: it counted past what the next restore takes."""
    rig.pm.restore({**rig.pm.save(), "ticks": (1 << 56) - 1, "half_turns": ((1 << 56) - 1) >> 31})
    rig.pm.resume()
    until(lambda: rig.pm.save()["ticks"] != (1 << 56) - 1)
    rig.pm.pause()
    rig.pm.restore(rig.pm.save())


def test_the_timer_s_event_comes_when_the_highest_bit_changes(rig):
    nearly = (1 << 31) - TIMER_HZ // 20
    rig.pm.restore({**rig.pm.save(), "ticks": nearly})
    rig.bus.write(ENABLE, 2, TIMER_EVENT)
    assert not rig.sci and not rig.bus.read(STATUS, 2)
    rig.thread.resume()
    rig.pm.resume()
    until(lambda: rig.sci)
    assert rig.bus.read(TIMER, 4) >= 1 << 31
    assert rig.bus.read(STATUS, 2) == TIMER_EVENT
    rig.bus.write(STATUS, 2, TIMER_EVENT)
    assert not rig.sci


def test_every_event_that_linux_enables_reads_back_enabled(rig):
    rig.bus.write(ENABLE, 2, 0xFFFF)
    assert rig.bus.read(ENABLE, 2) == 0x0521, "timer, global lock, power button, RTC"


def test_general_purpose_events_have_status_and_enable(rig):
    rig.bus.write(GPE_ENABLE, 1, 0x04)
    rig.bus.write(GPE_ENABLE + 1, 1, 0x80)
    rig.pm.raise_event(3)
    assert not rig.sci
    rig.pm.raise_event(15)
    assert rig.sci and rig.bus.read(GPE_STATUS, 2) == 0x8008 and rig.bus.read(GPE_ENABLE, 2) == 0x8004
    rig.bus.write(GPE_STATUS + 1, 1, 0x80)
    assert not rig.sci and rig.bus.read(GPE_STATUS, 2) == 0x0008


def test_reset_is_power_on(rig):
    fresh = rig.pm.save()
    rig.bus.write(ENABLE, 2, 0xFFFF)
    rig.bus.write(GPE_ENABLE, 2, 0xFFFF)
    rig.bus.write(CONTROL, 2, 0x1C02)
    rig.pm.press_power_button()
    rig.pm.reset()
    assert rig.pm.save() == fresh and not rig.sci


def test_a_restored_block_raises_its_sci(rig):
    rig.bus.write(ENABLE, 2, BUTTON)
    rig.pm.press_power_button()
    saved = rig.pm.save()
    other = Rig()
    other.pm.restore(saved)
    assert other.sci and other.pm.save() == saved
    other.thread.close()


@pytest.mark.parametrize("change", [{"status": 2}, {"enable": 0x8000}, {"control": 1}, {"gpe_status": 0x10000},
                                    {"ticks": 1 << 63}, {"ticks": (1 << 63) - 1}, {"half_turns": 1}, {"x": 1}])
def test_an_impossible_state_is_refused(rig, change):
    with pytest.raises(StateError, match="acpi"):
        rig.pm.restore({**rig.pm.save(), **change})


@given(st.lists(st.tuples(st.integers(0, 0x27), st.sampled_from([1, 2, 4, 8]), st.none() | st.integers(0, 2**64 - 1)),
                max_size=60))
def test_the_sci_tells_status_and_enable_whatever_the_guest_does(accesses):
    rig = Rig()
    for offset, size, value in accesses:
        if value is None:
            rig.bus.read(PM + offset, size)
        else:
            rig.bus.write(PM + offset, size, value)
        rig.pm.press_power_button()
        rig.pm.raise_event(offset & 15)
    pending = (rig.bus.read(STATUS, 2) & rig.bus.read(ENABLE, 2)) | (rig.bus.read(GPE_STATUS, 2) & rig.bus.read(GPE_ENABLE, 2))
    assert rig.sci == (pending != 0)
    rig.thread.close()


def test_port_cf9_resets_through_the_hole_in_pci_s_address_register():
    pio, power = Bus("pio"), Power()
    control = ResetControl("reset", power)
    pio.map(0xCF8, 8, PciHost("pci", pio, Bus("mmio"), Interrupts(), reset_control=control))
    pio.write(0xCF8, 4, 0x8000_0E00)
    assert power.take() == (PowerEvent.RUNNING, 0)
    assert pio.read(0xCF9, 1) == 0
    pio.write(0xCF9, 1, 0x02)
    assert pio.read(0xCF9, 1) == 0x02
    assert power.take() == (PowerEvent.RUNNING, 0)
    pio.write(0xCF9, 1, ACPI_RESET_VALUE)
    assert power.take() == (PowerEvent.RESET, 0)
    assert pio.read(0xCF8, 4) == 0x8000_0E00, "the address register did not move"
    pio.write(0xCF9, 1, 0x0E)
    assert power.take() == (PowerEvent.RUNNING, 0), "only the rising edge counts"


@pytest.mark.parametrize(("size", "value", "code"), [(1, 0x131, 0x31), (2, 0xABCD, 0xABCD), (4, 0xFFFF_FFFF, 0xFFFF_FFFF)])
def test_debug_exit_ends_with_its_code(size, value, code):
    bus, power = Bus("pio"), Power()
    bus.map(0xF4, 4, DebugExit("debug-exit", power))
    bus.write(0xF5, 1, 9)
    assert bus.read(0xF4, 4) == 0 and power.take() == (PowerEvent.RUNNING, 0)
    bus.write(0xF4, size, value)
    assert power.take() == (PowerEvent.DEBUG_EXIT, code)


def test_the_debug_console_writes_to_its_log_and_loses_only_what_does_not_fit():
    bus, log = Bus("pio"), CharBackend("debug", output_size=8)
    bus.map(0x402, 1, DebugPort("debug", log))
    assert bus.read(0x402, 1) == 0xE9
    for byte in b"hello, world":
        bus.write(0x402, 1, byte)
    assert log.take() == b"hello, w"
    bus.write(0x402, 1, ord("!"))
    assert log.take() == b"!"
