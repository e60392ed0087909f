/*
 * The processor: which hypervisor CPUID names, and the x87 and SSE state that every kernel keeps. Where KVM interprets ring 0
 * it knows no SSE arithmetic there: that is longmode.c's part, in ring 3.
 */
#include "probe.h"

#define HYPERVISOR_LEAF 0x40000000
#define CPUID_1_ECX_HYPERVISOR (1U << 31)
#define CPUID_1_EDX_FPU (1U << 0)
#define CPUID_1_EDX_FXSR (1U << 24)
#define CPUID_1_EDX_SSE2 (1U << 26)
#define CR0_MP_NE 0x22
#define CR0_EM_TS 0x0C
#define CR4_OSFXSR_OSXMMEXCPT 0x600

static void fpu_on(void)
{
    u32 cr;
    asm volatile("mov %%cr0, %0" : "=r"(cr));
    asm volatile("mov %0, %%cr0" : : "r"((cr & ~CR0_EM_TS) | CR0_MP_NE));
    asm volatile("mov %%cr4, %0" : "=r"(cr));
    asm volatile("mov %0, %%cr4" : : "r"(cr | CR4_OSFXSR_OSXMMEXCPT));
}

enum verdict test_cpu(void)
{
    static const u32 pattern[4] = { 0x01234567, 0x89ABCDEF, 0xDEADBEEF, 0x600DF00D };
    u32 leaf[4], vendor[4], copy[4] = { 0 };
    char signature[13] = { 0 };
    u16 control_word = 0;
    cpuid(0, vendor);
    cpuid(1, leaf);
    CHECK(leaf[2] & CPUID_1_ECX_HYPERVISOR, "CPUID 1 ECX 0x%08x has no hypervisor bit", leaf[2]);
    u32 wanted = CPUID_1_EDX_FPU | CPUID_1_EDX_FXSR | CPUID_1_EDX_SSE2;
    CHECK((leaf[3] & wanted) == wanted, "CPUID 1 EDX 0x%08x lacks FPU, FXSR or SSE2", leaf[3]);
    u32 apic_id = leaf[1] >> 24;
    CHECK(apic_id == lapic_read(LAPIC_ID) >> 24, "CPUID says APIC id %u, the local APIC %u", apic_id, lapic_read(LAPIC_ID) >> 24);
    cpuid(HYPERVISOR_LEAF, leaf);
    memcpy(signature, &leaf[1], 12);
    CHECK(memcmp(signature, "KVMKVMKVM", 9) == 0 || memcmp(signature, "TCGTCGTCG", 9) == 0,
          "CPUID 0x40000000 says '%s', expected KVMKVMKVM", signature);
    fpu_on();
    asm volatile("fninit; fnstcw %0" : "=m"(control_word));
    CHECK(control_word == 0x37F, "x87 control word 0x%04x after FNINIT, expected 0x37f", control_word);
    asm volatile("movups %1, %%xmm7; movups %%xmm7, %0" : "=m"(copy) : "m"(pattern));
    CHECK(memcmp(copy, pattern, sizeof copy) == 0, "XMM7 does not hold what was put into it");
    return ok("%c%c%c%c, %s, x87 and SSE", (char)vendor[1], (char)(vendor[1] >> 8), (char)(vendor[1] >> 16),
              (char)(vendor[1] >> 24), signature);
}
