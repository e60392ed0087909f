"""Where a machine's disks and network cards stand, and that they stay there."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmapp.config import DomainConfig
from kvmapp.errors import ConfigError, StateError, Unsupported
from kvmapp.places import free_place, keep_places, last_disk, places, require_free
from kvmapp.slots import PciSlots


def domain(interfaces=(), disks=(), **more):
    """Each card and disk as (its number or name, its slot)."""
    return DomainConfig.from_dict({
        "name": "web", "uuid": "d340f42e-8611-52c5-949c-8013181e73d4", "memory": 32 << 20, **more,
        "interfaces": [{"index": index, "type": "user", "mac": f"52:54:00:00:00:{index:02x}", "slot": slot} for index, slot in interfaces],
        "disks": [{"name": name, "source": f"/data/{name}.img", "slot": slot} for name, slot in disks]})


@pytest.mark.parametrize(("interfaces", "disks", "expected"), [
    ((), (), {}),
    ([(0, None), (1, None)], [("vda", None)], {"net0": 1, "net1": 2, "vda": 3}),
    ([(0, None)], [("vda", 1)], {"net0": 2, "vda": 1}),
    ([(0, 9), (1, None)], [("vda", None)], {"net0": 9, "net1": 10, "vda": 1}),
    ([(0, 31), (1, None)], (), {"net0": 31, "net1": 1}),
    ([], [("vda", 5), ("vdb", None), ("vdc", 6)], {"vda": 5, "vdb": 7, "vdc": 6}),
])
def test_where_cards_stand(interfaces, disks, expected):
    assert places(domain(interfaces, disks)) == expected


def test_a_card_too_many_has_no_place():
    many = domain([(index, None) for index in range(32)])
    assert len(places(many)) == 31 and "net31" not in places(many)
    assert free_place(set(range(1, 32))) is None


def test_windows_have_no_slots():
    assert places(domain([(0, None)], [("vda", None)], machine="microvm")) == {}
    with pytest.raises(ConfigError, match=r"\[disk vda\] slot = '4': a microvm has no PCI bus"):
        domain(disks=[("vda", 4)], machine="microvm")


def test_a_slot_is_had_by_one():
    with pytest.raises(ConfigError, match=r"\[disk vda\] slot = '4': \[interface 0\] has it already"):
        domain([(0, 4)], [("vda", 4)])
    with pytest.raises(ConfigError, match=r"\[interface 0\] slot = '32': expected a whole number from 1 to 31"):
        domain([(0, 32)])


@pytest.mark.parametrize(("before", "after", "written"), [
    # What goes.
    (([(0, None), (1, None)], [("vda", None)]), ([(1, None)], [("vda", None)]), {"net1": 2, "vda": 3}),
    (([(0, None)], [("vda", None), ("vdb", None)]), ([(0, None)], [("vdb", None)]), {"vdb": 3}),
    # What comes.
    (([(0, None)], [("vda", None)]), ([(0, None), (1, None)], [("vda", None)]), {"vda": 2}),
    (([(0, None)], [("vda", None)]), ([(0, None)], [("vda", None), ("vdb", None)]), {}),
    (([(0, None)], [("vda", None)]), ([(0, None), (1, 7)], [("vda", None)]), {"net1": 7}),
])
def test_what_comes_or_goes_moves_nothing(before, after, written):
    old, new = domain(*before), domain(*after)
    keep_places(old, new)
    assert slots_of(new) == written
    stood, stand = places(old), places(new)
    assert all(stand[name] == stood[name] for name in stood if name in stand)


@pytest.mark.parametrize("wanted", [None, 6])
def test_what_an_administrator_changes_is_as_he_wants_it(wanted):
    new = domain([(0, wanted)])
    keep_places(domain([(0, 5)]), new)
    assert new == domain([(0, wanted)])


def slots_of(config):
    """What the sections say."""
    sections = {**{f"net{one.index}": one for one in config.interfaces}, **{one.name: one for one in config.disks}}
    return {name: one.slot for name, one in sections.items() if one.slot is not None}


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 15)), max_size=30))
def test_whatever_comes_and_goes_the_others_stay(changes):
    """A card comes where there is none of its number, perhaps with a slot, and goes where there is."""
    interfaces: dict = {}
    disks: dict = {}
    for is_disk, number, slot in changes:
        before = domain(interfaces.items(), disks.items())
        cards, name = (disks, f"vd{chr(ord('a') + number)}") if is_disk else (interfaces, number)
        if name in cards:
            del cards[name]
        else:
            cards[name] = slot if slot and slot not in places(before).values() else None
        after = domain(interfaces.items(), disks.items())
        keep_places(before, after)
        stood, stand = places(before), places(after)
        assert {name: stand[name] for name in stood if name in stand} == {name: stood[name] for name in stood if name in stand}
        assert len(set(stand.values())) == len(stand) == len(interfaces) + len(disks)
        interfaces.update((one.index, one.slot) for one in after.interfaces)
        disks.update((one.name, one.slot) for one in after.disks)
    domain(interfaces.items(), disks.items())                   # which can be read again


def test_a_card_is_not_to_stand_where_another_stands():
    one = domain([(0, None), (1, 9)], [("vda", None)])
    require_free(one, "vda", 2)
    require_free(one, "vdb", 3)
    for slot, other in ((1, "net0"), (2, "vda"), (9, "net1")):
        with pytest.raises(ConfigError, match=f"PCI slot {slot} is not free for vdb: {other} stands there"):
            require_free(one, "vdb", slot)


def test_behind_which_slot_a_disk_changes_no_order():
    assert last_disk(domain([(0, None), (1, 9)], [("vda", None)])) == 2 and last_disk(domain([(0, None)])) == 0


class Bus:
    """As hw/pci_host.pyx, with names only."""

    def __init__(self, *names):
        self.names = dict(enumerate(names, 1))

    def slots(self):
        return {(slot, 0): type("Card", (), {"name": name}) for slot, name in {0: "bridge", **self.names}.items()}


def test_cards_that_come_get_their_slot_or_one_behind_their_kind():
    slots = PciSlots(Bus("net0", "vda", "rng"), None, "modern", {})
    slots.reserve("vdb", behind=["vda"])
    slots.reserve("net1", 9)
    slots.reserve("vdb", 12)                            # kept already
    assert slots.kept == {"vdb": 4, "net1": 9}
    with pytest.raises(Unsupported, match="PCI slot 9 is not free for vdc: net1 stands there"):
        slots.reserve("vdc", 9)
    with pytest.raises(Unsupported, match="PCI slot 3 is not free for vdc: rng stands there"):
        slots.reserve("vdc", 3)
    slots.release("net1")
    slots.release("net1")
    slots.reserve("vdc", 9)
    assert slots.kept == {"vdb": 4, "vdc": 9}


def test_a_full_bus_has_no_slot():
    with pytest.raises(Unsupported, match="no free PCI slot for vdb"):
        PciSlots(Bus(*(f"net{index}" for index in range(31))), None, "modern", {}).reserve("vdb")


@pytest.mark.parametrize("kept", [{"vda": 0}, {"vda": 32}, {"vda": True}, {"vda": "1"}, {"vda": 1, "vdb": 1}, ["vda"], None])
def test_a_saved_state_with_slots_that_no_bus_has_is_refused(kept):
    with pytest.raises(StateError, match="in which slots"):
        PciSlots(Bus(), None, "modern", kept)
