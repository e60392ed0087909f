"""PCI as a guest sees it: configuration by both mechanisms, BARs that move, INTx, MSI-X, and what hostile guests try."""
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmapp.devices import Bus, Interrupts
from kvmapp.hw.pci import BarKind, PciFunction
from kvmapp.hw.pci_host import ECAM_OFFSET, PciHost
from kvmapp.layout import GSI_INTX, PCI_ECAM_BASE, PCI_ECAM_SIZE, PCI_IO_BASE, PCI_MMIO32_BASE, PCI_MMIO32_SIZE
from kvmapp.state import StateError

SLOT = 3
COMMAND, STATUS, BAR0, BAR1, BAR2, BAR3, INTERRUPT_LINE = 0x04, 0x06, 0x10, 0x14, 0x18, 0x1C, 0x3C
IO, MEMORY, MASTER, INTX_DISABLE = 1, 2, 4, 0x400
MMIO64_BASE = 0x40_0000_0000
MSIX_TABLE, MSIX_PENDING, VECTORS = 0x1000, 0x1800, 3
MESSAGE = 0xFEE0_1000


class Rig:
    """A host with one card: BAR 0 ports, BAR 1 memory with the MSI-X table, BAR 2 64-bit memory."""

    def __init__(self):
        self.pio, self.mmio, self.interrupts = Bus("pio"), Bus("mmio"), Interrupts()
        self.host = PciHost("pci", self.pio, self.mmio, self.interrupts, mmio64_base=MMIO64_BASE)
        self.pio.map(0xCF8, 8, self.host)
        self.mmio.map(PCI_ECAM_BASE, PCI_ECAM_SIZE, self.host, ECAM_OFFSET)
        self.card = PciFunction()
        self.card.rename("card")
        self.card.identify(0x1AF4, 0x1041, 0x020000, revision=1, subsystem_vendor=0x1AF4, subsystem=0x1100, pin=1)
        self.card.add_bar(0, 0x40, BarKind.BAR_IO, 0x10000)
        self.card.add_bar(1, 0x2000, BarKind.BAR_MEM32)
        self.card.add_bar(2, 0x4000, BarKind.BAR_MEM64_PREFETCH, 0x8000)
        self.first_capability = self.card.add_capability(0x09, b"\x05\x01abc", b"\0\0\xff\0\0")
        self.msix_capability = self.card.add_msix(VECTORS, 1, MSIX_TABLE, MSIX_PENDING, self.interrupts)
        self.host.attach(SLOT, self.card)

    def ecam(self, offset, slot=SLOT, number=0, bus=0):
        return PCI_ECAM_BASE + (bus << 20) + (slot << 15) + (number << 12) + offset

    def get(self, offset, size=4):
        return self.mmio.read(self.ecam(offset), size)

    def put(self, offset, size, value):
        self.mmio.write(self.ecam(offset), size, value)

    def enable(self):
        """BAR 1 at the start of the 32-bit window, decoding on; the address of the MSI-X table."""
        self.put(BAR1, 4, PCI_MMIO32_BASE)
        self.put(COMMAND, 2, MEMORY | MASTER)
        return PCI_MMIO32_BASE + MSIX_TABLE


@pytest.fixture
def rig():
    return Rig()


def test_mechanism_1_reaches_bytes_words_and_dwords(rig):
    rig.pio.write(0xCF8, 4, 0x8000_0000 | SLOT << 11)
    assert rig.pio.read(0xCF8, 4) == 0x8000_0000 | SLOT << 11
    assert rig.pio.read(0xCFC, 4) == 0x1041_1AF4
    assert [rig.pio.read(0xCFC + i, 1) for i in range(4)] == [0xF4, 0x1A, 0x41, 0x10]
    assert rig.pio.read(0xCFE, 2) == 0x1041
    rig.pio.write(0xCF8, 4, 0x8000_0000 | SLOT << 11 | COMMAND)
    rig.pio.write(0xCFC, 1, MASTER)
    assert rig.pio.read(0xCFC, 2) == MASTER


def test_mechanism_1_answers_nothing_when_disabled_or_absent(rig):
    rig.pio.write(0xCF8, 4, SLOT << 11)
    assert rig.pio.read(0xCFC, 4) == 0xFFFF_FFFF
    for address in (0x8000_0000 | 9 << 11, 0x8001_0000 | SLOT << 11, 0x8000_0000 | SLOT << 11 | 1 << 8):
        rig.pio.write(0xCF8, 4, address)
        rig.pio.write(0xCFC, 4, 0)
        assert rig.pio.read(0xCFC, 4) == 0xFFFF_FFFF


def test_only_a_dword_is_the_address_register(rig):
    rig.pio.write(0xCF8, 4, 0x8000_1800)
    for port, size in ((0xCF8, 1), (0xCF8, 2), (0xCF9, 1), (0xCFA, 2), (0xCFB, 1), (0xCFA, 4)):
        rig.pio.write(port, size, 0)
    assert rig.pio.read(0xCF8, 4) == 0x8000_1800
    assert rig.pio.read(0xCF9, 1) == 0xFF


def test_ecam_reads_the_same_space_and_all_ones_elsewhere(rig):
    assert rig.get(0) == 0x1041_1AF4
    assert rig.mmio.read(rig.ecam(0), 8) == 0x0010_0000_1041_1AF4
    assert rig.mmio.read(rig.ecam(0, slot=0), 4) == 0x0008_1B36
    assert rig.get(0x100) == 0
    for place in (rig.ecam(0, slot=4), rig.ecam(0, number=1), rig.ecam(0, bus=1), rig.ecam(0, bus=255)):
        assert rig.mmio.read(place, 4) == 0xFFFF_FFFF
    assert rig.get(0xFFE, 4) == 0xFFFF_FFFF, "over the edge of the function"


def test_identity_is_read_only(rig):
    before = [rig.get(offset) for offset in (0, 8, 0x2C, 0x34, 0x3C)]
    for offset in (0, 8, 0x2C, 0x34):
        rig.put(offset, 4, 0xFFFF_FFFF)
    rig.put(0x3D, 1, 0xFF)
    assert [rig.get(offset) for offset in (0, 8, 0x2C, 0x34, 0x3C)] == before
    assert before[-1] & 0xFFFF == 0x0100 | GSI_INTX[SLOT % 4]


@pytest.mark.parametrize(("register", "flags", "size"), [(BAR0, 1, 0x40), (BAR1, 0, 0x2000)])
def test_bars_tell_their_size(rig, register, flags, size):
    rig.put(register, 4, 0xFFFF_FFFF)
    assert rig.get(register) == (0x1_0000_0000 - size) | flags


def test_a_64_bit_bar_tells_its_size_over_both_registers(rig):
    rig.put(BAR2, 4, 0xFFFF_FFFF)
    rig.put(BAR3, 4, 0xFFFF_FFFF)
    assert rig.get(BAR2, 8) == (2**64 - 0x4000) | 0xC


def test_a_bar_is_there_only_while_enabled_and_moves_with_its_register(rig):
    rig.put(BAR1, 4, PCI_MMIO32_BASE + 0x4000)
    assert rig.card.mapped_bars() == {}
    rig.put(COMMAND, 2, MEMORY)
    assert rig.card.mapped_bars() == {1: PCI_MMIO32_BASE + 0x4000}
    rig.put(BAR1, 4, PCI_MMIO32_BASE + 0x8123)
    assert rig.card.mapped_bars() == {1: PCI_MMIO32_BASE + 0x8000}
    assert (PCI_MMIO32_BASE + 0x8000, 0x2000, "card") in rig.mmio.windows()
    rig.put(COMMAND, 2, IO)
    assert rig.card.mapped_bars() == {}
    rig.put(BAR0, 4, 0xC100)
    assert rig.card.mapped_bars() == {0: 0xC100}
    assert (0xC100, 0x40, "card") in rig.pio.windows()


def test_a_64_bit_bar_may_stand_in_either_window(rig):
    rig.put(COMMAND, 2, MEMORY)
    rig.put(BAR2, 4, PCI_MMIO32_BASE)
    assert rig.card.mapped_bars() == {2: PCI_MMIO32_BASE}
    rig.put(BAR2, 8, MMIO64_BASE + 0x4000)
    assert rig.card.mapped_bars() == {2: MMIO64_BASE + 0x4000}


@pytest.mark.parametrize(("register", "address"), [
    (BAR1, 0), (BAR1, 0x1000_0000), (BAR1, PCI_MMIO32_BASE + PCI_MMIO32_SIZE), (BAR1, PCI_ECAM_BASE), (BAR1, 0xFEE0_0000),
    (BAR1, 0xFFFF_E000), (BAR2, 0x1_0000_0000), (BAR2, 0xFFFF_FFFF_FFFF_C000), (BAR2, 0xFFFF_FFFF_0000_0000),
    (BAR0, 0), (BAR0, 0x3C0), (BAR0, 0xCF8), (BAR0, 0x1_0000), (BAR0, 0xFFFF_FFC0),
])
def test_a_bar_over_ram_or_the_platform_is_not_mapped(rig, register, address):
    rig.put(COMMAND, 2, IO | MEMORY)
    rig.put(register, 8 if register == BAR2 else 4, address)
    assert rig.card.mapped_bars() == {}


def test_a_bar_over_another_stays_unmapped_until_it_moves(rig):
    rig.put(COMMAND, 2, MEMORY)
    rig.put(BAR1, 4, PCI_MMIO32_BASE)
    rig.put(BAR2, 4, PCI_MMIO32_BASE)
    assert rig.card.mapped_bars() == {1: PCI_MMIO32_BASE}
    rig.put(BAR2, 4, PCI_MMIO32_BASE + 0x4000)
    assert rig.card.mapped_bars() == {1: PCI_MMIO32_BASE, 2: PCI_MMIO32_BASE + 0x4000}


def test_sizing_with_decoding_on_takes_the_bar_away_and_back(rig):
    rig.enable()
    rig.put(BAR1, 4, 0xFFFF_FFFF)
    assert rig.card.mapped_bars() == {}
    rig.put(BAR1, 4, PCI_MMIO32_BASE)
    assert rig.card.mapped_bars() == {1: PCI_MMIO32_BASE}


def test_capabilities_are_chained_and_masked(rig):
    assert rig.get(STATUS, 2) & 0x10
    assert rig.get(0x34, 1) == rig.first_capability == 0x40
    assert rig.get(0x40, 2) == rig.msix_capability << 8 | 0x09
    assert rig.get(rig.msix_capability, 2) == 0x11
    rig.put(0x40, 8, 0xEEEE_EEEE_EEEE_EEEE)
    assert rig.mmio.read(rig.ecam(0x42), 8).to_bytes(8, "little")[:5] == b"\x05\x01\xeebc"


def test_assign_resources_maps_everything_apart_and_inside_the_windows(rig):
    others = [PciFunction() for _ in range(3)]
    for slot, other in enumerate(others, start=4):
        other.rename(f"other{slot}")
        other.identify(0x1AF4, 0x1042, 0x010000, pin=slot % 4 + 1)
        other.add_bar(0, 0x1000 << slot, BarKind.BAR_MEM32)
        other.add_bar(4, 0x800_0000, BarKind.BAR_MEM64)
        rig.host.attach(slot, other)
    rig.host.assign_resources()
    assert set(rig.card.mapped_bars()) == {0, 1, 2}
    assert rig.card.mapped_bars()[0] >= PCI_IO_BASE
    assert rig.card.mapped_bars()[2] < PCI_ECAM_BASE, "small 64-bit BARs stay where 32-bit guests reach them"
    assert all(other.mapped_bars()[4] >= MMIO64_BASE for other in others)
    assert rig.get(COMMAND, 2) == IO | MEMORY | MASTER
    windows = rig.mmio.windows()
    assert all(base + size <= following for (base, size, _), (following, _, _) in pairwise(windows))


def test_assign_resources_says_which_bar_does_not_fit(rig):
    other = PciFunction()
    other.rename("huge")
    other.add_bar(1, 1 << 30, BarKind.BAR_MEM32)
    rig.host.attach(9, other)
    with pytest.raises(ValueError, match="huge: no room for BAR 1"):
        rig.host.assign_resources()


def test_a_function_needs_function_0_and_a_free_place(rig):
    with pytest.raises(ValueError, match="is not free"):
        rig.host.attach(SLOT, PciFunction())
    with pytest.raises(ValueError, match="no function 0"):
        rig.host.attach(7, PciFunction(), 1)
    rig.host.attach(SLOT, PciFunction(), 1)
    assert rig.get(0x0E, 1) == 0x80


def test_a_detached_function_is_gone_from_every_bus(rig):
    rig.enable()
    assert rig.host.detach(SLOT) is rig.card
    assert rig.get(0) == 0xFFFF_FFFF
    assert [name for _, _, name in rig.mmio.windows()] == ["pci"]
    rig.host.attach(5, rig.card)
    assert rig.mmio.read(rig.ecam(0, slot=5), 4) == 0x1041_1AF4


def test_the_msix_table_shows_through_its_bar(rig):
    table = rig.enable()
    assert [rig.mmio.read(table + 16 * i + 12, 4) for i in range(VECTORS)] == [1] * VECTORS
    rig.mmio.write(table + 16, 8, MESSAGE | 3)
    rig.mmio.write(table + 24, 8, 0xFFFF_FFFE_0000_4041)
    assert rig.mmio.read(table + 16, 8) == MESSAGE
    assert rig.mmio.read(table + 24, 8) == 0x4041, "reserved bits of the vector control read zero"
    assert rig.mmio.read(table + 16 * VECTORS, 4) == 0
    assert rig.get(rig.msix_capability + 2, 2) == VECTORS - 1


def test_a_message_is_told_only_when_its_vector_may_be_sent(rig):
    table = rig.enable()
    line = rig.card.vectors[1]
    rig.mmio.write(table + 16, 8, MESSAGE)
    rig.mmio.write(table + 24, 4, 0x41)
    rig.mmio.write(table + 28, 4, 0)
    assert line.message == (0, 0)
    rig.put(rig.msix_capability + 2, 2, 0xC000)
    assert line.message == (0, 0)
    rig.put(rig.msix_capability + 2, 2, 0x8000)
    assert line.message == (MESSAGE, 0x41)
    rig.mmio.write(table + 24, 4, 0x42)
    assert line.message == (MESSAGE, 0x42)


def test_a_masked_vector_waits_as_a_pending_bit(rig):
    table = rig.enable()
    line = rig.card.vectors[2]
    rig.mmio.write(table + 32, 8, MESSAGE)
    rig.card.send(2)
    assert line.taken() == 0 and rig.mmio.read(PCI_MMIO32_BASE + MSIX_PENDING, 8) == 0, "MSI-X is off: nothing waits"
    rig.put(rig.msix_capability + 2, 2, 0x8000)
    rig.card.send(2)
    rig.card.send(2)
    assert line.taken() == 0 and rig.mmio.read(PCI_MMIO32_BASE + MSIX_PENDING, 8) == 4
    rig.mmio.write(table + 44, 4, 0)
    assert line.taken() == 1 and rig.mmio.read(PCI_MMIO32_BASE + MSIX_PENDING, 8) == 0
    rig.card.send(2)
    assert line.taken() == 1
    rig.put(rig.msix_capability + 2, 2, 0xC000)
    rig.card.send(2)
    assert line.taken() == 0
    rig.put(rig.msix_capability + 2, 2, 0x8000)
    assert line.taken() == 1
    rig.card.send(VECTORS)
    rig.card.send(0xFFFF)


def test_intx_follows_the_disable_bit_and_shows_in_the_status(rig):
    gsi = GSI_INTX[SLOT % 4]
    rig.card.drive(True)
    assert rig.interrupts.level(gsi) and rig.get(STATUS, 2) & 8
    rig.put(COMMAND, 2, INTX_DISABLE)
    assert not rig.interrupts.level(gsi) and rig.get(STATUS, 2) & 8
    rig.put(COMMAND, 2, 0)
    assert rig.interrupts.level(gsi)
    rig.card.drive(False)
    assert not rig.interrupts.level(gsi) and not rig.get(STATUS, 2) & 8


def test_reset_takes_everything_back(rig):
    table = rig.enable()
    rig.mmio.write(table + 12, 4, 0)
    rig.put(rig.msix_capability + 2, 2, 0x8000)
    rig.card.drive(True)
    fresh = Rig().card.save()
    rig.card.reset()
    assert rig.card.save() == fresh
    assert rig.card.mapped_bars() == {} and not rig.interrupts.level(GSI_INTX[SLOT % 4])


def test_restore_maps_and_routes_as_before(rig):
    table = rig.enable()
    rig.mmio.write(table + 16, 8, MESSAGE)
    rig.mmio.write(table + 24, 8, 0x41)
    rig.card.send(0)
    rig.put(rig.msix_capability + 2, 2, 0x8000)
    rig.card.send(0)
    rig.card.drive(True)
    saved = rig.card.save()
    other = Rig()
    other.card.restore(saved)
    assert other.card.save() == saved
    assert other.card.mapped_bars() == {1: PCI_MMIO32_BASE}
    assert other.card.vectors[1].message == (MESSAGE, 0x41)
    assert not other.interrupts.level(GSI_INTX[SLOT % 4])        # MSI-X forbids the pin
    other.mmio.write(table + 12, 4, 0)
    assert other.card.vectors[0].taken() == 1
    other.put(other.msix_capability + 2, 2, 0)
    assert other.interrupts.level(GSI_INTX[SLOT % 4])


@pytest.mark.parametrize("spoil", [
    lambda state: state["config"].__setitem__(0, 0),
    lambda state: state["config"].__setitem__(0x3D, 2),
    lambda state: state["config"].__setitem__(0x10, 0),
    lambda state: state["config"].__setitem__(0x800, 1),
    lambda state: state.update(intx=1),
    lambda state: state["msix"].update(table=bytes(16 * VECTORS + 16)),
    lambda state: state["msix"].update(table=b"\1" * 16 * VECTORS),
    lambda state: state["msix"].update(pending=b"\x08" + bytes(7)),
    lambda state: state["msix"].update(extra=1),
])
def test_restore_refuses_what_this_card_cannot_be(rig, spoil):
    rig.enable()
    good = rig.card.save()
    state = {**good, "config": bytearray(good["config"]), "msix": dict(good["msix"])}
    spoil(state)
    state["config"] = bytes(state["config"])
    with pytest.raises(StateError):
        rig.card.restore(state)
    assert rig.card.save() == good


def test_vcpus_that_move_and_use_bars_at_the_same_time_do_no_harm(rig):
    table = rig.enable()
    platform = rig.pio.windows()

    def move():
        for i in range(20_000):
            rig.put(COMMAND, 2, (0, IO, MEMORY, IO | MEMORY)[i % 4])
            rig.put(BAR1, 4, PCI_MMIO32_BASE + (i % 3) * 0x1000)
            rig.put(BAR2, 8, (PCI_MMIO32_BASE, MMIO64_BASE, 0xFFFF_FFFF_FFFF_FFFF)[i % 3])
            rig.put(BAR0, 4, 0xC000 + (i % 5) * 0x20)

    def use():
        for i in range(60_000):
            rig.mmio.write(table + i % 64, 4, i & 1)
            rig.mmio.read(PCI_MMIO32_BASE + i % 0x4000, 8)
            rig.card.send(i % 4)
            rig.card.drive(bool(i & 1))

    with ThreadPoolExecutor() as vcpus:
        for done in [vcpus.submit(move), vcpus.submit(move), vcpus.submit(use), vcpus.submit(use)]:
            done.result()
    rig.card.drive(False)
    rig.put(COMMAND, 2, 0)
    assert rig.card.mapped_bars() == {} and rig.pio.windows() == platform and len(rig.mmio.windows()) == 1
    assert not rig.interrupts.level(GSI_INTX[SLOT % 4])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([COMMAND, BAR0, BAR1, BAR2, BAR3, 0x20, 0x40, 0x48, 0x4A]) | st.integers(0, 4095),
                          st.sampled_from([1, 2, 4, 8]),
                          st.sampled_from([0, IO | MEMORY, 0xC000, 0xC000_0000, 0xE000_0000, 0x40, 0xFFFF_FFFF]) |
                          st.integers(0, 2**64 - 1)), max_size=40))
def test_no_sequence_of_config_writes_maps_outside_the_windows(writes):
    rig = Rig()
    platform = rig.pio.windows() + rig.mmio.windows()
    for offset, size, value in writes:
        rig.put(offset, size, value)
        rig.mmio.read(rig.ecam(offset), size)
    for base, size, name in rig.mmio.windows():
        assert name == "pci" or PCI_MMIO32_BASE <= base <= PCI_ECAM_BASE - size or base >= MMIO64_BASE
    assert all(window in rig.pio.windows() + rig.mmio.windows() for window in platform)
    assert all(base >= 0xCF8 for base, _, _ in rig.pio.windows())
