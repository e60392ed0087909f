"""Disks and network cards of a whole machine that come and go."""
import contextlib
import gc
import os

import pytest

from kvmapp.config import DiskConfig, InterfaceConfig, config_from_options
from kvmapp.errors import BadRequest, GuestImageError, KvmappError, Unsupported
from kvmapp.imagefile import open_image
from kvmapp.machine import Machine
from kvmapp.options import part_arguments, run_options
from kvmapp.probe import IMAGE
from tests.descriptors import nothing_left
from tests.smalldisk import sparse

pytestmark = pytest.mark.kvm
GUEST = ["--kernel", str(IMAGE), "--memory", "32"]


@pytest.fixture
def image(tmp_path):
    return str(sparse(tmp_path / "a.img", 1 << 20))


def machine(*words):
    pairs, _ = part_arguments([*GUEST, *words], {flag: bool(option.metavar) for flag, option in run_options().items()})
    return Machine(config_from_options(pairs))


def descriptors():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_one_more_disk_moves_no_network_card(tmp_path, image):
    """Guests name their cards by the slots."""
    other = str(sparse(tmp_path / "b.img", 1 << 20))
    places = []
    for disks in (), ("--disk", image), ("--disk", image, "--disk", other):
        one = machine("--net", "user", "--net", "user", *disks)
        places.append([card for card in one.inventory() if card["name"].startswith("net")])
        one.close()
    assert places[0] == places[1] == places[2] == [{"name": "net0", "slot": 1}, {"name": "net1", "slot": 2}]


def test_a_card_that_came_stands_where_the_file_has_it_then(image):
    one = machine("--net", "user", "--disk", image)
    interface = one.config.interfaces[0]
    slot = one.attach_interface(InterfaceConfig(index=1, type="user", mac="52:54:00:00:00:07"), {})
    assert slot == 1 + max(card["slot"] for card in one.inventory() if card["name"] != "net1")
    assert one.attach_interface(InterfaceConfig(index=2, type="user", mac="52:54:00:00:00:08", slot=29), {}) == 29
    with pytest.raises(Unsupported, match="PCI slot 29 is not free for net3: net2 stands there"):
        one.attach_interface(InterfaceConfig(index=3, type="user", mac="52:54:00:00:00:09", slot=29), {})
    there = [card for card in one.inventory() if card["name"].startswith("net")]
    one.close()
    again = machine("--net", f"user,mac={interface.mac}", "--net", f"user,slot={slot}", "--net", "user,slot=29", "--disk", image)
    assert [card for card in again.inventory() if card["name"].startswith("net")] == there
    again.close()


def test_a_slot_is_free_again_when_its_card_could_not_be_made(image):
    one = machine()
    with pytest.raises(GuestImageError, match="No such file"):
        one.attach_disk(DiskConfig(name="vdb", source=image + "x", slot=20), {})
    assert one.attach_disk(DiskConfig(name="vdc", source=image, slot=20), {}) == 20
    one.close()


def test_a_disk_that_comes_stands_behind_the_others(image, tmp_path):
    """For guests count them in the order of their slots; even where a slot before them has become free."""
    one = machine("--net", "user", "--disk", image)
    one.hotplug.ask(one.slots.slot_of("net0"))
    assert one.take_ejected(asked=True) == ["net0"]
    assert one.attach_disk(DiskConfig(name="vdb", source=str(sparse(tmp_path / "b.img", 1 << 20))), {}) > one.slots.slot_of("vda")
    one.close()


def test_windows_stand_in_the_order_of_old(image):
    one = machine("--machine", "microvm", "--net", "user", "--disk", image)
    assert [card["name"] for card in one.inventory()] == ["vda", "net0"]
    one.close()


def test_a_disk_that_nobody_waits_for_any_more_stays_out(image):
    one = machine()
    before, there = descriptors(), one.inventory()
    disk = DiskConfig(name="vdb", source=image, queues=4)
    with pytest.raises(BadRequest, match="nobody waits for this device any more"):
        one.attach_disk(disk, {}, lambda: False)
    assert one.inventory() == there and not one.disks() and descriptors() == before
    os.close(open_image("vdb", image))
    with pytest.raises(GuestImageError, match="No such file"):
        one.attach_disk(DiskConfig(name="vdb", source=image + "x"), {})
    assert one.inventory() == there and descriptors() == before
    one.close()


def test_disks_that_come_and_go_take_their_descriptors_along(image):
    """Of themselves: the collector runs when there are many objects, not when there are no descriptors."""
    one = machine()
    disk = DiskConfig(name="vdb", source=image, queues=16)
    gc.collect()
    gc.disable()
    try:
        seen = []
        for _ in range(3):
            slot = one.attach_disk(disk, {"disk:vdb": open_image("vdb", image)})
            one.hotplug.ask(slot)
            assert one.take_ejected(asked=True) == ["vdb"]
            seen.append(len(os.listdir("/proc/self/fd")))
    finally:
        gc.enable()
    assert seen[0] == seen[1] == seen[2]
    one.close()


class Hung:
    """A device whose server does not answer."""
    name = "hung"

    def pause(self):
        raise AssertionError("it is waited for")


def test_a_disk_that_grows_and_a_card_that_goes_wait_for_no_other(image):
    """Their servers may hang: the guest has lost what those serve, and nothing else."""
    one = machine("--disk", image, "--net", "user")
    one.boot()
    one.resume()
    one.devices.append(Hung())
    assert one.resize_disk("vda", 2 << 20) == 2 << 20
    with pytest.raises(GuestImageError, match="would be lost"):
        one.resize_disk("vda", 1 << 20)
    one.ask_for_card("net0")
    assert one.take_ejected(asked=True) == ["net0"] and one.running
    one.devices.pop()
    one.pause()
    assert one.resize_disk("vda", 3 << 20) == 3 << 20
    one.close()


def test_an_attach_that_fails_leaves_no_descriptor(image):
    """At whichever it is that the host has none left."""
    one = machine()
    disk = DiskConfig(name="vdb", source=image, queues=4)
    before = descriptors()
    refused = 0
    for room in range(200):
        with nothing_left(room), contextlib.suppress(KvmappError, OSError):
            one.attach_disk(disk, {})
            break
        refused += 1
        assert descriptors() == before, f"with room for {room}"
    assert one.disks() and refused > 20, "it comes at last"
    one.close()
