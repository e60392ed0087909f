"""VMs on /dev/kvm without devices or a kernel: 16 MiB, and a few bytes of code that run in protected mode."""
from kvmapp.core import Kvm, Vm
from kvmapp.memory import GuestMemory

CODE = 0x1000


class Entry:
    mode, rip, rsp = "protected", CODE, 0x8000
    rax = rbx = rcx = rdx = rsi = rdi = cr3 = gdt_base = gdt_limit = 0


def bare_vm(code, vcpus=1):
    memory = GuestMemory(16 << 20)
    memory.write(CODE, code)
    vm = Vm(Kvm(), memory)
    for _ in range(vcpus):
        vm.add_vcpu(vm.kvm.supported_cpuid())
    vm.keep_initial()
    vm.set_entry(Entry)
    return vm
