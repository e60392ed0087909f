"""Network cards of a domain: attach-interface, detach-interface, domif-setlink, domif-getlink, domiftune."""
from __future__ import annotations

from kvmapp.cli.definition import config_of, scope
from kvmapp.cli.table import argument, domain, flag, value, verb
from kvmapp.client import of
from kvmapp.errors import UsageError

SCOPE = (flag("config", "in its file, for its next start"), flag("live", "of the running domain"),
         flag("current", "of the running domain if it runs, else in its file"))
PERSISTENT = flag("persistent", "in its file, and of the running domain if it runs")
NOT_BOTH = (("live", "current"), ("config", "current"), ("persistent", "current"))
INTERFACE = argument("interface", "its tap (vnetN) or its MAC address: see domiflist", complete="interface")
RATE = "AVERAGE[,PEAK[,BURST]], in kilobytes a second and kilobytes; 0 is no limit"


@verb("attach-interface", "give a domain one more network card", domain(),
      argument("type", "bridge, network or user", choices=("bridge", "network", "user")),
      value("source", "the bridge or the network"), value("target", "the tap's name on the host; vnetN when left out"),
      value("mac", "its MAC address; made when left out"), value("model", "virtio or e1000"),
      value("inbound", f"how much goes to the guest: {RATE}", named=True),
      value("outbound", f"how much goes from the guest: {RATE}", named=True), PERSISTENT, *SCOPE,
      text="A running guest is told of the card through ACPI, and has it at once. For attach-interface DOMAIN user, leave the source out.",
      failure="Failed to attach interface", exclusive=NOT_BOTH)
def attach_interface(session, given):
    settings = {key: getattr(given, key) for key in ("type", "source", "target", "mac", "model") if getattr(given, key)}
    settings |= rates("inbound", given.inbound) | rates("outbound", given.outbound)
    changed = session.daemon.post(of(given.domain, "interfaces"), settings={key: text for key, text in settings.items() if text},
                                  **where(given))
    session.done(changed, "Interface attached successfully")


@verb("detach-interface", "take a network card out of a domain", domain(),
      argument("type", "bridge, network, user or tap", choices=("bridge", "network", "user", "tap")),
      value("mac", "its MAC address; wanted where there are several of this type", complete="interface"), PERSISTENT, *SCOPE,
      text="A running guest is asked for the card, and the card is gone when the guest has let go of it.",
      failure="Failed to detach interface", exclusive=NOT_BOTH)
def detach_interface(session, given):
    with session.wait_with(f"waiting for the guest of {given.domain} to let go", given.domain):
        changed = session.daemon.post(of(given.domain, "interfaces", "detach"), type=given.type,
                                      **({"interface": given.mac} if given.mac else {}), **where(given))
    session.done(changed, "Interface detached successfully")


@verb("domif-setlink", "plug a network card's cable in or out", domain(), INTERFACE,
      argument("state", "up or down", choices=("up", "down")), flag("config", "in its file, for its next start"),
      failure="Failed to update interface link state")
def domif_setlink(session, given):
    changed = session.daemon.post(of(given.domain, "interfaces", "update"), interface=given.interface, settings={"link": given.state},
                                  **({"config": True} if given.config else {}))
    session.done(changed, "Device updated successfully")


@verb("domif-getlink", "whether a network card's cable is plugged in", domain(), INTERFACE,
      flag("config", "in its file, which its next start will take"))
def domif_getlink(session, given):
    card = card_of(session, given, inactive=given.config)
    session.answer({"interface": given.interface, "link": card["link"]}, f"{given.interface} {card['link']}\n")


@verb("domiftune", "show or change how much goes through a network card", domain(), INTERFACE,
      value("inbound", f"how much goes to the guest: {RATE}", named=True),
      value("outbound", f"how much goes from the guest: {RATE}", named=True), *SCOPE,
      text="Without --inbound and --outbound it shows what holds. Rates are of cards of the types bridge and network.",
      failure="Unable to set interface parameters", exclusive=NOT_BOTH[:2])
def domiftune(session, given):
    if given.inbound is not None or given.outbound is not None:
        settings = rates("inbound", given.inbound) | rates("outbound", given.outbound)
        session.done(session.daemon.post(of(given.domain, "interfaces", "update"), interface=given.interface, settings=settings,
                                         **scope(given)), "")
        return
    card = card_of(session, given, inactive=given.config)
    values = {f"{way}.{what}": card.get(f"{way[:-5]}_{what}") or 0 for way in ("inbound", "outbound")
              for what in ("average", "peak", "burst", *(("floor",) if way == "inbound" else ()))}
    session.answer(values, "".join(f"{name:<15}: {number}\n" for name, number in values.items()))


def where(given) -> dict[str, bool]:
    return {**scope(given), **({"persistent": True} if given.persistent else {})}


def rates(way: str, text: str | None) -> dict[str, str]:
    """--inbound and --outbound as the settings of the file; nothing stands for no limit."""
    if text is None:
        return {}
    parts = text.split(",")
    if len(parts) > 3 and parts[3].strip("0"):
        raise UsageError(f"--{way} {text}: a floor is not kept here", f"--{way} AVERAGE[,PEAK[,BURST]]")
    if len(parts) > 4 or not all(part.isdigit() or not part for part in parts) or not parts[0]:
        raise UsageError(f"--{way} {text}: expected AVERAGE[,PEAK[,BURST]]", f"--{way} 1000,2000,512")
    numbers = [part.lstrip("0") for part in (*parts, "", "")]
    return {f"{way[:-5]}_{what}": number if numbers[0] else "" for what, number in zip(("average", "peak", "burst"), numbers, strict=False)}


def card_of(session, given, inactive: bool) -> dict:
    """The card's settings."""
    views = session.daemon.get(of(given.domain))["interfaces"]
    index = next((one["index"] for one in views if given.interface.lower() == one["mac"] or given.interface == one["target"]), None)
    cards = config_of(session, given.domain, inactive=inactive)["interfaces"]
    found = next((card for card in cards if card["index"] == index or (index is None and given.interface.lower() == card["mac"])), None)
    if found is None:
        kind = "mac" if ":" in given.interface else "dev"
        known = ", ".join(f"{one['target'] or '-'} ({one['mac']})" for one in views)
        raise UsageError(f"Interface ({kind}: {given.interface}) not found.", f"it has: {known or 'none'}")
    return found
