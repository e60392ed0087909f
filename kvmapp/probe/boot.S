/*
 * The way in: a multiboot 1 header, a PVH note, and one entry for both. Either protocol enters in flat 32-bit protected
 * mode with paging and interrupts off; multiboot says so by EAX = 0x2BADB002, PVH by the magic number EBX points to.
 */
        .set MULTIBOOT_MAGIC, 0x1BADB002
        .set MULTIBOOT_FLAGS, 0x00000002        /* memory information, please */
        .set XEN_ELFNOTE_PHYS32_ENTRY, 18

        .section .multiboot, "a"
        .balign 4
        .long MULTIBOOT_MAGIC, MULTIBOOT_FLAGS, -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)

        .section .note.pvh, "a", @note
        .balign 4
        .long 4, 4, XEN_ELFNOTE_PHYS32_ENTRY
        .asciz "Xen"
        .long start

        .text
        .globl start
start:
        cld
        mov $stack_top, %esp
        lgdt gdt_pointer
        ljmp $0x08, $1f
1:      mov $0x10, %ecx
        mov %ecx, %ds
        mov %ecx, %es
        mov %ecx, %fs
        mov %ecx, %gs
        mov %ecx, %ss
        push %ebx                               /* probe_main(magic, information) */
        push %eax
        call probe_main
1:      cli
        hlt
        jmp 1b

        .data
        .balign 8
gdt:    .quad 0
        .quad 0x00CF9A000000FFFF                /* 0x08: 32-bit code */
        .quad 0x00CF92000000FFFF                /* 0x10: data */
        .quad 0x00AF9A000000FFFF                /* 0x18: 64-bit code */
        .quad 0x00CFF2000000FFFF                /* 0x20: data of ring 3 */
        .quad 0x00AFFA000000FFFF                /* 0x28: 64-bit code of ring 3 */
        .globl gdt_tss
gdt_tss:
        .quad 0, 0                              /* 0x30: 64-bit TSS, filled in by longmode.c */
        .globl gdt_pointer
gdt_pointer:
        .word gdt_pointer - gdt - 1
        .long gdt

        .bss
        .balign 16
        .skip 8192
stack_top:

        .section .note.GNU-stack, "", @progbits
