/* What instrumented code calls (gcc's -fsanitize-coverage=trace-pc,trace-cmp): which edges an input took, and the constants that
 * it was compared with. Loaded by LD_PRELOAD before the sanitizers' own, which are empty. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { MAP_SIZE = 1 << 16, CONSTANTS = 256 };

static uint8_t map[MAP_SIZE];           /* how often each edge was taken since the last look */
static uint8_t seen[MAP_SIZE];          /* a bit for each class of counts of an edge */
static uint64_t constants[CONSTANTS];   /* the latest that differed from what they were compared with */
static uint32_t constants_next;
static int on;
static __thread uint32_t previous;

void coverage_switch(int wanted) { on = wanted; }
void coverage_forget(void) { memset(seen, 0, sizeof seen); memset(map, 0, sizeof map); }
const uint64_t *coverage_constants(void) { return constants; }

void __sanitizer_cov_trace_pc(void)
{
    uint32_t here;

    if (!on)
        return;
    here = (uint32_t)(((uintptr_t)__builtin_return_address(0) * 0x9E3779B97F4A7C15ull) >> 44);
    map[(here ^ previous) % MAP_SIZE] += 1;
    previous = here >> 1;
}

/* Marks what the last inputs covered as seen; how much of it is new, in classes of counts: 1, 2-7, 8 and more. */
uint32_t coverage_take(void)
{
    uint32_t i, fresh = 0;
    uint64_t word;

    for (i = 0; i < MAP_SIZE; i++) {
        uint8_t class;
        if (i % 8 == 0) {
            memcpy(&word, map + i, sizeof word);
            if (word == 0) {
                i += 7;
                continue;
            }
        }
        if (map[i] == 0)
            continue;
        class = map[i] == 1 ? 1 : map[i] < 8 ? 2 : 4;
        fresh += !(seen[i] & class);
        seen[i] |= class;
    }
    memset(map, 0, sizeof map);
    return fresh;
}

uint32_t coverage_edges(void)
{
    uint32_t i, edges = 0;

    for (i = 0; i < MAP_SIZE; i++)
        edges += seen[i] != 0;
    return edges;
}

static inline void compared(uint64_t a, uint64_t b)
{
    if (on && a != b && a > 0xFF)
        constants[constants_next++ % CONSTANTS] = a;
}

void __sanitizer_cov_trace_const_cmp1(uint8_t a, uint8_t b) { compared(a, b); }
void __sanitizer_cov_trace_const_cmp2(uint16_t a, uint16_t b) { compared(a, b); }
void __sanitizer_cov_trace_const_cmp4(uint32_t a, uint32_t b) { compared(a, b); }
void __sanitizer_cov_trace_const_cmp8(uint64_t a, uint64_t b) { compared(a, b); }
void __sanitizer_cov_trace_cmp1(uint8_t a, uint8_t b) { (void)a; (void)b; }
void __sanitizer_cov_trace_cmp2(uint16_t a, uint16_t b) { (void)a; (void)b; }
void __sanitizer_cov_trace_cmp4(uint32_t a, uint32_t b) { compared(a, b); }
void __sanitizer_cov_trace_cmp8(uint64_t a, uint64_t b) { compared(a, b); }
void __sanitizer_cov_trace_cmpf(float a, float b) { (void)a; (void)b; }
void __sanitizer_cov_trace_cmpd(double a, double b) { (void)a; (void)b; }

void __sanitizer_cov_trace_switch(uint64_t value, uint64_t *cases)
{
    uint64_t i;

    for (i = 0; i < cases[0] && i < 16; i++)
        compared(cases[2 + i], value);
}
