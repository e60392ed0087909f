/* Where interrupts and exceptions enter: a stub a vector, 16 bytes apart, that leaves the same frame for all (interrupts.c). */
        .set VECTORS, 0x58
        .text
        .balign 16
        .globl vector_stubs
vector_stubs:
        .set vector, 0
        .rept VECTORS
        .balign 16
        .if vector != 8 && vector != 10 && vector != 11 && vector != 12 && vector != 13 && vector != 14 && vector != 17
        push $0                                 /* where the processor pushes no error code */
        .endif
        push $vector
        jmp enter
        .set vector, vector + 1
        .endr

enter:  pusha
        cld
        push %esp                               /* interrupt(struct frame *) */
        call interrupt
        add $4, %esp
        popa
        add $8, %esp
        pushl 8(%esp)                           /* IRET by hand: where KVM interprets, it knows IRET in real mode alone */
        popf
        lret $4

        .section .note.GNU-stack, "", @progbits
