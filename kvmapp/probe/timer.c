/*
 * Time: the 8254 PIT, the local APIC timer and the ACPI PM timer, each tested against another; and waiting, which sleeps
 * in HLT with the local APIC timer as the deadline, so that a lost interrupt fails a step instead of hanging the probe.
 * A busy host may put the whole machine aside for longer than any of these times, and they go on meanwhile: so nothing is
 * given up, and nothing is measured, by a single stretch of time.
 * Intel 8254 datasheet; SDM 3A 11.5.4; ACPI 4.8.3.3. Not here: HPET, TSC deadline, kvmclock.
 */
#include "probe.h"

#define PIT_CHANNEL0 0x40
#define PIT_COMMAND 0x43
#define PIT_RATE_GENERATOR 0x34         /* channel 0, low byte then high, mode 2 */
#define PIT_LATCH 0x00
#define PIT_HZ 1193182

#define PM_TIMER_HZ 3579545
#define PM_TIMER_MASK 0xFFFFFF          /* 24 bits are always there */

#define LVT_MASKED 0x10000
#define DIVIDE_BY_16 3

#define CALIBRATION_MS 5
#define ROUNDS 3
#define STRETCH_MS 10

static u32 lapic_ticks_per_ms = 62500;  /* of a 1 GHz bus, until timer_start measures it */

static void pit_start(u32 period)
{
    out8(PIT_COMMAND, PIT_RATE_GENERATOR);
    out8(PIT_CHANNEL0, (u8)period);
    out8(PIT_CHANNEL0, (u8)(period >> 8));
}

static u32 pit_read(void)
{
    out8(PIT_COMMAND, PIT_LATCH);
    u32 low = in8(PIT_CHANNEL0);
    return low | (u32)in8(PIT_CHANNEL0) << 8;
}

/* Lets the PIT, counting down from 65536, run for `ticks`; returns how far it really came. */
static u32 pit_run(u32 ticks)
{
    u32 start = pit_read(), elapsed;
    do
        elapsed = (start - pit_read()) & 0xFFFF;
    while (elapsed < ticks);
    return elapsed;
}

void timer_start(void)
{
    u32 ratio = 0xFFFFFFFF;             /* the least: the PIT, which has 16 bits, misses what a vCPU that is put aside lets pass */
    lapic_write(LAPIC_TIMER_DIVIDE, DIVIDE_BY_16);
    lapic_write(LAPIC_LVT_TIMER, LVT_MASKED | VECTOR_TIMER);
    pit_start(0);
    for (u32 round = 0; round < ROUNDS; round++) {
        lapic_write(LAPIC_TIMER_INITIAL, 0xFFFFFFFF);
        u32 pit_ticks = pit_run(PIT_HZ / 1000 * CALIBRATION_MS);
        u32 lapic_ticks = 0xFFFFFFFF - lapic_read(LAPIC_TIMER_CURRENT);
        if (lapic_ticks / pit_ticks < ratio)
            ratio = lapic_ticks / pit_ticks;
    }
    lapic_write(LAPIC_TIMER_INITIAL, 0);
    if (ratio)
        lapic_ticks_per_ms = ratio * (PIT_HZ / 1000);
    lapic_write(LAPIC_LVT_TIMER, VECTOR_TIMER);
}

bool wait_for(const volatile u32 *count, u32 target, u32 milliseconds)
{
    while ((int)(*count - target) < 0 && milliseconds) {
        u32 stretch = milliseconds < STRETCH_MS ? milliseconds : STRETCH_MS;
        u32 alarm = interrupts[VECTOR_TIMER];
        lapic_write(LAPIC_TIMER_INITIAL, lapic_ticks_per_ms * stretch);
        while ((int)(*count - target) < 0 && interrupts[VECTOR_TIMER] == alarm)
            halt_until_interrupt();
        lapic_write(LAPIC_TIMER_INITIAL, 0);
        milliseconds -= stretch;
    }
    return (int)(*count - target) >= 0;
}

void sleep_ms(u32 milliseconds)
{
    static const volatile u32 never = 0;
    wait_for(&never, 1, milliseconds);
}

#define TICKS 3

/* The PIT's interrupt through the 8259A, which reaches the processor as ExtINT on LINT0. */
enum verdict test_pic(void)
{
    const volatile u32 *count = &interrupts[VECTOR_PIC];
    lapic_write(LAPIC_LVT_LINT0, 0x700);
    pit_start(PIT_HZ / 1000);
    out8(0x21, 0xFE);
    bool came = wait_for(count, *count + TICKS, 500);
    out8(0x21, 0xFF);
    lapic_write(LAPIC_LVT_LINT0, LVT_MASKED);
    CHECK(came, "%u of %u PIT ticks came through the 8259A in 500 ms", *count, TICKS);
    return ok("PIT ticks on IRQ 0 through the 8259A");
}

enum verdict test_ioapic(void)
{
    u32 gsi = gsi_of_irq(0);
    const volatile u32 *count = &interrupts[VECTOR_IOAPIC + gsi];
    pit_start(PIT_HZ / 1000);
    ioapic_open(gsi, false);
    bool came = wait_for(count, *count + TICKS, 500);
    ioapic_close(gsi);
    CHECK(came, "%u of %u PIT ticks came through I/O APIC pin %u in 500 ms", *count, TICKS, gsi);
    return ok("PIT ticks on pin %u of the I/O APIC", gsi);
}

/*
 * A one-shot of 3 ms must take about 3 ms by the PIT; a busy host may make it later, nothing may make it earlier. One that is
 * later than the PIT can count seems to be early: three are tried.
 */
enum verdict test_lapic_timer(void)
{
    u32 microseconds = 0;
    pit_start(0);
    for (u32 round = 0; round < ROUNDS && microseconds <= 2000; round++) {
        u32 before = interrupts[VECTOR_TIMER];
        u32 start = pit_read();
        sleep_ms(3);
        microseconds = ((start - pit_read()) & 0xFFFF) * 1000 / (PIT_HZ / 1000);
        CHECK(interrupts[VECTOR_TIMER] == before + 1, "%u interrupts of one one-shot", interrupts[VECTOR_TIMER] - before);
    }
    CHECK(microseconds > 2000, "a one-shot of 3000 us ended after %u us", microseconds);
    return ok("one-shot interrupt, %u ticks a millisecond", lapic_ticks_per_ms);
}

/* The PM timer counts three times as fast as the PIT. A vCPU put aside between two reads spoils a round: three are tried. */
enum verdict test_pm_timer(void)
{
    u32 permille = 0;
    if (!platform.pm_timer)
        return skip("no FADT to tell its port");
    pit_start(0);
    for (u32 round = 0; round < ROUNDS; round++) {
        u32 start = in32(platform.pm_timer);
        u32 pit_ticks = pit_run(PIT_HZ / 1000 * CALIBRATION_MS);
        u32 pm_ticks = (in32(platform.pm_timer) - start) & PM_TIMER_MASK;
        permille = pm_ticks * 1000 / (pit_ticks * 3);
        if (permille > 900 && permille < 1100)
            return ok("port 0x%x runs at %u permille of 3.579545 MHz by the PIT", platform.pm_timer, permille);
    }
    return fail("port 0x%x runs at %u permille of 3.579545 MHz by the PIT", platform.pm_timer, permille);
}
