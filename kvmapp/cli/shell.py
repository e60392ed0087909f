"""The interactive shell, and the verbs that make sense there: cd, pwd, echo, connect, quit.

Lines are edited and completed by readline where Python has it; history is kept in ~/.cache/kvmapp/kvmappctl/history. When standard
input is no terminal its lines are commands: no greeting, no prompt, and the last one's status counts.
"""
from __future__ import annotations

import os
import sys

from kvmapp.cli.parse import parse_string
from kvmapp.cli.table import flag, value, verb
from kvmapp.errors import KvmappError, UsageError

WELCOME = """Welcome to kvmappctl, the shell of this host's virtual machines.

Type:  'help' for help with commands
       'quit' to quit

"""
HISTORY_LENGTH = 500


def interact(session) -> int:
    """Reads and runs commands until the end; the exit status."""
    session.interactive = os.isatty(0)
    # A line that is no text is a command that nobody knows, as among the words of a command line.
    sys.stdin.reconfigure(errors="surrogateescape")     # type: ignore[union-attr]
    if not session.interactive:
        return serve(session, sys.stdin)
    if not session.quiet:
        session.say(WELCOME)
        session.flush()
    readline = with_readline(session)
    try:
        serve(session, prompted(session))
    finally:
        if readline:
            save_history(readline)
    return 0


def serve(session, lines) -> int:
    status = 0
    for line in lines:
        status = run_line(session, line)
        session.flush()
        if session.ended:
            break
    return status


def run_line(session, line: str) -> int:
    from kvmapp.cli.main import INTERRUPTED, run_calls
    try:
        return run_calls(session, parse_string(line))
    except KvmappError as error:
        session.complain_of(error)
        return error.exit_code
    except KeyboardInterrupt:
        session.disconnect()            # an answer may still come; nobody waits for it
        session.say("\n")
        return INTERRUPTED


def prompted(session):
    """What the user types, line by line."""
    while True:
        try:
            yield input("kvmappctl > " if session.read_only else "kvmappctl # ")
        except EOFError:
            session.say("\n")
            return
        except KeyboardInterrupt:
            session.say("\n")
            session.flush()


def with_readline(session):
    """Completion and history, where this Python has readline."""
    try:
        import readline
    except ImportError:
        return None
    from kvmapp.cli.complete import candidates_of_line
    found: list[str] = []

    def complete(_text: str, number: int) -> str | None:
        if number == 0:
            found[:] = candidates_of_line(session, readline.get_line_buffer()[:readline.get_endidx()])
        return found[number] if number < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n;=,")
    readline.parse_and_bind("tab: complete")
    readline.set_auto_history(True)
    readline.set_history_length(HISTORY_LENGTH)
    try:
        readline.read_history_file(history_path())
    except OSError:
        pass
    return readline


def save_history(readline) -> None:
    path = history_path()
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        readline.write_history_file(path)
    except OSError:
        pass                            # a full or read-only home costs the history, nothing else


def history_path() -> str:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "kvmapp", "kvmappctl", "history")


@verb("cd", "change the current folder of the shell", value("dir", "the folder (default: home)", complete="file"))
def cd(session, given):
    if not session.interactive:
        raise UsageError("cd: command valid only in interactive mode")
    folder = given.dir or os.path.expanduser("~")
    try:
        os.chdir(folder)
    except OSError as error:
        raise UsageError(f"cd: {folder}: {error.strerror}") from None


@verb("pwd", "print the current folder")
def pwd(session, given):
    folder = os.getcwd()
    session.answer({"dir": folder}, f"{folder}\n")


@verb("echo", "print words", flag("shell", "quoted for a shell"), flag("xml", "escaped for XML"),
      flag("split", "part each word at commas; two commas are one"), flag("err", "to standard error"),
      value("string", "the words", many=True))
def echo(session, given):
    words = given.string
    if given.split:
        words = [part.replace("\0", ",") for word in words for part in word.replace(",,", "\0").split(",")]
    if given.xml:
        words = [escaped(word) for word in words]
    if given.shell:
        import shlex
        words = [shlex.quote(word) for word in words]
    text = " ".join(words)
    if given.err:
        session.complain(text)
    else:
        session.answer({"string": text}, text)


def escaped(text: str) -> str:
    for letter, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("'", "&apos;"), ('"', "&quot;")):
        text = text.replace(letter, entity)
    return text


@verb("connect", "speak to another daemon, or as another user", value("name", "its URI (default: the one of now)"),
      flag("readonly", "by the read-only socket"))
def connect(session, given):
    from kvmapp.cli.uri import socket_of
    if given.name:
        session.socket, session.uri = socket_of(given.name), given.name
    session.read_only = given.readonly
    session.disconnect()
    version = session.daemon.get("/v1/version")
    session.answer({"uri": session.uri, "kvmapp": version["kvmapp"]}, "")


@verb("quit", "leave the shell")
def quit(session, given):
    session.ended = True


@verb("exit", "leave the shell")
def exit(session, given):
    session.ended = True
