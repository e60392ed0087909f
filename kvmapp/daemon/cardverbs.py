"""Network cards of domains that come, go and change: attach-interface, detach-interface, domif-setlink, domiftune.

As in virsh, the running domain and its file are two things, and `live` and `config` choose. Both new configurations are checked
before either is changed; the running domain comes first, for it is what can refuse.
"""
from __future__ import annotations

from kvmapp import schema
from kvmapp.config import DomainConfig
from kvmapp.daemon.actions import change_stored, scope
from kvmapp.daemon.call import Call
from kvmapp.daemon.domain import Domain, interface_view
from kvmapp.daemon.netverbs import parsed
from kvmapp.daemon.taps import open_tap
from kvmapp.errors import KvmappError, NameInUse, Unsupported, UsageError
from kvmapp.values import make_mac

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmapp.config import InterfaceConfig

    Cards = Callable[[list[dict]], list[dict]]          # what becomes of a configuration's cards

SECTION = schema.DOMAIN.sections["interface"]
ATTACH_TIMEOUT = 10.0                   # seconds
COME_AND_GO = "Its cards cannot come and go"
EJECT_PATIENCE = 5.0                    # for the guest to let go of a card before the verb answers; a Linux takes a moment


async def interface_attach(call: Call) -> dict:
    domain = call.domain()
    with domain.jobs.hold("attach-interface", call.who):
        live, config = chosen(call, domain)
        targets = configs(domain, live, config)
        settings = parsed(SECTION, "new", call.body.get("settings", {}))
        index = free_index(targets)
        settings = {"mac": make_mac(), **{key: value for key, value in settings.items() if value is not None}}

        def add(cards: list[dict]) -> list[dict]:
            return [*cards, {"index": index, **settings}]
        after = [with_cards(one, add(cards_of(one))) for one in targets]
        if live:
            await plug(call, domain, after[0], card_of(after[0], index))
            change_live(domain, add)
        if config:
            change_cards(call, domain, add)
        return changed(call, domain, card_of(after[0], index), live)


async def interface_detach(call: Call) -> dict:
    domain = call.domain()
    with domain.jobs.hold("detach-interface", call.who):
        live, config = chosen(call, domain)
        found = find(domain, configs(domain, live, config), call.body)
        view = changed(call, domain, found[0], live)
        if live:
            await unplug(domain, found[0], view["warnings"])
        if config:
            change_cards(call, domain, lambda cards: [one for one in cards if one["index"] != found[-1].index])
        return {**view, "domain": domain.summary()}


async def interface_update(call: Call) -> dict:
    domain = call.domain()
    with domain.jobs.hold("update-interface", call.who):
        live, config = chosen(call, domain)
        targets = configs(domain, live, config)
        before = find(domain, targets, call.body)
        settings = parsed(SECTION, str(before[0].index), call.body.get("settings", {}))
        fixed = [key for key in settings if not SECTION.settings[key].live]
        if live and fixed:
            raise Unsupported(f"Cannot change {fixed[0]} of {before[0].heading} while domain '{domain.name}' runs",
                              "with --config it takes effect at the next start")
        settings = {key: SECTION.settings[key].default if value is None else value for key, value in settings.items()}

        def alter(was: InterfaceConfig) -> Cards:
            return lambda cards: [{**card, **settings} if card["index"] == was.index else card for card in cards]
        after = [with_cards(one, alter(was)(cards_of(one))) for one, was in zip(targets, before, strict=True)]
        if live:
            await apply_live(call, domain, before[0], card_of(after[0], before[0].index))
            change_live(domain, alter(before[0]))
        if config:
            change_cards(call, domain, alter(before[-1]))
        return changed(call, domain, card_of(after[0], before[0].index), live)


# Which configurations, and which card of them.

def chosen(call: Call, domain: Domain) -> tuple[bool, bool]:
    """`persistent`: what virsh means by it: the file, and the running domain if it runs."""
    if call.body.get("persistent"):
        domain.want_persistent()
        return domain.active, True
    return scope(call, domain)


def configs(domain: Domain, live: bool, config: bool) -> list[DomainConfig]:
    """The live one first."""
    found = []
    if live:
        domain.want_active()
        if domain.live is None:
            raise Unsupported(f"Domain '{domain.name}' was started by another version, which this one does not understand",
                              "with --config the change takes effect at the next start")
        found.append(domain.live)
    return [*found, domain.want_persistent()] if config else found


def cards_of(config: DomainConfig) -> list[dict]:
    return [one.to_dict() for one in config.interfaces]


def with_cards(config: DomainConfig, cards: list[dict]) -> DomainConfig:
    return DomainConfig.from_dict({**config.to_dict(), "interfaces": cards})


def card_of(config: DomainConfig, index: int) -> InterfaceConfig:
    return next(one for one in config.interfaces if one.index == index)


def free_index(targets: list[DomainConfig]) -> int:
    taken = {card.index for config in targets for card in config.interfaces}
    return next(index for index in range(len(taken) + 1) if index not in taken)


def find(domain: Domain, targets: list[DomainConfig], body: dict) -> list[InterfaceConfig]:
    """The card of each of them. In the second it is the one with the same MAC address: an index may be another card's there."""
    first = find_one(domain, targets[0], body)
    return [first, *(find_one(domain, one, {"interface": first.mac}) for one in targets[1:])]


def find_one(domain: Domain, config: DomainConfig, body: dict) -> InterfaceConfig:
    """By MAC address or by the tap's name; by type alone where there is one of it. virsh's words."""
    name, kind = body.get("interface"), body.get("type")
    names = targets_of(domain, config)
    cards = [one for one in config.interfaces if kind in (None, one.type)]
    if not cards and kind is not None:
        raise UsageError(f"No interface found whose type is {kind}", f"kvmappctl domiflist {domain.name}")
    if name is None:
        if len(cards) > 1:
            raise UsageError(f"Domain has {len(cards)} interfaces. Please specify which one to detach using --mac",
                             f"it has: {', '.join(one.mac for one in cards)}")
        return cards[0]
    found = next((one for one in cards if name.lower() == one.mac or name == names[one.mac]), None)
    if found is None:
        what = f"No interface with MAC address {name} was found" if ":" in name else f"interface (target: {name}) not found"
        if config is not domain.live and domain.active:
            what += " in the domain's file"
        raise UsageError(what, "it has: " + (", ".join(f"{names[one.mac] or '-'} ({one.mac})" for one in cards) or "none"))
    return found


def targets_of(domain: Domain, config: DomainConfig) -> dict[str, str | None]:
    """By MAC address. A tap that is there is the running card's, also in the file, where its index may be another card's."""
    names = {one.mac: one.target for one in config.interfaces}
    taps = domain.record.taps if domain.record else {}
    there = {one.mac: taps[str(one.index)] for one in (domain.live.interfaces if domain.live else ()) if str(one.index) in taps}
    return {mac: there.get(mac, None if name in there.values() else name) for mac, name in names.items()}


def changed(call: Call, domain: Domain, card: InterfaceConfig, live: bool) -> dict:
    """`live`: the card is the running domain's; another one's tap has nothing to do with it."""
    return {**call.changed(domain), "interface": interface_view(card, domain.record.taps if live and domain.record else {})}


# The running domain.

def set_live(domain: Domain, config: DomainConfig) -> None:
    assert domain.record
    domain.live, domain.record.config = config, config.to_dict()
    domain.record.save(domain.paths)


def change_live(domain: Domain, change: Cards) -> None:
    """Of the cards that are there by now: the guest may have let go of one while the verb was at work."""
    domain.want_active()
    assert domain.live
    set_live(domain, with_cards(domain.live, change(cards_of(domain.live))))


def change_cards(call: Call, domain: Domain, change: Cards) -> None:
    """In the domain's file."""
    change_stored(call, domain, lambda stored: {"interfaces": change(cards_of(stored))})


async def plug(call: Call, domain: Domain, config: DomainConfig, card: InterfaceConfig) -> None:
    """Makes its tap, hands it to the domain process. Raises KvmappError; then nothing of it is left."""
    supervisor = call.supervisor
    process = domain.want_active()
    for other in supervisor.active():
        if any(one.mac == card.mac for one in (other.live.interfaces if other.live and other is not domain else ())):
            raise NameInUse(f"Domain '{other.name}' runs with the same MAC address {card.mac}", "leave --mac out and one is made")
    bridge = supervisor.networks.bridge_of(card) if card.type == "network" else card.source or ""
    tap = open_tap(card, bridge)
    files = tap.files(card.index) if tap else {}
    try:
        if tap and tap.made:
            await supervisor.cards.settle(domain.name, card, tap.name, bridge)
        supervisor.networks.expect(config)
        await domain.told(process.ask_with_files("attach-device", files, ATTACH_TIMEOUT, interface=card.to_dict()), COME_AND_GO)
    except BaseException:
        if tap:
            supervisor.cards.release(domain.name, tap.name)
        raise
    finally:
        if tap:
            tap.close()
    if domain.record is None:
        raise KvmappError(f"Domain '{domain.name}' ended meanwhile")
    if tap:
        domain.record.taps[str(card.index)] = tap.name


async def unplug(domain: Domain, card: InterfaceConfig, warnings: list[str]) -> None:
    """Asks the guest for it; what else there is to do is done when the guest has let go (Cards.removed)."""
    await domain.told(domain.want_active().ask("detach-device", device=f"net{card.index}"), COME_AND_GO)
    gone = await domain.wait_until(lambda: domain.live is None or all(one.index != card.index for one in domain.live.interfaces),
                                   EJECT_PATIENCE)
    if not gone:
        warnings.append(f"the guest has not let go of {card.heading} ({card.mac}) yet; a guest without ACPI hotplug never does")


async def apply_live(call: Call, domain: Domain, before: InterfaceConfig, after: InterfaceConfig) -> None:
    tap = (domain.record.taps if domain.record else {}).get(str(after.index))
    if before.link != after.link:
        await domain.want_active().ask("link", device=f"net{after.index}", up=after.link == "up")
    if tap and after.type in ("bridge", "network"):
        await call.supervisor.cards.change(domain.name, before, after, tap)
