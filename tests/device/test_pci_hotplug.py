"""Cards that come and go: the registers behind the DSDT's slots, a guest that plays with them, and what a card leaves behind."""
import gc
import os
import select
from types import SimpleNamespace
from typing import Any

import pytest

from kvmapp.devices import Bus, Interrupts, Power, PowerEvent
from kvmapp.errors import HostError
from kvmapp.hw.acpi_pm import AcpiPm
from kvmapp.hw.pci_hotplug import PciHotplug
from kvmapp.iothread import IoThread
from kvmapp.machine import Machine
from kvmapp.virtio.pci import VirtioPci
from kvmapp.virtio.rng import VirtioRng
from tests.device.virtio_driver import Guest

BASE, INSERTED, ASKED, EJECT = 0x640, 0x640, 0x644, 0x648
SCI, GPE_STATUS, GPE_ENABLE = 9, 0x620, 0x622


@pytest.fixture
def board():
    return Board()


class Board:
    def __init__(self):
        self.pio, self.interrupts, self.thread = Bus("pio"), Interrupts(), IoThread("io")
        self.acpi = AcpiPm("acpi", self.interrupts.line(SCI), Power(), self.thread)
        self.hotplug = PciHotplug("pci-hotplug", self.acpi)
        self.pio.map(0x600, 0x24, self.acpi)
        self.pio.map(BASE, 0xC, self.hotplug)
        self.pio.write(GPE_ENABLE, 2, 2)

    def woken(self) -> bool:
        return bool(select.select([self.hotplug.fd], [], [], 0)[0])


def test_a_new_card_is_told_once(board):
    board.hotplug.insert(5)
    assert board.interrupts.level(SCI)
    assert board.pio.read(GPE_STATUS, 2) == 2
    assert board.pio.read(INSERTED, 4) == 1 << 5
    board.pio.write(INSERTED, 4, 1 << 5)
    board.pio.write(GPE_STATUS, 2, 2)
    assert board.pio.read(INSERTED, 4) == 0
    assert not board.interrupts.level(SCI)


def test_a_card_that_was_asked_for_is_ejected(board):
    board.hotplug.ask(3)
    board.hotplug.ask(31)
    assert board.pio.read(ASKED, 4) == 1 << 31 | 1 << 3
    board.pio.write(ASKED, 4, 1 << 31 | 1 << 3)
    assert board.hotplug.wanted() == [3, 31]
    assert not board.woken()
    board.pio.write(EJECT, 4, 1 << 3)
    assert board.woken()
    assert board.hotplug.take_ejected() == [3]
    assert not board.woken()
    assert board.hotplug.wanted() == [31]


def test_nothing_else_is_ejected(board, capfd):
    board.hotplug.ask(4)
    board.pio.write(EJECT, 4, 0xFFFF_FFFF)
    assert board.hotplug.take_ejected() == [4]
    board.pio.write(EJECT, 4, 0xFFFF_FFFF)
    assert board.hotplug.take_ejected() == []
    assert "pci-hotplug: guest error: ejects a card that it was not asked for" in capfd.readouterr().err


def test_slot_0_is_the_bridges(board):
    board.hotplug.insert(0)
    board.hotplug.ask(0)
    assert board.pio.read(INSERTED, 4) == board.pio.read(ASKED, 4) == 0
    assert board.hotplug.wanted() == []


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_any_width_and_place_is_borne(board, size):
    board.hotplug.ask(9)
    for address in range(BASE, BASE + 0xC):
        board.pio.read(address, size)
        board.pio.write(address, size, 0xFFFF_FFFF_FFFF_FFFF)
    assert board.hotplug.take_ejected() == [9]


def test_an_ejection_is_not_lost_between_save_and_restore(board):
    board.hotplug.ask(7)
    board.pio.write(EJECT, 4, 1 << 7)
    other = Board()
    other.hotplug.restore(board.hotplug.save())
    assert other.woken()
    assert other.hotplug.take_ejected() == [7]


def test_cards_come_and_go_without_an_end():
    """More in turn than there are interrupt vectors, and nothing of them stays."""
    gc.collect()                                        # what is left of other tests
    before = len(os.listdir("/proc/self/fd"))
    with Guest() as guest:
        for _ in range(600):
            card = VirtioPci(VirtioRng("rng0", guest.memory), guest.interrupts)
            guest.host.attach(1, card)
            guest.host.assign_resources()
            assert guest.host.detach(1) is card
            card.close()
            card.part()
        gc.collect()                                    # a card and its device know each other
        assert len(os.listdir("/proc/self/fd")) < before + 20
        assert guest.mmio.windows() == [(0xE000_0000, 0x1000_0000, "pci")]


def test_a_table_that_does_not_fit_gives_its_vectors_back():
    with Guest() as guest:
        cards = []
        with pytest.raises(OSError, match="no more MSI vectors"):
            while True:
                cards.append(VirtioPci(VirtioRng("rng0", guest.memory), guest.interrupts))
        cards.pop().part()
        cards.append(VirtioPci(VirtioRng("rng0", guest.memory), guest.interrupts))
        for card in cards:
            card.part()
        cards.clear()
        gc.collect()


def test_a_table_that_kvm_refuses_gives_its_vectors_back():
    given: list = []
    back: list = []

    class Refusing(Interrupts):
        def msi(self):
            if given:
                raise HostError("KVM refuses an irqfd")
            given.append(super().msi())
            return given[0]

        def release(self, line):
            back.append(line)
            super().release(line)

    with Guest() as guest, pytest.raises(HostError, match="refuses an irqfd"):
        VirtioPci(VirtioRng("rng0", guest.memory), Refusing())
    assert given == back != []


def test_a_reset_takes_out_what_was_asked_for_and_what_is_ejected_already(board):
    """The guest may have let go a moment ago, and the control thread not have heard of it."""
    taken: list[str] = []
    machine: Any = object.__new__(Machine)
    machine.vm = SimpleNamespace(power=Power(), reset=lambda: None)
    machine.memory, machine.devices, machine.hotplug = SimpleNamespace(clear=lambda: None), [board.hotplug], board.hotplug
    machine.card_threads = dict.fromkeys(("net0", "net1", "net2"), ())
    machine.slots = SimpleNamespace(slot_of={"net0": 3, "net1": 4, "net2": 5}.get, assign_resources=lambda: None)
    machine._take_out = taken.append
    for slot in (3, 4):
        board.hotplug.ask(slot)
    board.pio.write(EJECT, 4, 1 << 4)
    machine.power.ask(PowerEvent.POWER_OFF)
    assert machine.reset() == taken == ["net0", "net1"]
    assert board.hotplug.take_ejected() == board.hotplug.wanted() == []
    assert not machine.power.asked, "the guest that wished so is gone"
