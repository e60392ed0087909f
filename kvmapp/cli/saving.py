"""A running domain into a file and back: save, restore, managedsave, managedsave-remove; and domjobabort."""
from __future__ import annotations

import os
from contextlib import contextmanager

from kvmapp.cli.table import argument, domain, flag, verb
from kvmapp.client import of
from kvmapp.errors import KvmappError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmapp.cli.session import Session

RUNNING = flag("running", "let it run when it comes back, though it is paused now")
PAUSED = flag("paused", "let it be paused when it comes back")
VERBOSE = flag("verbose", "accepted for virsh's sake: how far it is, is always shown")


@verb("save", "save a domain that runs to a file, and end it", domain(complete="active"),
      argument("file", "where to", complete="file"), RUNNING, PAUSED, VERBOSE, exclusive=(("running", "paused"),),
      text="The guest's memory and the state of its devices go to the file; restore goes on from there. Its disks must not change in "
           "between. If the file cannot be written, the guest goes on as if nothing had been; so it does after a Ctrl-C.",
      failure="Failed to save domain '{domain}' to {file}")
def save(session, given):
    with abortable(session, f"saving {given.domain}", given.domain):
        changed = session.daemon.post(of(given.domain, "save"), file=os.path.abspath(given.file), **as_asked(given))
    session.done(changed, f"\nDomain '{changed['domain']['name']}' saved to {given.file}")


@verb("restore", "go on with a domain from the file it was saved to", argument("file", "which file", complete="file"),
      flag("running", "let it run, though it was paused when it was saved"), flag("paused", "do not let it run yet"),
      flag("trust", "believe the configuration in the file, though it was not saved by this host's daemon"),
      exclusive=(("running", "paused"),),
      text="The file stays, and must not be written to while the domain runs: its memory is read from there when it is needed.",
      failure="Failed to restore domain from {file}")
def restore(session, given):
    with session.wait_with(f"restoring from {given.file}"):
        changed = session.daemon.post("/v1/restore", file=os.path.abspath(given.file), **as_asked(given),
                                      **{"trust": True} if given.trust else {})
    session.done(changed, f"Domain restored from {given.file}")


@verb("managedsave", "save a domain that runs; its next start goes on from there", domain(complete="active"), RUNNING, PAUSED, VERBOSE,
      exclusive=(("running", "paused"),),
      failure="Failed to save domain '{domain}' state")
def managedsave(session, given):
    with abortable(session, f"saving {given.domain}", given.domain):
        changed = session.daemon.post(of(given.domain, "managedsave"), **as_asked(given))
    session.done(changed, f"\nDomain '{changed['domain']['name']}' state saved by kvmapp")


@verb("managedsave-remove", "give up a domain's managed save, so that its next start boots it", domain(),
      failure="Failed to remove managed save image for domain '{domain}'")
def managedsave_remove(session, given):
    changed = session.daemon.post(of(given.domain, "managedsave-remove"))
    name = changed["domain"]["name"]
    session.done(changed, f"Removed managedsave image for domain '{name}'" if changed["removed"]
                 else f"Domain '{name}' has no manage save image; removal skipped")


@verb("domjobabort", "end the job that holds a domain", domain(),
      text="That is one that saves it, or waits for the file of a disk to attach: its guest goes on as if nothing had been. Of any other "
           "job, destroy is the end.")
def domjobabort(session, given):
    session.done(session.daemon.post(of(given.domain, "job", "abort")), "")


@contextmanager
def abortable(session: Session, what: str, name: str) -> Iterator[None]:
    """As virsh has it, who hits Ctrl-C does not want it any more."""
    try:
        with session.wait_with(what, name):
            yield
    except KeyboardInterrupt:
        session.disconnect()                # that connection waits for the answer
        try:
            session.daemon.post(of(name, "job", "abort"))
        except KvmappError as error:        # it goes on
            session.complain_of(error, f"It goes on ({what})")
        raise


def as_asked(given) -> dict[str, bool]:
    """What the daemon is told of how the domain comes back: nothing, if it is to be as it is now."""
    return {"paused": given.paused} if given.paused or given.running else {}
