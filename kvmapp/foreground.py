"""`kvmapp run`: one domain in the foreground, its serial port on the terminal.

Ctrl-] ends the guest; SIGTERM (or SIGINT) presses its power button and, a second time, ends it; SIGQUIT ends it at once. The exit
status tells how it ended: 0 powered off, 3 reset (with --no-reboot), 4 crashed, 5 ended from here, 6 saved, 2N+1 by debug exit N,
1 an error. With --save FILE, SIGUSR1 saves the guest to FILE and ends it; --restore FILE goes on from there.
"""
import _signal as signal  # its public face would import enum, and with it half of the library
import fcntl
import os
import struct
import sys
import termios

from kvmapp import terminal
from kvmapp.console import ConsolePort, open_log, open_sink
from kvmapp.errors import KvmappError
from kvmapp.loop import Loop
from kvmapp.machine import Machine
from kvmapp.vmprocess import EXIT_ERROR, Domain, Log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmapp.statefile import SavedState
    from kvmapp.timing import Timing


class Extras:
    """What `kvmapp run` does beside running the domain."""
    __slots__ = ("restore", "save", "timing")

    def __init__(self, save: str | None = None, restore: "SavedState | None" = None, timing: bool = False):
        self.save = save                                # where SIGUSR1 saves to
        self.restore = restore                          # go on from this state
        self.timing = start_timing() if timing else None


def start_timing() -> "Timing":
    from kvmapp.timing import Timing
    return Timing()


def run(config, extras: Extras | None = None) -> int:
    """Runs the domain to its end; the exit status. Raises KvmappError when it cannot start."""
    extras = extras or Extras()
    uses_terminal = any(device.type == "stdio" for device in (*config.serials, *config.consoles)) and terminal.is_terminal()
    if uses_terminal:
        return terminal.guarded(lambda: report(lambda: run_and_tell(config, uses_terminal, extras)))
    return run_and_tell(config, uses_terminal, extras)


def open_saved(path: str) -> "SavedState":
    """A saved state's file, open and found whole. Raises KvmappError."""
    from kvmapp import statefile
    return statefile.read(statefile.open_file(path), path)


def report(work) -> int:
    """What the child of the guard does with an error: the parent has no way to see it."""
    from kvmapp.__main__ import guarded_main
    return guarded_main(work)


def run_and_tell(config, uses_terminal: bool, extras: Extras) -> int:
    status = run_here(config, uses_terminal, extras)
    if extras.timing:
        sys.stderr.write(extras.timing.table())         # the terminal is as it was again
    return status


def run_here(config, uses_terminal: bool, extras: Extras) -> int:
    loop, log = Loop(), extras.timing.hearing(Log(2)) if extras.timing else Log(2)
    for what in unkept_limits(config):
        log(f"warning: {what} is not kept by kvmapp run: only the daemon makes control groups")
    machine = machine_for(config, extras, log)
    domain = Domain(config, machine, loop, log)
    if extras.timing:
        extras.timing.mark("machine built")
        domain.mark = extras.timing.mark
    for name, backend, device in domain.machine.characters:
        domain.ports[name] = ConsolePort(loop, name, backend, open_sink(device), open_log(device), leave_key(domain, uses_terminal))
    handle_signals(domain, extras)
    if not uses_terminal:
        return live(domain, extras)
    with terminal.RawTerminal():
        resize(domain)
        signal.signal(signal.SIGWINCH, lambda *_: loop.call(lambda: resize(domain)))
        return live(domain, extras)


def unkept_limits(config) -> list[str]:
    """What control groups would keep, and only the daemon makes those."""
    cputune = config.cputune
    return [*(f"[cputune] {key}" for key in ("shares", "quota", "global_quota") if getattr(cputune, key) != cputune.setting(key).default),
            *(f"[memtune] {key}" for key, limit in config.memtune.to_dict().items() if limit is not None)]


def machine_for(config, extras: Extras, log: "Callable[[str], None]") -> Machine:
    files = {}
    if config.filesystems:
        from kvmapp.fileserver import start
        files = {f"filesystem:{one.tag}": start(one, 2).fd for one in config.filesystems}
    if extras.restore is None:
        return Machine(config, files, cache=cache_folder())
    from kvmapp.snapshot import restore
    return restore(extras.restore, config, files, warn=lambda text: log(f"warning: {text}"))


def cache_folder() -> str:
    """Where unpacked kernels are kept for us."""
    if os.geteuid() == 0:
        return "/var/cache/kvmapp"
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "kvmapp")


def live(domain: Domain, extras: Extras) -> int:
    try:
        domain.start(restored=extras.restore is not None)
        domain.loop.run()
        if extras.timing:
            extras.timing.end(domain.machine)
    finally:
        status = domain.ending.exit if domain.ending else EXIT_ERROR
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, lambda *_: os._exit(status))      # who reads the guest's last words may take his time, or not
        domain.close(None)
    assert domain.ending
    return domain.ending.exit


def leave_key(domain: Domain, uses_terminal: bool):
    """Sees what is typed first: Ctrl-] is for us."""
    def escape(data: bytes) -> bytes:
        typed, leave = terminal.without_leave(data)
        if leave:
            domain.loop.call(domain.destroy)
        return typed
    return escape if uses_terminal else None


def handle_signals(domain: Domain, extras: Extras) -> None:
    asked = False

    def press(*_):
        nonlocal asked
        if asked or not domain.config.acpi or not (domain.state == "running" or domain.waits_for_room):
            domain.loop.call(domain.destroy)
        else:
            domain.loop.call(domain.machine.press_power_button)
        asked = True

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, press)
    signal.signal(signal.SIGQUIT, lambda *_: domain.loop.call(domain.destroy))
    if path := extras.save:
        signal.signal(signal.SIGUSR1, lambda *_: domain.loop.call(lambda: save(domain, path)))


def save(domain: Domain, path: str) -> None:
    """A file that cannot be written costs a line; the guest goes on."""
    try:
        domain.save(lambda error: None, path)
    except KvmappError as error:
        domain.log(f"not saved: {error.message}" + (f" (hint: {error.hint})" if error.hint else ""))


def resize(domain: Domain) -> None:
    """Tells the guest's virtio consoles how large the terminal is."""
    rows, columns, _, _ = struct.unpack("4H", fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8)))
    domain.machine.resize_consoles(columns, rows)
