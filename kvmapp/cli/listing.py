"""list: all domains, one line each.

Broken files are listed with those that are shut off, with the reason. Left out: virsh's options for snapshots, checkpoints and
managed saves.
"""
from __future__ import annotations

from kvmapp.cli import render
from kvmapp.cli.table import flag, verb

STATE_FLAGS = {"state_running": ("running",), "state_paused": ("paused",), "state_shutoff": ("shut off",),
               "state_other": ("in shutdown", "crashed", "no response", "broken")}


@verb("list", "list domains",
      flag("inactive", "those that do not run"), flag("all", "those that run, and those that do not"),
      flag("transient", "those without a file"), flag("persistent", "those with a file"),
      flag("state-running", "those that are running"), flag("state-paused", "those that are paused"),
      flag("state-shutoff", "those that are shut off"), flag("state-other", "those in any other state"),
      flag("autostart", "those marked by autostart"), flag("no-autostart", "those that are not"),
      flag("waiting", "those that autostart is still to start since the host's boot"),
      flag("uuid", "print UUIDs only"), flag("name", "print names only"), flag("id", "print Ids only"),
      flag("table", "print the table (what is done without another wish)"), flag("title", "print titles too"),
      text="Running domains, in the order of their Ids; with --all the others too, in the order of their names. Conditions of one "
           "kind add up, those of different kinds must all hold. A domain whose file cannot be used is `broken`, with the reason; "
           "one whose process does not answer shows `no response`, and delays nobody.",
      exclusive=(("table", "name"), ("table", "uuid"), ("table", "id")))
def list_domains(session, given):
    domains = chosen(session.daemon.get("/v1/domains")["domains"], given)
    session.answer({"domains": domains}, lambda: text_of(domains, given, header=not session.quiet))
    older = [one["name"] for one in domains if one.get("outdated")]
    if older and given.all and not (given.name or given.uuid or given.id):
        session.note(f"note: under another kvmapp until the next start: {', '.join(older)}")


def chosen(domains: list[dict], given) -> list[dict]:
    states = [state for key, names in STATE_FLAGS.items() if getattr(given, key) for state in names]
    inactive = given.inactive or given.state_shutoff
    everything = given.all or (given.state_other and not inactive)          # broken ones do not run
    found = [one for one in domains
             if (everything or (one["id"] is None) == inactive)
             and (not states or one["state"] in states)
             and holds(one["persistent"], given.persistent, given.transient)
             and holds(one["autostart"], given.autostart, given.no_autostart)
             and (one["waiting"] or not given.waiting)]
    return sorted(found, key=lambda one: (one["id"] is None, one["id"] or 0, one["name"]))


def holds(fact: bool, wanted: bool, unwanted: bool) -> bool:
    return wanted == unwanted or fact == wanted


def text_of(domains: list[dict], given, header: bool) -> str:
    if given.uuid or given.name or given.id:
        return columns(domains, given)
    rows = [[render.or_dash(one["id"]), one["name"], state_text(one)] + ([one["title"] or ""] if given.title else [])
            for one in domains]
    return render.table(["Id", "Name", "State"] + (["Title"] if given.title else []), rows, header=header)


def columns(domains: list[dict], given) -> str:
    """Bare values for scripts. Ids alone leave out the domains that have none."""
    keys = [key for key in ("uuid", "id", "name") if getattr(given, key)]
    if keys == ["id"]:
        domains = [one for one in domains if one["id"] is not None]
    return "".join(" ".join(render.or_dash(one[key]) for key in keys) + "\n" for one in domains)


def state_text(domain: dict) -> str:
    return f"broken ({domain['text']})" if domain["state"] == "broken" and domain["text"] else domain["state"]
