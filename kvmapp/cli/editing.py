"""edit: a domain's file in the user's editor; checked by the daemon before it replaces the file, and never lost.

$VISUAL, else $EDITOR, else vi. While the text cannot be used, the user may go back into it; who gives up finds it in a file.
"""
from __future__ import annotations

import os

from kvmapp.cli.definition import kept_at
from kvmapp.cli.table import domain, flag, verb
from kvmapp.client import of
from kvmapp.errors import HostError, KvmappError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

QUESTION = "Try again? [y(es), n(o)]: "


@verb("edit", "change a domain's file in an editor", domain(),
      flag("skip-validate", "accepted for virsh's sake: every text is checked before it is saved"),
      text="The file is saved when the editor ends and the text holds no error; nothing is changed otherwise. A running domain takes "
           "the changes at its next start.",
      failure="Failed to edit domain '{domain}'")
def edit(session, given):
    saved = edit_config(session, of(given.domain, "config"), given.domain)
    if saved is None:
        session.done({}, f"Domain {given.domain} configuration not changed.")
    else:
        session.done(saved, f"Domain {saved['domain']['name']} configuration edited.")


def edit_config(session, resource: str, name: str) -> dict | None:
    """What the daemon said when it had saved the changed text of /config; None when it was not changed."""
    config = session.daemon.get(resource, inactive=True)
    path = new_file(f"{name.replace('/', '_')[:64]}.", config["text"])
    while True:
        edited = edit_file(path)
        if edited == config["text"]:
            os.unlink(path)
            return None
        try:
            saved = session.daemon.put(resource, text=edited, digest=config["digest"])
        except KvmappError as error:
            if not wants_again(session, error):
                raise kept_at(error, path) from None
        else:
            os.unlink(path)
            return saved


def wants_again(session, error: KvmappError) -> bool:
    """Asks, where somebody is there to answer, whether the editor shall come up once more."""
    if error.code != "config" or not os.isatty(0):
        return False
    session.complain_of(error)
    try:
        session.error_sink.write(QUESTION)
        session.error_sink.flush()
        return os.read(0, 100).strip().lower() in (b"y", b"yes")
    except KeyboardInterrupt:                               # a no, by who still wants to know where the text is
        session.error_sink.write("\n")
        return False


def edit_text(text: str, name: str, save: Callable[[str], dict]) -> dict:
    """A text of no file, in the editor; what `save` made of it. A text that is not taken stays in a file."""
    path = new_file(f"{name.replace('/', '_')[:64]}.", text)
    edited = edit_file(path)
    try:
        saved = save(edited)
    except KvmappError as error:
        raise kept_at(error, path) from None
    os.unlink(path)
    return saved


def new_file(prefix: str, text: str) -> str:
    import tempfile
    fd, path = tempfile.mkstemp(suffix=".conf", prefix=prefix)
    with open(fd, "w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
        stream.write(text)
    return path


def edit_file(path: str) -> str:
    """What the file holds when the editor has ended. Raises HostError."""
    import signal
    import subprocess
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    # As a shell reads it, so that EDITOR="emacs -nw" is what the user means; the path is an argument of its own.
    # Keys that interrupt are the editor's: vi leaves its insert mode by one. We and the shell go on waiting; what one handles, and
    # does not ignore, is at its default in its children.
    kept = [(number, signal.signal(number, lambda *_: None)) for number in (signal.SIGINT, signal.SIGQUIT)]
    try:
        done = subprocess.run(["/bin/sh", "-c", f'trap : INT QUIT; {editor} "$1"', "editor", path], check=False)
    finally:
        for number, handler in kept:
            signal.signal(number, handler)
    if done.returncode == 127:
        raise kept_at(HostError(f"The editor '{editor}' cannot be run", "set VISUAL or EDITOR to one that is installed"), path)
    if done.returncode:
        raise kept_at(HostError(f"The editor '{editor}' ended with status {done.returncode}; nothing was changed"), path)
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as stream:
        return stream.read()
