"""A whole machine with an 82540EM: it stands on the bus with its memory and ports, is saved and restored, and comes and goes."""
import subprocess
import sys
from pathlib import Path

import pytest

from kvmapp import netcards
from kvmapp.config import InterfaceConfig, config_from_options
from kvmapp.errors import HostError
from kvmapp.machine import Machine
from kvmapp.netcards import make_device
from kvmapp.probe import IMAGE

ROOT = Path(__file__).resolve().parents[2]

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


def test_a_card_whose_thread_cannot_start_is_out_again(monkeypatch):
    class Unstartable:
        def resume(self):
            raise HostError("Cannot start a thread")

        def pause(self):
            pass

        def close(self):
            pass

    def make(*arguments):
        device, threads = make_device(*arguments)
        return device, [*threads, Unstartable()]

    running = machine("user")
    try:
        running.boot()
        running.resume()
        before = running.inventory(), list(running.devices), list(running.threads)
        monkeypatch.setattr(netcards, "make_device", make)
        with pytest.raises(HostError, match="Cannot start a thread"):
            running.attach_interface(InterfaceConfig(index=1, type="user", model="e1000", mac="52:54:00:00:00:08"), {})
        assert (running.inventory(), running.devices, running.threads) == before
        assert set(running.network_cards()) == {"net0"} and running.running
    finally:
        running.close()


WITHOUT_DESCRIPTORS = """
import gc, os, resource
from kvmapp.errors import KvmappError
from tests.kvm.test_e1000 import machine
machine("user").close()                                          # what is opened once for all
def descriptors():
    gc.collect()                                                 # a VM and its vCPUs hold each other
    return len(os.listdir("/proc/self/fd"))
before = descriptors()
for limit in range(before, 200, 3):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 4096))
    try:
        machine("user").close()
        break
    except KvmappError as error:
        print(error, error.hint)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 4096))
    assert descriptors() == before, [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")[:-1]]
"""


def test_a_host_without_descriptors_is_an_error_and_nothing_stays_open():
    """Whichever of a machine's descriptors is the one too many."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_DESCRIPTORS], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "Cannot build the machine of domain 'guest'" in done.stdout and "see ulimit -n" in done.stdout


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
