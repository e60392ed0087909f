/*
 * CMOS RTC: Motorola MC146818A with the century and memory-size bytes of a PC. Time, update flag, battery-backed byte,
 * memory size against the loader's map, periodic interrupt; on request the alarm (it takes up to two seconds).
 * Not here: daylight saving, square wave.
 */
#include "probe.h"

enum { SECONDS = 0, SECONDS_ALARM = 1, MINUTES = 2, MINUTES_ALARM = 3, HOURS = 4, HOURS_ALARM = 5, DAY = 7, MONTH = 8, YEAR = 9,
       REG_A = 0x0A, REG_B = 0x0B, REG_C = 0x0C, REG_D = 0x0D, SHUTDOWN = 0x0F, CENTURY = 0x32, MEMORY_ABOVE_16M = 0x34 };
#define A_UPDATING 0x80
#define A_RATE_1024HZ 0x26
#define B_PERIODIC 0x40
#define B_ALARM 0x20
#define B_BINARY 0x04
#define B_24_HOURS 0x02
#define D_VALID 0x80
#define ANY 0xC0                        /* an alarm byte that matches every value */
#define RTC_IRQ 8

struct date { u32 second, minute, hour, day, month, year; };

static volatile u8 interrupt_flags;

static u8 cmos_read(u8 index)
{
    out8(0x70, index);
    return in8(0x71);
}

static void cmos_write(u8 index, u8 value)
{
    out8(0x70, index);
    out8(0x71, value);
}

static u32 cmos_number(u8 index, u8 reg_b)
{
    u8 value = cmos_read(index);
    return reg_b & B_BINARY ? value : (value >> 4) * 10U + (value & 15);
}

static struct date read_date(u8 reg_b)
{
    return (struct date){
        cmos_number(SECONDS, reg_b), cmos_number(MINUTES, reg_b), cmos_number(HOURS, reg_b), cmos_number(DAY, reg_b),
        cmos_number(MONTH, reg_b), cmos_number(YEAR, reg_b) + 100 * cmos_number(CENTURY, reg_b),
    };
}

/* Read until two reads agree, as an update may fall between two registers. */
static enum verdict test_time(struct date *date)
{
    u8 reg_b = cmos_read(REG_B);
    CHECK(cmos_read(REG_D) & D_VALID, "register D 0x%02x: time and memory not valid", cmos_read(REG_D));
    CHECK(reg_b & B_24_HOURS, "register B 0x%02x: 12-hour mode", reg_b);
    u32 tries = 0;
    while (cmos_read(REG_A) & A_UPDATING)
        CHECK(++tries < 1000, "register A says 'updating' for ever");
    struct date again = read_date(reg_b);
    do {
        *date = again;
        again = read_date(reg_b);
        CHECK(++tries < 1010, "no two reads of the time agree");
    } while (memcmp(date, &again, sizeof again) != 0);
    CHECK(date->second < 60 && date->minute < 60 && date->hour < 24 && date->day >= 1 && date->day <= 31 &&
          date->month >= 1 && date->month <= 12 && date->year >= 1970 && date->year < 2100,
          "implausible time %04u-%02u-%02u %02u:%02u:%02u", date->year, date->month, date->day, date->hour, date->minute,
          date->second);
    return OK;
}

static enum verdict test_memory_bytes(void)
{
    u8 before = cmos_read(SHUTDOWN);
    cmos_write(SHUTDOWN, 0x0A);
    u8 after = cmos_read(SHUTDOWN);
    cmos_write(SHUTDOWN, before);
    CHECK(after == 0x0A, "byte 0x%02x reads 0x%02x, wrote 0x0a", SHUTDOWN, after);
    u32 units = cmos_read(MEMORY_ABOVE_16M) | (u32)cmos_read(MEMORY_ABOVE_16M + 1) << 8;
    u32 expected = memory_end_below_4g > 16U << 20 ? (memory_end_below_4g - (16U << 20)) >> 16 : 0;
    /* The map may end a little lower: firmware keeps its tables there. */
    CHECK(!memory_end_below_4g || (units >= expected && units - expected < 16),
          "bytes 0x34-35 tell %u * 64 KiB above 16 MiB, the memory map %u", units, expected);
    return OK;
}

static void note_flags(void)
{
    interrupt_flags |= cmos_read(REG_C);                            /* reading it takes the interrupt back */
}

/* Opens the line, enables `enable` in register B, and waits for the flag of the same bit. */
static enum verdict await_flag(u8 enable, const char *what, u32 milliseconds)
{
    const volatile u32 *count = &interrupts[VECTOR_IOAPIC + RTC_IRQ];
    u8 reg_b = cmos_read(REG_B);
    on_interrupt(VECTOR_IOAPIC + RTC_IRQ, note_flags);
    ioapic_open(RTC_IRQ, false);
    cmos_read(REG_C);
    interrupt_flags = 0;
    cmos_write(REG_B, reg_b | enable);
    bool came = true;
    while (came && !(interrupt_flags & enable))                     /* one of another kind may still be on its way */
        came = wait_for(count, *count + 1, milliseconds);
    cmos_write(REG_B, reg_b);
    ioapic_close(RTC_IRQ);
    CHECK(came, "no %s interrupt on IRQ %u in %u ms: register C 0x%02x", what, RTC_IRQ, milliseconds, cmos_read(REG_C));
    return OK;
}

enum verdict test_rtc(void)
{
    struct date date;
    if (cmos_read(REG_D) == 0xFF)
        return skip("nothing at port 0x70");
    TRY(test_time(&date));
    TRY(test_memory_bytes());
    cmos_write(REG_A, A_RATE_1024HZ);
    TRY(await_flag(B_PERIODIC, "periodic", 200));
    return ok("%04u-%02u-%02u %02u:%02u:%02u, memory size, periodic interrupt on IRQ %u", date.year, date.month, date.day,
              date.hour, date.minute, date.second, RTC_IRQ);
}

/* An alarm every second: all three bytes "any". */
enum verdict test_rtc_alarm(void)
{
    cmos_write(SECONDS_ALARM, ANY);
    cmos_write(MINUTES_ALARM, ANY);
    cmos_write(HOURS_ALARM, ANY);
    TRY(await_flag(B_ALARM, "alarm", 2500));
    return ok("alarm interrupt on IRQ %u", RTC_IRQ);
}
