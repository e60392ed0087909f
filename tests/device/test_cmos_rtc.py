"""The clock as drivers read and set it, in each format, its three interrupts, and the memory beside it."""
import calendar
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmapp.devices import Bus, Interrupts
from kvmapp.hw.cmos_rtc import CmosRtc
from kvmapp.iothread import IoThread
from kvmapp.state import StateError
from tests.waiting import until

GIB = 1 << 30
SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR = range(10)
TICKS = 32768                            # a second
A, B, C, D, CENTURY = 0xA, 0xB, 0xC, 0xD, 0x32
UIP, DIVIDER, DIVIDER_RESET = 0x80, 0x20, 0x60
SET, PIE, AIE, UIE, BINARY, H24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
GSI = 8


class Rig:
    def __init__(self, memory=5 * GIB):
        self.interrupts = Interrupts()
        self.thread = IoThread("io")
        self.rtc = CmosRtc("rtc", self.interrupts.line(GSI), self.thread, memory=memory, vcpus=4)
        self.bus = Bus("pio")
        self.bus.map(0x70, 2, self.rtc)

    def get(self, index):
        self.bus.write(0x70, 1, index)
        return self.bus.read(0x71, 1)

    def put(self, index, value):
        self.bus.write(0x70, 1, index)
        self.bus.write(0x71, 1, value)

    def time(self):
        """Seconds since 1970 as a careful driver reads them, in binary 24-hour format."""
        while True:
            fields = [self.get(index) for index in (YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS)]
            if fields == [self.get(index) for index in (YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS)]:
                break
        century = int(f"{self.get(CENTURY):x}")
        return calendar.timegm((century * 100 + fields[0], *fields[1:]))

    def shows(self, *when):
        """Whether it is within the minute that begins then: a busy machine may keep a test waiting."""
        return 0 <= self.time() - calendar.timegm(when) < 60

    def set_time(self, year, month, day, hour, minute, second, enables=0):
        """As Linux does it: SET, divider reset, the fields, and back, perhaps with interrupts enabled. Half a second later the next
        second begins."""
        self.put(B, BINARY | H24 | SET)
        self.put(A, DIVIDER_RESET | 6)
        for index, value in ((YEAR, year % 100), (MONTH, month), (DAY, day), (HOURS, hour), (MINUTES, minute), (SECONDS, second)):
            self.put(index, value)
        self.put(CENTURY, int(str(year // 100), 16))
        self.put(B, BINARY | H24 | enables)
        self.put(A, DIVIDER | 6)


@pytest.fixture
def rig():
    rig = Rig()
    yield rig
    rig.thread.close()


def test_the_time_is_the_host_s(rig):
    rig.put(B, BINARY | H24)
    before = int(time.time())
    assert before <= rig.time() <= time.time()


def test_power_on_is_bcd_24_hours_with_valid_ram(rig):
    assert rig.get(B) == H24
    assert rig.get(D) == 0x80
    assert rig.get(A) & ~UIP == DIVIDER | 6
    assert 0x20 <= rig.get(CENTURY) <= 0x99
    assert rig.bus.read(0x70, 1) == 0xFF


@pytest.mark.parametrize(("format_bits", "hour", "expected"), [
    (0, 0, 0x12), (0, 11, 0x11), (0, 12, 0x92), (0, 23, 0x91),
    (BINARY, 0, 12), (BINARY, 12, 0x8C), (BINARY, 23, 0x8B),
    (H24, 23, 0x23), (H24 | BINARY, 23, 23),
])
def test_hours_in_every_format(rig, format_bits, hour, expected):
    rig.set_time(2031, 12, 31, hour, 7, 8)
    rig.put(B, format_bits)
    assert rig.get(HOURS) == expected
    assert rig.get(MINUTES) == 7
    assert rig.get(DAY) == (31 if format_bits & BINARY else 0x31)
    rig.put(HOURS, expected)
    rig.put(B, BINARY | H24)
    assert rig.get(HOURS) == hour


def test_a_time_that_was_set_goes_on_half_a_second_later(rig):
    before = time.monotonic()
    rig.set_time(2099, 2, 28, 23, 59, 59)
    weekday, second = rig.get(WEEKDAY), rig.get(SECONDS)
    assert (weekday, second) == (7, 59) or time.monotonic() - before > 0.49
    until(lambda: rig.get(MONTH) == 3)
    assert time.monotonic() - before > 0.49
    assert rig.shows(2099, 3, 1, 0, 0, 0) and rig.get(WEEKDAY) == 1


def test_set_stops_the_clock_and_the_format_changes_on_the_fly(rig):
    rig.set_time(2024, 2, 29, 12, 30, 45)
    rig.put(B, SET | BINARY | H24 | UIE)
    assert rig.get(B) == SET | BINARY | H24, "SET clears the update interrupt"
    assert not rig.get(A) & UIP
    before = [rig.get(index) for index in range(10)]
    rig.put(SECONDS, 44)
    assert rig.get(SECONDS) == 44
    assert [rig.get(index) for index in range(1, 10)] == before[1:]


def test_one_field_written_while_the_clock_runs_counts_at_once(rig):
    rig.set_time(2024, 2, 29, 12, 30, 0)
    rig.put(HOURS, 5)
    assert rig.shows(2024, 2, 29, 5, 30, 0)


def test_years_far_from_now_are_kept(rig):
    for year in (1900, 1969, 1970, 2038, 2107, 9999):
        rig.set_time(year, 1, 1, 0, 0, 0)
        assert rig.shows(year, 1, 1, 0, 0, 0)


def test_update_in_progress_shows_before_each_second(rig):
    rig.set_time(2030, 1, 1, 0, 0, 0)
    second = 0

    def about_to_end():
        """Puts the clock into the middle of the 244 us before a second's end; whether it was looked at before they were over."""
        nonlocal second
        state = rig.rtc.save()
        now = time.time_ns() * TICKS // 10**9 + state["offset"]
        second = now // TICKS - 1
        rig.rtc.restore({**state, "offset": state["offset"] - now % TICKS - 4})
        return rig.get(A) & UIP

    until(about_to_end, pause=0)
    until(lambda: not rig.get(A) & UIP)
    assert rig.time() > second


def test_polled_flags_come_without_interrupts(rig):
    rig.get(C)
    until(lambda: rig.get(C) & 0x40)
    until(lambda: rig.get(C) & 0x10)
    assert not rig.interrupts.edge_count(GSI)


def test_reading_c_clears_it_and_lowers_the_line(rig):
    rig.thread.resume()
    rig.put(A, DIVIDER | 3)
    rig.put(B, H24 | PIE)
    until(lambda: rig.interrupts.level(GSI))
    rig.put(B, H24)
    assert not rig.interrupts.level(GSI)
    assert rig.get(C) & 0xC0 == 0x40


def test_the_periodic_interrupt_repeats_while_it_is_acknowledged(rig):
    rig.thread.resume()
    rig.put(A, DIVIDER | 3)
    rig.put(B, H24 | PIE)
    for _ in range(5):
        edges = rig.interrupts.edge_count(GSI)
        rig.get(C)
        until(lambda edges=edges: rig.interrupts.edge_count(GSI) > edges)
    assert rig.get(C) & 0xC0 == 0xC0


@pytest.mark.parametrize("reg_a", [DIVIDER, 0x00 | 3, DIVIDER_RESET | 3])
def test_no_rate_or_no_time_base_is_no_periodic_interrupt(rig, reg_a):
    rig.thread.resume()
    rig.put(A, reg_a)
    rig.put(B, H24 | PIE | UIE)
    rig.get(C)
    if reg_a == DIVIDER_RESET | 3:
        assert not rig.interrupts.level(GSI)
    else:
        until(lambda: rig.interrupts.level(GSI))
        assert rig.get(C) & 0x50 == 0x10, "the update interrupt, not the periodic one"


def test_the_update_interrupt_comes_with_the_second(rig):
    rig.thread.resume()
    rig.set_time(2030, 1, 1, 0, 0, 58)
    rig.put(B, BINARY | H24 | UIE)
    until(lambda: rig.interrupts.level(GSI))
    assert rig.shows(2030, 1, 1, 0, 0, 59)
    assert rig.get(C) & 0x90 == 0x90


@pytest.mark.parametrize("alarm", [(0xFF, 0xC0, 0xFF), (0xFF, 0xFF, 0x00), (0x00, 0x00, 0x00)])
def test_the_alarm_comes_when_all_three_match(rig, alarm):
    rig.thread.resume()
    for index, value in zip((HOURS_ALARM, MINUTES_ALARM, SECONDS_ALARM), alarm, strict=True):
        rig.put(index, value)
    before = time.monotonic()
    rig.set_time(2030, 6, 30, 23, 59, 59, enables=AIE)
    assert not rig.interrupts.level(GSI) or time.monotonic() - before > 0.49
    until(lambda: rig.interrupts.level(GSI))
    assert rig.shows(2030, 7, 1, 0, 0, 0)
    assert rig.get(C) & 0xA0 == 0xA0


def test_an_alarm_at_another_time_does_not_come_with_the_second(rig):
    rig.put(SECONDS_ALARM, 58)
    rig.set_time(2030, 6, 30, 23, 59, 59, enables=AIE)
    until(lambda: rig.get(DAY) == 1)
    assert rig.get(C) & 0x30 == 0x10


def test_firmware_finds_the_sizes_of_memory(rig):
    def number(index, size):
        return sum(rig.get(index + i) << 8 * i for i in range(size))
    assert number(0x15, 2) == 640
    assert number(0x17, 2) == number(0x30, 2) == 0xFFFF
    assert number(0x34, 2) == (3 * GIB - (16 << 20)) >> 16
    assert number(0x5B, 3) == 2 * GIB >> 16
    assert rig.get(0x5F) == 3
    assert sum(rig.get(index) for index in range(0x10, 0x2E)) == rig.get(0x2E) << 8 | rig.get(0x2F)


def test_the_rest_is_memory(rig):
    for index in (0x0E, 0x0F, 0x33, 0x7F):
        rig.put(index | 0x80, index)
    assert [rig.get(index) for index in (0x0E, 0x0F, 0x33, 0x7F)] == [0x0E, 0x0F, 0x33, 0x7F]
    with pytest.raises(ValueError, match="not a byte of the memory"):
        rig.rtc.set_nvram(B, 0)


def test_reset_turns_interrupts_off_and_keeps_time_and_memory(rig):
    rig.set_time(2030, 1, 1, 0, 0, 0)
    rig.put(0x40, 0x55)
    rig.put(B, BINARY | H24 | PIE | AIE | UIE)
    rig.rtc.reset()
    assert rig.get(B) == BINARY | H24 and rig.get(0x40) == 0x55
    assert rig.time() <= calendar.timegm((2030, 1, 1, 0, 0, 59))


def test_a_restored_clock_shows_the_same_offset_and_interrupts(rig):
    rig.set_time(2050, 1, 1, 0, 0, 0)
    rig.put(A, DIVIDER | 6)
    rig.put(B, BINARY | H24 | PIE)
    rig.put(0x41, 0x66)
    saved = rig.rtc.save()
    other = Rig()
    other.rtc.restore(saved)
    assert other.rtc.save() == saved
    assert calendar.timegm((2050, 1, 1, 0, 0, 0)) <= other.time() <= calendar.timegm((2050, 1, 1, 0, 1, 0))
    assert other.get(0x41) == 0x66
    other.thread.resume()
    until(lambda: other.interrupts.level(GSI))
    other.thread.close()


@pytest.mark.parametrize("change", [{"index": 256}, {"bytes": bytes(127)}, {"offset": 2**63}, {"seen": -2**63}, {"extra": 0}])
def test_an_impossible_state_is_refused(rig, change):
    with pytest.raises(StateError, match="rtc"):
        rig.rtc.restore({**rig.rtc.save(), **change})


@pytest.mark.parametrize("seen", [-2**62, -1, 0, 2**62])
def test_a_state_from_any_time_is_survived(rig, seen):
    rig.rtc.restore({**rig.rtc.save(), "seen": seen, "offset": -seen})
    rig.put(B, PIE | AIE | UIE)
    assert rig.get(C) & 0x80


@given(st.lists(st.tuples(st.integers(0, 0x40), st.none() | st.integers(0, 255)), max_size=60))
def test_no_sequence_of_accesses_breaks_the_clock(accesses):
    rig = Rig()
    for index, value in accesses:
        if value is None:
            rig.get(index)
        else:
            rig.put(index, value)
    rig.set_time(2024, 1, 2, 3, 4, 5)
    assert rig.shows(2024, 1, 2, 3, 4, 5)
    rig.thread.close()
