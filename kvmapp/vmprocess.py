"""One domain in one process: its life cycle, its consoles and its control socket, in a single control thread.

    run_domain(config, control=listener, log_fd=fd, files={...}, run_dir="/run/kvmapp/domains")     # in a child of the zygote

The machine's own threads run without the GIL; this thread wakes for what is rare: a console's bytes, a client's request, the
guest's wish to power off or reset. When the domain ends, RUN_DIR/NAME.end tells the daemon how, whether it is there or not.
"""
import os
import time

from kvmapp.console import LAST_WORDS, ConsolePort, LogPort, Sink, open_log, open_sink
from kvmapp.devices import PowerEvent, set_log
from kvmapp.errors import BadRequest, KvmappError, WrongState
from kvmapp.loop import Loop
from kvmapp.machine import Machine
from kvmapp.vmdevices import IO_ERROR, wanted
from kvmapp.vmsaving import SaveVerbs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmapp.control import ControlServer

# How a process that ran one guest ends (kvmapp run): the exit status tells how the guest ended.
EXIT_POWER_OFF, EXIT_ERROR, EXIT_RESET, EXIT_CRASH, EXIT_DESTROYED, EXIT_SAVED = 0, 1, 3, 4, 5, 6

TRIPLE_FAULT = 8                        # KVM_EXIT_SHUTDOWN, the code of a reset that the run loop asks for
TUNABLE = {"cputune", "vcpu_pins", "memtune"}        # what `tune` may change
BOOT_TIME = 5.0                         # seconds after which most guests have looked at all of their devices
REBOOT_WISH = 3600.0                    # seconds: a guest that heeds `reboot` later than this powered off for another reason
RESET_CAUSES = {TRIPLE_FAULT: "the guest reset by a triple fault"}


class Ending:
    """How the domain ended: `reason` in virsh's words (domstate --reason), `text` for people, `exit` for a foreground run."""

    def __init__(self, reason: str, text: str, exit: int):
        self.state = "shut off"
        self.reason = reason
        self.text = text
        self.exit = exit


class Domain(SaveVerbs):
    """A guest's life, from `start` to an Ending. `state` and `reason` are virsh's words."""

    def __init__(self, config, machine: Machine, loop: Loop, log):
        self.config = config
        self.machine = machine
        self.loop = loop
        self.log = log
        self.state, self.reason = "starting", "booted"
        self.started = time.time()
        self.ending: Ending | None = None
        self.ports: dict[str, ConsolePort] = {}
        self.server: ControlServer | None = None
        self.reboot_until = 0.0                         # by the monotonic clock: whether a power-off is the answer to `reboot`
        self.mark: Callable[[str], None] | None = None  # hears of the points of a start
        self.warnings: list[str] = []                   # of a restored machine, for whoever asked for it
        self.debug_port = LogPort(loop, machine.debug_console, log) if machine.debug_console else None

    # The life cycle.

    def start(self, paused: bool = False, restored: bool = False) -> None:
        """The guest's first instruction, or its next one when the machine was restored; `paused`: all is made ready for it, and
        `resume` gives the word."""
        self.begun = "restored" if restored else "booted"
        self.loop.watch(self.machine.power.fd, self.power_event)
        if self.machine.hotplug:
            self.loop.watch(self.machine.hotplug.fd, self.device_ejected)
        if not restored:
            self.boot()
            if self.mark:
                self.mark("kernel loaded")
        if paused:
            self.machine.start_vcpus()              # so that they are there to be looked at and placed
            self.change("paused", "user")
            return
        self.machine.resume()
        self.change("running", self.begun)

    def boot(self) -> None:
        self.machine.boot()
        self.loop.later(BOOT_TIME, self.machine.settle)

    def serve(self, listener) -> None:
        """Answers on a control socket."""
        from kvmapp.control import ControlServer  # `kvmapp run` goes without
        verbs = {name.removeprefix("verb_").replace("_", "-"): getattr(self, name) for name in dir(self) if name.startswith("verb_")}
        self.server = ControlServer(self.loop, listener, verbs)

    def end(self, ending: Ending) -> None:
        """The guest stops here; `loop.run` returns."""
        self.give_up_saving()
        self.machine.pause()
        self.ending = ending
        if self.debug_port:
            self.debug_port.drain()
        self.log(f"shut off: {ending.text}")
        self.change(ending.state, ending.reason)
        self.loop.stop()

    def close(self, patience: float | None = LAST_WORDS) -> None:
        """Shows the guest's last words and gives everything back; `patience`: see ConsolePort.drain."""
        if self.ending and self.ending.reason == "destroyed":
            patience = LAST_WORDS
        self.give_up_saving()
        self.machine.pause()
        for port in self.ports.values():
            port.close(patience)
        if self.debug_port:
            self.debug_port.close()
        if self.server:
            self.server.close()
        self.machine.close()

    def change(self, state: str, reason: str) -> None:
        self.state, self.reason = state, reason
        self.publish({"type": "lifecycle", "state": state, "reason": reason, "full_disks": self.machine.full_disks()})

    def publish(self, event: dict) -> None:
        """Tells every client that listens."""
        if self.server:
            self.server.publish({**event, "name": self.config.name, "time": time.time()})

    # What the guest asks for.

    def power_event(self, _events: int) -> None:
        if self.ending:                                 # by the host, in the same round of the loop: nothing of the guest counts any more
            return
        self.machine.pause()
        event, code = self.machine.power.take()
        if event == PowerEvent.POWER_OFF and time.monotonic() < self.reboot_until:
            self.log("the guest powered off to reboot: restarting")
            self.restart()
        elif event == PowerEvent.POWER_OFF:
            self.act(self.config.on_poweroff, Ending("shutdown", "the guest powered off", EXIT_POWER_OFF))
        elif event == PowerEvent.RESET:
            if code == TRIPLE_FAULT:
                for line in self.machine.crash_report():
                    self.log(line)
            self.act(self.config.on_reboot, Ending("shutdown", RESET_CAUSES.get(code, "the guest reset itself"), EXIT_RESET))
        elif event == PowerEvent.DEBUG_EXIT:
            self.end(Ending("shutdown", f"the guest ended with debug exit code {code}", (code << 1 | 1) & 0xFF))
        elif event == PowerEvent.CRASH:
            for line in self.machine.crash_report():
                self.log(line)
            self.act(self.config.on_crash, Ending("crashed", "the guest crashed", EXIT_CRASH))
        else:
            self.told(event)

    def told(self, event: PowerEvent) -> None:
        """What the guest tells by devices that the domain file asks for; or nothing, any more."""
        if event == PowerEvent.PANIC:
            self.act(self.config.on_crash, Ending("crashed", "the guest panicked", EXIT_CRASH))
        elif event == PowerEvent.WATCHDOG:
            self.watchdog_expired(self.config.watchdog.action)
        elif event == PowerEvent.DISK_FULL and self.machine.full_disks():
            self.disk_full()
        else:
            if event == PowerEvent.CRASH_KERNEL:
                self.log("the guest panicked: its crash kernel goes on")
            self.go_on()

    def watchdog_expired(self, action: str) -> None:
        """The machine is paused."""
        text = "its watchdog expired"
        self.publish({"type": "watchdog", "action": action})
        if action == "reset":
            self.act(self.config.on_reboot, Ending("shutdown", text, EXIT_RESET))
        elif action == "poweroff":
            self.act(self.config.on_poweroff, Ending("shutdown", text, EXIT_POWER_OFF))
        elif action == "pause":
            self.log(f"{text}: paused")
            self.change("paused", "watchdog")
        else:
            self.log(f"{text}: {'pressing the power button' if action == 'shutdown' else 'nothing is done'}")
            if action == "shutdown":
                self.machine.press_power_button()
            self.go_on()

    def go_on(self) -> None:
        """After a pause to hear what the guest tells; a wish may also have been voided, by a reset, before it was heard."""
        if self.state == "running":
            self.machine.resume()

    def act(self, action: str, ending: Ending) -> None:
        """on_poweroff, on_reboot, on_crash: destroy, restart in place, or preserve for a look."""
        if action == "restart":
            self.log(f"{ending.text}: restarting")
            self.restart()
        elif action == "preserve":
            self.log(f"{ending.text}: preserved")
            self.change(*(("crashed", "panicked") if ending.reason == "crashed" else ("paused", ending.reason)))
        else:
            self.end(ending)

    def restart(self, paused: bool = False) -> None:
        """A power cycle in place; `paused`: up to the first instruction."""
        self.reboot_until = 0.0
        try:
            for device in self.machine.reset():
                self.device_removed(device)
            self.boot()
        except KvmappError as error:                    # the kernel file went away since the start
            self.end(Ending("failed", f"cannot boot again: {error.message}", EXIT_ERROR))
            return
        if paused:
            self.change("paused", "user")
            return
        self.machine.resume()
        self.change("running", "booted")

    # What the host asks for: the control socket's verbs.

    def require(self, *states: str) -> None:
        if self.state not in states:
            raise WrongState(f"Domain '{self.config.name}' is {self.state}", f"this needs a domain that is {' or '.join(states)}")

    @property
    def preserved(self) -> bool:
        """Whether it is there for a look only, as on_poweroff and on_reboot = preserve leave it."""
        return self.state == "paused" and self.reason not in ("user", "watchdog", IO_ERROR)

    def require_alive(self) -> None:
        if self.preserved:
            raise WrongState(f"Domain '{self.config.name}' ended and was preserved", "reset or destroy it")

    def require_no_wish(self) -> None:
        """The machine is paused, to stay so: `power_event`, which comes next, might let it go on, or begin anew."""
        if self.machine.power.asked:
            what = "found no room on the host" if self.machine.full_disks() else "powered off or reset"
            raise WrongState(f"Domain '{self.config.name}' has just {what}", "look at its state, then try again")

    def verb_status(self, _connection, _request) -> dict:
        config = self.config
        return {"name": config.name, "uuid": config.uuid, "pid": os.getpid(), "state": self.state, "reason": self.reason,
                "started": self.started, "vcpus": config.vcpus, "memory": config.memory, "balloon": self.machine.balloon_size(),
                "acpi": config.acpi, "devices": self.machine.inventory(), "consoles": list(self.ports),
                "full_disks": self.machine.full_disks(),
                "saved": self.saving.written if self.saving else None, "warnings": self.warnings,
                "ttys": {name: port.sink.path for name, port in self.ports.items()}}

    def verb_stats(self, _connection, _request) -> dict:
        return {"name": self.config.name, "time": time.time(), "state": self.state, **self.machine.stats()}

    def verb_shutdown(self, _connection, _request) -> dict:
        self.press_power_button()
        self.reboot_until = 0.0
        return {}

    def verb_reboot(self, _connection, _request) -> dict:
        """The power button, and a restart when the guest has powered off by it; ACPI has no button that means reboot."""
        self.press_power_button()
        self.reboot_until = time.monotonic() + REBOOT_WISH
        return {}

    def press_power_button(self) -> None:
        self.require("running")
        if not self.config.acpi:
            raise WrongState(f"Domain '{self.config.name}' has no ACPI, so it has no power button",
                             "set acpi = yes in its file, or stop it with destroy")
        self.machine.press_power_button()

    def verb_reset(self, _connection, _request) -> dict:
        self.require("running", "paused", "crashed")
        self.machine.pause()
        self.restart(paused=self.state == "paused" and not self.preserved)      # only `resume` lets it go on
        return {}

    def verb_suspend(self, _connection, _request) -> dict:
        self.require("running", "paused")
        if self.state == "running":                     # one that is paused stays what it is: it may have ended
            self.machine.pause()
            self.require_no_wish()
            self.change("paused", "user")
        return {}

    def verb_resume(self, _connection, request) -> dict:
        """`begin`: it was started paused only so that it would not run before its time."""
        self.require("paused", "running")
        self.require_alive()
        if self.state == "paused":
            self.machine.resume()
            self.change("running", self.begun if request.get("begin") else "unpaused")
        return {}

    def verb_destroy(self, _connection, _request) -> dict:
        self.loop.call(self.destroy)                    # so that the answer goes out first
        return {}

    def destroy(self) -> None:
        if self.ending is None:
            self.end(Ending("destroyed", "destroyed", EXIT_DESTROYED))

    def end_saved(self, text: str) -> None:
        self.end(Ending("saved", text, EXIT_SAVED))

    def verb_setmem(self, _connection, request) -> dict:
        size = request.get("bytes")
        if not isinstance(size, int) or not 0 < size <= self.config.memory:
            raise BadRequest(f"'bytes' is {size!r}, not a number from 1 to {self.config.memory}")
        self.machine.set_balloon(size)
        return {"balloon": self.machine.balloon_size()}

    def verb_tune(self, _connection, request) -> dict:
        """`settings` are cputune, vcpu_pins and memtune as DomainConfig.to_dict gives them. Threads move at once; what they say of
        limits is noted only, for a saved state: control groups are the daemon's."""
        settings = wanted(request, "settings", dict)
        if unknown := settings.keys() - TUNABLE:
            raise BadRequest(f"'settings' has {min(unknown)!r}", f"known: {', '.join(sorted(TUNABLE))}")
        config = type(self.config).from_dict({**self.config.to_dict(), **settings})
        self.machine.retune(config)
        self.config = config
        return {}

    def verb_subscribe(self, connection, _request) -> dict:
        connection.subscribed = True
        return {}

    def verb_console(self, connection, request) -> dict:
        name = str(request.get("device") or next(iter(self.ports), ""))
        port = self.ports.get(name)
        if port is None:
            raise KvmappError(f"Domain '{self.config.name}' has no console {name}".rstrip(),
                              f"it has: {', '.join(self.ports)}" if self.ports else "add [serial 0] to its file")
        return port.open(connection, bool(request.get("force")))


def run_domain(config, *, control, log_fd: int, files: dict[str, int], run_dir: str, drop=None, paused: bool = False,
               cache: str | None = None) -> int:
    """A domain's whole life, in a process of its own; the exit status for os._exit.

    `files` holds descriptors opened by the daemon ('interface:0', ...; 'restore' is a saved state to go on from). `drop()` gives up
    privileges when everything is open. `cache` is the folder of unpacked kernels.
    """
    set_log(log_fd)
    log = Log(log_fd)
    loop = Loop()
    try:
        restored = "restore" in files
        warnings: list[str] = []
        machine = restored_machine(config, files, warnings.append) if restored else Machine(config, files, cache=cache)
        domain = Domain(config, machine, loop, log)
        domain.warnings = warnings
        for text in warnings:
            log(f"warning: {text}")
        for name, backend, section in machine.characters:
            sink = Sink() if section.type == "stdio" else open_sink(section)        # there is no terminal here
            domain.ports[name] = ConsolePort(loop, name, backend, sink, open_log(section))
        domain.serve(control)
        if drop:
            drop()
        domain.start(paused, restored)
    except KvmappError as error:
        log(f"failed: {error.message}" + (f" (hint: {error.hint})" if error.hint else ""))
        write_ending(run_dir, config.name, Ending("failed", error.message, EXIT_ERROR), error.hint)
        return EXIT_ERROR
    loop.run()
    assert domain.ending
    write_ending(run_dir, config.name, domain.ending)       # first: to give much memory and many dirty pages back takes long
    domain.close()
    return domain.ending.exit


def restored_machine(config, files: dict[str, int], warn: "Callable[[str], None]") -> Machine:
    """The machine of a saved state, whose file lies open in `files`. Raises KvmappError."""
    from kvmapp import snapshot, statefile
    fd = files.pop("restore")
    try:
        saved = statefile.read(fd, config.name)
        return snapshot.restore(saved, config, files, warn)
    finally:
        os.close(fd)


def preload() -> None:
    """For the zygote."""
    import kvmapp.preload  # noqa: F401


class Log:
    """Lines with the time, to a descriptor. A full disk costs lines only."""

    def __init__(self, fd: int):
        self.fd = fd

    def __call__(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        try:
            os.write(self.fd, f"{stamp}+0000: {text}\n".encode())
        except OSError:
            pass


def write_ending(run_dir: str, name: str, ending: Ending, hint: str | None = None) -> None:
    """RUN_DIR/NAME.end, atomically: what the daemon reads when the process is gone."""
    import json
    record = {"state": ending.state, "reason": ending.reason, "text": ending.text, "hint": hint, "exit": ending.exit,
              "time": time.time()}
    path = os.path.join(run_dir, f"{name}.end")
    try:
        with open(f"{path}.new", "w") as file:
            json.dump(record, file)
        os.rename(f"{path}.new", path)
    except OSError:
        pass                                            # the daemon then says that the process is gone, without a reason
