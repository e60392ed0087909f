/*
 * COM1 (and a glance at COM2): 16550A UART, National Semiconductor PC16550D. Detected, looped back and interrupted as
 * Linux's 8250 driver does it. Not here: modem status interrupts, FIFO trigger levels, 5 to 7 bit words.
 */
#include "probe.h"

enum { COM1 = 0x3F8, COM2 = 0x2F8, COM1_IRQ = 4 };
enum { DATA, IER, IIR, LCR, MCR, LSR, MSR, SCRATCH, FCR = IIR };
#define IER_RECEIVED 0x01
#define IER_THRE 0x02
#define IIR_NONE 0x01
#define IIR_THRE 0x02
#define IIR_FIFO 0xC0
#define FCR_ENABLE_AND_CLEAR 0x07
#define LCR_8N1 0x03
#define LCR_DLAB 0x80
#define MCR_DTR_RTS_OUT2 0x0B           /* OUT2 gates the interrupt line */
#define MCR_LOOPBACK 0x10
#define LSR_DATA_READY 0x01
#define LSR_THRE 0x20
#define FIFO_SIZE 16

static volatile u8 interrupt_reason;

void serial_start(void)
{
    out8(COM1 + IER, 0);
    out8(COM1 + LCR, LCR_DLAB | LCR_8N1);
    out8(COM1 + DATA, 1);               /* 115200 */
    out8(COM1 + IER, 0);
    out8(COM1 + LCR, LCR_8N1);
    out8(COM1 + FCR, FCR_ENABLE_AND_CLEAR);
    out8(COM1 + MCR, MCR_DTR_RTS_OUT2);
}

/* A FIFO's worth for each look at the line status. Without a UART that reads 0xFF, and nothing waits. */
void serial_write(const char *text, size_t size)
{
    while (size) {
        while (!(in8(COM1 + LSR) & LSR_THRE))
            asm volatile("pause");
        for (u32 room = FIFO_SIZE; room && size; room--, size--)
            out8(COM1 + DATA, (u8)*text++);
    }
}

static bool present(u16 port)
{
    out8(port + SCRATCH, 0x5A);
    u8 first = in8(port + SCRATCH);
    out8(port + SCRATCH, 0xA5);
    return first == 0x5A && in8(port + SCRATCH) == 0xA5;
}

static enum verdict test_divisor(void)
{
    out8(COM1 + LCR, LCR_DLAB | LCR_8N1);
    out8(COM1 + DATA, 0x0C);
    out8(COM1 + IER, 0x01);
    u32 divisor = in8(COM1 + DATA) | (u32)in8(COM1 + IER) << 8;
    out8(COM1 + LCR, LCR_8N1);
    CHECK(divisor == 0x010C, "divisor latch reads 0x%04x, wrote 0x010c", divisor);
    return OK;
}

/* In loopback a byte sent is a byte received, and the four modem outputs are the four modem inputs. */
static enum verdict test_loopback(void)
{
    out8(COM1 + FCR, FCR_ENABLE_AND_CLEAR);
    out8(COM1 + MCR, MCR_LOOPBACK | 0x0A);                          /* OUT2 and RTS: DCD and CTS */
    u8 modem = in8(COM1 + MSR) & 0xF0;
    out8(COM1 + DATA, 0x5A);
    u8 status = 0;
    for (u32 tries = 0; tries < 100 && !(status & LSR_DATA_READY); tries++)
        status = in8(COM1 + LSR);
    u8 received = in8(COM1 + DATA);
    out8(COM1 + MCR, MCR_DTR_RTS_OUT2);
    CHECK(modem == 0x90, "loopback of OUT2 and RTS gives modem status 0x%02x, expected 0x90", modem);
    CHECK(status & LSR_DATA_READY, "loopback received nothing: line status 0x%02x", status);
    CHECK(received == 0x5A, "loopback of 0x5a gave 0x%02x", received);
    return OK;
}

static void note_reason(void)
{
    interrupt_reason = in8(COM1 + IIR);                             /* reading it takes THRE back */
}

static enum verdict test_interrupt(void)
{
    const volatile u32 *count = &interrupts[VECTOR_IOAPIC + COM1_IRQ];
    on_interrupt(VECTOR_IOAPIC + COM1_IRQ, note_reason);
    ioapic_open(COM1_IRQ, false);
    u32 before = *count;
    out8(COM1 + IER, IER_THRE);
    bool came = wait_for(count, before + 1, 200);
    out8(COM1 + IER, 0);
    ioapic_close(COM1_IRQ);
    u8 after = in8(COM1 + IIR);
    CHECK(came, "no THRE interrupt on IRQ %u in 200 ms: IIR 0x%02x", COM1_IRQ, after);
    CHECK((interrupt_reason & 0x0F) == IIR_THRE, "IIR 0x%02x at the interrupt, expected THRE", interrupt_reason);
    CHECK(after & IIR_NONE, "IIR 0x%02x after the interrupt, expected none pending", after);
    return OK;
}

enum verdict test_serial(void)
{
    if (!present(COM1))
        return skip("nothing at port 0x%x", COM1);
    serial_start();
    u8 fifo = in8(COM1 + IIR) & IIR_FIFO;
    CHECK(fifo == IIR_FIFO, "IIR says 0x%02x after the FIFOs were enabled, expected 0xc0", fifo);
    enum verdict verdict = test_divisor();
    if (verdict == OK)
        verdict = test_loopback();
    if (verdict == OK)
        verdict = test_interrupt();
    serial_start();
    TRY(verdict);
    return ok("16550A at 0x%x: scratch, divisor, FIFO, loopback, THRE interrupt on IRQ %u%s", COM1, COM1_IRQ,
              present(COM2) ? "; COM2 too" : "");
}

static void echo(void)
{
    while (!(in8(COM1 + IIR) & IIR_NONE)) {
        while (in8(COM1 + LSR) & LSR_DATA_READY) {
            char c = (char)in8(COM1 + DATA);
            serial_write(&c, 1);
        }
    }
}

/* From now on what arrives on COM1 goes back out, from the interrupt. */
void serial_echo(void)
{
    serial_start();
    on_interrupt(VECTOR_IOAPIC + COM1_IRQ, echo);
    ioapic_open(COM1_IRQ, false);
    out8(COM1 + IER, IER_RECEIVED);
}
