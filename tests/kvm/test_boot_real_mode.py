"""Real mode without a BIOS, in a guest on /dev/kvm: services are refused, hardware vectors return, the reset vector resets."""
import select
import struct

import pytest

from kvmapp.boot import real_mode
from kvmapp.boot.entry import protected_mode
from kvmapp.boot.platform import Platform
from kvmapp.boot.topology import Topology
from kvmapp.chardev import CharBackend
from kvmapp.core import Kvm, Vm
from kvmapp.devices import PowerEvent
from kvmapp.hw.debug_port import DebugPort
from kvmapp.hw.reset_control import ResetControl
from kvmapp.layout import PORT_ACPI_RESET, PORT_DEBUG_CONSOLE
from kvmapp.memory import GuestMemory

pytestmark = pytest.mark.kvm

CODE, GDT_POINTER, IVT_POINTER, GDT = 0x1000, 0x2000, 0x2008, 0x2010
GUEST = bytes.fromhex(
    "0f011500200000"                    # lgdt [GDT_POINTER]
    "ea0e1000000800"                    # jmp 8:$+7, a 16-bit segment
    "0f20c0 24fe 0f22c0"                # mov eax, cr0; and al, 0xfe; mov cr0, eax
    "ea1b100000"                        # jmp 0:$+5: real mode
    "31c0 8ed0 bc0070"                  # ss:sp = 0:0x7000
    "2e0f011e0820"                      # lidt [IVT_POINTER]
    "ba0204"                            # mov dx, 0x402
    "f8 cd15 b030 1400 ee"              # clc; int 0x15; out '0' + carry
    "f8 cd08 b030 1400 ee"              # clc; int 8; out '0' + carry
    "ea0000ffff")                       # jmp 0xffff:0


def test_calls_to_a_bios_are_answered_and_its_reset_vector_resets():
    memory = GuestMemory(16 << 20)
    vm = Vm(Kvm(), memory)
    vm.add_vcpu(vm.kvm.supported_cpuid())
    log = CharBackend("log")
    vm.pio.map(PORT_DEBUG_CONSOLE, 1, DebugPort("debug", log))
    vm.pio.map(PORT_ACPI_RESET, 1, ResetControl("reset", vm.power))
    real_mode.write(memory, Platform(Topology(1)))
    memory.write(CODE, GUEST)
    memory.write(GDT_POINTER, struct.pack("<HIxx", 0x17, GDT))
    memory.write(IVT_POINTER, struct.pack("<HI", 0x3FF, 0))
    memory.write(GDT, struct.pack("<3Q", 0, 0x0000_9B00_0000_FFFF, 0x0000_9300_0000_FFFF))
    vm.set_entry(protected_mode(memory, CODE))
    vm.resume()
    ready, _, _ = select.select([vm.power.fd], [], [], 20)
    vm.close()
    assert ready, "the guest did not get to the reset vector"
    assert vm.power.take() == (PowerEvent.RESET, 0)
    assert log.take() == b"10"
