/*
 * The guest of the exit bench: four loops of ECX accesses that all leave the guest, at port DX or at EDI, where no memory is.
 * Flat 32-bit protected mode, loaded at 0x1000; loop number n starts at n * 64. Each ends by a triple fault, which every VMM
 * is told of without having to emulate anything: EBX points to ten zero bytes, an IDT of no entries.
 */
        .macro loop_of access:vararg
        .balign 64
1:      \access
        dec %ecx
        jnz 1b
        lidt (%ebx)
        ud2
        .endm

        .code32
        loop_of out %al, %dx
        loop_of in %dx, %al
        loop_of mov %eax, (%edi)
        loop_of mov (%edi), %eax
