"""The machine's heart: /dev/kvm, and one VM with its vCPUs (vcpu.pyx). Follows Documentation/virt/kvm/api.rst.

    kvm = Kvm()
    vm = Vm(kvm, memory)
    vm.add_vcpu(cpuid)           # for each vCPU
    vm.pio.map(...)              # devices: machine.py
    vm.set_entry(entry)          # boot/
    vm.resume() ... vm.pause() ... vm.close()

Control methods (resume, pause, reset, close) belong to one control thread.
"""
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from kvmapp.abi cimport kvm as abi
from kvmapp.abi.kvm cimport kvm_cpuid2, kvm_cpuid_entry2, kvm_pit_config, kvm_reinject_control, kvm_userspace_memory_region
from kvmapp.abi.posix cimport EINTR, close, errno, ioctl
from kvmapp.vcpu cimport PAUSE, RUN, STOP, Vcpu, refused
from kvmapp.vmstate cimport msr_indexes, restore_vcpu, restore_vm, save_vcpu, save_vm, set_level_triggered, tell_stopped

import os

from kvmapp.errors import HostError
from kvmapp.layout import GSI_INTX, IDENTITY_MAP_BASE, TSS_BASE
from kvmapp.state import StateError, StateReader

REQUIRED = {
    "KVM_CAP_IRQCHIP": abi.KVM_CAP_IRQCHIP,
    "KVM_CAP_USER_MEMORY": abi.KVM_CAP_USER_MEMORY,
    "KVM_CAP_SET_TSS_ADDR": abi.KVM_CAP_SET_TSS_ADDR,
    "KVM_CAP_EXT_CPUID": abi.KVM_CAP_EXT_CPUID,
    "KVM_CAP_PIT2": abi.KVM_CAP_PIT2,
    "KVM_CAP_IRQ_ROUTING": abi.KVM_CAP_IRQ_ROUTING,
    "KVM_CAP_IRQFD": abi.KVM_CAP_IRQFD,
    "KVM_CAP_IOEVENTFD": abi.KVM_CAP_IOEVENTFD,
    "KVM_CAP_IMMEDIATE_EXIT": abi.KVM_CAP_IMMEDIATE_EXIT,
}


cdef class Kvm:
    """The host's /dev/kvm: capabilities are asked, never assumed."""

    def __cinit__(self, path="/dev/kvm"):
        """Raises HostError, with what to mend, where KVM is absent, forbidden or too old."""
        self.fd = -1
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise HostError(f"Cannot open {path}: No such file or directory",
                            "load the module (modprobe kvm_intel, or kvm_amd) and enable virtualization in the BIOS; "
                            "kvmapp check tells more") from None
        except PermissionError:
            raise HostError(f"Cannot open {path}: Permission denied", "run as root, or as a member of the group kvm") from None
        except OSError as error:
            raise HostError(f"Cannot open {path}: {error.strerror}", "kvmapp check tells what this host lacks") from None
        version = ioctl(self.fd, abi.KVM_GET_API_VERSION, 0)
        if version != abi.KVM_API_VERSION:
            raise HostError(f"{path} is not KVM (API version {version}, wanted {abi.KVM_API_VERSION})")
        lacking = [name for name, number in REQUIRED.items() if not self.capability(number)]
        if lacking:
            raise HostError(f"KVM of this host lacks {', '.join(lacking)}", "a kernel of CentOS 7's level or later has them")
        self.run_size = ioctl(self.fd, abi.KVM_GET_VCPU_MMAP_SIZE, 0)

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    def capability(self, long number):
        """KVM_CHECK_EXTENSION: 0 where the host lacks it, else 1 or a limit."""
        return max(0, ioctl(self.fd, abi.KVM_CHECK_EXTENSION, number))

    @property
    def most_vcpus(self):
        return self.capability(abi.KVM_CAP_MAX_VCPUS) or self.capability(abi.KVM_CAP_NR_VCPUS) or 4

    @property
    def interprets(self):
        """Whether this KVM interprets guest code: it is there although the CPU shows neither VMX nor SVM."""
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("flags"):
                    return not {"vmx", "svm"} & set(line.split())
        return False

    @property
    def has_tsc_deadline(self):
        return bool(self.capability(abi.KVM_CAP_TSC_DEADLINE_TIMER))

    def supported_cpuid(self):
        """[(function, index, flags, eax, ebx, ecx, edx)] that KVM can show a guest on this host. Raises HostError."""
        cdef uint32_t room = 256
        cdef kvm_cpuid2* table = <kvm_cpuid2*>calloc(1, sizeof(kvm_cpuid2) + room * sizeof(kvm_cpuid_entry2))
        cdef kvm_cpuid_entry2* entry
        if table == NULL:
            raise MemoryError()
        try:
            table.nent = room
            if ioctl(self.fd, abi.KVM_GET_SUPPORTED_CPUID, table) < 0:
                raise HostError(f"KVM_GET_SUPPORTED_CPUID: {os.strerror(errno)}")
            leaves = []
            for i in range(table.nent):
                entry = &table.entries[i]
                leaves.append((entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx))
            return leaves
        finally:
            free(table)


cdef class Vm:
    """One virtual machine without devices: memory, interrupt chips, two buses, vCPUs."""

    def __cinit__(self, Kvm kvm not None, GuestMemory memory not None):
        """Raises HostError where KVM refuses a part."""
        self.kvm = kvm
        self.memory = memory
        self.vcpus = []
        self.fd = ioctl(kvm.fd, abi.KVM_CREATE_VM, 0)
        while self.fd < 0 and errno == EINTR:           # as KVM has it where a signal comes in between
            self.fd = ioctl(kvm.fd, abi.KVM_CREATE_VM, 0)
        if self.fd < 0:
            raise refused("creating a VM")
        self.request("KVM_SET_TSS_ADDR", abi.KVM_SET_TSS_ADDR, TSS_BASE)
        cdef uint64_t identity_map = IDENTITY_MAP_BASE
        if ioctl(self.fd, abi.KVM_SET_IDENTITY_MAP_ADDR, &identity_map) < 0:
            raise refused("KVM_SET_IDENTITY_MAP_ADDR")
        self.request("KVM_CREATE_IRQCHIP", abi.KVM_CREATE_IRQCHIP, 0)
        cdef kvm_pit_config pit
        memset(&pit, 0, sizeof(pit))
        pit.flags = abi.KVM_PIT_SPEAKER_DUMMY
        if ioctl(self.fd, abi.KVM_CREATE_PIT2, &pit) < 0:
            raise refused("KVM_CREATE_PIT2")
        for slot in range(memory.count):
            self.set_memslot(slot, memory.regions[slot].gpa, memory.regions[slot].size, <uint64_t>memory.regions[slot].hva, 0)
        self.interrupts = KvmInterrupts(self.fd)
        self.pio = Bus("pio", vm_fd=self.fd)
        self.mmio = Bus("mmio", vm_fd=self.fd)
        self.coalesced = CoalescedRing(self.pio, self.mmio)
        self.power = Power()
        self.gate = Gate()

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    def request(self, name, unsigned long number, unsigned long argument):
        """A VM ioctl with a plain argument. Raises HostError."""
        if ioctl(self.fd, number, argument) < 0:
            raise refused(name)

    def set_memslot(self, uint32_t slot, uint64_t gpa, uint64_t size, uint64_t hva, uint32_t flags):
        """KVM_SET_USER_MEMORY_REGION. Raises HostError."""
        cdef kvm_userspace_memory_region region
        region.slot = slot
        region.flags = flags
        region.guest_phys_addr = gpa
        region.memory_size = size
        region.userspace_addr = hva
        if ioctl(self.fd, abi.KVM_SET_USER_MEMORY_REGION, &region) < 0:
            raise refused(f"{size >> 20} MiB of guest memory at {gpa:#x}")

    def add_vcpu(self, cpuid, apic_id=None):
        """The next vCPU, which shows `cpuid` ([(function, index, flags, eax, ebx, ecx, edx)]). Raises HostError."""
        index = len(self.vcpus)
        vcpu = Vcpu(self, index, index if apic_id is None else apic_id)
        vcpu.set_cpuid(cpuid)
        self.vcpus.append(vcpu)
        return vcpu

    def coalesce_port(self, uint32_t port, uint32_t size):
        """Lets the guest go on after a store to these ports, which takes effect before the next exit; where KVM can do that."""
        if self.kvm.capability(abi.KVM_CAP_COALESCED_PIO):
            self.coalesced.add(self.fd, port, size, True)

    def uncoalesce_port(self, uint32_t port, uint32_t size):
        """Each store to these ports is an exit again."""
        self.coalesced.remove(self.fd, port, size, True)

    def coalesce_memory(self, uint64_t address, uint32_t size):
        """The same for stores to these addresses outside of RAM."""
        self.coalesced.add(self.fd, address, size, False)

    def set_entry(self, entry):
        """Where the boot vCPU starts (boot.entry.EntryState); the others wait for INIT and SIPI."""
        self.vcpus[0].set_entry(entry)

    def set_level_triggered(self):
        """For guests that use the 8259: cards share a line, so it asks until it falls. Firmware sets this elsewhere. Before
        `keep_initial`. Raises HostError."""
        set_level_triggered(self.fd, GSI_INTX)

    def keep_initial(self):
        """Remembers the power-on state for `reset`: call it once, before `set_entry`."""
        indexes = msr_indexes(self.kvm.fd)
        self.initial = save_vm(self.fd), [save_vcpu((<Vcpu>vcpu).fd, indexes) for vcpu in self.vcpus]

    def reset(self):
        """Interrupt chips, PIT and vCPUs back to power-on; the VM must be paused. Devices and memory are their owners' matter."""
        chips, vcpus = self.initial
        for vcpu, state in zip(self.vcpus, vcpus):
            restore_vcpu((<Vcpu>vcpu).fd, state)
            (<Vcpu>vcpu).failure = 0
        restore_vm(self.fd, chips)

    def save(self, uint64_t moment=0):
        """The state that lives in KVM, clocks as of the moment (vmstate.pyx); the VM must be paused. Raises HostError."""
        indexes = msr_indexes(self.kvm.fd)
        return {"version": 1, "chips": save_vm(self.fd, moment),
                "vcpus": [save_vcpu((<Vcpu>vcpu).fd, indexes, moment) for vcpu in self.vcpus]}

    def restore(self, dict state not None, uint64_t moment=0, uint64_t components=UINT64_MAX):
        """Puts back what `save` gave, with clocks that went on since the moment; devices come before. `components`: the XSAVE state
        components that the guest can have. False: this host cannot run the guest's TSC at the rate it had. Raises StateError, HostError."""
        reader = StateReader("kvm", state, version=1)
        chips, vcpus = reader.take("chips", dict), reader.take("vcpus", list)
        reader.done()
        if len(vcpus) != len(self.vcpus) or not all(isinstance(saved, dict) for saved in vcpus):
            raise StateError(f"kvm: 'vcpus' does not hold {len(self.vcpus)} vCPUs")
        drifts = 0
        for vcpu, saved in zip(self.vcpus, vcpus):
            drifts |= restore_vcpu((<Vcpu>vcpu).fd, saved, moment, components)
        restore_vm(self.fd, chips, moment)                     # after the LAPICs, into which the I/O APIC may send at once
        return not drifts

    def resume(self):
        """Lets the vCPUs run; the first time it starts their threads."""
        self.keep_ticks(True)
        if self.gate.wanted == PAUSE:                          # one that runs would not listen
            for vcpu in self.vcpus:
                tell_stopped((<Vcpu>vcpu).fd)
        with nogil:
            self.gate.want(RUN)
        for vcpu in self.vcpus:
            vcpu.start()

    def pause(self):
        """Returns when every vCPU stands at the gate with no access half done."""
        self.drive(PAUSE)
        self.keep_ticks(False)

    def keep_ticks(self, bint keep):
        """Whether KVM keeps the PIT's ticks that the guest has not taken yet (8254 in Linux's i8254.c): the timer runs on while the guest
        stands still, and a night of ticks would come down on it one after the other. Kernels that cannot do it keep all."""
        cdef kvm_reinject_control control
        memset(&control, 0, sizeof(control))
        control.pit_reinject = keep
        ioctl(self.fd, abi.KVM_REINJECT_CONTROL, &control)

    def close(self):
        """Ends the vCPU threads. The VM cannot run again; a second call does nothing."""
        self.drive(STOP)
        for vcpu in self.vcpus:
            vcpu.join()

    def drive(self, uint32_t wanted):
        """Makes every vCPU see `wanted`, and returns when none is in the guest."""
        cdef bint all_stand = False
        with nogil:
            self.gate.want(wanted)
        while not all_stand:           # before Linux 4.14 a vCPU that waits for its INIT does not look whether it was kicked as it went
            for vcpu in self.vcpus:
                (<Vcpu>vcpu).kick()
            with nogil:
                all_stand = self.gate.await_all()
        with nogil:
            self.coalesced.drain()
