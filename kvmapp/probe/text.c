/* Memory and text: what a freestanding compiler expects to find, and a printf of six conversions. */
#include "probe.h"

void *memcpy(void *to, const void *from, size_t size)
{
    void *start = to;
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
    return start;
}

void *memset(void *to, int value, size_t size)
{
    void *start = to;
    asm volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(value) : "memory");
    return start;
}

int memcmp(const void *a, const void *b, size_t size)
{
    const u8 *x = a, *y = b;
    for (; size; size--, x++, y++)
        if (*x != *y)
            return *x - *y;
    return 0;
}

size_t strlen(const char *text)
{
    size_t length = 0;
    while (text[length])
        length++;
    return length;
}

struct sink { char *out; size_t size, used; };

static void put(struct sink *sink, char c)
{
    if (sink->used + 1 < sink->size)
        sink->out[sink->used++] = c;
}

static void put_number(struct sink *sink, u32 value, u32 base, u32 width, char pad)
{
    char digits[10];
    u32 count = 0;
    do {
        digits[count++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    for (; width > count; width--)
        put(sink, pad);
    while (count)
        put(sink, digits[--count]);
}

/* %s %c %u %d %x %%, with a width and a leading 0 for the numbers. Always ends in NUL; returns the length kept. */
size_t format_text(char *out, size_t size, const char *format, __builtin_va_list arguments)
{
    struct sink sink = { out, size, 0 };
    for (; *format; format++) {
        if (*format != '%') {
            put(&sink, *format);
            continue;
        }
        char pad = *++format == '0' ? '0' : ' ';
        u32 width = 0;
        for (; *format >= '0' && *format <= '9'; format++)
            width = width * 10 + (u32)(*format - '0');
        if (*format == 's') {
            for (const char *text = __builtin_va_arg(arguments, const char *); *text; text++)
                put(&sink, *text);
        } else if (*format == 'c') {
            put(&sink, (char)__builtin_va_arg(arguments, int));
        } else if (*format == 'u') {
            put_number(&sink, __builtin_va_arg(arguments, u32), 10, width, pad);
        } else if (*format == 'x') {
            put_number(&sink, __builtin_va_arg(arguments, u32), 16, width, pad);
        } else if (*format == 'd') {
            int value = __builtin_va_arg(arguments, int);
            if (value < 0)
                put(&sink, '-');
            put_number(&sink, value < 0 ? 0U - (u32)value : (u32)value, 10, width, pad);
        } else {
            put(&sink, *format);
        }
    }
    sink.out[sink.used] = 0;
    return sink.used;
}
