"""Between names, Ids and UUIDs: domid, domname, domuuid."""
from __future__ import annotations

from kvmapp.cli import render
from kvmapp.cli.table import domain, verb
from kvmapp.client import of


@verb("domid", "the Id of a domain", domain("the domain's name or UUID"))
def domid(session, given):
    show(session, given, "id")


@verb("domname", "the name of a domain", domain("the domain's Id or UUID"))
def domname(session, given):
    show(session, given, "name")


@verb("domuuid", "the UUID of a domain", domain("the domain's name or Id"))
def domuuid(session, given):
    show(session, given, "uuid")


def show(session, given, key: str) -> None:
    value = session.daemon.get(of(given.domain))[key]
    session.answer({key: value}, f"{render.or_dash(value)}\n")
