"""The run loop on the machine's own /dev/kvm, with guests of a few bytes: start, stop, pause, power events, reset."""
import gc
import os
import select
import time
from contextlib import suppress
from pathlib import Path

import pytest

from kvmapp.core import Kvm, Vm
from kvmapp.devices import Device, PowerEvent
from kvmapp.errors import HostError
from kvmapp.memory import GuestMemory
from tests.kvm.bare import CODE, Entry, bare_vm
from tests.waiting import until

pytestmark = pytest.mark.kvm

MIB = 1 << 20
SPIN = b"\xeb\xfe"                                  # jmp $
TRIPLE_FAULT = b"\x0f\x01\x1d\x00\x20\x00\x00\x0f\x0b"  # lidt [0x2000] (zeroes); ud2
COUNT = b"\xff\x05\x00\x30\x00\x00\xeb\xf8"         # inc dword [0x3000]; jmp
COUNT_PORT = b"\xe6\x80" + b"\xff\x05\x00\x30\x00\x00\xeb\xf6"  # out 0x80, al; inc dword [0x3000]; jmp
KVMCLOCK = 0x4000
ENABLE_KVMCLOCK = b"\xb9\x01\x4d\x56\x4b\xb8\x01\x40\x00\x00\x31\xd2\x0f\x30"  # wrmsr of 0x4001 to MSR_KVM_SYSTEM_TIME_NEW

SET_MEMORY_TYPES = (b"\xb9\x00\x02\x00\x00\xb8\x06\x00\x00\x00\x31\xd2\x0f\x30"  # wrmsr of 6 to 0x200
                    b"\xb9\xff\x02\x00\x00\xb8\x06\x0c\x00\x00\x31\xd2\x0f\x30")  # ... of 0xc06 to 0x2ff

WAKE_NEIGHBOUR = (b"\xc7\x05\xf0\x00\xe0\xfe\xff\x01\x00\x00"  # mov dword [0xfee000f0], 0x1ff: enables the own APIC
                  b"\xc7\x05\x10\x03\xe0\xfe\x00\x00\x00\x01"  # mov dword [0xfee00310], 1 << 24: to APIC 1
                  b"\xc7\x05\x00\x03\xe0\xfe\x00\x45\x00\x00"  # mov dword [0xfee00300], 0x4500: INIT
                  b"\xc7\x05\x00\x03\xe0\xfe\x02\x46\x00\x00"  # mov dword [0xfee00300], 0x4602: start-up at 0x2000
                  + COUNT)
# The interrupt controller and a timer of 1 kHz, by polling: out 0x20 0x0c, in al 0x20; if there was one, inc dword [0x3000], out 0x20 0x20.
COUNT_TICKS = (b"".join(b"\xb0" + bytes([value]) + b"\xe6" + bytes([port]) for port, value in [
                   (0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xFE), (0x43, 0x34), (0x40, 0xA9), (0x40, 0x04)])
               + b"\xb0\x0c\xe6\x20\xe4\x20\x84\xc0\x79\xf6\xff\x05\x00\x30\x00\x00\xb0\x20\xe6\x20\xeb\xea")
SAY_HELLO = b"\xc6\x06\x04\x30\x07" + SPIN           # real mode: mov byte [0x3004], 7


@pytest.fixture
def make_vm():
    vms = []

    def make(code, vcpus=1):
        vms.append(bare_vm(code, vcpus))
        return vms[-1]

    yield make
    for vm in vms:
        vm.close()


def counter(vm):
    return int.from_bytes(vm.memory.read(0x3000, 4), "little")


def wait_for_event(vm):
    ready, _, _ = select.select([vm.power.fd], [], [], 20)
    assert ready, "no power event"
    return vm.power.take()


def test_a_triple_fault_is_a_reset_wish(make_vm):
    vm = make_vm(TRIPLE_FAULT)
    vm.resume()
    event, code = wait_for_event(vm)
    assert (event, code) == (PowerEvent.RESET, 8)
    vm.pause()
    assert vm.vcpus[0].exit_counts() == {"shutdown": 1}


@pytest.mark.parametrize("code", [COUNT, COUNT_PORT], ids=["computing", "doing I/O"])
def test_a_paused_guest_stands_still_and_goes_on(make_vm, code):
    vm = make_vm(code)
    vm.resume()
    for _ in range(20):
        before = counter(vm)
        until(lambda before=before: counter(vm) != before)
        vm.pause()
        stopped = counter(vm)
        assert counter(vm) == stopped
        assert vm.vcpus[0].registers()["rip"] in range(CODE, CODE + len(code))
        vm.resume()


def test_a_guest_finds_no_heap_of_ticks_after_a_pause(make_vm):
    vm = make_vm(COUNT_TICKS)
    vm.resume()
    until(lambda: counter(vm) > 20)
    vm.pause()
    began, before = time.monotonic(), counter(vm)
    time.sleep(1)                                      # it is what the test is about
    vm.resume()
    until(lambda: counter(vm) > before + 20)
    time.sleep(0.1)
    ticks, milliseconds = counter(vm) - before, (time.monotonic() - began - 1) * 1000
    assert ticks < milliseconds + 300, "the timer's 1000 ticks of the pause came all the same"


def test_a_guest_that_goes_on_is_told_that_it_stood_still(make_vm):
    """Its kvmclock went on meanwhile: without that word Linux takes a long pause for a CPU that hung."""
    vm = make_vm(ENABLE_KVMCLOCK + COUNT)
    vm.resume()
    until(lambda: counter(vm) > 0)
    vm.pause()
    assert not vm.memory.read(KVMCLOCK + 29, 1)[0] & 2           # pvclock_vcpu_time_info.flags, PVCLOCK_GUEST_STOPPED
    vm.resume()
    until(lambda: vm.memory.read(KVMCLOCK + 29, 1)[0] & 2)


def test_memory_types_are_saved_restored_and_reset(make_vm):
    vm = make_vm(SET_MEMORY_TYPES + COUNT)
    at_power_on = memory_types(vm)
    vm.resume()
    until(lambda: counter(vm) > 0)
    vm.pause()
    assert memory_types(vm) == [6, 0xC06] != at_power_on
    other = make_vm(COUNT)
    other.restore(vm.save(0), 0)
    assert memory_types(other) == [6, 0xC06]
    vm.reset()
    assert memory_types(vm) == at_power_on


def memory_types(vm):
    """MTRRphysBase0 and MTRRdefType of a paused vCPU."""
    msrs = vm.save(0)["vcpus"][0]["msrs"]
    values = {int.from_bytes(msrs[at:at + 4], "little"): int.from_bytes(msrs[at + 4:at + 12], "little") for at in range(0, len(msrs), 12)}
    return [values[0x200], values[0x2FF]]


def test_port_writes_are_counted_as_exits(make_vm):
    vm = make_vm(COUNT_PORT)
    vm.resume()
    until(lambda: counter(vm) > 10)
    vm.pause()
    assert vm.vcpus[0].exit_counts()["io"] >= counter(vm) > 10


def test_reset_starts_the_guest_again_from_its_entry(make_vm):
    vm = make_vm(COUNT + b"\xcc")
    vm.resume()
    until(lambda: counter(vm) > 0)
    vm.pause()
    vm.memory.write(0x3000, bytes(4))
    vm.reset()
    assert vm.vcpus[0].registers()["cr0"] & 1 == 0
    vm.set_entry(Entry)
    assert vm.vcpus[0].registers()["rip"] == CODE
    vm.resume()
    until(lambda: counter(vm) > 0)


def test_cards_lines_of_the_8259_are_level_triggered_and_stay_so(make_vm):
    def elcr():
        return vm.save()["chips"]["pic_slave"][8 + 14]       # struct kvm_pic_state, behind chip_id and a filler

    vm = make_vm(SPIN)
    assert elcr() == 0
    vm.set_level_triggered()
    vm.keep_initial()
    assert elcr() == 1 << 10 - 8 | 1 << 11 - 8
    vm.reset()
    assert elcr() == 1 << 10 - 8 | 1 << 11 - 8


def test_waiting_vcpus_can_be_paused_and_closed(make_vm):
    vm = make_vm(SPIN, vcpus=4)
    vm.resume()
    vm.pause()
    vm.resume()
    vm.close()
    vm.close()


def test_state_is_saved_in_bytes_and_numbers(make_vm):
    vm = make_vm(SPIN, vcpus=2)
    state = vm.save()
    assert len(state["vcpus"]) == 2
    assert len(state["vcpus"][0]["lapic"]) == 1024


def test_a_vcpu_that_was_woken_and_has_not_run_since_is_saved_awake(make_vm):
    vm = make_vm(WAKE_NEIGHBOUR, vcpus=2)
    sleeper = vm.vcpus.pop()                        # its thread does not start
    vm.resume()
    until(lambda: counter(vm))
    vm.pause()
    vm.vcpus.append(sleeper)
    state = vm.save()
    other = make_vm(SPIN, vcpus=2)
    other.memory.write(0x2000, SAY_HELLO)
    other.restore(state)
    other.resume()
    until(lambda: other.memory.read(0x3004, 1) == b"\x07")


def test_saved_clocks_are_those_of_the_moment_however_long_it_takes(make_vm):
    """Put back as of two hours ago and saved as of one hour ago, kvmclock has gone on for one hour. The TSC, which some KVMs will not
    set, is looked at in tests/guest/test_saved.py."""
    hour = 3600 * 10**9
    now = time.time_ns()
    state = make_vm(SPIN).save()
    other = make_vm(SPIN)
    other.restore(state, now - 2 * hour)
    again = other.save(now - hour)
    assert abs(again["chips"]["clock"] - state["chips"]["clock"] - hour) < 10**9


def vcpu_threads():
    """Of this process; a thread that ends while we look is none of them."""
    found = set()
    for task in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/self/task/{task}/comm").read_text().startswith("vcpu"):
                found.add(task)
    return found


def test_closing_ends_the_threads(make_vm):
    before = vcpu_threads()                         # of the test before, perhaps: the kernel's side of a joined thread ends a moment later
    vm = make_vm(SPIN, vcpus=2)
    vm.resume()
    until(lambda: len(vcpu_threads() - before) == 2)
    vm.close()
    until(lambda: vcpu_threads() <= before)


def test_a_dropped_vm_is_collected_whole():
    vm = Vm(Kvm(), GuestMemory(MIB))
    vm.add_vcpu(vm.kvm.supported_cpuid())
    del vm
    before = len(os.listdir("/proc/self/fd"))
    gc.collect()                                        # VM and vCPU hold each other
    assert len(os.listdir("/proc/self/fd")) < before


def test_a_bus_without_devices_answers_ones(make_vm):
    vm = make_vm(SPIN)
    vm.pio.map(0x10, 4, Device())
    assert vm.pio.read(0x10, 4) == 0xFFFF_FFFF


@pytest.mark.parametrize(("path", "words"), [("/dev/no-kvm", "No such file"), ("/dev/null", "not KVM|lacks|Inappropriate")])
def test_what_is_not_kvm_is_named(path, words):
    with pytest.raises(HostError, match=words):
        Kvm(path)
