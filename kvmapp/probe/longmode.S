/*
 * 64-bit mode, from 32-bit protected mode and back (SDM 3A 9.8.5), with interrupts off throughout.
 * u32 run_in_long_mode(u32 page_tables, void (*code)(void)): calls `code` in 64-bit ring 0; returns its EAX.
 */
        .set CR0_PG, 0x80000000
        .set CR4_PAE, 0x20
        .set EFER, 0xC0000080
        .set EFER_LME, 0x100

        .text
        .globl run_in_long_mode
run_in_long_mode:
        push %ebx
        push %esi
        push %edi
        push %ebp
        mov 24(%esp), %ebp                      /* code */
        mov 20(%esp), %eax                      /* page tables */
        mov %eax, %cr3
        mov %cr4, %eax
        or $CR4_PAE, %eax
        mov %eax, %cr4
        mov $EFER, %ecx
        rdmsr
        or $EFER_LME, %eax
        wrmsr
        mov %cr0, %eax
        or $CR0_PG, %eax
        mov %eax, %cr0
        ljmp $0x18, $1f
        .code64
1:      mov %ebp, %ebp                          /* the upper halves are undefined on entry */
        mov %esp, %esp
        call *%rbp
        mov %eax, %esi
        ljmp *back_to_32(%rip)
        .code32
2:      mov %cr0, %eax
        and $~CR0_PG, %eax
        mov %eax, %cr0
        mov $EFER, %ecx
        rdmsr
        and $~EFER_LME, %eax
        wrmsr
        mov %cr4, %eax
        and $~CR4_PAE, %eax
        mov %eax, %cr4
        mov %esi, %eax
        pop %ebp
        pop %edi
        pop %esi
        pop %ebx
        ret

        .section .rodata
back_to_32:
        .long 2b
        .word 0x08

        .text
        .code64
/* Sums the first eight odd numbers times 2^32 in R8-R12: EAX = 1 if the sum comes out right, else 0. */
        .globl code_ring0
code_ring0:
        movabs $0x100000000, %r8
        mov $8, %r9d
        mov $1, %r10d
        xor %r11d, %r11d
1:      mov %r8, %r12
        imul %r10, %r12
        add %r12, %r11                          /* r11 += odd * 2^32 */
        add $2, %r10
        dec %r9d
        jnz 1b
        shr $32, %r11
        xor %eax, %eax
        cmp $64, %r11d                          /* 1 + 3 + ... + 15 = 64 */
        sete %al
        ret

/*
 * Ring 3 and back: IRETQ there, INT3 back through an interrupt gate and the TSS's stack. EAX = what ring 3 computed by SSE2:
 * 355 / 113 * 1,000,000, rounded.
 */
        .globl code_ring3
code_ring3:
        push %rbx
        push %rbp
        sidt saved_idt(%rip)
        lidt user_idt_pointer(%rip)
        mov $0x30, %eax
        ltr %ax
        mov %rsp, saved_stack(%rip)
        mov %rsp, tss64 + 4(%rip)               /* RSP0 */
        push $0x23                              /* SS, RSP, RFLAGS (interrupts off), CS, RIP */
        lea user_stack_top(%rip), %rax
        push %rax
        push $0x02
        push $0x2B
        lea in_ring3(%rip), %rax
        push %rax
        iretq

        .globl from_ring3
from_ring3:
        mov saved_stack(%rip), %rsp
        lidt saved_idt(%rip)
        mov %ebx, %eax
        mov $0x10, %ecx                         /* IRETQ emptied all segments that ring 3 may not have */
        mov %ecx, %ds
        mov %ecx, %es
        mov %ecx, %fs
        mov %ecx, %gs
        mov %ecx, %ss
        pop %rbp
        pop %rbx
        ret

in_ring3:
        mov $355, %eax
        cvtsi2sd %eax, %xmm0
        mov $113, %eax
        cvtsi2sd %eax, %xmm1
        divsd %xmm1, %xmm0
        mov $1000000, %eax
        cvtsi2sd %eax, %xmm1
        mulsd %xmm1, %xmm0
        cvtsd2si %xmm0, %ebx
        int3

        .data
        .balign 8
user_idt_pointer:
        .word 4 * 16 - 1
        .long user_idt, 0
saved_idt:
        .word 0
        .quad 0

        .bss
        .balign 16
        .globl user_idt, tss64
user_idt:
        .skip 4 * 16
tss64:  .skip 104
saved_stack:
        .skip 8
        .balign 16
        .skip 512
user_stack_top:

        .section .note.GNU-stack, "", @progbits
