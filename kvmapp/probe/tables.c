/*
 * The tables a machine describes itself by: ACPI (RSDP, XSDT or RSDT, MADT, FADT, MCFG, and of the DSDT's bytecode only the
 * _S5_ package), the MP table, SMBIOS. ACPI 6.4 chapter 5, MultiProcessor Specification 1.4 chapter 4, SMBIOS 3.4.
 * All of them lie below 4 GiB; the search looks where firmware puts them: the EBDA and the BIOS area.
 */
#include "probe.h"

#define BIOS_AREA 0xE0000
#define BIOS_AREA_END 0x100000
#define SMBIOS_AREA 0xF0000

struct rsdp { char signature[8]; u8 checksum; char oem[6]; u8 revision; u32 rsdt, length; u64 xsdt; } __attribute__((packed));
struct table { char signature[4]; u32 length; u8 revision, checksum; char oem[6], oem_table[8]; u32 oem_revision, creator[2]; }
    __attribute__((packed));
struct fadt {
    struct table header;
    u32 facs, dsdt; u8 model, profile; u16 sci; u32 smi_command; u8 acpi_enable, acpi_disable, s4bios, pstate;
    u32 pm1a_event, pm1b_event, pm1a_control, pm1b_control, pm2_control, pm_timer, gpe0, gpe1; u8 pm1_event_length;
} __attribute__((packed));
struct mcfg { struct table header; u64 reserved, base; } __attribute__((packed));
struct mp_pointer { char signature[4]; u32 table; u8 length, revision, checksum, features[5]; } __attribute__((packed));
struct mp_table { char signature[4]; u16 length; u8 revision, checksum; char oem[8], product[12]; u32 oem_table; u16 oem_size,
    entries; u32 lapic; u16 extended_length; u8 extended_checksum, reserved; } __attribute__((packed));

extern const volatile u16 ebda_segment; /* in the BIOS data area, by probe.ld */

struct platform platform = { .ioapic_base = 0xFEC00000, .timer_gsi = 2 };
static const char *acpi_trouble = "no RSDP in the EBDA or the BIOS area", *mp_trouble = "no MP table";

static bool sums_to_zero(const void *bytes, u32 length)
{
    u8 sum = 0;
    for (u32 i = 0; i < length; i++)
        sum += ((const u8 *)bytes)[i];
    return sum == 0;
}

/* `anchor` begins with four characters that tell it apart; all anchors are on 16 bytes. */
static u32 find_anchor(u32 start, u32 stop, const char *anchor)
{
    u32 wanted = load32((u32)anchor);
    for (u32 at = start; at < stop; at += 16)
        if (load32(at) == wanted)
            return at;
    return 0;
}

static u32 find_in_firmware(const char *anchor)
{
    u32 ebda = (u32)ebda_segment << 4;
    u32 found = ebda >= 0x80000 && ebda < 0xA0000 ? find_anchor(ebda, ebda + 1024, anchor) : 0;
    if (!found)
        found = find_anchor(0x9FC00, 0xA0000, anchor);
    return found ? found : find_anchor(BIOS_AREA, BIOS_AREA_END, anchor);
}

static void add_cpu(u32 apic_id)
{
    if (platform.cpu_count < LENGTH(platform.cpus))
        platform.cpus[platform.cpu_count++] = apic_id;
}

static void read_madt(const struct table *madt)
{
    for (const u8 *at = (const u8 *)madt + 44; at < (const u8 *)madt + madt->length && at[1]; at += at[1]) {
        if (at[0] == 0 && load32((u32)at + 4) & 1)                          /* local APIC, enabled */
            add_cpu(at[3]);
        else if (at[0] == 9 && load32((u32)at + 8) & 1)                     /* local x2APIC, enabled */
            add_cpu(load32((u32)at + 4));
        else if (at[0] == 1)
            platform.ioapic_base = load32((u32)at + 4);
        else if (at[0] == 2 && at[3] == 0)                                  /* override: ISA line 0 is elsewhere */
            platform.timer_gsi = load32((u32)at + 4);
    }
}

/* _S5_ := Name (_S5_, Package { SLP_TYPa, ... }): 5F 53 35 5F 12 length count value; value is a byte or a constant opcode. */
static void read_s5(const struct table *dsdt)
{
    const u8 *stop = (const u8 *)dsdt + dsdt->length - 8;
    for (const u8 *at = (const u8 *)dsdt + sizeof *dsdt; at < stop; at++) {
        if (load32((u32)at) != 0x5F35535F || at[4] != 0x12)
            continue;
        const u8 *value = at + 7 + (at[5] >> 6);                            /* the length takes one to four bytes */
        platform.sleep_type_s5 = value[0] == 0x0A ? value[1] : value[0];
        platform.has_s5 = true;
        return;
    }
}

static void read_fadt(const struct fadt *fadt)
{
    platform.smi_command = fadt->smi_command;
    platform.acpi_enable = fadt->acpi_enable;
    platform.pm1_event = fadt->pm1a_event;
    platform.pm1_event_length = fadt->pm1_event_length;
    platform.pm1_control = fadt->pm1a_control;
    platform.pm_timer = fadt->pm_timer;
    platform.sci = fadt->sci;
    const struct table *dsdt = (const void *)fadt->dsdt;
    if (!dsdt || memcmp(dsdt->signature, "DSDT", 4) != 0 || !sums_to_zero(dsdt, dsdt->length)) {
        acpi_trouble = "DSDT: not where the FADT says, or wrong checksum";
        return;
    }
    platform.tables++;
    read_s5(dsdt);
}

static void read_table(const struct table *table)
{
    if (!sums_to_zero(table, table->length)) {
        acpi_trouble = "a table has a wrong checksum";
        return;
    }
    platform.tables++;
    if (memcmp(table->signature, "APIC", 4) == 0)
        read_madt(table);
    else if (memcmp(table->signature, "FACP", 4) == 0)
        read_fadt((const void *)table);
    else if (memcmp(table->signature, "MCFG", 4) == 0 && ((const struct mcfg *)table)->base >> 32 == 0)
        platform.ecam_base = (u32)((const struct mcfg *)table)->base;
}

static void read_acpi(void)
{
    const struct rsdp *rsdp = (const void *)(boot_rsdp ? boot_rsdp : find_in_firmware("RSD PTR "));
    if (!rsdp)
        return;
    acpi_trouble = "RSDP: wrong signature or checksum";
    if (memcmp(rsdp->signature, "RSD PTR ", 8) != 0 || !sums_to_zero(rsdp, 20))
        return;
    bool extended = rsdp->revision >= 2 && rsdp->xsdt;
    const struct table *root = (const void *)(extended ? (u32)rsdp->xsdt : rsdp->rsdt);
    acpi_trouble = extended ? "XSDT: wrong signature or checksum" : "RSDT: wrong signature or checksum";
    if (memcmp(root->signature, extended ? "XSDT" : "RSDT", 4) != 0 || !sums_to_zero(root, root->length))
        return;
    acpi_trouble = NULL;
    platform.has_acpi = true;
    platform.timer_gsi = 0;                                                 /* unless the MADT moves it */
    u32 stride = extended ? 8 : 4;
    for (u32 at = (u32)root + sizeof *root; at + stride <= (u32)root + root->length; at += stride)
        read_table((const void *)load32(at));
}

static void read_mp_table(void)
{
    const struct mp_pointer *pointer = (const void *)find_in_firmware("_MP_");
    if (!pointer)
        return;
    const struct mp_table *table = (const void *)pointer->table;
    mp_trouble = "floating pointer or table: wrong signature or checksum";
    if (!sums_to_zero(pointer, 16) || !table || memcmp(table->signature, "PCMP", 4) != 0 || !sums_to_zero(table, table->length))
        return;
    platform.has_mp = true;
    const u8 *at = (const u8 *)(table + 1);
    u32 isa_bus = 0;
    for (u32 i = 0; i < table->entries; i++) {
        if (at[0] == 0 && at[3] & 1) {                                      /* processor, usable */
            platform.mp_cpu_count++;
            if (!platform.has_acpi)
                add_cpu(at[1]);
        } else if (at[0] == 2) {                                            /* I/O APIC */
            platform.ioapic_base = load32((u32)at + 4);
        } else if (at[0] == 1 && memcmp(at + 2, "ISA", 3) == 0) {           /* bus; all of them come before the lines */
            isa_bus = at[1];
        } else if (at[0] == 3 && at[1] == 0 && at[4] == isa_bus && at[5] == 0 && !platform.has_acpi) {
            platform.timer_gsi = at[7];                                     /* ISA line 0 goes to this pin */
        }
        at += at[0] == 0 ? 20 : 8;
    }
}

void tables_start(void)
{
    read_acpi();
    read_mp_table();
    if (!platform.cpu_count)
        add_cpu(lapic_read(LAPIC_ID) >> 24);
}

enum verdict test_acpi(void)
{
    if (!platform.has_acpi && !boot_rsdp && !find_in_firmware("RSD PTR "))
        return skip("%s", acpi_trouble);
    CHECK(!acpi_trouble, "%s", acpi_trouble);
    CHECK(platform.cpu_count, "the MADT lists no processor");
    CHECK(platform.pm1_control, "no FADT, or one without PM1a control");
    CHECK(platform.has_s5, "the DSDT has no _S5_");
    return ok("%u tables, %u CPUs, SCI %u, PM1a 0x%x, S5 type %u, ECAM 0x%08x", platform.tables, platform.cpu_count,
              platform.sci, platform.pm1_event, platform.sleep_type_s5, platform.ecam_base);
}

enum verdict test_mp_table(void)
{
    if (!platform.has_mp && !find_in_firmware("_MP_"))
        return skip("%s", mp_trouble);
    CHECK(platform.has_mp, "%s", mp_trouble);
    CHECK(platform.mp_cpu_count && platform.mp_cpu_count <= platform.cpu_count, "%u CPUs here, %u in the MADT",
          platform.mp_cpu_count, platform.cpu_count);             /* fewer is right: threads of a core need not be listed */
    return ok("%u CPUs", platform.mp_cpu_count);
}

/* The structure after this one: its strings follow it, ended by two NULs. */
static const u8 *next_structure(const u8 *structure)
{
    const u8 *at = structure + structure[1];
    while (at[0] || at[1])
        at++;
    return at + 2;
}

static const char *structure_string(const u8 *structure, u32 number)
{
    const char *text = (const char *)structure + structure[1];
    for (; number > 1 && *text; number--)
        text += strlen(text) + 1;
    return number ? text : "";
}

enum verdict test_smbios(void)
{
    u32 anchor3 = find_anchor(SMBIOS_AREA, BIOS_AREA_END, "_SM3_");
    u32 anchor = anchor3 ? anchor3 : find_anchor(SMBIOS_AREA, BIOS_AREA_END, "_SM_");
    if (!anchor)
        return skip("no entry point in 0xf0000-0xfffff");
    const u8 *entry = (const u8 *)anchor;
    CHECK(sums_to_zero(entry, entry[anchor3 ? 6 : 5]), "entry point at 0x%x: wrong checksum", anchor);
    const u8 *structure = (const u8 *)load32(anchor + (anchor3 ? 16 : 24)), *system = NULL;
    u32 count = 0;
    for (; count < 256 && structure[0] != 127; count++, structure = next_structure(structure)) {
        CHECK(structure[1] >= 4, "structure %u of type %u has length %u", count, structure[0], structure[1]);
        if (structure[0] == 1)
            system = structure;
    }
    CHECK(structure[0] == 127, "no end-of-table structure among the first 256");
    CHECK(system, "no system structure (type 1) among %u", count);
    return ok("%u structures, system '%s %s'", count + 1, structure_string(system, system[4]),
              structure_string(system, system[5]));
}
