/*
 * Where a second processor wakes up: real mode, CS:IP = 0800:0000, nothing else known. smp.c copies these bytes to 0x8000;
 * they enter protected mode on the probe's GDT, take a stack of their own (AP_STACKS + 1 KiB a processor) and go to ap_main.
 */
        .set TRAMPOLINE, 0x8000
        .set AP_STACKS, 0x10000

        .text
        .code16
        .globl trampoline, trampoline_end
trampoline:
        cli
        cs lgdtl trampoline_gdt - trampoline
        mov $0x11, %eax                         /* CR0: PE, ET */
        mov %eax, %cr0
        ljmpl $0x08, $ap_start
        .balign 4
        .globl trampoline_gdt
trampoline_gdt:
        .word 0
        .long 0
trampoline_end:

        .code32
ap_start:
        cld
        mov $0x10, %eax
        mov %eax, %ds
        mov %eax, %es
        mov %eax, %fs
        mov %eax, %gs
        mov %eax, %ss
        mov $1, %eax
        lock xadd %eax, ap_number               /* the how-manieth we are: no two share a stack */
        inc %eax
        shl $10, %eax
        lea AP_STACKS(%eax), %esp
        call ap_main
1:      cli
        hlt
        jmp 1b

        .bss
        .balign 4
ap_number:
        .skip 4

        .section .note.GNU-stack, "", @progbits
