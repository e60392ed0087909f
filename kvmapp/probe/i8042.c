/* Keyboard controller: Intel 8042 as the PC has it. Both self tests and the command byte; no keys, no mouse. */
#include "probe.h"

#define DATA 0x60
#define COMMAND 0x64                    /* written: a command; read: the status */
#define STATUS_OUTPUT_FULL 0x01
#define STATUS_INPUT_FULL 0x02
#define READ_COMMAND_BYTE 0x20
#define SELF_TEST 0xAA
#define SELF_TEST_PASSED 0x55
#define INTERFACE_TEST 0xAB

static enum verdict ask(u8 command, u8 *answer)
{
    u32 tries = 0;
    out8(COMMAND, command);
    while (!(in8(COMMAND) & STATUS_OUTPUT_FULL))
        CHECK(++tries < 200, "no answer to command 0x%02x: status 0x%02x", command, in8(COMMAND));
    *answer = in8(DATA);
    return OK;
}

enum verdict test_i8042(void)
{
    u8 answer, status = in8(COMMAND);
    if (status == 0xFF)
        return skip("nothing at port 0x64");
    for (u32 stale = 0; stale < 16 && in8(COMMAND) & STATUS_OUTPUT_FULL; stale++)
        in8(DATA);
    CHECK(!(in8(COMMAND) & STATUS_INPUT_FULL), "status 0x%02x: never ready for a command", in8(COMMAND));
    TRY(ask(SELF_TEST, &answer));
    CHECK(answer == SELF_TEST_PASSED, "self test gave 0x%02x, expected 0x55", answer);
    TRY(ask(INTERFACE_TEST, &answer));
    CHECK(answer == 0, "keyboard interface test gave 0x%02x, expected 0", answer);
    TRY(ask(READ_COMMAND_BYTE, &answer));
    return ok("self test, keyboard interface test, command byte 0x%02x", answer);
}
