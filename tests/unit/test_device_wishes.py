"""What guests tell by their panic device and watchdog, as the domain's process takes it; no guest runs."""
import time
from types import SimpleNamespace
from typing import Any

import pytest

from kvmapp.devices import Power, PowerEvent
from kvmapp.errors import ConfigError, HostError, WrongState
from kvmapp.machine import Machine as WholeMachine
from kvmapp.vmprocess import EXIT_CRASH, EXIT_POWER_OFF, EXIT_RESET, REBOOT_WISH
from tests.unit.idle_domain import domain


def tell(made, event):
    made.machine.power.ask(event)
    made.power_event(0)
    return made


@pytest.mark.parametrize(("action", "exit", "state"), [("destroy", EXIT_CRASH, "shut off"), ("restart", None, "running"),
                                                       ("preserve", None, "crashed")])
def test_a_panic_is_what_on_crash_says(tmp_path, action, exit, state):
    made = tell(domain(f"on_crash = {action}\n[panic]\n", tmp_path), PowerEvent.PANIC)
    assert (made.ending.exit if made.ending else None) == exit and made.state == state
    assert "the guest panicked" in made.lines[0]
    assert made.published[-1]["state"] == state
    if action == "preserve":
        assert made.reason == "panicked" and "resume" not in made.machine.did
        with pytest.raises(WrongState):
            made.verb_resume(None, {})


@pytest.mark.parametrize("asked", ["resume", "save", "suspend and resume"])
def test_a_guest_that_powered_off_and_was_preserved_does_not_go_on(tmp_path, monkeypatch, asked):
    """Its first instruction would be the one after the power-off; restored, it would have it before it."""
    made = tell(domain("on_poweroff = preserve\n", tmp_path), PowerEvent.POWER_OFF)
    monkeypatch.setattr("kvmapp.saving.Saving", lambda *_: made.machine.did.append("save"))
    if asked == "suspend and resume":
        made.verb_suspend(None, None)
    with pytest.raises(WrongState, match="ended and was preserved"):
        made.save(lambda error: None, "/nowhere") if asked == "save" else made.verb_resume(None, {})
    assert (made.state, made.reason) == ("paused", "shutdown") and not {"save", "resume"} & set(made.machine.did)


def test_a_reset_of_a_paused_domain_lets_it_not_go_on(tmp_path):
    """As in virsh. One that is there for a look only begins anew: that is what reset is for, then."""
    made = domain("on_poweroff = preserve\n", tmp_path)
    made.verb_suspend(None, None)
    made.verb_reset(None, None)
    assert (made.state, made.reason) == ("paused", "user") and made.machine.did[-2:] == ["reset", "boot"]
    made.verb_resume(None, {})
    tell(made, PowerEvent.POWER_OFF).verb_reset(None, None)
    assert made.state == "running" and made.machine.did[-3:] == ["reset", "boot", "resume"]


@pytest.mark.parametrize("when", ["at once", "an hour later", "after shutdown", "after a reset"])
def test_a_power_off_is_the_answer_to_a_reboot_for_an_hour(tmp_path, monkeypatch, when):
    """A guest that ignored it may power off days later, because its administrator said so."""
    made = domain("", tmp_path)
    made.verb_reboot(None, {})
    if when == "an hour later":
        now = time.monotonic()
        monkeypatch.setattr("kvmapp.vmprocess.time.monotonic", lambda: now + REBOOT_WISH + 1)
    elif when == "after shutdown":
        made.verb_shutdown(None, {})
    elif when == "after a reset":
        made.verb_reset(None, {})
    tell(made, PowerEvent.POWER_OFF)
    assert (made.ending is None) == (when == "at once")


def test_a_crash_is_told_though_kvm_has_given_the_machine_up():
    def refuse():
        raise HostError("KVM refuses reading registers: Input/output error")
    vcpu = SimpleNamespace(index=0, registers=refuse, failure_text=lambda: "KVM_RUN: Input/output error")
    machine: Any = SimpleNamespace(vm=SimpleNamespace(vcpus=[vcpu]))
    assert WholeMachine.crash_report(machine) == ["vcpu 0: KVM_RUN: Input/output error",
                                                  "vcpu 0: KVM refuses reading registers: Input/output error"]


def test_a_guest_with_a_crash_kernel_goes_on(tmp_path):
    made = tell(domain("[panic]\n", tmp_path), PowerEvent.CRASH_KERNEL)
    assert made.machine.did[-1] == "resume" and made.state == "running" and "crash kernel" in made.lines[0]


@pytest.mark.parametrize(("action", "exit", "state", "did"), [
    ("reset", None, "running", "reset"), ("poweroff", EXIT_POWER_OFF, "shut off", "pause"),
    ("shutdown", None, "running", "press_power_button"), ("pause", None, "paused", "pause"), ("none", None, "running", "resume"),
])
def test_an_expired_watchdog_does_what_its_action_says(tmp_path, action, exit, state, did):
    made = tell(domain(f"[watchdog]\naction = {action}\n", tmp_path), PowerEvent.WATCHDOG)
    assert (made.ending.exit if made.ending else None) == exit and made.state == state
    assert did in made.machine.did and "its watchdog expired" in made.lines[0]
    assert made.published[0] == {"type": "watchdog", "action": action}
    if action == "pause":
        assert made.reason == "watchdog"
        made.verb_resume(None, {})
        assert made.state == "running"


def test_a_machine_without_pci_has_no_watchdog(tmp_path):
    with pytest.raises(ConfigError, match="a microvm has no PCI bus"):
        domain("machine = microvm\n[watchdog]\n", tmp_path)


def test_a_reset_by_the_watchdog_heeds_on_reboot(tmp_path):
    made = tell(domain("on_reboot = destroy\n[watchdog]\n", tmp_path), PowerEvent.WATCHDOG)
    assert made.ending.exit == EXIT_RESET


def test_a_full_host_pauses_the_guest_and_it_may_be_resumed(tmp_path):
    made = domain("[disk vda]\nsource = /x\n", tmp_path)
    made.machine.full, made.server = ["vda"], object()
    tell(made, PowerEvent.DISK_FULL)
    assert (made.state, made.reason) == ("paused", "I/O error") and made.machine.did == ["pause"]
    assert made.lines == ["the host has no room for what the guest writes to vda: paused; make room, then kvmappctl resume x"]
    assert [event["type"] for event in made.published] == ["io-error", "lifecycle"]
    made.verb_resume(None, {})
    assert made.state == "running" and made.machine.did[-1] == "resume"


def test_a_disk_that_was_reset_meanwhile_is_full_no_more(tmp_path):
    made = tell(domain("[disk vda]\nsource = /x\n", tmp_path), PowerEvent.DISK_FULL)
    assert made.state == "running" and made.machine.did == ["pause", "resume"]


def test_a_domain_is_not_suspended_over_a_disk_that_has_just_filled_up(tmp_path):
    made = domain("[disk vda]\nsource = /x\n", tmp_path)
    made.machine.full = ["vda"]
    made.machine.power.ask(PowerEvent.DISK_FULL)
    with pytest.raises(WrongState, match="Domain 'x' has just found no room on the host"):
        made.verb_suspend(None, None)


@pytest.mark.parametrize("other", [PowerEvent.CRASH_KERNEL, PowerEvent.WATCHDOG, PowerEvent.POWER_OFF])
def test_a_full_disk_covers_up_nothing(other):
    power = Power()
    power.ask(PowerEvent.DISK_FULL)
    power.ask(other)
    power.ask(PowerEvent.DISK_FULL)
    assert power.take()[0] == other


@pytest.mark.parametrize(("section", "event"), [("[panic]", PowerEvent.CRASH_KERNEL), ("[watchdog]\naction = none", PowerEvent.WATCHDOG)])
def test_a_domain_is_not_suspended_over_a_wish_that_lets_it_go_on(tmp_path, section, event):
    """It would run again while it is said to be paused."""
    made = domain(f"{section}\n", tmp_path)
    made.machine.power.ask(event)
    with pytest.raises(WrongState, match="just powered off or reset"):
        made.verb_suspend(None, None)
    assert made.state == "running"
    made.power_event(0)
    assert made.machine.did[-1] == "resume"
    made.verb_suspend(None, None)
    assert (made.state, made.machine.did[-1]) == ("paused", "pause")


def test_a_wish_that_is_void_by_the_time_it_is_heard_wakes_nobody(tmp_path):
    made = domain("", tmp_path)
    made.verb_suspend(None, None)
    made.power_event(0)
    assert (made.state, made.machine.did[-1]) == ("paused", "pause")


def test_cards_that_a_reset_takes_out_are_told_of_and_leave_the_configuration(tmp_path):
    made = domain("[interface 0]\ntype = user\n[interface 1]\ntype = user\n", tmp_path)
    made.machine.lets_go = ["net1"]
    made.server = made
    made.verb_reset(None, None)
    assert [one.index for one in made.config.interfaces] == [one.index for one in made.machine.config.interfaces] == [0]
    assert {"type": "device-removed", "name": "x", "device": "net1"} in made.published


def test_a_card_that_was_let_go_of_is_no_part_of_what_is_saved(tmp_path, monkeypatch):
    """The control thread may hear of the wish to save first; the saved machine would have a card that its domain has no more."""
    made = domain("[interface 0]\ntype = user\n[interface 1]\ntype = user\n", tmp_path)
    made.machine.ejected, saved = ["net1"], []
    monkeypatch.setattr("kvmapp.saving.Saving", lambda machine, *_: saved.append([one.index for one in machine.config.interfaces]))
    made.save(lambda error: None, "/nowhere")
    assert saved == [[0]] and made.state == "saving"


def test_a_host_without_threads_to_save_with_is_an_error_and_the_guest_goes_on(tmp_path, monkeypatch):
    made = domain("", tmp_path)
    made.machine.config = made.config
    (saved := tmp_path / "saved").mkdir()
    monkeypatch.setattr("kvmapp.snapshot.describe", lambda machine, paused: ({}, {}))

    def fail(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", fail)
    with pytest.raises(HostError, match="Cannot save domain 'x': can't start new thread"):
        made.save(lambda error: None, str(saved / "x.save"))
    assert (made.state, made.machine.did[-1]) == ("running", "resume") and list(saved.iterdir()) == []


@pytest.mark.parametrize("event", [PowerEvent.RESET, PowerEvent.POWER_OFF])
def test_a_domain_that_was_just_destroyed_does_not_begin_anew(tmp_path, event):
    made = domain("on_reboot = restart\n", tmp_path)
    made.machine.power.ask(event)
    made.destroy()
    made.power_event(0)
    assert made.state == "shut off" and made.ending.reason == "destroyed" and "reset" not in made.machine.did
