/*
 * The order of things: the steps, then what the command line asks for after them, then the end.
 *   steps=a,b,...   only these (or none); without the word, all but those on request
 *   mode=counter    prints "count N" on COM1 every period=MS (100) for ever; mode=echo says "ready" there and sends
 *                   back what it receives
 *   banner=TEXT     a word printed on COM1 first;   report=, button=, end=: report.c, power.c;   arp=: virtio_net.c
 */
#include "probe.h"

static const struct {
    const char *name;
    enum verdict (*run)(void);
    bool on_request;
} steps[] = {
    { "cpu", test_cpu, false },
    { "memory", test_memory, false },
    { "debug-port", test_debug_port, false },
    { "serial", test_serial, false },
    { "rtc", test_rtc, false },
    { "rtc-alarm", test_rtc_alarm, true },
    { "i8042", test_i8042, false },
    { "pic", test_pic, false },
    { "ioapic", test_ioapic, false },
    { "lapic-timer", test_lapic_timer, false },
    { "acpi", test_acpi, false },
    { "pm-timer", test_pm_timer, false },
    { "mp-table", test_mp_table, false },
    { "smbios", test_smbios, false },
    { "smp", test_smp, false },
    { "long-mode", test_long_mode, false },
    { "user-mode", test_user_mode, false },
    { "pci", test_pci, false },
    { "virtio-blk", test_virtio_blk, false },
    { "virtio-blk-intx", test_virtio_blk_intx, false },
    { "virtio-net", test_virtio_net, false },
    { "virtio-rng", test_virtio_rng, false },
    { "msix", test_msix, false },
    { "virtio-console", test_virtio_console, false },
    { "hostile", test_hostile, true },
};

static void run_steps(void)
{
    const char *chosen = word("steps");
    for (u32 i = 0; i < LENGTH(steps); i++)
        if (chosen ? word_lists(chosen, steps[i].name) : !steps[i].on_request)
            report_step(steps[i].name, steps[i].run());
    report_done();
}

static void print_banner(void)
{
    const char *text = word("banner");
    size_t size = 0;
    while (text && text[size] && text[size] != ' ')
        size++;
    serial_write(text, size);
    if (size)
        serial_write("\r\n", 2);
}

static void print(const char *format, ...)
{
    char text[32];
    __builtin_va_list arguments;
    __builtin_va_start(arguments, format);
    serial_write(text, format_text(text, sizeof text, format, arguments));
    __builtin_va_end(arguments);
}

static void count_for_ever(void)
{
    u32 period = word_number(word("period"));
    for (u32 n = 1;; n++) {
        print("count %u\r\n", n);
        sleep_ms(period ? period : 100);
    }
}

static void echo_for_ever(void)
{
    serial_echo();
    print("ready\r\n");
    for (;;)
        halt_until_interrupt();
}

void probe_main(u32 magic, u32 information)
{
    boot_information(magic, information);
    interrupts_start();
    tables_start();
    timer_start();
    pci_start();
    serial_start();
    report_start();
    print_banner();
    power_button_start();
    const char *mode = word("mode");
    if (!mode || word("steps"))
        run_steps();
    if (word_is(mode, "counter"))
        count_for_ever();
    if (word_is(mode, "echo"))
        echo_for_ever();
    end();
}
