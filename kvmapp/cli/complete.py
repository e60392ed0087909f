"""Completion of verbs, options and names, for the shell and for bash (init/completion/kvmappctl calls `kvmappctl complete`).

A name that would have to come from the daemon is left out when the daemon is away: completion never says an error.
"""
from __future__ import annotations

from kvmapp.cli.index import GROUPS, MODULES, find
from kvmapp.cli.table import FLAG, Option, Verb, value, verb
from kvmapp.client import Client, of
from kvmapp.errors import KvmappError

ANSWER_WITHIN = 2                       # seconds that a user may wait for a Tab


@verb("complete", "print what the last of these words may become", value("string", "words", many=True))
def complete(session, given):
    session.quiet = True
    words = given.string
    session.say("".join(f"{word}\n" for word in candidates(session, words[:-1], words[-1] if words else "")))


def candidates_of_line(session, line: str) -> list[str]:
    """What the last word of a line of the shell may become; of several commands the last one counts."""
    last = line.rpartition(";")[2].lstrip()
    words = last.split()
    current = words.pop() if words and not last[-1:].isspace() else ""
    return [f"{word} " for word in candidates(session, words, current)]


def candidates(session, words: list[str], current: str) -> list[str]:
    if not words:
        return sorted(name for name in MODULES if name.startswith(current) and name != "complete")
    found = find(words[0])
    if found is None:
        return []
    if current.startswith("--") and "=" not in current:
        return unused_options(found, words[1:], current)
    option = option_at(found, words[1:])
    return sorted(word for word in values(session, found, option, words[1:]) if word.startswith(current)) if option else []


def unused_options(verb: Verb, words: list[str], current: str) -> list[str]:
    names = [f"--{name}" for name in (*verb.options, "json", "help")]
    return [name for name in names if name.startswith(current) and name not in words]


def option_at(verb: Verb, words: list[str]) -> Option | None:
    """Which option the word after these belongs to."""
    waiting = [option for option in verb.options.values() if option.kind != FLAG and not option.named]
    pending: Option | None = None
    for word in words:
        if pending:
            pending = None
            continue
        option = verb.options.get(word[2:].partition("=")[0]) if word.startswith("--") else None
        if option:
            if option.kind != FLAG and "=" not in word:
                pending = option
            if option in waiting and not option.many:
                waiting.remove(option)
        elif not word.startswith("--") and waiting and not waiting[0].many:
            waiting.pop(0)
    return pending or (waiting[0] if waiting else None)


def values(session, verb: Verb, option: Option, words: list[str]) -> list[str]:
    if option.choices:
        return list(option.choices)
    source = SOURCES.get(option.complete)
    if source is None:
        return []
    kept, session.connection = session.connection, Client(session.socket_in_use, timeout=ANSWER_WITHIN)
    try:
        return source(session, next((word for word in words if not word.startswith("-")), ""))
    except KvmappError:
        return []
    finally:                            # a verb that comes after it has all the time that it takes
        session.disconnect()
        session.connection = kept


# Where words come from, by the tables' `complete`; each is given the session and the domain that was named before.

def domains(session, _name: str) -> list[str]:
    return [one["name"] for one in session.daemon.get("/v1/domains")["domains"]]


def active_domains(session, _name: str) -> list[str]:
    return [one["name"] for one in session.daemon.get("/v1/domains")["domains"] if one["id"] is not None]


def inactive_domains(session, _name: str) -> list[str]:
    return [one["name"] for one in session.daemon.get("/v1/domains")["domains"] if one["id"] is None]


def networks(session, _name: str) -> list[str]:
    return [one["name"] for one in session.daemon.get("/v1/networks")["networks"]]


def active_networks(session, _name: str) -> list[str]:
    return [one["name"] for one in session.daemon.get("/v1/networks")["networks"] if one["active"]]


def inactive_networks(session, _name: str) -> list[str]:
    return [one["name"] for one in session.daemon.get("/v1/networks")["networks"] if not one["active"]]


def disks(session, name: str) -> list[str]:
    return [disk["name"] for disk in session.daemon.get(of(name))["disks"]] if name else []


def consoles(session, name: str) -> list[str]:
    return [console["name"] for console in session.daemon.get(of(name))["consoles"]] if name else []


def interfaces(session, name: str) -> list[str]:
    cards = session.daemon.get(of(name))["interfaces"] if name else []
    return [word for card in cards for word in (card["target"], card["mac"]) if word]


def host_interfaces(session, _name: str) -> list[str]:
    return [one["name"] for one in session.daemon.get("/v1/interfaces")["interfaces"]]


def event_kinds(_session, _name: str) -> list[str]:
    from kvmapp.cli.events import KINDS
    return list(KINDS)


def states(_session, _name: str) -> list[str]:
    from kvmapp.cli.lifecycle import STATES
    return [state for state in STATES if " " not in state]


def verbs(_session, _name: str) -> list[str]:
    return [name for name in (*MODULES, *GROUPS) if name != "complete"]


SOURCES = {"network": networks, "active-network": active_networks, "inactive-network": inactive_networks,
           "domain": domains, "active": active_domains, "inactive": inactive_domains, "disk": disks, "console": consoles,
           "host-interface": host_interfaces,
           "interface": interfaces,
           "event": event_kinds, "state": states, "verb": verbs}
