/*
 * What the loader tells: the command line, the memory map and, by PVH, where the RSDP is. Read once at the start and
 * copied, for the steps use the low memory it lies in. Multiboot specification 0.6.96; Xen's struct hvm_start_info.
 * Memory above 4 GiB is counted but never touched: it is out of reach without paging.
 */
#include "probe.h"

#define MULTIBOOT_BOOTED 0x2BADB002
#define PVH_MAGIC 0x336EC578
#define USABLE 1

struct multiboot_info { u32 flags, mem_lower, mem_upper, boot_device, command_line, modules[2], symbols[4], mmap_length, mmap; };
struct multiboot_range { u32 size; u64 start, length; u32 type; } __attribute__((packed));
struct pvh_info { u32 magic, version, flags, modules; u64 module_list, command_line, rsdp, memory_map; u32 ranges; };
struct pvh_range { u64 start, length; u32 type, reserved; };

static struct { u64 start, length; } ranges[32];        /* the usable ones */
static char command_line[512];

const char *boot_protocol = "an unknown loader";
u32 boot_rsdp, memory_end_below_4g;
static u32 usable_ranges;

static void add_range(u64 start, u64 length, u32 type)
{
    if (type != USABLE || usable_ranges == LENGTH(ranges))
        return;
    ranges[usable_ranges].start = start;
    ranges[usable_ranges++].length = length;
    if (start + length <= 0x100000000 && (u32)(start + length) > memory_end_below_4g)
        memory_end_below_4g = (u32)(start + length);
}

static void read_multiboot(const struct multiboot_info *info)
{
    boot_protocol = "multiboot";
    if (info->flags & 1 << 2)
        memcpy(command_line, (const char *)info->command_line, sizeof command_line - 1);
    if (info->flags & 1 << 6) {
        u32 at = info->mmap, stop = info->mmap + info->mmap_length;
        while (at < stop) {
            const struct multiboot_range *range = (const void *)at;
            add_range(range->start, range->length, range->type);
            at += range->size + 4;
        }
    } else if (info->flags & 1) {
        add_range(0, info->mem_lower * 1024, USABLE);
        add_range(0x100000, (u64)info->mem_upper * 1024, USABLE);
    }
}

static void read_pvh(const struct pvh_info *info)
{
    boot_protocol = "PVH";
    boot_rsdp = (u32)info->rsdp;
    if (info->command_line)
        memcpy(command_line, (const char *)(u32)info->command_line, sizeof command_line - 1);
    const struct pvh_range *range = (const void *)(u32)info->memory_map;
    for (u32 i = 0; info->version >= 1 && i < info->ranges; i++)
        add_range(range[i].start, range[i].length, range[i].type);
}

void boot_information(u32 magic, u32 info)
{
    if (magic == MULTIBOOT_BOOTED)
        read_multiboot((const void *)info);
    else if (*(const u32 *)info == PVH_MAGIC)
        read_pvh((const void *)info);
}

const char *word(const char *key)
{
    size_t length = strlen(key);
    for (const char *at = command_line; *at; at++) {
        if (at != command_line && at[-1] != ' ')
            continue;
        if (memcmp(at, key, length) == 0 && (at[length] == '=' || at[length] == ' ' || at[length] == 0))
            return at + length + (at[length] == '=');
    }
    return NULL;
}

/* The value up to one of `stops` is `text`. */
static bool matches(const char *value, const char *text, size_t length, const char *stops)
{
    if (memcmp(value, text, length) != 0)
        return false;
    for (; *stops; stops++)
        if (value[length] == *stops)
            return true;
    return value[length] == 0;
}

bool word_is(const char *value, const char *text)
{
    return value && matches(value, text, strlen(text), " :");
}

bool word_lists(const char *value, const char *name)
{
    size_t length = strlen(name);
    while (value) {
        if (matches(value, name, length, ", "))
            return true;
        while (*value && *value != ' ' && *value != ',')
            value++;
        value = *value == ',' ? value + 1 : NULL;
    }
    return false;
}

u32 word_number(const char *value)
{
    u32 number = 0;
    for (; value && *value >= '0' && *value <= '9'; value++)
        number = number * 10 + (u32)(*value - '0');
    return number;
}

/* The last word of each usable range below 4 GiB holds what is written to it; the value before is put back. */
enum verdict test_memory(void)
{
    u32 low_kib = 0, high_mib = 0;
    if (!usable_ranges)
        return skip("%s gave no memory map", boot_protocol);
    for (u32 i = 0; i < usable_ranges; i++) {
        u64 stop = ranges[i].start + ranges[i].length;
        if (stop > 0x100000000) {
            high_mib += (u32)(ranges[i].length >> 20);
            continue;
        }
        low_kib += (u32)(ranges[i].length >> 10);
        u32 last = ((u32)stop - 4) & ~3U, before = load32(last);
        store32(last, ~before);
        u32 after = load32(last);
        store32(last, before);
        CHECK(after == ~before, "wrote 0x%08x at 0x%08x, read 0x%08x", ~before, last, after);
    }
    return ok("%u usable ranges by %s: %u KiB below 4 GiB, %u MiB above", usable_ranges, boot_protocol, low_kib, high_mib);
}
