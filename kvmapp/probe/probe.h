/*
 * What the probe's files share. The probe is a kernel of a few KB that drives every device of the machine it wakes up in
 * and reports each step as one line; __init__.py tells its command line and the form of its report.
 *
 * It must run where KVM interprets guest code at a million instructions a second and an exit costs 50 microseconds, so it
 * counts both: no loop over a megabyte, no polling where an interrupt can be awaited.
 * It stays in 32-bit protected mode with paging off (address = physical address); longmode.S visits 64-bit mode.
 */
#ifndef PROBE_H
#define PROBE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))

/* Ports and the few instructions that C has no word for. */
static inline void out8(u16 port, u8 value) { asm volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline void out16(u16 port, u16 value) { asm volatile("outw %0, %1" : : "a"(value), "Nd"(port)); }
static inline void out32(u16 port, u32 value) { asm volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }
static inline u8 in8(u16 port) { u8 value; asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static inline u16 in16(u16 port) { u16 value; asm volatile("inw %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static inline u32 in32(u16 port) { u32 value; asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port)); return value; }

static inline void interrupts_off(void) { asm volatile("cli" : : : "memory"); }
static inline void interrupts_on(void) { asm volatile("sti" : : : "memory"); }
/* STI holds interrupts back for one more instruction: one that arrives here ends the HLT instead of slipping in before it. */
static inline void halt_until_interrupt(void) { asm volatile("sti; hlt; cli" : : : "memory"); }

static inline void cpuid(u32 leaf, u32 out[4])
{
    asm volatile("cpuid" : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3]) : "a"(leaf), "c"(0));
}

/* Memory-mapped registers, at the width of the access. */
static inline u32 load32(u32 address) { return *(volatile u32 *)address; }
static inline void store32(u32 address, u32 value) { *(volatile u32 *)address = value; }

/* text.c: the four functions that a freestanding compiler may call, and the ones we want. */
void *memcpy(void *to, const void *from, size_t size);
void *memset(void *to, int value, size_t size);
int memcmp(const void *a, const void *b, size_t size);
size_t strlen(const char *text);
size_t format_text(char *out, size_t size, const char *format, __builtin_va_list arguments);

/* report.c: the verdict of a step, and the line that tells it. */
enum verdict { OK, FAIL, SKIP };
enum verdict ok(const char *format, ...) __attribute__((format(printf, 1, 2)));
enum verdict fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
enum verdict skip(const char *format, ...) __attribute__((format(printf, 1, 2)));
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
void report_start(void);
void report_step(const char *name, enum verdict verdict);
void report_done(void);
u32 failed_steps(void);
enum verdict test_debug_port(void);

#define CHECK(condition, ...) do { if (!(condition)) return fail(__VA_ARGS__); } while (0)
#define TRY(step) do { enum verdict outcome_ = (step); if (outcome_ != OK) return outcome_; } while (0)

/* boot.c: what the loader told us, by multiboot 1 or by PVH. */
extern const char *boot_protocol;
extern u32 boot_rsdp;                                   /* 0: unknown, look for it */
extern u32 memory_end_below_4g;
void boot_information(u32 magic, u32 info);
const char *word(const char *key);                      /* the value of key=value, "" for a bare word, NULL when absent */
bool word_is(const char *value, const char *text);
bool word_lists(const char *value, const char *name);
u32 word_number(const char *value);
enum verdict test_memory(void);

/* interrupts.c: IDT, both 8259A (masked unless tested), I/O APIC, local APIC. */
enum {
    VECTOR_PIC = 0x20,                                  /* sixteen, one an ISA line */
    VECTOR_TIMER = 0x30,                                /* local APIC timer: the deadline of every wait */
    VECTOR_PING = 0x31,
    VECTOR_PONG = 0x32,
    VECTOR_MSIX = 0x33,
    VECTOR_SPURIOUS = 0x3F,
    VECTOR_IOAPIC = 0x40,                               /* twenty-four, one a pin */
    VECTORS = 0x58,
};
enum { LAPIC_ID = 0x20, LAPIC_LVT_TIMER = 0x320, LAPIC_LVT_LINT0 = 0x350, LAPIC_TIMER_INITIAL = 0x380,
       LAPIC_TIMER_CURRENT = 0x390, LAPIC_TIMER_DIVIDE = 0x3E0 };
extern volatile u32 interrupts[VECTORS];                /* how many came, by vector */
void interrupts_start(void);
void interrupts_start_ap(void);
void on_interrupt(u32 vector, void (*handler)(void));   /* runs before the EOI: it must quiet a level-triggered source */
u32 lapic_read(u32 offset);
void lapic_write(u32 offset, u32 value);
void send_ipi(u32 apic_id, u32 command);
u32 gsi_of_irq(u32 irq);
void ioapic_open(u32 gsi, bool level);                  /* arrives as VECTOR_IOAPIC + gsi on this CPU */
void ioapic_close(u32 gsi);

/* timer.c: PIT, local APIC timer, ACPI PM timer, and waiting. */
void timer_start(void);
bool wait_for(const volatile u32 *count, u32 target, u32 milliseconds);     /* false: the time was up first */
void sleep_ms(u32 milliseconds);
enum verdict test_pic(void);
enum verdict test_ioapic(void);
enum verdict test_lapic_timer(void);
enum verdict test_pm_timer(void);

/* tables.c: what the ACPI and MP tables say of the machine; SMBIOS. */
struct platform {
    bool has_acpi, has_mp;
    u32 tables;                                         /* ACPI tables with a right checksum */
    u32 cpus[255], cpu_count;                           /* local APIC ids, by MADT, else by MP table */
    u32 mp_cpu_count;
    u32 ioapic_base, timer_gsi;
    u32 ecam_base;                                      /* 0: none, or out of reach above 4 GiB */
    u32 smi_command, pm1_event, pm1_control, pm_timer, sci;
    u8 acpi_enable, pm1_event_length, sleep_type_s5;
    bool has_s5;
};
extern struct platform platform;
void tables_start(void);
enum verdict test_acpi(void);
enum verdict test_mp_table(void);
enum verdict test_smbios(void);

/* pci.c: configuration space, BARs and capabilities of bus 0. */
struct pci_function {
    u8 slot, number;
    u16 vendor, device;
    u32 class;
};
enum { PCI_COMMAND = 0x04, PCI_BAR = 0x10, PCI_INTERRUPT = 0x3C, PCI_CAP_VENDOR = 0x09, PCI_CAP_MSIX = 0x11 };
void pci_start(void);
const struct pci_function *pci_find(u16 vendor, u16 device);
u32 pci_read(const struct pci_function *f, u32 offset);             /* a dword; the low two bits of offset are ignored */
void pci_write(const struct pci_function *f, u32 offset, u32 value);
u32 pci_bar(const struct pci_function *f, u32 bar);                 /* its address, given one first if need be; 0: none */
u32 pci_capability(const struct pci_function *f, u32 id, u32 after);
enum verdict test_pci(void);

/* One file a device: its step. */
enum verdict test_cpu(void);
enum verdict test_serial(void);
void serial_start(void);
void serial_write(const char *text, size_t size);
void serial_echo(void);
enum verdict test_rtc(void);
enum verdict test_rtc_alarm(void);
enum verdict test_i8042(void);
enum verdict test_smp(void);
enum verdict test_long_mode(void);
enum verdict test_user_mode(void);
enum verdict test_virtio_blk(void);
enum verdict test_virtio_blk_intx(void);
enum verdict test_virtio_net(void);
enum verdict test_virtio_rng(void);
enum verdict test_virtio_console(void);
enum verdict test_msix(void);
enum verdict test_hostile(void);

/* power.c: the ways out. */
void power_button_start(void);
void end(void) __attribute__((noreturn));

#endif
