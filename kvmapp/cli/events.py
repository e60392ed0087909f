"""event: what happens to domains, as it happens, one line each as virsh prints them."""
from __future__ import annotations

from kvmapp.cli.table import SECONDS, flag, value, verb
from kvmapp.client import of
from kvmapp.errors import NoResponse, UsageError

KINDS = ("lifecycle", "reboot", "balloon-change", "job", "autostart", "domain-broken", "network", "device-added",
         "device-removed", "io-error", "watchdog", "guest-ignored")


@verb("event", "show what happens to domains, as it happens",
      value("domain", "to this one only", named=True, complete="domain"),
      value("event", "which kind to wait for", complete="event"), flag("all", "wait for every kind"),
      flag("loop", "go on until the time is out or Ctrl-C, not only to the first one"),
      value("timeout", "for so many seconds", kind=SECONDS), flag("list", "list the kinds"), flag("timestamp", "print the time, too"),
      exclusive=(("all", "event"), ("list", "all"), ("list", "event")))
def event(session, given):
    if given.list:
        session.answer({"events": list(KINDS)}, "".join(f"{kind}\n" for kind in KINDS))
        return 0
    if not (given.all or given.event):
        raise UsageError("one of --list, --all, or --event <type> is required")
    if given.event and given.event not in KINDS:
        raise UsageError(f"unknown event type {given.event}", f"it may be {', '.join(KINDS)}")
    name = session.daemon.get(of(given.domain))["name"] if given.domain else None
    return 0 if watch(session, given, name) else 1


def watch(session, given, domain: str | None) -> int:
    """How many events came."""
    count = 0
    try:
        for one in stream(session, given, domain):
            count += 1
            show(session, given, one)
            if not given.loop or one["event"] == "lost":
                break
    except NoResponse:
        ending(session, "event loop timed out\n")
    except KeyboardInterrupt:
        ending(session, "event loop interrupted\n")
    ending(session, f"events received: {count}\n")
    return count


def stream(session, given, domain: str | None):
    """The daemon's events; NoResponse when the time is out."""
    import time
    session.disconnect()
    daemon = session.daemon
    end = None if given.timeout is None else time.monotonic() + given.timeout
    daemon.timeout = given.timeout
    try:
        for one in daemon.events(domain=domain, event=given.event):
            yield one
            if end is not None:
                if (left := end - time.monotonic()) <= 0:
                    raise NoResponse("")
                daemon.connection.settimeout(left)
    finally:
        session.disconnect()


def show(session, given, one: dict) -> None:
    if session.json:
        session.say_json(one)
    else:
        stamp = f"{moment(one['time'])}: " if given.timestamp else ""
        whose = f" for domain '{one['domain']}'" if one["domain"] else ""
        what = " ".join(str(one[key]) for key in ("type", "detail") if one[key] is not None)
        session.say(f"{stamp}event '{one['event']}'{whose}{f': {what}' if what else ''}\n")
    session.flush()


def ending(session, text: str) -> None:
    if not session.json:
        session.say(text)


def moment(when: float) -> str:
    import time
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(when))}.{int(when * 1000) % 1000:03d}+0000"
