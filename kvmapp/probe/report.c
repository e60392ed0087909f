/*
 * The report: one line a step on the debug port 0x402, or on COM1, or on both (command line: report=debug|serial|both).
 * Without the word it goes to the debug port where that reads back 0xE9, and to COM1 where it does not.
 */
#include "probe.h"

#define DEBUG_PORT 0x402
#define DEBUG_PORT_READBACK 0xE9        /* as Bochs and QEMU answer: "somebody listens" */

static bool to_debug_port, to_serial;
static char detail[200];                /* what the running step says of itself */
static u32 verdicts[3];

#define DETAIL(verdict)                                         \
    __builtin_va_list arguments;                                \
    __builtin_va_start(arguments, format);                      \
    format_text(detail, sizeof detail, format, arguments);      \
    __builtin_va_end(arguments);                                \
    return verdict

enum verdict ok(const char *format, ...) { DETAIL(OK); }
enum verdict fail(const char *format, ...) { DETAIL(FAIL); }
enum verdict skip(const char *format, ...) { DETAIL(SKIP); }

void report_start(void)
{
    const char *where = word("report");
    bool listens = in8(DEBUG_PORT) == DEBUG_PORT_READBACK;
    to_debug_port = where ? word_is(where, "debug") || word_is(where, "both") : listens;
    to_serial = !to_debug_port || word_is(where, "both");
}

static void write_line(char *line, size_t size)
{
    line[size++] = '\n';
    if (to_serial)
        serial_write(line, size);
    if (to_debug_port)
        asm volatile("rep outsb" : "+S"(line), "+c"(size) : "d"(DEBUG_PORT) : "memory");
}

void say(const char *format, ...)
{
    char line[sizeof detail + 40];
    __builtin_va_list arguments;
    __builtin_va_start(arguments, format);
    size_t size = format_text(line, sizeof line - 1, format, arguments);
    __builtin_va_end(arguments);
    write_line(line, size);
}

void report_step(const char *name, enum verdict verdict)
{
    static const char *const names[] = { "ok", "fail", "skip" };
    verdicts[verdict]++;
    say("%s %s: %s", names[verdict], name, detail);
}

void report_done(void)
{
    say("done passed=%u failed=%u skipped=%u", verdicts[OK], verdicts[FAIL], verdicts[SKIP]);
}

u32 failed_steps(void)
{
    return verdicts[FAIL];
}

enum verdict test_debug_port(void)
{
    u8 value = in8(DEBUG_PORT);
    if (value == 0xFF)
        return skip("nothing at port 0x402");
    CHECK(value == DEBUG_PORT_READBACK, "port 0x402 reads 0x%02x, expected 0xe9", value);
    return ok("port 0x402 reads back 0xe9");
}
