/*
 * The ways out, chosen by end=... on the command line:
 *   exit       isa-debug-exit, port 0xF4, with 0 when every step passed, else 1 (the default); exit:N with N
 *   poweroff   ACPI S5                      reset        port 0xCF9            reset-i8042  the keyboard controller's line
 *   triple     a triple fault               crash        a jump to where no memory is
 *   hang       HLT with interrupts off      spin         a busy loop           idle         HLT, but for the power button
 * One that does not take falls to the next in the order exit, poweroff, reset, reset-i8042, triple.
 * Until then the power button powers off by S5, unless button=ignore: then ACPI is left as it was found.
 */
#include "probe.h"

#define DEBUG_EXIT 0xF4
#define RESET_CONTROL 0xCF9
#define RESET_COLD 0x06
#define I8042_COMMAND 0x64
#define I8042_PULSE_RESET 0xFE
#define PM1_CONTROL_SCI_EN 0x0001
#define PM1_CONTROL_SLP_EN 0x2000
#define PM1_POWER_BUTTON 0x0100
#define NO_MEMORY_THERE 0xFD000000

static void power_off(void)
{
    if (platform.has_s5)
        out16((u16)platform.pm1_control, (u16)(platform.sleep_type_s5 << 10 | PM1_CONTROL_SLP_EN | PM1_CONTROL_SCI_EN));
}

static void power_button(void)
{
    u16 status = in16((u16)platform.pm1_event);
    out16((u16)platform.pm1_event, status);                         /* ones clear what they meet */
    if (status & PM1_POWER_BUTTON) {
        say("power button");
        power_off();
    }
}

void power_button_start(void)
{
    if (!platform.pm1_event || word_is(word("button"), "ignore"))
        return;
    if (platform.smi_command && !(in16((u16)platform.pm1_control) & PM1_CONTROL_SCI_EN))
        out8((u16)platform.smi_command, platform.acpi_enable);
    on_interrupt(VECTOR_IOAPIC + platform.sci, power_button);
    ioapic_open(platform.sci, true);
    out16((u16)(platform.pm1_event + platform.pm1_event_length / 2), PM1_POWER_BUTTON);
}

static void triple_fault(void)
{
    static const struct { u16 limit; u32 base; } __attribute__((packed)) no_idt = { 0, 0 };
    asm volatile("lidt %0; ud2" : : "m"(no_idt));
}

static void stop_here(const char *how)
{
    if (word_is(how, "crash"))
        ((void (*)(void))NO_MEMORY_THERE)();
    if (word_is(how, "hang"))
        for (;;)
            asm volatile("cli; hlt");
    if (word_is(how, "reset-halt")) {
        out8(RESET_CONTROL, RESET_COLD);
        for (;;)
            asm volatile("cli; hlt");
    }
    if (word_is(how, "spin"))
        for (;;)
            asm volatile("pause");
    if (word_is(how, "idle"))
        for (;;)
            halt_until_interrupt();
}

void end(void)
{
    static const char *const order[] = { "exit", "poweroff", "reset", "reset-i8042", "triple" };
    const char *how = word("end");
    u32 status = failed_steps() ? 1 : 0, first = 0;
    if (how && memcmp(how, "exit:", 5) == 0)
        status = word_number(how + 5);
    stop_here(how);
    for (u32 i = 0; i < LENGTH(order); i++)
        if (word_is(how, order[i]))
            first = i;
    if (first <= 0)
        out8(DEBUG_EXIT, (u8)status);
    if (first <= 1) {
        power_off();
        sleep_ms(100);                                              /* a VMM may take note of it a little later */
    }
    if (first <= 2) {
        out8(RESET_CONTROL, RESET_COLD);
        sleep_ms(100);
    }
    if (first <= 3) {
        out8(I8042_COMMAND, I8042_PULSE_RESET);
        sleep_ms(100);
    }
    triple_fault();
    __builtin_unreachable();
}
