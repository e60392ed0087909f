"""The life of a domain: start, shutdown, reboot, reset, destroy, suspend, resume, autostart, autostart-stop, wait.

What is said after each is what virsh says, without quotes around the name.
"""
from __future__ import annotations

from kvmapp.cli.table import NUMBER, domain, flag, value, verb
from kvmapp.client import of
from kvmapp.errors import DomainRunning, GuestIgnored, UsageError

MODE = value("mode", "how the guest is asked: acpi, by its power button", choices=("acpi",))
STATES = ("running", "paused", "in shutdown", "shut off", "crashed", "no response", "broken")


@verb("start", "start a domain that is shut off", domain(complete="inactive"),
      flag("console", "then attach to its console"), flag("paused", "make it, but do not let it run yet"),
      flag("force-boot", "boot it even if it has a managed save, which is given up"),
      failure="Failed to start domain '{domain}'")
def start(session, given):
    if given.console:
        from kvmapp.cli.console import require_terminal
        require_terminal()
    try:
        with session.wait_with(f"starting {given.domain}", given.domain):
            wishes = {"paused": given.paused, "force_boot": given.force_boot}
            changed = session.daemon.post(of(given.domain, "start"), **{name: True for name, wish in wishes.items() if wish})
    except DomainRunning as error:
        session.complain_of(DomainRunning("Domain is already active", error.hint))
        return error.exit_code
    session.done(changed, f"Domain {name_of(changed)} started")
    return open_after(session, changed) if given.console else 0


def open_after(session, changed: dict) -> int:
    """What --console asks for, once the domain is there. By its UUID: its name may be another domain's Id."""
    from kvmapp.cli.console import attach
    return attach(session, changed["domain"]["uuid"], name=name_of(changed))


@verb("shutdown", "ask the guest to shut down", domain(complete="active"), MODE,
      value("timeout", "wait so many seconds for its end; say so if it does not come", kind=NUMBER),
      text="Presses the domain's power button. A guest without ACPI, or without a program that heeds it, ignores that; destroy ends "
           "it then. If it still runs after guest.conf's shutdown_timeout, a line in the domain's log and an event (guest-ignored) say so.",
      failure="Failed to shutdown domain '{domain}'")
def shutdown(session, given):
    if not given.timeout:
        changed = session.daemon.post(of(given.domain, "shutdown"))
        session.done(changed, f"Domain {name_of(changed)} is being shutdown")
        return
    with session.wait_with(f"waiting for {given.domain} to shut down"):
        changed = session.daemon.post(of(given.domain, "shutdown"), timeout=given.timeout)
    session.done(changed, f"Domain {name_of(changed)} has shut down")


@verb("reboot", "ask the guest to reboot", domain(complete="active"), MODE,
      text="Presses the domain's power button, and begins anew when the guest has powered off within the hour. A guest that ignores the "
           "button is told of as with shutdown; reset restarts it then.",
      failure="Failed to reboot domain '{domain}'")
def reboot(session, given):
    changed = session.daemon.post(of(given.domain, "reboot"))
    session.done(changed, f"Domain {name_of(changed)} is being rebooted")


@verb("reset", "reset a domain, as by its reset button", domain(complete="active"), failure="Failed to reset domain '{domain}'")
def reset(session, given):
    changed = session.daemon.post(of(given.domain, "reset"))
    session.done(changed, f"Domain {name_of(changed)} was reset")


@verb("destroy", "end a domain now, as by pulling its plug", domain(complete="active"),
      flag("graceful", "fail rather than kill its process if that does not end by itself"),
      text="Its disks and its file stay. This works in every state, whatever job holds the domain.",
      failure="Failed to destroy domain '{domain}'")
def destroy(session, given):
    with session.wait_with(f"ending {given.domain}", given.domain):
        changed = session.daemon.post(of(given.domain, "destroy"), **({"graceful": True} if given.graceful else {}))
    session.done(changed, f"Domain {name_of(changed)} destroyed")


@verb("suspend", "stop a domain's vCPUs", domain(complete="active"), failure="Failed to suspend domain '{domain}'")
def suspend(session, given):
    changed = session.daemon.post(of(given.domain, "suspend"))
    session.done(changed, f"Domain {name_of(changed)} suspended")


@verb("resume", "let a domain's vCPUs run again", domain(complete="active"), failure="Failed to resume domain '{domain}'")
def resume(session, given):
    changed = session.daemon.post(of(given.domain, "resume"))
    session.done(changed, f"Domain {name_of(changed)} resumed")


@verb("autostart", "start a domain with the host, or no longer", domain(), flag("disable", "no longer"),
      text="A link in /etc/kvmapp/domains/autostart marks the domain.",
      failure="Failed to change the autostart mark of domain '{domain}'")
def autostart(session, given):
    changed = session.daemon.post(of(given.domain, "autostart"), enabled=not given.disable)
    session.done(changed, f"Domain {name_of(changed)} {'unmarked' if given.disable else 'marked'} as autostarted")


@verb("autostart-stop", "have autostart start no further domain until the host's next boot",
      text="For the host's end: `list --all --waiting` has those that it is still to start. They keep their mark.",
      failure="Failed to stop autostart")
def autostart_stop(session, given):
    stopped = session.daemon.post("/v1/autostart/stop")
    left = f"; left off: {', '.join(stopped['left'])}" if stopped["left"] else ""
    session.done(stopped, f"Autostart stopped until the host's next boot{left}")


@verb("wait", "wait for a domain to come into a state", domain(),
      value("state", "the state, or several with commas (default: shut off)", complete="state"),
      value("timeout", "for so many seconds at most", kind=NUMBER),
      text="Exit status 1 when the time runs out first.")
def wait(session, given):
    wanted = given.state or "shut off"
    for state in wanted.split(","):
        if state not in STATES:
            raise UsageError(f"Unknown state '{state}'", f"it may be {', '.join(STATES)}")
    with session.wait_with(f"waiting for {given.domain} to be {wanted}"):
        waited = session.daemon.wait(of(given.domain, "wait"), state=wanted, timeout=given.timeout)
    one = waited["domain"]
    if not waited["reached"]:
        raise GuestIgnored(f"Domain '{one['name']}' is {one['state']}, not {wanted}, after {given.timeout} s")
    session.answer(waited, "" if session.quiet else f"Domain {one['name']} is {one['state']}\n")


def name_of(changed: dict) -> str:
    """As the daemon knows it: who wrote an Id reads which domain it was."""
    return changed["domain"]["name"]
