"""The user's terminal while a guest has it: raw mode, the key that leaves, and a guard that puts it back whatever happens."""
import _signal as signal  # its public face would import enum, and with it half of the library
import os
import sys
import termios
import tty

LEAVE = 0x1D                            # Ctrl-]


def is_terminal() -> bool:
    """Whether standard input is one."""
    return os.isatty(0)


def without_leave(data: bytes) -> tuple[bytes, bool]:
    """What was typed before Ctrl-], and whether it was there."""
    typed, found, _ = data.partition(bytes([LEAVE]))
    return typed, bool(found)


class RawTerminal:
    """`with RawTerminal():` every key goes to the guest. Output stays as it is, but for newlines, which the guest sends itself."""

    def __enter__(self):
        self.saved = termios.tcgetattr(0)
        tty.setraw(0)
        return self

    def __exit__(self, *_):
        termios.tcsetattr(0, termios.TCSADRAIN, self.saved)


def guarded(run) -> int:
    """Calls `run() -> exit status` in a child and waits: however the child ends, the terminal is as it was.

    Signals that ask this process to end are handed on to the child.
    """
    saved = termios.tcgetattr(0)
    handed = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, handed)       # until there is somebody to hand them on to, and we can
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            status = run()
        except BaseException:           # a defect of ours; the parent could not show it
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def hand_on(number, _frame) -> None:
        try:
            os.kill(child, number)
        except ProcessLookupError:      # it has just ended, and how is all that is left to tell
            pass
    for number in handed:
        signal.signal(number, hand_on)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        _, status = os.waitpid(child, 0)
    finally:
        for number in handed:
            signal.signal(number, signal.SIG_IGN)
        termios.tcsetattr(0, termios.TCSADRAIN, saved)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
