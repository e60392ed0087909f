"""Legacy drivers on transitional cards: their IDs and ports, queues used before DRIVER_OK, features changed late, mixed registers,
frames behind the short header, hostile rings."""
import socket
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmapp.hw.pci import BarKind
from kvmapp.net.backend import FrameDescriptor
from kvmapp.state import StateError
from kvmapp.virtio.net import VirtioNet
from kvmapp.virtio.rng import VirtioRng
from kvmapp.virtio.transitional import virtio_card
from tests.device.virtio_driver import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    F_EVENT_IDX,
    F_INDIRECT,
    F_VERSION_1,
    FEATURES_OK,
    NEEDS_RESET,
    Driver,
    Guest,
    Queue,
    random_bytes,
)
from tests.device.virtio_wirings import LegacyDriver

MAC = bytes.fromhex("5254007f0dcb")
MRG_RXBUF = 1 << 15
SHORT, LONG = 10, 12                                   # headers

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def guest():
    with Guest(wiring="legacy") as guest:
        yield guest


def both(guest, device):
    """A transitional card, and a driver of each age for it."""
    modern = guest.insert(virtio_card(device, guest.interrupts), Driver)
    return LegacyDriver(guest, modern.slot, modern.card), modern


def test_the_ids_are_those_of_each_age(guest):
    cards = {mode: virtio_card(VirtioRng(mode, guest.memory), guest.interrupts, mode)
             for mode in ("transitional", "modern", "legacy")}
    seen = {}
    for slot, (mode, card) in enumerate(cards.items(), 1):
        guest.host.attach(slot, card)
        guest.cards.append(card)
        word = struct.unpack("<HH", guest.host.peek(slot, 0, 0, 4).to_bytes(4, "little"))
        seen[mode] = (*word, guest.host.peek(slot, 0, 8, 1), guest.host.peek(slot, 0, 0x2E, 2),
                      [kind for _, _, kind in card.wanted_bars()])
    assert seen == {"transitional": (0x1AF4, 0x1005, 0, 4, [BarKind.BAR_IO, BarKind.BAR_MEM32]),
                    "modern": (0x1AF4, 0x1044, 1, 0x1100, [BarKind.BAR_MEM32]),
                    "legacy": (0x1AF4, 0x1005, 0, 4, [BarKind.BAR_IO, BarKind.BAR_MEM32])}


def test_a_legacy_card_shows_no_modern_registers(guest):
    driver = guest.plug(VirtioRng("rng0", guest.memory))
    assert driver.structures == {} and driver.windows == 0
    memory = driver.bar(1)
    guest.mmio.write(memory + 0x14, 1, ACKNOWLEDGE)
    assert [guest.mmio.read(memory + offset, 4) for offset in range(0, 0x40, 4)] == [0] * 16
    assert driver.status == 0


@pytest.mark.parametrize("msix", [True, False])
@pytest.mark.parametrize("without", [0, F_EVENT_IDX, F_INDIRECT])
def test_requests_with_and_without_msix(guest, msix, without):
    driver = guest.drive(VirtioRng("rng0", guest.memory), msix=msix, without=without)
    assert driver.device.legacy and driver.status == ACKNOWLEDGE | DRIVER | DRIVER_OK
    if msix:
        for _ in range(3):
            random_bytes(driver.queues[0])
        return
    driver.queues[0].post(writable=[8])
    driver.queues[0].kick()
    driver.await_pin()
    assert driver.isr() == 1 and driver.isr() == 0
    driver.await_pin(False)
    assert driver.queues[0].collect()[0].written == 8


def test_config_space_moves_when_msix_is_enabled(guest):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with theirs:
        driver = guest.plug(VirtioNet("net0", guest.memory, FrameDescriptor(fd=ours.detach()), MAC))
        assert bytes(guest.pio.read(driver.ports + 20 + i, 1) for i in range(6)) == MAC
        driver.enable_msix()
        assert bytes(guest.pio.read(driver.ports + 24 + i, 1) for i in range(6)) == MAC
        assert driver.get("config_msix_vector") == 0xFFFF
        driver.put("config_msix_vector", 99)
        assert driver.get("config_msix_vector") == 0xFFFF


def test_a_driver_may_kick_before_driver_ok_and_tell_its_features_later(guest):
    """Linux 2.6.25 to 3.17: requests in `probe`, features and DRIVER_OK after it."""
    driver = guest.plug(VirtioRng("rng0", guest.memory))
    for status in (0, ACKNOWLEDGE, DRIVER):
        driver.set_status(status)
    driver.enable_msix()
    driver.queues = [Queue(driver, 0)]
    driver.queues[0].enable(vector=1)
    random_bytes(driver.queues[0])
    assert driver.device.legacy and driver.status == ACKNOWLEDGE | DRIVER
    driver.features = driver.offered()
    driver.want(driver.features)
    driver.set_status(DRIVER_OK)
    assert driver.device.features == driver.features & 0xFFFF_FFFF
    driver.queues[0].event_idx = driver.queues[0].indirect = True
    for _ in range(3):
        random_bytes(driver.queues[0])
    driver.want(0)
    assert driver.device.features == driver.features


def test_a_driver_that_never_makes_the_card_a_bus_master_is_served(guest):
    """Linux before 2.6.34, of a card that came while it ran."""
    driver = guest.plug(VirtioRng("rng0", guest.memory))
    driver.poke(4, 2, 3)
    driver.start()
    random_bytes(driver.queues[0])
    driver.set_status(0)
    driver.poke(4, 2, 3)                                     # as a driver that goes leaves it
    driver.start()
    random_bytes(driver.queues[0])


def test_a_reset_forgets_the_legacy_driver_and_lets_a_modern_one_in(guest):
    legacy, modern = both(guest, VirtioRng("rng0", guest.memory))
    legacy.start()
    random_bytes(legacy.queues[0])
    legacy.set_status(0)
    assert not modern.device.legacy and legacy.status == 0
    modern.start()
    random_bytes(modern.queues[0])
    assert modern.status & FEATURES_OK


def test_registers_of_both_ages_mixed_do_no_harm(guest):
    legacy, modern = both(guest, VirtioRng("rng0", guest.memory))
    modern.negotiate()
    legacy.set_status(DRIVER_OK)
    assert modern.status & DRIVER_OK == 0 and not modern.device.legacy
    legacy.start()
    modern.set_status(FEATURES_OK)
    assert modern.status & FEATURES_OK == 0 and modern.device.features >> 32 == 0
    random_bytes(legacy.queues[0])


def test_a_modern_driver_must_know_1_0(guest):
    _, modern = both(guest, VirtioRng("rng0", guest.memory))
    modern.set_status(ACKNOWLEDGE | DRIVER)
    modern.want(modern.offered() & ~F_VERSION_1)
    modern.set_status(FEATURES_OK)
    assert modern.status & FEATURES_OK == 0


@pytest.mark.parametrize("page", [0xFFFF_FFFF, 0x2000, 0xC0000])
def test_a_ring_outside_of_ram_breaks_the_device_only(guest, page):
    driver = guest.plug(VirtioRng("rng0", guest.memory))
    driver.set_status(ACKNOWLEDGE | DRIVER)
    driver.put("queue_page", page)
    assert driver.status & NEEDS_RESET
    driver.put("queue_notify", 0)
    guest.settle()
    driver.start()
    random_bytes(driver.queues[0])


def test_a_queue_is_taken_back_by_page_zero(guest):
    driver = guest.drive(VirtioRng("rng0", guest.memory))
    random_bytes(driver.queues[0])
    driver.reset_queue(driver.queues[0])
    driver.queues = [Queue(driver, 0)]
    driver.queues[0].enable(vector=1)
    random_bytes(driver.queues[0])


def test_the_state_of_a_legacy_driver_comes_back(guest):
    driver = guest.drive(VirtioRng("rng0", guest.memory))
    random_bytes(driver.queues[0])
    driver.card.pause()
    guest.thread.pause()
    state = driver.card.save()
    driver.card.reset()
    driver.card.restore(state)
    assert driver.card.save() == state and driver.device.legacy
    wrong = {**state, "virtio": {**state["virtio"], "status": ACKNOWLEDGE | DRIVER | FEATURES_OK}}
    with pytest.raises(StateError, match="legacy"):
        driver.card.restore(wrong)
    guest.thread.resume()
    driver.card.resume()
    random_bytes(driver.queues[0])


def test_features_wished_for_since_the_beginning_do_not_spoil_the_state(guest):
    """A driver that has kicked already may store any features until DRIVER_OK."""
    driver = guest.plug(VirtioRng("rng0", guest.memory))
    driver.set_status(ACKNOWLEDGE | DRIVER)
    driver.enable_msix()
    driver.queues = [Queue(driver, 0)]
    driver.queues[0].enable(vector=1)
    random_bytes(driver.queues[0])
    driver.want(0xFFFF_FFFF)
    driver.card.pause()
    guest.thread.pause()
    state = driver.card.save()
    driver.card.restore(state)
    assert driver.card.save() == state and driver.device.features & ~driver.device.offered == 0


@pytest.mark.parametrize("without", [0, MRG_RXBUF])
def test_frames_have_a_short_header_unless_buffers_merge(guest, without):
    header = SHORT if without else LONG
    ours, host = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    frame = bytes(range(60))
    with host:
        host.settimeout(20)
        driver = guest.drive(VirtioNet("net0", guest.memory, FrameDescriptor(fd=ours.detach()), MAC), without=without)
        rx, tx, *_ = driver.queues
        tx.post(readable=[bytes(header), frame])
        tx.kick()
        assert host.recv(4096) == bytes(header) + frame
        rx.post(writable=[header, 1514 + 4])
        rx.kick()
        host.send(b"\xEE" * header + frame)
        [done] = rx.wait()
        assert done.data[header:] == frame
        assert done.data[:header] == b"\xEE" * SHORT + (b"" if without else b"\1\0")


@given(st.lists(st.tuples(st.integers(0, 127), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1) | st.integers(0, 8))))
@settings(max_examples=60, deadline=None)
def test_no_store_to_any_port_does_harm(stores):
    with Guest(wiring="legacy") as guest:
        driver = guest.plug(VirtioRng("rng0", guest.memory))
        for offset, size, value in stores:
            guest.pio.write(driver.ports + offset, size, value)
            guest.pio.read(driver.ports + offset, size)
        driver.set_status(0)
        driver.start()
        random_bytes(driver.queues[0])
