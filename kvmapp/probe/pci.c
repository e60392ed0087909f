/*
 * PCI bus 0: configuration space by mechanism 1 and by ECAM, BARs, the capability list. PCI Local Bus 3.0 chapter 6,
 * PCI Express 5.0 7.2.2. A BAR that nobody gave an address, or one above 4 GiB (out of reach), gets one from WINDOW.
 * Not here: bridges (bus 0 is all that a VMM of ours has), expansion ROMs.
 */
#include "probe.h"

#define CONFIG_ADDRESS 0xCF8
#define CONFIG_DATA 0xCFC
#define CONFIG_ENABLE 0x80000000
#define WINDOW 0xD8000000               /* inside the hole of every machine we know, above what others hand out */
#define CLASS 0x08
#define HEADER 0x0C
#define HEADER_MULTIFUNCTION 0x00800000
#define HEADER_TYPE 0x007F0000
#define COMMAND_IO 0x1
#define COMMAND_MEMORY 0x2
#define COMMAND_BUS_MASTER 0x4
#define STATUS_CAPABILITIES 0x00100000
#define CAPABILITY_POINTER 0x34
#define BAR_IO 0x1
#define BAR_64 0x4

static struct pci_function functions[64];
static u32 function_count;
static u32 next_address = WINDOW;

static u32 mechanism1_read(const struct pci_function *f, u32 offset)
{
    out32(CONFIG_ADDRESS, CONFIG_ENABLE | (u32)f->slot << 11 | (u32)f->number << 8 | (offset & 0xFC));
    return in32(CONFIG_DATA);
}

static u32 ecam(const struct pci_function *f, u32 offset)
{
    return platform.ecam_base + ((u32)f->slot << 15) + ((u32)f->number << 12) + (offset & 0xFFC);
}

u32 pci_read(const struct pci_function *f, u32 offset)
{
    return platform.ecam_base ? load32(ecam(f, offset)) : mechanism1_read(f, offset);
}

void pci_write(const struct pci_function *f, u32 offset, u32 value)
{
    if (platform.ecam_base) {
        store32(ecam(f, offset), value);
        return;
    }
    mechanism1_read(f, offset);
    out32(CONFIG_DATA, value);
}

static bool note_function(struct pci_function f)
{
    u32 id = mechanism1_read(&f, 0);
    if (id == 0xFFFFFFFF || function_count == LENGTH(functions))
        return false;
    f.vendor = (u16)id;
    f.device = (u16)(id >> 16);
    f.class = mechanism1_read(&f, CLASS) >> 8;
    functions[function_count++] = f;
    return true;
}

void pci_start(void)
{
    for (u8 slot = 0; slot < 32; slot++) {
        struct pci_function f = { .slot = slot };
        if (!note_function(f) || !(mechanism1_read(&f, HEADER) & HEADER_MULTIFUNCTION))
            continue;
        for (f.number = 1; f.number < 8; f.number++)
            note_function(f);
    }
}

const struct pci_function *pci_find(u16 vendor, u16 device)
{
    for (u32 i = 0; i < function_count; i++)
        if (functions[i].vendor == vendor && functions[i].device == device)
            return &functions[i];
    return NULL;
}

u32 pci_capability(const struct pci_function *f, u32 id, u32 after)
{
    if (!(pci_read(f, PCI_COMMAND) & STATUS_CAPABILITIES))
        return 0;
    u32 at = after ? pci_read(f, after) >> 8 & 0xFC : pci_read(f, CAPABILITY_POINTER) & 0xFC;
    for (u32 hops = 0; at >= 0x40 && hops < 48; hops++) {
        u32 header = pci_read(f, at);
        if ((header & 0xFF) == id)
            return at;
        at = header >> 8 & 0xFC;
    }
    return 0;
}

/* What a BAR answers to all ones, with decoding off meanwhile so that it answers nowhere else. */
static u32 size_mask(const struct pci_function *f, u32 offset)
{
    u32 command = pci_read(f, PCI_COMMAND) & 0xFFFF, before = pci_read(f, offset);
    pci_write(f, PCI_COMMAND, command & ~(u32)(COMMAND_IO | COMMAND_MEMORY));
    pci_write(f, offset, 0xFFFFFFFF);
    u32 mask = pci_read(f, offset);
    pci_write(f, offset, before);
    pci_write(f, PCI_COMMAND, command);
    return mask & (before & BAR_IO ? ~0x3U : ~0xFU);
}

u32 pci_bar(const struct pci_function *f, u32 bar)
{
    u32 offset = PCI_BAR + bar * 4, low = pci_read(f, offset);
    bool wide = !(low & BAR_IO) && low & BAR_64;
    u32 high = wide ? pci_read(f, offset + 4) : 0;
    if (low & BAR_IO)
        return 0;
    if (!(low & ~0xFU) || high) {
        u32 mask = size_mask(f, offset), size = ~mask + 1;
        if (!mask)
            return 0;
        next_address = (next_address + size - 1) & mask;
        pci_write(f, offset, next_address);
        if (wide)
            pci_write(f, offset + 4, 0);
        next_address += size;
    }
    pci_write(f, PCI_COMMAND, (pci_read(f, PCI_COMMAND) & 0xFFFF) | COMMAND_MEMORY | COMMAND_BUS_MASTER);
    return pci_read(f, offset) & ~0xFU;
}

static enum verdict compare_mechanisms(const struct pci_function *f)
{
    static const u8 offsets[] = { 0x00, PCI_COMMAND, CLASS, HEADER, 0x2C, CAPABILITY_POINTER, PCI_INTERRUPT };
    for (u32 i = 0; platform.ecam_base && i < LENGTH(offsets); i++) {
        u32 by_ports = mechanism1_read(f, offsets[i]), by_memory = load32(ecam(f, offsets[i]));
        CHECK(by_ports == by_memory, "00:%02x.%u offset 0x%02x: 0x%08x by ports, 0x%08x by ECAM", f->slot, f->number, offsets[i],
              by_ports, by_memory);
    }
    return OK;
}

/* The data port is four bytes wide, and each of them can be read alone. */
static enum verdict check_narrow_reads(const struct pci_function *f)
{
    u32 id = mechanism1_read(f, 0);
    u16 device = in16(CONFIG_DATA + 2);
    u8 vendor_high = in8(CONFIG_DATA + 1);
    CHECK(device == id >> 16 && vendor_high == (id >> 8 & 0xFF), "00:%02x.%u: id 0x%08x, but 0x%04x by word and 0x%02x by byte",
          f->slot, f->number, id, device, vendor_high);
    return OK;
}

static enum verdict check_bars(const struct pci_function *f, u32 *bars)
{
    if (mechanism1_read(f, HEADER) & HEADER_TYPE)
        return OK;                                              /* a bridge has other registers here */
    for (u32 bar = 0; bar < 6; bar++) {
        u32 offset = PCI_BAR + bar * 4, value = pci_read(f, offset), mask = size_mask(f, offset);
        if (!mask)
            continue;
        u32 size = (~mask + 1) & (value & BAR_IO ? 0xFFFF : 0xFFFFFFFF);
        CHECK((size & (size - 1)) == 0, "00:%02x.%u BAR %u: size 0x%x is no power of two", f->slot, f->number, bar, size);
        CHECK((value & (size - 1) & ~0xFU) == 0, "00:%02x.%u BAR %u: 0x%08x is not on its size 0x%x", f->slot, f->number, bar,
              value, size);
        CHECK(pci_read(f, offset) == value, "00:%02x.%u BAR %u does not hold what is written", f->slot, f->number, bar);
        ++*bars;
        if (!(value & BAR_IO) && value & BAR_64)
            bar++;
    }
    return OK;
}

static enum verdict check_capabilities(const struct pci_function *f, u32 *capabilities)
{
    u32 at = pci_read(f, PCI_COMMAND) & STATUS_CAPABILITIES ? pci_read(f, CAPABILITY_POINTER) & 0xFF : 0, hops = 0;
    while (at) {
        CHECK(at >= 0x40 && !(at & 3), "00:%02x.%u: capability at 0x%02x", f->slot, f->number, at);
        CHECK(++hops <= 48, "00:%02x.%u: the capability list has no end", f->slot, f->number);
        at = pci_read(f, at) >> 8 & 0xFF;
        ++*capabilities;
    }
    return OK;
}

enum verdict test_pci(void)
{
    u32 bars = 0, capabilities = 0;
    if (!function_count)
        return skip("no device on bus 0 by mechanism 1");
    for (u32 i = 0; i < function_count; i++) {
        const struct pci_function *f = &functions[i];
        TRY(compare_mechanisms(f));
        TRY(check_bars(f, &bars));
        TRY(check_capabilities(f, &capabilities));
        say("note pci: 00:%02x.%u %04x:%04x class %06x", f->slot, f->number, f->vendor, f->device, f->class);
    }
    TRY(check_narrow_reads(&functions[0]));
    u32 empty = mechanism1_read(&(struct pci_function){ .slot = 31, .number = 7 }, 0);
    CHECK(empty == 0xFFFFFFFF, "00:1f.7, where nothing is, reads 0x%08x", empty);
    return ok("%u functions, %u BARs, %u capabilities, %s", function_count, bars, capabilities,
              platform.ecam_base ? "mechanism 1 and ECAM agree" : "mechanism 1 alone");
}
