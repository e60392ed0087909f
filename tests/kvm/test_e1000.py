"""A whole machine with an 82540EM: it stands on the bus with its memory and ports, is saved and restored, and comes and goes."""
import pytest

from kvmapp.config import InterfaceConfig, config_from_options
from kvmapp.machine import Machine
from kvmapp.probe import IMAGE

pytestmark = pytest.mark.kvm


def machine(net):
    return Machine(config_from_options([("--kernel", str(IMAGE)), ("--memory", "16MiB"), ("--append", "steps=none mode=counter"),
                                        ("--net", net)]))


def test_a_machine_with_the_card():
    first, second = (machine("user,model=e1000,mac=52:54:00:00:00:07") for _ in range(2))
    try:
        assert [card["name"] for card in first.inventory() if card["name"] == "net0"] == ["net0"]
        card = first.network_cards()["net0"]
        assert sorted(card.mapped_bars()) == [0, 1] and card.link
        assert first.stats()["devices"]["net0"]["rx_packets"] == 0
        card.set_link(False)
        assert second.restore_state(first.save_state())
        assert not second.network_cards()["net0"].link
    finally:
        first.close()
        second.close()


def test_cards_come_to_a_running_guest_and_go():
    running = machine("user")
    try:
        running.boot()
        running.resume()
        for _ in range(2):
            running.attach_interface(InterfaceConfig(index=1, type="user", model="e1000", mac="52:54:00:00:00:08"), {})
            assert set(running.network_cards()) == {"net0", "net1"}
            running._take_out("net1")
        assert set(running.network_cards()) == {"net0"}
    finally:
        running.close()
