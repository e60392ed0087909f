"""console: a guest's serial port or virtio console on the user's terminal; ttyconsole: where a pseudo terminal is.

The bytes go to and from the domain's own control socket: the daemon is asked for it, but is not needed (it may be away). Who is
alone with a blank screen is told why: the kernel's command line names no console, nothing came for a
while, the domain is paused.
"""
from __future__ import annotations

import os

from kvmapp.cli.table import domain, flag, value, verb
from kvmapp.client import Client, of, open_console
from kvmapp.errors import ConnectionFailed, DomainNotRunning, HostError, NoResponse, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket

SILENCE = 5                             # seconds
PATIENCE = 5                            # seconds for the daemon, which is not needed
# What the guest's kernel calls the first console of each kind.
KERNEL_NAMES = {"serial": "ttyS", "console": "hvc"}


@verb("console", "attach the terminal to a domain's console", domain(complete="active"),
      value("devname", "which one: serial0, console0 (default: the first)", complete="console"),
      flag("force", "take it over from whoever has it"), flag("safe", "only if nobody else writes there (always so)"),
      text="Ctrl-] leaves (another key with kvmappctl -e). One terminal at a time has a console: a second one is told who has it.")
def console(session, given):
    require_terminal()
    return attach(session, given.domain, given.devname, given.force)


@verb("ttyconsole", "the pseudo terminal of a domain's first console", domain(complete="active"))
def ttyconsole(session, given):
    consoles = session.daemon.get(of(given.domain))["consoles"]
    path = next((one["tty"] for one in consoles if one["tty"]), None)
    session.answer({"tty": path}, f"{path}\n" if path else "")


def require_terminal() -> None:
    if not os.isatty(0):
        raise HostError("Cannot run interactive console without a controlling TTY")


def attach(session, reference: str, device: str | None = None, force: bool = False, name: str | None = None) -> int:
    """Until the user leaves or the guest ends. `name`: where `reference` is none, for when the daemon is away. Raises KvmappError."""
    leave = escape_byte(session.escape)
    name = name or reference
    detail, config = known_of(session, reference, name)
    if detail and detail["id"] is None:
        raise DomainNotRunning("The domain is not running", f"kvmappctl start {detail['name']} --console")
    control = detail["control"] if detail else control_without_daemon(session, name)
    connection, said, first = open_console(control, device, force=force)
    lines = [f"Connected to domain '{detail['name'] if detail else name}'", escape_line(session.escape),
             *(f"note: {note}" for note in notes(said.get("device", ""), detail, config))]
    session.flush()
    session.disconnect()                # the daemon's connection would only grow old
    from kvmapp.terminal import RawTerminal
    end_as_by_interrupt()
    try:
        with RawTerminal():             # before a word: what is typed from now on is the guest's
            write_all("".join(f"{line}\r\n" for line in lines).encode())
            converse(connection, first, leave, why_silent(said.get("device", ""), config))
    finally:
        connection.close()
        session.say("\n")
    return 0


def end_as_by_interrupt() -> None:
    """Who is asked to end puts the terminal back first."""
    import signal
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


def escape_byte(text: str) -> bytes:
    """^] as the byte that the key gives."""
    if len(text) == 2 and text[0] == "^" and "@" <= text[1].upper() <= "_":
        return bytes([ord(text[1].upper()) & 0x1F])
    if len(text.encode()) == 1:
        return text.encode()
    raise UsageError(f"Invalid string '{text}' for escape sequence", "^] is Ctrl and ]; a single character stands for itself")


def escape_line(text: str) -> str:
    return f"Escape character is {text}" + (f" (Ctrl + {text[1:]})" if len(text) == 2 else "")


def known_of(session, reference: str, name: str) -> tuple[dict | None, dict | None]:
    """What the daemon says of the domain and of its configuration; None when it is away, or hangs."""
    try:
        with Client(session.socket_in_use, timeout=PATIENCE) as daemon:
            detail = daemon.get(of(reference))
            return detail, daemon.get(of(detail["uuid"], "config"))["config"] if detail["id"] is not None else None
    except (ConnectionFailed, NoResponse):
        if not os.path.exists(control_without_daemon(session, name)):
            raise
        return None, None


def control_without_daemon(session, name: str) -> str:
    return os.path.join(os.path.dirname(session.socket), "domains", name, "control.sock")


def notes(device: str, detail: dict | None, config: dict | None) -> list[str]:
    """Why the screen may stay blank."""
    found = []
    if detail and detail["state"] == "paused":
        found.append(f"the domain is paused; kvmappctl resume {detail['name']} lets it run")
    if names_console(device, config) is False:
        found.append(f"the kernel's command line has no console={kernel_name_of(device)}, so Linux prints nothing here: "
                     f"add it to cmdline in [boot] (kvmappctl edit {detail['name'] if detail else ''})".replace(" )", ")"))
    return found


def why_silent(device: str, config: dict | None) -> str:
    """What to try when nothing comes."""
    if names_console(device, config):
        return "the guest may still be starting; Enter asks for a prompt"
    return "press Enter; if that shows nothing, the guest may have no console configured"


def names_console(device: str, config: dict | None) -> bool | None:
    """Whether the command line of a kernel that is booted directly names this console; None where nobody knows."""
    boot, name = (config or {}).get("boot") or {}, kernel_name_of(device)
    if not boot.get("kernel") or not name:
        return None
    return f"console={name}" in (boot.get("cmdline") or "")


def kernel_name_of(device: str) -> str:
    kind = device.rstrip("0123456789")
    return f"{KERNEL_NAMES[kind]}{device[len(kind):]}" if kind in KERNEL_NAMES else ""


def converse(connection: socket, first: bytes, leave: bytes, why_silent: str) -> None:
    """Bytes both ways until `leave` is typed or the other side closes. In a raw terminal: a new line is \\r\\n."""
    from select import POLLIN, poll
    waiting = poll()
    waiting.register(0, POLLIN)
    waiting.register(connection.fileno(), POLLIN)
    write_all(first)
    silent = not first
    while True:
        ready = waiting.poll(SILENCE * 1000 if silent else None)
        if silent and not ready:
            silent = False
            write_all(f"\r\n[nothing came for {SILENCE} s: {why_silent}]\r\n".encode())
        for fd, _events in ready:
            if fd == 0:
                data = os.read(0, 4096)
                typed, found, _ = data.partition(leave)
                if not (data and send(connection, typed)) or found:
                    return
            else:
                data = receive(connection)
                if not data:
                    return
                silent = False
                write_all(data)


def send(connection: socket, data: bytes) -> bool:
    """False when the guest has gone."""
    try:
        connection.sendall(data)
    except OSError:
        return False
    return True


def receive(connection: socket) -> bytes:
    try:
        return connection.recv(65536)
    except OSError:
        return b""


def write_all(data: bytes) -> None:
    while data:
        data = data[os.write(1, data):]


def console_names(detail: dict) -> list[str]:
    """For completion."""
    return [one["name"] for one in detail["consoles"]]
