"""Kicks under KVM: the guest's store to a notify address reaches the I/O thread without an exit, wherever the BAR stands."""
import pytest

from kvmapp.layout import PCI_MMIO32_BASE
from kvmapp.virtio.rng import VirtioRng
from tests.device.virtio_driver import Guest
from tests.kvm.bare import bare_vm
from tests.waiting import until

pytestmark = pytest.mark.kvm

MAILBOX = 0x3000
# again: mov eax, [MAILBOX]; test eax, eax; jz again; mov word [eax], 0; mov dword [MAILBOX], 0; jmp again
STORE_WHERE_TOLD = bytes.fromhex("a100300000 85c0 74f7 66c7000000 c7050030000000000000 ebe6")


@pytest.fixture
def vm():
    vm = bare_vm(STORE_WHERE_TOLD)
    yield vm
    vm.close()


def store(vm, address):
    """Has the guest store to `address`; returns when it has."""
    vm.memory.write(MAILBOX, address.to_bytes(4, "little"))
    until(lambda: vm.memory.read(MAILBOX, 4) == bytes(4))


def mmio_exits(vm):
    vm.pause()
    exits = vm.vcpus[0].exit_counts().get("mmio", 0)
    vm.resume()
    return exits


def test_a_kick_makes_no_exit(vm):
    with Guest(vm=vm) as guest:
        driver = guest.drive(VirtioRng("rng0", vm.memory))
        vm.resume()
        for base in (driver.bar(1), PCI_MMIO32_BASE + 0x40_0000, PCI_MMIO32_BASE):
            driver.poke(0x14, 4, base)
            driver.find_structures()
            queue = driver.queues[0]
            for _ in range(3):
                queue.post(writable=[16])
                store(vm, driver.structures[2])
                until(queue.collect)
        assert mmio_exits(vm) == 0
        driver.set_status(0)
        store(vm, driver.structures[2])
        assert mmio_exits(vm) == 1, "a queue that was reset has no doorbell"
        driver.start()
        driver.queues[0].post(writable=[16])
        store(vm, driver.structures[2])
        until(driver.queues[0].collect)
        assert mmio_exits(vm) == 1
