"""Whole machines saved and restored, with the probe guest: `kvmapp run --save` and `--restore`, the control socket, bad files."""
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmapp import snapshot, statefile
from kvmapp.config import InterfaceConfig, config_from_options
from kvmapp.errors import HostError, KvmappError, StateError
from kvmapp.machine import Machine
from kvmapp.probe import IMAGE
from tests.kvm.counting import COUNTER, RUN, Guest
from tests.leaves import leaves

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 20

pytestmark = pytest.mark.kvm


@pytest.fixture(scope="module")
def counter(tmp_path_factory):
    """The saved state of a guest that counts."""
    path = tmp_path_factory.mktemp("saved") / "counter.save"
    running = Guest(*COUNTER, "--save", path)
    running.count(3)
    log = running.save()
    assert running.process.returncode == 6, log
    return path


def test_a_counter_goes_on_twenty_times(guest, tmp_path):
    path = tmp_path / "counter.save"
    seen = []
    for number in range(ROUNDS + 1):
        one = guest(*(("--restore", path) if number else COUNTER), "--save", path)
        one.count(2)
        log = one.save()
        assert one.process.returncode == 6, log
        assert f"shut off: saved to {path}" in log
        seen += one.counts                              # all that it said until it was saved
    assert seen == list(range(1, len(seen) + 1))
    assert os.listdir(tmp_path) == ["counter.save"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_restored_guest_can_be_reset(guest, counter, tmp_path):
    """Its memory is the file's no more, and the kernel is read again."""
    config = config_from_options(pairs(COUNTER))
    with open(counter, "rb") as file:
        machine = snapshot.restore(statefile.read(file.fileno(), "counter"), config)
    machine.reset()
    machine.boot()
    machine.close()


def pairs(words):
    from kvmapp.options import part_arguments, run_options
    return part_arguments(words, {flag: bool(option.metavar) for flag, option in run_options().items()})[0]


def test_a_guest_without_pci_is_saved_and_reset(guest, tmp_path):
    """It has network cards that nobody takes out."""
    words = ["--machine", "microvm", "--net", "user", *COUNTER]
    one = guest(*words, "--save", tmp_path / "a.save")
    one.count(2)
    log = one.save()
    assert one.process.returncode == 6, log
    with open(tmp_path / "a.save", "rb") as file:
        machine = snapshot.restore(statefile.read(file.fileno(), "a"))
    assert machine.reset() == []
    machine.close()


def test_saving_fails_and_the_guest_goes_on(guest, tmp_path):
    path = tmp_path / "counter.save"
    one = guest(*COUNTER, "--save", path)
    one.count(2)
    resource.prlimit(one.process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    one.fail_to_save()
    one.count(10)
    assert one.counts == list(range(1, len(one.counts) + 1))
    assert os.listdir(tmp_path) == []
    one.process.send_signal(signal.SIGQUIT)
    assert "not saved: Cannot write the saved state: File too large" in one.log()


def test_a_folder_that_is_not_there_costs_a_line_only(guest):
    one = guest(*COUNTER, "--save", "/no/such/folder/x")
    one.count(1)
    one.fail_to_save()
    one.count(5)
    one.process.send_signal(signal.SIGQUIT)
    assert "not saved: Cannot save to '/no/such/folder/x': No such file" in one.log()


@pytest.mark.parametrize(("change", "error"), [
    (["--memory", "32MiB"], "memory was 16777216, is 33554432"),
    (["--vcpus", "1"], "vcpus was 2, is 1"),
    (["--disk", str(IMAGE)], "disk vda was not there, is there"),
])
def test_another_configuration_is_refused(counter, change, error):
    done = subprocess.run([*RUN, "--restore", counter, *COUNTER, *change], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert error in done.stderr
    assert "hint: restore it with the configuration it was saved with" in done.stderr


def test_a_disk_that_is_missing_is_named(guest, tmp_path):
    disk = tmp_path / "a.img"
    disk.write_bytes(bytes(1 << 20))
    one = guest(*COUNTER, "--disk", disk, "--save", tmp_path / "a.save")
    one.count(1)
    one.save()
    disk.unlink()
    done = subprocess.run([*RUN, "--restore", tmp_path / "a.save"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"Cannot open disk 'vda' ({disk}): No such file" in done.stderr


def test_a_cpu_that_lacks_what_the_guest_uses(counter):
    with open(counter, "rb") as file:
        saved = statefile.read(file.fileno(), "counter")
    leaf = next(entry for entry in saved.state["machine"]["cpuids"][0] if entry[0] == 0x8000_0001)
    leaf[5] |= 1 << 31                              # ECX: no CPU has it
    with pytest.raises(HostError, match="CPUID 0x80000001 ecx bit 31") as refused, open(counter, "rb") as file:
        saved.fd = file.fileno()
        snapshot.restore(saved)
    assert "cpu = baseline" in refused.value.hint


@pytest.mark.parametrize(("damage", "error"), [
    (lambda data: data[:-1], "its header says"),
    (lambda data: data[:3000], "cut short"),
    (lambda data: b"", "not written to its end"),
    (lambda data: b"#!/bin/sh\n", "no saved machine"),
])
def test_broken_files_are_refused_by_name(counter, tmp_path, damage, error):
    path = tmp_path / "broken.save"
    path.write_bytes(damage(counter.read_bytes()))
    done = subprocess.run([*RUN, "--restore", path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert error in done.stderr
    assert str(path) in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-2**70, 2**70), st.text(max_size=3), st.binary(max_size=5000), st.just([]),
                   st.just({}))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_hostile_state_is_an_error_or_a_machine_never_a_crash(counter, choice):
    """Checksums are right, values are not: bytes of every chip and register are turned, exchanged for others, or left out."""
    with open(counter, "rb") as file:
        saved = statefile.read(file.fileno(), "counter")
        paths = list(leaves(saved.state))
        for path in choice.draw(st.lists(st.sampled_from(paths), min_size=1, max_size=4, unique=True)):
            inner = saved.state
            for key in path[:-1]:
                inner = inner[key]
            value = inner[path[-1]]
            if isinstance(value, bytes) and value and choice.draw(st.booleans()):
                turned = bytearray(value)
                turned[choice.draw(st.integers(0, len(value) - 1))] ^= choice.draw(st.integers(1, 255))
                inner[path[-1]] = bytes(turned)
            else:
                inner[path[-1]] = choice.draw(VALUES)
        try:
            machine = snapshot.restore(saved)
        except KvmappError as error:
            assert str(error)
        else:
            machine.resume()                        # whatever the guest does with such registers is its own affair
            machine.close()


def test_memory_that_the_guest_has_not_is_refused(counter):
    with open(counter, "rb") as file:
        saved = statefile.read(file.fileno(), "counter")
        saved.runs.append((1 << 40, 4096, 0))
        with pytest.raises(StateError, match="which the guest has not"):
            snapshot.restore(saved)


def test_the_saved_tree_is_the_restored_tree(counter):
    """Nothing is lost on the way but time."""
    with open(counter, "rb") as file:
        saved = statefile.read(file.fileno(), "counter")
        machine = snapshot.restore(saved)
    again = machine.save_state()
    machine.close()
    before = saved.state["machine"]
    assert again["devices"] == before["devices"]
    for there, here in zip(before["kvm"]["vcpus"], again["kvm"]["vcpus"], strict=True):
        for key in ("regs", "sregs", "xsave", "xcrs", "debugregs", "mp_state"):
            assert there[key] == here[key], key


def test_what_the_cpu_of_the_guest_cannot_hold_does_not_come_back(counter):
    """Protection keys that the other host had and its KVM saved, of a guest that was never shown them."""
    with open(counter, "rb") as file:
        saved = statefile.read(file.fileno(), "counter")
        machine = saved.state["machine"]
        machine["cpuids"] = [[entry[:3] + [0] * 4 if entry[:2] == [0xD, 0] else entry for entry in one] for one in machine["cpuids"]]
        for vcpu in machine["kvm"]["vcpus"]:
            vcpu["xsave"] = with_components(vcpu["xsave"], components_of(vcpu["xsave"]) | 1 << 9)
        restored = snapshot.restore(saved)
    again = restored.save_state()["kvm"]["vcpus"]
    restored.close()
    assert all(components_of(vcpu["xsave"]) & ~3 == 0 for vcpu in again)


def components_of(area):
    return int.from_bytes(area[512:520], "little")


def with_components(area, components):
    return area[:512] + components.to_bytes(8, "little") + area[520:]


def test_the_clock_went_on(counter):
    """kvmclock stands where it would if the guest had never stopped."""
    with open(counter, "rb") as file:
        saved = statefile.read(file.fileno(), "counter")
        saved.state["time"] -= 3600 * 10**9
        machine = snapshot.restore(saved)
    clock = machine.save_state()["kvm"]["chips"]["clock"]
    machine.close()
    passed = clock - saved.state["machine"]["kvm"]["chips"]["clock"]
    assert 3600 * 10**9 <= passed <= time.time_ns() - saved.state["time"]


def test_cards_whose_places_the_guest_exchanged_are_restored_there():
    """Where one of them belongs, another stands in the machine that was just built."""
    first, second = (Machine(config_from_options(pairs([*COUNTER, "--net", "user"]))) for _ in range(2))
    host, slots = first.slots.host, [first.slots.slot_of(name) for name in ("rng", "net0")]
    places = [host.peek(slot, 0, 0x10, 4) for slot in slots]
    for slot in slots:
        host.poke(slot, 0, 0x10, 4, 0xFFFF_FFFF)
    for slot, place in zip(slots, reversed(places), strict=True):
        host.poke(slot, 0, 0x10, 4, place)
    there = bars(first)
    assert there["rng"][0] != bars(second)["rng"][0]
    second.restore_state(first.save_state())
    assert bars(second) == there
    first.close()
    second.close()


def bars(machine):
    return {name: card.mapped_bars() for name, card in machine.cards.items()}


def test_cards_stay_in_the_slots_where_the_guest_knows_them(tmp_path):
    """A card that came while it ran stands behind all others, and one that went leaves its slot empty."""
    machine = Machine(config_from_options(pairs([*COUNTER, "--net", "user", "--net", "user"])))
    there = machine.config.interfaces
    machine.attach_interface(InterfaceConfig(index=2, type="user", model="e1000", mac="52:54:00:00:00:09"), {})
    machine.hotplug.ask(machine.slots.slot_of("net0"))
    assert machine.take_ejected(asked=True) == ["net0"]
    late = InterfaceConfig(index=2, type="user", model="e1000", mac="52:54:00:00:00:09")
    machine.config = type(machine.config).from_dict(
        {**machine.config.to_dict(), "interfaces": [one.to_dict() for one in (there[1], late)]})
    with open(tmp_path / "a.save", "w+b") as file:
        snapshot.write(machine, file.fileno())
        saved = statefile.read(file.fileno(), "a")
        restored = snapshot.restore(saved)
        assert restored.inventory() == machine.inventory()
        card = InterfaceConfig(index=0, type="user", model="virtio", mac="52:54:00:00:00:0a")
        assert restored.attach_interface(card, {}) == machine.attach_interface(card, {})
        restored.close()
        wrong: list = [{"net1": 3, "net2": 3}, {"net1": 0}, {"net1": 32}, {"net1": True}, {"net1": []}, [1]]
        for slots in wrong:
            saved.state["machine"]["slots"] = slots
            with pytest.raises(StateError, match="slots"):
                snapshot.restore(saved)
    machine.close()


def test_hosts_side_settings_are_those_of_the_table():
    from kvmapp.schema import DOMAIN
    for kind, keys in snapshot.HOST_SIDE.items():
        section = DOMAIN.sections[kind] if kind else DOMAIN.top
        assert keys <= section.settings.keys(), kind
    assert DOMAIN.sections.keys() >= snapshot.HOST_SECTIONS


def test_what_may_change_while_the_guest_runs_is_the_host_s_side():
    """Else a change in between would leave a guest that can be saved no more."""
    from kvmapp.schema import DOMAIN
    for kind, section in [("", DOMAIN.top), *DOMAIN.sections.items()]:
        live = {key for key, setting in section.settings.items() if setting.live}
        assert kind in snapshot.HOST_SECTIONS or live <= snapshot.HOST_SIDE.get(kind, set()), kind

