# The kernel's KVM interface (linux/kvm.h, Documentation/virt/kvm/api.rst): what kvmapp uses of it, names verbatim.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "linux/kvm.h" nogil:
    int KVM_API_VERSION

    # system, vm and vcpu requests
    unsigned long KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_CHECK_EXTENSION, KVM_GET_VCPU_MMAP_SIZE
    unsigned long KVM_GET_SUPPORTED_CPUID, KVM_GET_MSR_INDEX_LIST
    unsigned long KVM_SET_USER_MEMORY_REGION, KVM_GET_DIRTY_LOG, KVM_CREATE_VCPU, KVM_SET_TSS_ADDR
    unsigned long KVM_SET_IDENTITY_MAP_ADDR, KVM_CREATE_IRQCHIP, KVM_IRQ_LINE, KVM_SET_GSI_ROUTING
    unsigned long KVM_IRQFD, KVM_IOEVENTFD, KVM_CREATE_PIT2, KVM_SIGNAL_MSI
    unsigned long KVM_GET_IRQCHIP, KVM_SET_IRQCHIP, KVM_GET_PIT2, KVM_SET_PIT2, KVM_GET_CLOCK, KVM_SET_CLOCK
    unsigned long KVM_REGISTER_COALESCED_MMIO, KVM_UNREGISTER_COALESCED_MMIO, KVM_ENABLE_CAP
    unsigned long KVM_RUN, KVM_GET_REGS, KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS, KVM_SET_CPUID2
    unsigned long KVM_GET_MSRS, KVM_SET_MSRS, KVM_GET_FPU, KVM_SET_FPU, KVM_GET_LAPIC, KVM_SET_LAPIC
    unsigned long KVM_GET_MP_STATE, KVM_SET_MP_STATE, KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS
    unsigned long KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, KVM_GET_XSAVE, KVM_SET_XSAVE, KVM_GET_XCRS, KVM_SET_XCRS
    unsigned long KVM_SET_SIGNAL_MASK, KVM_KVMCLOCK_CTRL, KVM_GET_TSC_KHZ, KVM_SET_TSC_KHZ, KVM_GET_STATS_FD
    unsigned long KVM_NMI, KVM_SMI, KVM_REINJECT_CONTROL

    # capabilities
    int KVM_CAP_IRQCHIP, KVM_CAP_USER_MEMORY, KVM_CAP_SET_TSS_ADDR, KVM_CAP_EXT_CPUID, KVM_CAP_NR_VCPUS
    int KVM_CAP_MAX_VCPUS, KVM_CAP_NR_MEMSLOTS, KVM_CAP_PIT2, KVM_CAP_IRQ_ROUTING, KVM_CAP_IRQFD, KVM_CAP_IOEVENTFD
    int KVM_CAP_SET_IDENTITY_MAP_ADDR, KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_SIGNAL_MSI, KVM_CAP_TSC_DEADLINE_TIMER
    int KVM_CAP_COALESCED_PIO, KVM_CAP_BINARY_STATS_FD, KVM_CAP_XSAVE, KVM_CAP_XSAVE2, KVM_CAP_XCRS, KVM_CAP_VCPU_EVENTS
    int KVM_CAP_ADJUST_CLOCK, KVM_CAP_READONLY_MEM, KVM_CAP_MP_STATE, KVM_CAP_DEBUGREGS, KVM_CAP_TSC_CONTROL
    int KVM_CAP_COALESCED_MMIO, KVM_CAP_DIRTY_LOG_RING, KVM_CAP_KVMCLOCK_CTRL, KVM_CAP_SYNC_REGS, KVM_CAP_IOEVENTFD_NO_LENGTH

    # exits
    enum:
        KVM_EXIT_UNKNOWN, KVM_EXIT_EXCEPTION, KVM_EXIT_IO, KVM_EXIT_HYPERCALL, KVM_EXIT_DEBUG, KVM_EXIT_HLT
        KVM_EXIT_MMIO, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_SHUTDOWN, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTR
        KVM_EXIT_SET_TPR, KVM_EXIT_TPR_ACCESS, KVM_EXIT_NMI, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_SYSTEM_EVENT
        KVM_EXIT_IOAPIC_EOI, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR
        KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT
        KVM_SYSTEM_EVENT_SHUTDOWN, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_CRASH
        KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX, KVM_INTERNAL_ERROR_DELIVERY_EV

    # flags and states
    enum:
        KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
        KVM_IOEVENTFD_FLAG_DATAMATCH, KVM_IOEVENTFD_FLAG_PIO, KVM_IOEVENTFD_FLAG_DEASSIGN
        KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE
        KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI
        KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC
        KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_HALTED
        KVM_MP_STATE_SIPI_RECEIVED
        KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        KVM_PIT_SPEAKER_DUMMY

    struct kvm_reinject_control:
        uint8_t pit_reinject

    struct kvm_userspace_memory_region:
        uint32_t slot
        uint32_t flags
        uint64_t guest_phys_addr
        uint64_t memory_size
        uint64_t userspace_addr

    struct kvm_dirty_log:
        uint32_t slot
        void* dirty_bitmap

    struct kvm_pit_config:
        uint32_t flags

    struct kvm_irq_level:
        uint32_t irq
        uint32_t level

    struct kvm_msi:
        uint32_t address_lo
        uint32_t address_hi
        uint32_t data
        uint32_t flags

    struct kvm_irqfd:
        uint32_t fd
        uint32_t gsi
        uint32_t flags
        uint32_t resamplefd

    struct kvm_ioeventfd:
        uint64_t datamatch
        uint64_t addr
        uint32_t len
        int32_t fd
        uint32_t flags

    struct kvm_irq_routing_irqchip:
        uint32_t irqchip
        uint32_t pin

    struct kvm_irq_routing_msi:
        uint32_t address_lo
        uint32_t address_hi
        uint32_t data

    union kvm_irq_routing_u:
        kvm_irq_routing_irqchip irqchip
        kvm_irq_routing_msi msi

    struct kvm_irq_routing_entry:
        uint32_t gsi
        uint32_t type
        uint32_t flags
        kvm_irq_routing_u u

    struct kvm_irq_routing:
        uint32_t nr
        uint32_t flags
        kvm_irq_routing_entry entries[0]

    struct kvm_cpuid_entry2:
        uint32_t function
        uint32_t index
        uint32_t flags
        uint32_t eax
        uint32_t ebx
        uint32_t ecx
        uint32_t edx

    struct kvm_cpuid2:
        uint32_t nent
        kvm_cpuid_entry2 entries[0]

    struct kvm_regs:
        uint64_t rax, rbx, rcx, rdx
        uint64_t rsi, rdi, rsp, rbp
        uint64_t r8, r9, r10, r11
        uint64_t r12, r13, r14, r15
        uint64_t rip, rflags

    struct kvm_segment:
        uint64_t base
        uint32_t limit
        uint16_t selector
        uint8_t type
        uint8_t present, dpl, db, s, l, g, avl
        uint8_t unusable

    struct kvm_dtable:
        uint64_t base
        uint16_t limit

    struct kvm_sregs:
        kvm_segment cs, ds, es, fs, gs, ss
        kvm_segment tr, ldt
        kvm_dtable gdt, idt
        uint64_t cr0, cr2, cr3, cr4, cr8
        uint64_t efer
        uint64_t apic_base
        uint64_t interrupt_bitmap[4]

    struct kvm_mp_state:
        uint32_t mp_state

    struct kvm_msr_entry:
        uint32_t index
        uint64_t data

    struct kvm_msrs:
        uint32_t nmsrs
        kvm_msr_entry entries[0]

    struct kvm_coalesced_mmio_zone:
        uint64_t addr
        uint32_t size
        uint32_t pio

    struct kvm_coalesced_mmio:
        uint64_t phys_addr
        uint32_t len
        uint32_t pio
        uint8_t data[8]

    struct kvm_coalesced_mmio_ring:
        uint32_t first
        uint32_t last
        kvm_coalesced_mmio coalesced_mmio[0]

    struct kvm_msr_list:
        uint32_t nmsrs
        uint32_t indices[0]

    # Saved and restored as whole blocks of bytes.
    struct kvm_xsave:
        pass
    struct kvm_xcrs:
        pass
    struct kvm_fpu:
        pass
    struct kvm_lapic_state:
        pass
    struct kvm_vcpu_events:
        pass
    struct kvm_debugregs:
        pass
    struct kvm_pit_state2:
        pass
    struct kvm_clock_data:
        uint64_t clock
        uint32_t flags
    struct kvm_pic_state:
        uint8_t elcr

    union kvm_irqchip_state:         # C knows it by its member's name only
        kvm_pic_state pic

    struct kvm_irqchip:
        uint32_t chip_id
        kvm_irqchip_state chip

    # The members of kvm_run's unnamed union; C knows them by member name only, never by these type names.
    struct kvm_run_io:
        uint8_t direction
        uint8_t size
        uint16_t port
        uint32_t count
        uint64_t data_offset

    struct kvm_run_mmio:
        uint64_t phys_addr
        uint8_t data[8]
        uint32_t len
        uint8_t is_write

    struct kvm_run_hw:
        uint64_t hardware_exit_reason

    struct kvm_run_fail_entry:
        uint64_t hardware_entry_failure_reason

    struct kvm_run_internal:
        uint32_t suberror
        uint32_t ndata
        uint64_t data[16]

    struct kvm_run_system_event:
        uint32_t type

    struct kvm_run:
        uint8_t request_interrupt_window
        uint8_t immediate_exit
        uint32_t exit_reason
        uint8_t ready_for_interrupt_injection
        uint8_t if_flag
        kvm_run_io io
        kvm_run_mmio mmio
        kvm_run_hw hw
        kvm_run_fail_entry fail_entry
        kvm_run_internal internal
        kvm_run_system_event system_event
