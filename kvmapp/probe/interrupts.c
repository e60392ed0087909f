/*
 * Interrupts: the IDT, a count a vector, and the three controllers. The 8259A pair is remapped and masked (one step opens
 * IRQ 0 there), the I/O APIC's pins open one by one, the local APIC is on. Intel 8259A and 82093AA datasheets, SDM 3A
 * chapter 11. Not here: interrupt priorities, logical destinations, x2APIC.
 */
#include "probe.h"

#define PIC_MASTER 0x20
#define PIC_SLAVE 0xA0
#define PIC_EOI 0x20

#define LAPIC_BASE 0xFEE00000
#define LAPIC_EOI 0xB0
#define LAPIC_SPURIOUS 0xF0
#define LAPIC_ENABLED 0x100
#define LAPIC_ICR_LOW 0x300
#define LAPIC_ICR_HIGH 0x310
#define LAPIC_LVT_MASKED 0x10000

#define IOAPIC_SELECT 0x00
#define IOAPIC_WINDOW 0x10
#define IOAPIC_REDIRECTION 0x10
#define IOAPIC_LEVEL 0x8000
#define IOAPIC_MASKED 0x10000

struct gate { u16 low, selector, flags, high; };
struct frame { u32 edi, esi, ebp, esp, ebx, edx, ecx, eax, vector, error, eip, cs, eflags; };

extern const char vector_stubs[];
static struct gate idt[VECTORS];
static void (*handlers[VECTORS])(void);
volatile u32 interrupts[VECTORS];

u32 lapic_read(u32 offset) { return load32(LAPIC_BASE + offset); }
void lapic_write(u32 offset, u32 value) { store32(LAPIC_BASE + offset, value); }

static void load_idt(void)
{
    struct { u16 limit; u32 base; } __attribute__((packed)) pointer = { sizeof idt - 1, (u32)idt };
    asm volatile("lidt %0" : : "m"(pointer));
}

static void pic_start(void)
{
    out8(PIC_MASTER, 0x11);                             /* ICW1: edge, cascade, ICW4 follows */
    out8(PIC_SLAVE, 0x11);
    out8(PIC_MASTER + 1, VECTOR_PIC);                   /* ICW2: vectors */
    out8(PIC_SLAVE + 1, VECTOR_PIC + 8);
    out8(PIC_MASTER + 1, 0x04);                         /* ICW3: the slave hangs on IRQ 2 */
    out8(PIC_SLAVE + 1, 0x02);
    out8(PIC_MASTER + 1, 0x01);                         /* ICW4: 8086 mode */
    out8(PIC_SLAVE + 1, 0x01);
    out8(PIC_MASTER + 1, 0xFF);                         /* all masked */
    out8(PIC_SLAVE + 1, 0xFF);
}

void interrupts_start_ap(void)
{
    load_idt();
    lapic_write(LAPIC_SPURIOUS, LAPIC_ENABLED | VECTOR_SPURIOUS);
}

void interrupts_start(void)
{
    for (u32 i = 0; i < VECTORS; i++) {
        u32 stub = (u32)vector_stubs + i * 16;
        idt[i] = (struct gate){ (u16)stub, 0x08, 0x8E00, (u16)(stub >> 16) };
    }
    pic_start();
    interrupts_start_ap();
    lapic_write(LAPIC_LVT_LINT0, LAPIC_LVT_MASKED);
}

void on_interrupt(u32 vector, void (*handler)(void))
{
    handlers[vector] = handler;
}

static void exception(const struct frame *frame)
{
    say("fail exception: vector %u, error 0x%x, at 0x%08x", frame->vector, frame->error, frame->eip);
    report_step("exception", fail("the probe cannot go on"));
    report_done();
    end();
}

void interrupt(const struct frame *frame)
{
    u32 vector = frame->vector;
    if (vector < VECTOR_PIC)
        exception(frame);
    __atomic_fetch_add(&interrupts[vector], 1, __ATOMIC_SEQ_CST);
    if (handlers[vector])
        handlers[vector]();
    if (vector >= VECTOR_TIMER) {
        if (vector != VECTOR_SPURIOUS)
            lapic_write(LAPIC_EOI, 0);
    } else {
        if (vector >= VECTOR_PIC + 8)
            out8(PIC_SLAVE, PIC_EOI);
        out8(PIC_MASTER, PIC_EOI);
    }
}

void send_ipi(u32 apic_id, u32 command)
{
    lapic_write(LAPIC_ICR_HIGH, apic_id << 24);
    lapic_write(LAPIC_ICR_LOW, command);
}

/* The MADT may move ISA lines; all PCs move one: the timer, to pin 2. */
u32 gsi_of_irq(u32 irq)
{
    return irq == 0 ? platform.timer_gsi : irq;
}

static void ioapic_write(u32 index, u32 value)
{
    store32(platform.ioapic_base + IOAPIC_SELECT, index);
    store32(platform.ioapic_base + IOAPIC_WINDOW, value);
}

void ioapic_open(u32 gsi, bool level)
{
    u32 entry = IOAPIC_REDIRECTION + gsi * 2;
    ioapic_write(entry + 1, lapic_read(LAPIC_ID) & 0xFF000000);
    ioapic_write(entry, (VECTOR_IOAPIC + gsi) | (level ? IOAPIC_LEVEL : 0));
}

void ioapic_close(u32 gsi)
{
    ioapic_write(IOAPIC_REDIRECTION + gsi * 2, IOAPIC_MASKED | (VECTOR_IOAPIC + gsi));
}
