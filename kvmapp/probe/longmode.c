/* 64-bit mode, in ring 0 and in ring 3 (longmode.S): its page tables, its TSS and the one gate that leads out of ring 3. */
#include "probe.h"

#define CPUID_LONG_MODE (1U << 29)
#define PAGE_PRESENT_WRITABLE_USER 7
#define PAGE_2MIB 0x80

extern u32 run_in_long_mode(u32 page_tables, const char *code);
extern const char code_ring0[], code_ring3[], from_ring3[];
extern u32 user_idt[], tss64[26];
extern u64 gdt_tss[2];

/* The first 4 MiB, identity-mapped: the probe and its low memory. Static data is zero: the other entries are not present. */
typedef u64 page_table[512] __attribute__((aligned(4096)));
static page_table pml4, pdpt, pd;

static bool prepare(void)
{
    u32 leaf[4];
    cpuid(0x80000001, leaf);
    if (!(leaf[3] & CPUID_LONG_MODE))
        return false;
    pml4[0] = (u32)pdpt | PAGE_PRESENT_WRITABLE_USER;
    pdpt[0] = (u32)pd | PAGE_PRESENT_WRITABLE_USER;
    for (u32 i = 0; i < 2; i++)
        pd[i] = i << 21 | PAGE_2MIB | PAGE_PRESENT_WRITABLE_USER;
    return true;
}

enum verdict test_long_mode(void)
{
    if (!prepare())
        return skip("CPUID names no long mode");
    CHECK(run_in_long_mode((u32)pml4, code_ring0), "64-bit registers do not hold 64 bits");
    return ok("64-bit ring 0 and back");
}

enum verdict test_user_mode(void)
{
    if (!prepare())
        return skip("CPUID names no long mode");
    u32 *gate = &user_idt[3 * 4], handler = (u32)from_ring3, tss = (u32)tss64;
    gate[0] = 0x18 << 16 | (handler & 0xFFFF);
    gate[1] = (handler & 0xFFFF0000) | 0xEE00;                      /* present, DPL 3, interrupt gate */
    gdt_tss[0] = (u64)(tss & 0xFF000000) << 32 | (u64)0x0089 << 40 | (u64)(tss & 0xFFFFFF) << 16 | (sizeof tss64 - 1);
    gdt_tss[1] = 0;
    u32 result = run_in_long_mode((u32)pml4, code_ring3);
    CHECK(result == 3141593, "355/113 * 1000000 by SSE2 gave %u, expected 3141593", result);
    return ok("SSE2 arithmetic in 64-bit ring 3, back by an interrupt gate");
}
