"""The i6300esb as its driver uses it, with stages of milliseconds; and the panic port."""
import select
import time

import pytest

from kvmapp.devices import Power, PowerEvent
from kvmapp.hw.i6300esb import I6300Esb
from kvmapp.hw.pvpanic import Pvpanic
from kvmapp.layout import GSI_INTX, PCI_ECAM_BASE
from kvmapp.state import StateError
from tests.device.virtio_driver import Guest
from tests.waiting import TIMEOUT, until

SLOT = 1
CONFIG, LOCK, ENABLED, LOCKED, FREE_RUN = 0x60, 0x68, 2, 1, 4
FAST, OUTPUT_OFF, NO_INTERRUPT = 4, 0x20, 3      # not FAST: ticks of 2^15 PCI clocks, about a millisecond
RELOAD, RELOAD_NOW, TIMED_OUT = 0xC, 0x100, 0x200
MILLISECOND = 1042                               # ticks of 2^5 PCI clocks
LONG = 1_000_000                                 # ticks of 2^15: a quarter of an hour, more than any test takes


class Rig:
    def __init__(self, guest):
        self.guest, self.power = guest, Power()
        self.card = I6300Esb("watchdog", self.power, guest.thread)
        guest.host.attach(SLOT, self.card)
        guest.host.assign_resources()
        self.card.resume()
        self.bar = self.card.mapped_bars()[0]

    def configure(self, offset, size, value):
        self.guest.mmio.write(PCI_ECAM_BASE + (SLOT << 15) + offset, size, value)

    def start_slowly(self, lock=ENABLED):
        """Neither stage ends while a test looks at it."""
        self.start(LONG, LONG, config=NO_INTERRUPT, lock=lock)

    def lock(self):
        return self.guest.mmio.read(PCI_ECAM_BASE + (SLOT << 15) + LOCK, 1)

    def store(self, offset, value):
        """As Linux does: the unlocking sequence before every store."""
        for word in (0x80, 0x86):
            self.guest.mmio.write(self.bar + RELOAD, 4, word)
        self.guest.mmio.write(self.bar + offset, 4, value)

    def start(self, first, second, config=FAST | NO_INTERRUPT, lock=ENABLED):
        self.configure(CONFIG, 2, config)
        self.store(0, first)
        self.store(4, second)
        self.configure(LOCK, 1, lock)

    def timed_out(self):
        return bool(self.guest.mmio.read(self.bar + RELOAD, 4) & TIMED_OUT)

    def expired(self):
        """Waits for the wish to act."""
        assert select.select([self.power.fd], [], [], TIMEOUT)[0]
        return self.power.take()[0]


@pytest.fixture
def rig():
    with Guest() as guest:
        rig = Rig(guest)
        yield rig
        rig.card.close()


def test_two_stages_then_the_host_acts_and_the_guest_can_see_why(rig):
    started = time.monotonic()
    rig.start(5 * MILLISECOND, 5 * MILLISECOND)
    assert rig.expired() == PowerEvent.WATCHDOG and time.monotonic() - started >= 0.0099
    assert rig.timed_out()
    rig.card.reset()
    rig.guest.host.assign_resources()
    assert rig.timed_out(), "a reset does not hide it"
    rig.store(RELOAD, TIMED_OUT)
    assert not rig.timed_out()


def test_a_reload_starts_the_first_stage_anew(rig):
    rig.start_slowly()

    def gains_time():
        before = rig.card.save()
        rig.store(RELOAD, RELOAD_NOW)
        after = rig.card.save()
        assert after["stage"] == before["stage"] == 1
        return after["left"] > before["left"]

    until(gains_time)                            # unless this took longer than all that ran before it


def test_a_store_without_the_unlocking_sequence_does_nothing(rig):
    bus, bar = rig.guest.mmio, rig.bar
    for words in ((), (0x86,), (0x80,), (0x80, 1, 0x86)):
        for word in words:
            bus.write(bar + RELOAD, 4, word)
        bus.write(bar, 4, 7)
        assert bus.read(bar, 4) == 0xFFFFF, words
    rig.store(0, 7)
    assert bus.read(bar, 4) == 7
    bus.write(bar, 4, 8)
    assert bus.read(bar, 4) == 7, "the sequence opens one store"


def test_the_first_stage_interrupts_when_asked(rig):
    rig.start(1, LONG, config=0)
    until(lambda: rig.guest.interrupts.level(GSI_INTX[SLOT % 4]))
    rig.guest.mmio.write(rig.bar + 8, 4, 1)
    assert not rig.guest.interrupts.level(GSI_INTX[SLOT % 4]) and rig.power.take()[0] == PowerEvent.RUNNING


def test_a_locked_watchdog_cannot_be_stopped(rig):
    rig.start_slowly(lock=ENABLED | LOCKED)
    for size in (1, 2, 4):
        rig.configure(LOCK, size, 0)
    assert rig.lock() == ENABLED | LOCKED and rig.card.save()["stage"] == 1
    rig.card.reset()
    rig.guest.host.assign_resources()
    assert rig.lock() == 0 and rig.card.save()["stage"] == 0


def test_disabling_stops_it(rig):
    rig.start_slowly()
    rig.configure(LOCK, 1, 0)
    assert rig.card.save()["stage"] == rig.card.save()["left"] == 0


def test_without_its_output_nobody_acts(rig):
    rig.start(0, 0, config=FAST | NO_INTERRUPT | OUTPUT_OFF)
    until(rig.timed_out)
    assert rig.power.take()[0] == PowerEvent.RUNNING


def test_running_free_it_asks_once_until_it_is_reloaded(rig):
    rig.start(0, 0, lock=ENABLED | FREE_RUN)
    assert rig.expired() == PowerEvent.WATCHDOG
    rig.store(RELOAD, TIMED_OUT)
    until(rig.timed_out)
    assert rig.power.take()[0] == PowerEvent.RUNNING
    rig.store(RELOAD, RELOAD_NOW)
    assert rig.expired() == PowerEvent.WATCHDOG


def test_time_stands_still_while_the_machine_does(rig):
    rig.start_slowly()
    rig.card.pause()
    rig.card.restore({**rig.card.save(), "stage": 2, "left": 20_000_000})
    time.sleep(0.05)
    assert rig.card.save()["left"] == 20_000_000 and rig.power.take()[0] == PowerEvent.RUNNING
    rig.card.resume()
    assert rig.expired() == PowerEvent.WATCHDOG


def test_a_restored_watchdog_goes_on(rig):
    rig.start_slowly()
    rig.card.pause()
    state = rig.card.save()
    rig.card.reset()
    rig.card.restore({**state, "stage": 2, "left": 10**6})
    rig.card.resume()
    assert rig.expired() == PowerEvent.WATCHDOG


@pytest.mark.parametrize("change", [{"stage": 3}, {"left": 1 << 62}, {"preload": [1]}, {"preload": [1 << 20, 0]}, {"stage": 0, "left": 1},
                                    {"unlocking": 3}, {"pci": {}}])
def test_an_impossible_state_is_refused(rig, change):
    rig.start_slowly()
    rig.card.pause()
    state = rig.card.save()
    with pytest.raises(StateError, match="watchdog"):
        rig.card.restore({**state, **change})
    assert rig.card.save() == state


@pytest.mark.parametrize(("value", "event"), [(1, PowerEvent.PANIC), (3, PowerEvent.PANIC), (2, PowerEvent.CRASH_KERNEL),
                                              (0, PowerEvent.RUNNING), (0x80, PowerEvent.RUNNING)])
def test_the_panic_port(value, event):
    power = Power()
    with Guest() as guest:
        guest.pio.map(0x505, 1, Pvpanic("panic", power))
        assert guest.pio.read(0x505, 1) == 3
        guest.pio.write(0x505, 1, value)
    assert power.take()[0] == event
