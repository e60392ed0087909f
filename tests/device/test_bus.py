"""The bus as a guest sees it: windows, widths, edges, and what answers where nothing is mapped."""
import pytest

from kvmapp.chardev import CharBackend
from kvmapp.devices import Bus, Device, Interrupts, Power, PowerEvent
from kvmapp.hw.ns16550 import Ns16550


@pytest.fixture
def bus():
    return Bus("mmio")


def test_unmapped_loads_read_all_ones_and_stores_vanish(bus):
    assert [bus.read(0x1000, size) for size in (1, 2, 4, 8)] == [0xFF, 0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF]
    bus.write(0x1000, 4, 1)


def test_windows_stay_sorted_and_refuse_overlap(bus):
    device = Device()
    for base in (0x3000, 0x1000, 0x2000):
        bus.map(base, 0x100, device)
    assert [window[0] for window in bus.windows()] == [0x1000, 0x2000, 0x3000]
    for base, size in ((0x1000, 1), (0x10FF, 2), (0xF00, 0x101), (0x0, 0x10000)):
        with pytest.raises(OSError, match="File exists"):
            bus.map(base, size, device)
    bus.unmap(0x2000, 0x100)
    bus.map(0x2000, 0x80, device)
    with pytest.raises(KeyError):
        bus.unmap(0x2000, 0x100)


@pytest.mark.parametrize(("base", "size"), [(0, 0), (2**64 - 1, 2), (2**63, 2**63 + 1)])
def test_impossible_windows_are_refused(bus, base, size):
    with pytest.raises(OSError, match="Invalid argument"):
        bus.map(base, size, Device())


def test_the_last_bytes_of_the_address_space_can_be_mapped(bus):
    bus.map(2**64 - 8, 8, Device())
    assert bus.read(2**64 - 4, 8) == 2**64 - 1


def test_sources_on_one_pin_are_wired_or(bus):
    """Two serial ports that share a pin: it is high as long as one of them asks."""
    controller = Interrupts()
    for number in range(2):
        bus.map(8 * number, 8, Ns16550(f"serial{number}", controller.line(10), CharBackend(f"serial{number}")))
        bus.write(8 * number + 4, 1, 8)                     # OUT2 lets its interrupt through

    def ask(number, wish):
        bus.write(8 * number + 1, 1, 2 if wish else 0)      # the interrupt of an empty transmitter, which it is

    assert not controller.level(10)
    ask(0, True)
    ask(1, True)
    assert controller.level(10)
    ask(0, False)
    assert controller.level(10)
    ask(1, False)
    assert not controller.level(10)
    ask(1, True)
    assert controller.level(10)
    assert controller.edge_count(10) == 2
    assert controller.edge_count(11) == 0 and not controller.level(11)


def test_a_line_is_that_of_a_pin():
    controller = Interrupts()
    assert controller.line(10).gsi == 10
    with pytest.raises(ValueError, match="not a pin"):
        controller.line(24)


def test_the_first_wish_wins_until_it_is_taken():
    power = Power()
    power.ask(PowerEvent.RESET, 7)
    power.ask(PowerEvent.POWER_OFF, 1)
    assert power.take() == (PowerEvent.RESET, 7)
    assert power.take() == (PowerEvent.RUNNING, 0)


def test_what_only_tells_gives_way_to_a_wish_to_end():
    """After it the guest goes on, and would wait for ever for the end that it was not given."""
    power = Power()
    wishes = (PowerEvent.CRASH_KERNEL, PowerEvent.WATCHDOG, PowerEvent.POWER_OFF, PowerEvent.WATCHDOG, PowerEvent.PANIC)
    for code, event in enumerate(wishes):
        power.ask(event, code)
    assert power.take() == (PowerEvent.POWER_OFF, 2)
    assert not power.asked
