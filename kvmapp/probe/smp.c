/*
 * The other processors: woken by INIT and SIPI as MultiProcessor Specification B.4 says, counted, and pinged one by one.
 * They stay in HLT with interrupts on until the end.
 */
#include "probe.h"

#define TRAMPOLINE 0x8000               /* trampoline.S */
#define ICR_INIT_ASSERT 0x4500
#define ICR_SIPI 0x4600
#define ICR_FIXED 0x4000

extern const char trampoline[], trampoline_end[], trampoline_gdt[];
extern const char gdt_pointer[];

static volatile u32 started;
static u32 boot_apic_id;

static void pong(void)
{
    send_ipi(boot_apic_id, ICR_FIXED | VECTOR_PONG);
}

__attribute__((noreturn)) void ap_main(void)
{
    interrupts_start_ap();
    __atomic_fetch_add(&started, 1, __ATOMIC_SEQ_CST);
    for (;;)
        halt_until_interrupt();
}

/* AP starts are awaited by sleeping a millisecond at a time: no interrupt tells of them. */
static bool await_started(u32 expected, u32 milliseconds)
{
    for (; milliseconds && started < expected; milliseconds--)
        sleep_ms(1);
    return started >= expected;
}

static void wake(u32 apic_id)
{
    u32 before = started;
    send_ipi(apic_id, ICR_INIT_ASSERT);
    sleep_ms(1);
    for (u32 tries = 0; tries < 2 && started == before; tries++) {
        send_ipi(apic_id, ICR_SIPI | TRAMPOLINE >> 12);
        await_started(before + 1, tries ? 500 : 10);
    }
}

enum verdict test_smp(void)
{
    u32 others = platform.cpu_count - 1;
    boot_apic_id = lapic_read(LAPIC_ID) >> 24;
    if (!others)
        return skip("one CPU");
    memcpy((void *)TRAMPOLINE, trampoline, (size_t)(trampoline_end - trampoline));
    memcpy((void *)(TRAMPOLINE + (trampoline_gdt - trampoline)), gdt_pointer, 6);
    on_interrupt(VECTOR_PING, pong);
    for (u32 i = 0; i < platform.cpu_count; i++)
        if (platform.cpus[i] != boot_apic_id)
            wake(platform.cpus[i]);
    CHECK(started == others, "%u of %u other CPUs started", started, others);
    for (u32 i = 0; i < platform.cpu_count; i++) {
        if (platform.cpus[i] == boot_apic_id)
            continue;
        u32 before = interrupts[VECTOR_PONG];
        send_ipi(platform.cpus[i], ICR_FIXED | VECTOR_PING);
        bool came = wait_for(&interrupts[VECTOR_PONG], before + 1, 500);
        CHECK(came, "no answer to an IPI from the CPU of APIC id %u", platform.cpus[i]);
    }
    return ok("%u CPUs started by INIT and SIPI, each answered an IPI", others);
}
