"""One virtual CPU, its thread and its run loop. Follows Documentation/virt/kvm/api.rst.

The thread lives in `Vcpu.loop` without the GIL: through the gate when the machine runs, in KVM_RUN until KVM needs us, one step for
each exit. It leaves KVM_RUN for the gate when it is kicked (signal and immediate_exit) or the guest asked for power-off, reset or the
like (Power). What stands in KVM of a vCPU is saved and restored by vmstate.pyx.
Left out: nested virtualization state, KVM_EXIT_HLT (the irqchip is in the kernel), SMM.
"""
cimport cython
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint16_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from kvmapp.abi cimport kvm as abi
from kvmapp.abi.kvm cimport (KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_OUT,
                             KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, KVM_RUN, kvm_cpuid2, kvm_cpuid_entry2,
                             kvm_regs, kvm_segment, kvm_sregs)
from kvmapp.abi.posix cimport (CLOCK_REALTIME, EAGAIN, EINTR, ETIMEDOUT, MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, SIGRTMIN,
                               SIG_BLOCK, SIG_UNBLOCK, atomic_fence, clock_gettime, close, errno, ioctl, mmap, munmap, own_thread_number,
                               pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_timedwait, pthread_cond_wait,
                               pthread_create, pthread_join, pthread_kill, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
                               pthread_mutex_unlock, pthread_self, pthread_setname_np, pthread_sigmask, sigaction, sigaction_t, sigaddset,
                               sigemptyset, sigfillset, sigset_t, timespec)
from kvmapp.devices cimport CRASH, POWER_OFF, RESET
from kvmapp.iothread cimport monotonic_ns

import os

from kvmapp.errors import HostError

EXIT_NAMES = {
    abi.KVM_EXIT_UNKNOWN: "unknown", abi.KVM_EXIT_EXCEPTION: "exception", abi.KVM_EXIT_IO: "io",
    abi.KVM_EXIT_HYPERCALL: "hypercall", abi.KVM_EXIT_DEBUG: "debug", abi.KVM_EXIT_HLT: "hlt", abi.KVM_EXIT_MMIO: "mmio",
    abi.KVM_EXIT_IRQ_WINDOW_OPEN: "irq_window", abi.KVM_EXIT_SHUTDOWN: "shutdown", abi.KVM_EXIT_FAIL_ENTRY: "fail_entry",
    abi.KVM_EXIT_INTR: "intr", abi.KVM_EXIT_SET_TPR: "set_tpr", abi.KVM_EXIT_TPR_ACCESS: "tpr_access", abi.KVM_EXIT_NMI: "nmi",
    abi.KVM_EXIT_INTERNAL_ERROR: "internal_error", abi.KVM_EXIT_SYSTEM_EVENT: "system_event",
    abi.KVM_EXIT_IOAPIC_EOI: "ioapic_eoi", abi.KVM_EXIT_X86_RDMSR: "rdmsr", abi.KVM_EXIT_X86_WRMSR: "wrmsr",
}

cdef enum:
    PAGE_SIZE = 4096
    CODE_SELECTOR = 0x10                                       # as Linux's boot protocol wants them
    DATA_SELECTOR = 0x18
    CR0_PROTECTED = 0x11                                       # PE, ET
    CR4_PAE = 0x20
    EFER_LME = 0x100
    EFER_LMA = 0x400
    PATIENCE = 20000000                                        # ns until vCPUs that have not come to the gate are kicked again
    SECOND = 1000000000

cdef uint64_t CR0_LONG = 0x80000033                            # PG, NE, ET, MP, PE


cdef class Gate:
    """Where the vCPUs' threads of one machine stand while it does not run."""

    def __cinit__(self):
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.changed, NULL)
        self.wanted = PAUSE
        install_kick()

    def __dealloc__(self):
        pthread_cond_destroy(&self.changed)
        pthread_mutex_destroy(&self.lock)

    cdef void want(self, uint32_t wanted) noexcept nogil:
        """RUN, PAUSE or STOP: the threads at the gate hear it at once, those in the guest when they are kicked."""
        pthread_mutex_lock(&self.lock)
        self.wanted = wanted
        pthread_cond_broadcast(&self.changed)
        pthread_mutex_unlock(&self.lock)

    cdef bint await_all(self) noexcept nogil:
        """Whether no vCPU is in the guest; waits for it, but not for long."""
        cdef timespec deadline
        cdef bint all_stand
        clock_gettime(CLOCK_REALTIME, &deadline)
        deadline.tv_nsec += PATIENCE
        if deadline.tv_nsec >= SECOND:
            deadline.tv_sec, deadline.tv_nsec = deadline.tv_sec + 1, deadline.tv_nsec - SECOND
        pthread_mutex_lock(&self.lock)
        while self.awake > 0 and pthread_cond_timedwait(&self.changed, &self.lock, &deadline) != ETIMEDOUT:
            pass
        all_stand = self.awake == 0
        pthread_mutex_unlock(&self.lock)
        return all_stand


cdef class Vcpu:
    """One virtual CPU and its thread."""

    def __cinit__(self, vm, uint32_t index, uint32_t apic_id):
        """Of a core.Vm, which stands above this room: asked by name, here only. Raises HostError where KVM refuses."""
        self.fd = self.stats_fd = -1
        self.vm = vm
        self.index = index
        self.pio = vm.pio
        self.mmio = vm.mmio
        self.power = vm.power
        self.coalesced = vm.coalesced
        self.gate = vm.gate
        self.fd = ioctl(vm.fd, abi.KVM_CREATE_VCPU, <unsigned long>apic_id)
        if self.fd < 0:
            raise refused(f"vCPU {index} (this host allows {vm.kvm.most_vcpus})")
        self.stats_fd = ioctl(self.fd, abi.KVM_GET_STATS_FD, 0)       # here: later it would wait for the thread
        if self.stats_fd >= 0:
            os.set_inheritable(self.stats_fd, False)
        self.shared_size = vm.kvm.run_size
        shared = mmap(NULL, self.shared_size, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd, 0)
        if shared == MAP_FAILED:
            raise refused("mapping a vCPU's shared page")
        self.shared = <kvm_run*>shared
        cdef size_t page = vm.kvm.capability(abi.KVM_CAP_COALESCED_MMIO)
        if page:                                               # one ring for all vCPUs, in each one's shared pages
            self.coalesced.ring = <abi.kvm_coalesced_mmio_ring*>(<uint8_t*>self.shared + page * PAGE_SIZE)

    def __dealloc__(self):
        if self.shared != NULL:
            munmap(self.shared, self.shared_size)      # self.vm may be gone: the two hold each other
        for fd in (self.stats_fd, self.fd):
            if fd >= 0:
                close(fd)

    def set_cpuid(self, leaves):
        """KVM_SET_CPUID2. Raises HostError."""
        cdef kvm_cpuid2* table = <kvm_cpuid2*>calloc(1, sizeof(kvm_cpuid2) + len(leaves) * sizeof(kvm_cpuid_entry2))
        cdef kvm_cpuid_entry2* entry
        if table == NULL:
            raise MemoryError()
        try:
            table.nent = len(leaves)
            for i, leaf in enumerate(leaves):
                entry = &table.entries[i]
                entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx = leaf
            if ioctl(self.fd, abi.KVM_SET_CPUID2, table) < 0:
                raise refused("these CPUID leaves")
        finally:
            free(table)

    def set_entry(self, entry):
        """Registers for a direct boot, 'long' (64-bit, paging on) or 'protected' (32-bit, flat); 'real' stays at the reset vector."""
        cdef kvm_regs registers
        cdef kvm_sregs system
        if entry.mode == "real":
            return
        if ioctl(self.fd, abi.KVM_GET_SREGS, &system) < 0:
            raise refused("reading registers")
        is_long = entry.mode == "long"
        set_flat(&system.cs, CODE_SELECTOR, 0xB, is_long)
        set_flat(&system.ds, DATA_SELECTOR, 0x3, False)
        system.es = system.fs = system.gs = system.ss = system.ds
        system.gdt.base = entry.gdt_base
        system.gdt.limit = entry.gdt_limit
        system.cr0 = CR0_LONG if is_long else CR0_PROTECTED
        if is_long:
            system.cr3 = entry.cr3
            system.cr4 = CR4_PAE
            system.efer = EFER_LME | EFER_LMA
        if ioctl(self.fd, abi.KVM_SET_SREGS, &system) < 0:
            raise refused("the boot vCPU's segments")
        memset(&registers, 0, sizeof(registers))
        registers.rflags = 2
        registers.rip, registers.rsp = entry.rip, entry.rsp
        registers.rax, registers.rbx, registers.rcx, registers.rdx = entry.rax, entry.rbx, entry.rcx, entry.rdx
        registers.rsi, registers.rdi = entry.rsi, entry.rdi
        if ioctl(self.fd, abi.KVM_SET_REGS, &registers) < 0:
            raise refused("the boot vCPU's registers")

    def registers(self):
        """General and system registers of a paused vCPU, {name: int}, for the log of a crash. Raises HostError."""
        cdef kvm_regs general
        cdef kvm_sregs system
        if ioctl(self.fd, abi.KVM_GET_REGS, &general) < 0 or ioctl(self.fd, abi.KVM_GET_SREGS, &system) < 0:
            raise refused("reading registers")
        values = dict(general)
        values.update(cs=system.cs.selector, ss=system.ss.selector, cr0=system.cr0, cr2=system.cr2, cr3=system.cr3,
                      cr4=system.cr4, efer=system.efer)
        return values

    def exit_counts(self):
        """{exit reason: how often the guest left for user space because of it}."""
        return {EXIT_NAMES.get(reason, str(reason)): self.exits[reason] for reason in range(EXIT_REASONS) if self.exits[reason]}

    @property
    def thread_number(self):
        """The kernel's number of the thread (gettid), 0 before `start`."""
        return self.native

    def failure_text(self):
        """Why KVM could not go on with this vCPU (after a CRASH): for the log."""
        cdef uint32_t reason = self.shared.exit_reason
        if self.failure:
            return f"KVM_RUN: {os.strerror(self.failure)}"
        if reason == KVM_EXIT_INTERNAL_ERROR:
            data = [f"{self.shared.internal.data[i]:#x}" for i in range(min(16, self.shared.internal.ndata))]
            return f"KVM internal error, suberror {self.shared.internal.suberror}, data {' '.join(data) or 'none'}"
        if reason == KVM_EXIT_FAIL_ENTRY:
            return f"the CPU refuses to enter the guest, reason {self.shared.fail_entry.hardware_entry_failure_reason:#x}"
        return f"exit '{EXIT_NAMES.get(reason, reason)}'"

    def start(self):
        """Starts the thread; a second call does nothing. Raises HostError."""
        if self.started:
            return
        Py_INCREF(self)                                        # the thread's
        result = pthread_create(&self.thread_id, NULL, vcpu_thread, <void*>self)
        if result:
            Py_DECREF(self)
            raise HostError(f"Cannot start the thread of vCPU {self.index}: {os.strerror(result)}", "see ulimit -u and pids.max")
        self.started = True

    def join(self):
        """Waits for the thread's end (after Vm.close)."""
        if self.started:
            with nogil:
                pthread_join(self.thread_id, NULL)
            self.started = False
            Py_DECREF(self)

    cdef void run(self) noexcept nogil:
        """The thread's body. Only the kick signal reaches it."""
        cdef sigset_t signals
        cdef char name[16]
        sigfillset(&signals)
        pthread_sigmask(SIG_BLOCK, &signals, NULL)
        sigemptyset(&signals)
        sigaddset(&signals, SIGRTMIN)
        pthread_sigmask(SIG_UNBLOCK, &signals, NULL)
        snprintf(name, sizeof(name), b"vcpu %u", self.index)
        pthread_setname_np(pthread_self(), name)
        self.native = own_thread_number()
        self.loop()

    cdef void loop(self) noexcept nogil:
        """Once round the gate, once into the guest, until the machine stops."""
        pthread_mutex_lock(&self.gate.lock)
        self.running = True
        pthread_mutex_unlock(&self.gate.lock)
        while self.pass_gate():
            if self.first_entry or self.enter_first():
                self.enter()
        pthread_mutex_lock(&self.gate.lock)
        self.running = False
        pthread_mutex_unlock(&self.gate.lock)

    cdef bint pass_gate(self) noexcept nogil:
        """Waits here while the machine is paused or an event of the guest waits to be handled; False when the machine stops."""
        cdef bint go
        pthread_mutex_lock(&self.gate.lock)
        if self.inside:
            self.inside = False
            self.gate.awake = self.gate.awake - 1
            pthread_cond_broadcast(&self.gate.changed)
        while self.gate.wanted == PAUSE or (self.gate.wanted == RUN and self.power.pending()):
            pthread_cond_wait(&self.gate.changed, &self.gate.lock)
        go = self.gate.wanted == RUN
        if go:
            self.inside = True
            self.gate.awake = self.gate.awake + 1
            self.shared.immediate_exit = 0
        pthread_mutex_unlock(&self.gate.lock)
        return go

    cdef bint enter_first(self) noexcept nogil:
        """The thread's first KVM_RUN, with the time before and after it: here, so that no later exit has to ask."""
        cdef int result
        self.first_entry = monotonic_ns()
        result = ioctl(self.fd, KVM_RUN, 0)
        self.first_exit = monotonic_ns()
        return self.handle_exit(result)

    cdef void enter(self) noexcept nogil:
        """Runs the guest until it is kicked or asks for an event. With immediate_exit set, KVM_RUN only completes the access
        that the last exit began, so nothing is half done when this returns."""
        while self.gate.wanted != STOP and self.handle_exit(ioctl(self.fd, KVM_RUN, 0)):
            pass

    @cython.final
    cdef bint handle_exit(self, int result) noexcept nogil:
        """What KVM_RUN came back for; False when the thread is to go to the gate."""
        cdef uint32_t reason
        if result < 0:
            if errno != EINTR and errno != EAGAIN:
                self.failure = errno
                self.power.request(CRASH, KVM_EXIT_INTERNAL_ERROR)
            return False
        self.coalesced.drain()
        reason = self.shared.exit_reason
        if reason == KVM_EXIT_IO:
            self.handle_io()
        elif reason == KVM_EXIT_MMIO:
            self.handle_mmio()
        else:
            self.handle_rare(reason)
        self.exits[reason if reason < EXIT_REASONS else EXIT_REASONS - 1] += 1
        if self.power.pending():
            self.shared.immediate_exit = 1
        return True

    cdef void handle_io(self) noexcept nogil:
        """IN and OUT, and their string forms (`count` items one after the other)."""
        cdef uint8_t* data = <uint8_t*>self.shared + self.shared.io.data_offset
        cdef uint32_t size = self.shared.io.size
        cdef uint16_t port = self.shared.io.port
        cdef bint is_out = self.shared.io.direction == KVM_EXIT_IO_OUT
        cdef uint64_t value
        cdef uint32_t i
        for i in range(self.shared.io.count):
            if is_out:
                value = 0
                memcpy(&value, data, size)
                self.pio.store(port, size, value)
            else:
                value = self.pio.load(port, size)
                memcpy(data, &value, size)
            data += size

    cdef void handle_mmio(self) noexcept nogil:
        """A load or store of 1 to 8 bytes; odd lengths (an access over a page's edge) go byte by byte."""
        cdef uint64_t address = self.shared.mmio.phys_addr
        cdef uint32_t size = self.shared.mmio.len
        cdef uint32_t step = size if size & (size - 1) == 0 else 1
        cdef uint32_t done = 0
        cdef uint64_t value
        while done < size:
            if self.shared.mmio.is_write:
                value = 0
                memcpy(&value, &self.shared.mmio.data[done], step)
                self.mmio.store(address + done, step, value)
            else:
                value = self.mmio.load(address + done, step)
                memcpy(&self.shared.mmio.data[done], &value, step)
            done += step

    cdef void handle_rare(self, uint32_t reason) noexcept nogil:
        """Exits that end the guest's run one way or another."""
        cdef uint32_t event
        if reason == KVM_EXIT_INTR:
            return
        if reason == KVM_EXIT_SHUTDOWN:
            self.power.request(RESET, KVM_EXIT_SHUTDOWN)               # triple fault
        elif reason == KVM_EXIT_SYSTEM_EVENT:
            event = self.shared.system_event.type
            if event == abi.KVM_SYSTEM_EVENT_SHUTDOWN:
                self.power.request(POWER_OFF, reason)
            elif event == abi.KVM_SYSTEM_EVENT_RESET:
                self.power.request(RESET, reason)
            else:
                self.power.request(CRASH, reason)
        else:
            self.power.request(CRASH, reason)

    cdef void kick(self) noexcept nogil:
        """Makes the thread leave the guest soon. A kick that comes before KVM_RUN is not lost: immediate_exit stays set."""
        pthread_mutex_lock(&self.gate.lock)
        self.shared.immediate_exit = 1
        atomic_fence()
        if self.running:
            pthread_kill(self.thread_id, SIGRTMIN)
        pthread_mutex_unlock(&self.gate.lock)


cdef void* vcpu_thread(void* vcpu) noexcept nogil:
    (<Vcpu>vcpu).run()
    return NULL


cdef void set_flat(kvm_segment* segment, uint16_t selector, uint8_t kind, bint is_long) noexcept:
    """A present, accessed, ring-0 segment over all 4 GiB (SDM vol. 3, 3.4.5)."""
    memset(segment, 0, sizeof(kvm_segment))
    segment.limit = 0xFFFFFFFF
    segment.selector = selector
    segment.type = kind
    segment.present = 1
    segment.s = 1
    segment.g = 1
    segment.l = is_long  # no-cython-lint
    segment.db = not is_long


cdef void ignore_kick(int signal) noexcept nogil:
    """The signal's only work is to interrupt KVM_RUN."""


cdef int install_kick() except -1:
    cdef sigaction_t action
    memset(&action, 0, sizeof(action))
    action.sa_handler = ignore_kick
    if sigaction(SIGRTMIN, &action, NULL) < 0:
        raise OSError(errno, "sigaction")
    return 0


cdef object refused(str what):
    code = errno
    return HostError(f"KVM refuses {what}: {os.strerror(code)}")
