"""kvmappctl: virsh's place. Global options, then one command, a string of them, or the interactive shell.

Exit status: 0 done, 1 failed (of several commands: the last one's), as virsh has it. It must answer as fast as virsh: no argparse, no
re, no json, one module for the verb, and no tidying up at the end.
"""
from __future__ import annotations

import posix  # os is the same with 1 ms of Python around it
import sys

from kvmapp.cli.parse import nearest_hint, parse_string, parse_words
from kvmapp.cli.session import OutputFailed, Session
from kvmapp.errors import ConnectionFailed, HostError, KvmappError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from kvmapp.cli.parse import Call
    from kvmapp.cli.table import Verb

BROKEN_PIPE, INTERRUPTED = 141, 130
NO_CONNECTION = "failed to connect to the hypervisor"


class GlobalOption:
    __slots__ = ("help", "metavar", "name", "short")

    def __init__(self, short: str, name: str, help: str, metavar: str = ""):
        self.short, self.name, self.help, self.metavar = short, name, help, metavar


GLOBAL_OPTIONS = (
    GlobalOption("c", "connect", "the daemon to speak to: kvmapp:///system (qemu:///system means the same), the one of this host; "
                                 "kvmapp:///system?socket=PATH, the one at this socket", "URI"),
    GlobalOption("d", "debug", "accepted for virsh's sake; nothing more is printed", "NUM"),
    GlobalOption("e", "escape", "the key that leaves a console (default ^])", "CHAR"),
    GlobalOption("h", "help", "show the options, or a command's help"),
    GlobalOption("", "json", "print JSON, one line a command; errors too, besides their text on standard error"),
    GlobalOption("k", "keepalive-interval", "accepted for virsh's sake; a UNIX socket needs none", "NUM"),
    GlobalOption("K", "keepalive-count", "accepted for virsh's sake; a UNIX socket needs none", "NUM"),
    GlobalOption("q", "quiet", "only what was asked for: no table headings, no messages, no blank lines"),
    GlobalOption("r", "readonly", "use the read-only socket, which is for everybody"),
    GlobalOption("t", "timing", "tell how long each command took"),
    GlobalOption("v", "version", "the version, and no more (--version=long as -V)", "=TYPE"),
    GlobalOption("V", "", "the version and what it stands on"),
)


def run(words: list[str]) -> NoReturn:
    """The process's whole work; what Python would tidy up at its end, the kernel does faster."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:      # closed by whoever called us; no socket of ours may take its place
            setattr(sys, name, open("/dev/null", mode))  # noqa: SIM115
    posix._exit(main(words))


def main(words: list[str], session: Session | None = None, uri: str | None = None) -> int:
    """The exit status. `session` and `uri`, the environment's, are given where one process speaks for another (quick.py)."""
    session = session or Session()
    session.default_uri = posix.environ.get(b"KVMAPP_DEFAULT_URI", b"").decode("utf-8", "surrogateescape") if uri is None else uri
    session.sink.reconfigure(errors="backslashreplace")     # type: ignore[union-attr]
    try:
        status = guarded(session, words)
        session.flush()
        return status
    except OutputFailed as failed:
        if failed.gone:
            return BROKEN_PIPE
        sys.stderr.write(f"error: Cannot write the output: {failed}\n")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def guarded(session: Session, words: list[str]) -> int:
    try:
        commands = take_global_options(session, words)
        if commands is None:
            return 0
        if not commands:
            from kvmapp.cli.shell import interact
            return interact(session)
        calls = parse_string(commands[0]) if len(commands) == 1 else parse_words(commands)
    except KvmappError as error:
        session.json = session.json or "--json" in " ".join(words).split()      # asked for among what could not be read
        session.complain_of(error, NO_CONNECTION if isinstance(error, ConnectionFailed) else "")
        return error.exit_code
    return run_calls(session, calls)


def run_calls(session: Session, calls: list[Call]) -> int:
    status = 0
    for verb, given in calls:
        status = run_call(session, verb, given)
        if session.ended:
            break
    return status


def run_call(session: Session, verb: Verb, given) -> int:
    """One verb, with what virsh does around each: errors in two lines, the time, a blank line."""
    if session.timing:
        import time
        began = time.monotonic()
    everywhere, gone = session.json, False
    session.json = everywhere or given.json
    try:
        status = run_guarded(session, verb, given)
    except KvmappError as error:
        session.complain_of(error, headline(verb, given, error))
        status = error.exit_code
        gone = isinstance(error, ConnectionFailed) and not session.interactive
    if session.timing:
        session.say(f"\n(Time: {(time.monotonic() - began) * 1000:.3f} ms)\n")
    if not (session.quiet or session.json or session.ended):
        session.say("\n")
    session.json = everywhere
    session.ended = session.ended or gone
    return status


def run_guarded(session: Session, verb: Verb, given) -> int:
    """What the system refuses (a folder that is gone, a full disk) is an error of ours, never a traceback."""
    try:
        return verb.run(session, given) or 0
    except OSError as error:
        where = f"'{error.filename}': " if error.filename else ""
        raise HostError(f"{verb.name}: {where}{error.strerror or error}") from None


def headline(verb: Verb, given, error: KvmappError) -> str:
    """What was tried: where the reason alone does not say it."""
    if isinstance(error, ConnectionFailed):
        return NO_CONNECTION
    if not verb.failure or error.code in ("domain-not-found", "usage"):
        return ""
    return verb.failure.format_map(vars(given))


# The global options.

def take_global_options(session: Session, words: list[str]) -> list[str] | None:
    """The words from the command on; None when everything was said."""
    uri = ""
    remaining = list(words)
    while remaining and remaining[0].startswith("-") and remaining[0] != "-":
        word = remaining.pop(0)
        if word == "--":
            break
        for option, text in options_of(word, remaining):
            if option.name == "help" and remaining:
                return ["help", remaining[0]]
            if option.name in ("help", "version", ""):
                show(session, option, text)
                return None
            if option.name == "connect":
                uri = text
            elif option.name == "escape":
                session.escape = text
            elif option.name == "readonly":
                session.read_only = True
            elif option.name in ("json", "quiet", "timing"):
                setattr(session, option.name, True)
    uri = uri or session.default_uri
    if uri:
        from kvmapp.cli.uri import socket_of
        session.socket, session.uri = socket_of(uri), uri
    return remaining


def options_of(word: str, remaining: list[str]) -> list[tuple[GlobalOption, str]]:
    """One word may hold several single letters: -rq, -ckvmapp:///system."""
    if word.startswith("--"):
        return [long_option(word, remaining)]
    found = []
    letters = word[1:]
    while letters:
        option = next((one for one in GLOBAL_OPTIONS if one.short == letters[0]), None)
        if option is None:
            raise UsageError(f"unsupported option '-{letters[0]}'. See --help.")
        letters = letters[1:]
        text = ""
        if option.metavar and not option.metavar.startswith("="):
            text, letters = letters or argument_of(option, remaining), ""
        found.append((option, text))
    return found


def long_option(word: str, remaining: list[str]) -> tuple[GlobalOption, str]:
    name, equals, text = word[2:].partition("=")
    option = next((one for one in GLOBAL_OPTIONS if one.name == name), None)
    if not name or option is None:
        raise UsageError(f"unsupported option '{word}'. See --help.",
                         nearest_hint(name, [one.name for one in GLOBAL_OPTIONS if one.name]))
    if equals and not option.metavar:
        raise UsageError(f"option '--{name}' takes no argument, got '{text}'")
    if option.metavar and not equals and not option.metavar.startswith("="):
        text = argument_of(option, remaining)
    return option, text


def argument_of(option: GlobalOption, remaining: list[str]) -> str:
    if not remaining:
        raise UsageError(f"option '-{option.short}'/'--{option.name}' requires an argument")
    return remaining.pop(0)


def show(session: Session, option: GlobalOption, text: str) -> None:
    """--help, -v and -V."""
    from kvmapp.cli import help
    if option.name == "help":
        session.say(help.usage(GLOBAL_OPTIONS))
    elif text not in ("", "short", "long"):
        raise UsageError(f"unsupported version type '{text}'", "it may be short or long")
    else:
        session.say(help.version(long=option.short == "V" or text == "long"))
