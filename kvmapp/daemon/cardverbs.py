"""Network cards of domains that come, go and change: attach-interface, detach-interface, domif-setlink, domiftune."""
from __future__ import annotations

from kvmapp import schema
from kvmapp.config import DomainConfig
from kvmapp.daemon.call import Call
from kvmapp.daemon.domain import Domain, interface_view
from kvmapp.daemon.netverbs import parsed
from kvmapp.daemon.plugging import change_file, change_live, changed, chosen, configs, plug_in, slot_in_file, slot_of, unplug
from kvmapp.daemon.taps import open_tap
from kvmapp.errors import NameInUse, Unsupported, UsageError
from kvmapp.values import make_mac

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmapp.config import InterfaceConfig
    from kvmapp.daemon.plugging import Change

SECTION = schema.DOMAIN.sections["interface"]
CARDS = "interfaces"


async def interface_attach(call: Call) -> dict:
    domain = call.domain()
    with domain.jobs.hold("attach-interface", call.who):
        live, config = chosen(call, domain)
        targets = configs(domain, live, config)
        settings = parsed(SECTION, "new", call.body.get("settings", {}))
        index = free_index(targets)
        settings = {"mac": make_mac(), **{key: value for key, value in settings.items() if value is not None}}

        def add(slot: int | None = None) -> Change:
            return lambda cards: [*cards, {"index": index, "slot": slot, **settings}]
        after = [changed(domain, one, CARDS, add()) for one in targets]
        if live:
            slot = await plug(call, domain, after[0], card_of(after[0], index), add)
        else:
            slot = next((slot_of(domain, f"net{one.index}") for one in (domain.live.interfaces if domain.live else ())
                         if one.mac == settings["mac"]), None)
        if config:
            change_file(call, domain, CARDS, add(slot_in_file(call, domain, slot)))
        return answer(call, domain, card_of(after[0], index), live)


async def interface_detach(call: Call) -> dict:
    domain = call.domain()
    with domain.jobs.hold("detach-interface", call.who):
        live, config = chosen(call, domain)
        found = find(domain, configs(domain, live, config), call.body)
        view = answer(call, domain, found[0], live)
        if live:
            await unplug(domain, "detach-device", f"net{found[0].index}", f"{found[0].heading} ({found[0].mac})", view["warnings"])
        if config:
            change_file(call, domain, CARDS, lambda cards: [one for one in cards if one["index"] != found[-1].index])
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

        def alter(was: InterfaceConfig) -> Change:
            return lambda cards: [{**card, **settings} if card["index"] == was.index else card for card in cards]
        after = [changed(domain, one, CARDS, alter(was)) for one, was in zip(targets, before, strict=True)]
        if live:
            await apply_live(call, domain, before[0], card_of(after[0], before[0].index))
            change_live(domain, CARDS, alter(before[0]))
        if config:
            change_file(call, domain, CARDS, alter(before[-1]))
        return answer(call, domain, card_of(after[0], before[0].index), live)


# Which card.

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


def answer(call: Call, domain: Domain, card: InterfaceConfig, live: bool) -> dict:
    """`live`: the card is the running domain's; another one's tap has nothing to do with it."""
    return {**call.changed(domain), "interface": interface_view(card, domain.record.taps if live and domain.record else {})}


# The running domain.

async def plug(call: Call, domain: Domain, config: DomainConfig, card: InterfaceConfig,
               add: Callable[[int | None], Change]) -> int | None:
    """Makes its tap, hands it to the domain process: the slot. Raises KvmappError; then nothing of it is left."""
    supervisor = call.supervisor
    domain.want_active()
    for other in supervisor.active():
        if any(one.mac == card.mac for one in (other.live.interfaces if other.live and other is not domain else ())):
            raise NameInUse(f"Domain '{other.name}' runs with the same MAC address {card.mac}", "leave --mac out and one is made")
    bridge = supervisor.networks.bridge_of(card) if card.type == "network" else card.source or ""
    tap = open_tap(card, bridge)
    files = tap.files(card.index) if tap else {}
    try:
        try:
            if tap and tap.made:
                await supervisor.cards.settle(domain.name, card, tap.name, bridge)
            supervisor.networks.expect(config)
            domain.want_active()
        except BaseException:
            if tap:
                supervisor.cards.release(domain.name, tap.name)
            raise
        if tap and domain.record:
            domain.record.taps[str(card.index)] = tap.name
        return await plug_in(call, domain, CARDS, add, f"net{card.index}", "attach-device", files, interface=card.changes())
    finally:
        if tap:
            tap.close()


async def apply_live(call: Call, domain: Domain, before: InterfaceConfig, after: InterfaceConfig) -> None:
    tap = (domain.record.taps if domain.record else {}).get(str(after.index))
    if before.link != after.link:
        await domain.want_active().ask("link", device=f"net{after.index}", up=after.link == "up")
    if tap and after.type in ("bridge", "network"):
        await call.supervisor.cards.change(domain.name, before, after, tap)
