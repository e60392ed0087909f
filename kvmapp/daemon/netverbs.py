"""The verbs of virtual networks, and the addresses of domains, one function a route (routes.py).

A change of a file and of the active network are two things, as in virsh: `live` and `config` choose, neither means both.
"""
from __future__ import annotations

import asyncio

from kvmapp import schema
from kvmapp.daemon import hostnet
from kvmapp.daemon.actions import digest
from kvmapp.daemon.call import Call
from kvmapp.daemon.network import Network
from kvmapp.daemon.networkstore import render
from kvmapp.errors import ConfigError, KvmappError, NameInUse, UsageError
from kvmapp.hostconfig import NetworkConfig

NEXT_START = "the active network keeps its configuration until its next start"


# Looking.

async def networks(call: Call) -> dict:
    return {"networks": [network.summary() for network in call.supervisor.networks.listed()]}


async def network(call: Call) -> dict:
    return call.network().summary()


async def network_config(call: Call) -> dict:
    """The file's text with its comments; of an active network, with what it has differently."""
    one = call.network()
    text = one.store.text(one.name)
    config = one.stored.config if one.stored else None
    if one.live is not None and not call.query.get("inactive"):
        config = one.live
        text = render(config, text if one.stored and one.stored.config else "", one.store.path(one.name))
    elif one.stored is None:
        want_persistent(one)
    return {"text": text, "file": one.stored.path if one.stored else None, "config": config.to_dict() if config else {},
            "digest": digest(text)}


async def network_leases(call: Call) -> dict:
    """virsh's order: by address."""
    from ipaddress import ip_address
    one = call.network()
    call.supervisor.networks.want_active(one)
    mac = call.query.get("mac")
    leases = [lease for lease in one.leases() if mac in (None, lease["mac"])]
    return {"leases": sorted(leases, key=lambda lease: (lease["protocol"], int(ip_address(lease["address"]))))}


async def addresses(call: Call) -> dict:
    """By the leases of our networks, or by whom the host has spoken with (guests on any bridge)."""
    domain = call.domain()
    domain.want_active()
    taps = domain.record.taps if domain.record else {}
    found = []
    neighbours = await asyncio.to_thread(hostnet.neighbours) if call.query.get("source") == "arp" else None
    for card in domain.live.interfaces if domain.live else ():
        entries = lent(call, card.source, card.mac) if neighbours is None and card.type == "network" else \
            [(address, 0) for mac, address in neighbours or () if mac == card.mac]
        found += [{"interface": taps.get(str(card.index)), "mac": card.mac, "protocol": "ipv6" if ":" in address else "ipv4",
                   "address": address, "prefix": prefix} for address, prefix in entries]
    return {"addresses": found}


def lent(call: Call, name: str | None, mac: str) -> list[tuple[str, int]]:
    one = call.supervisor.networks.networks.get(name or "")
    return [(str(lease["address"]), int(str(lease["prefix"]))) for lease in one.leases() if lease["mac"] == mac] if one else []


# Changing.

def changed(one: Network, warnings: list[str] | None = None) -> dict:
    return {"network": one.summary(), "warnings": warnings or []}


def want_persistent(one: Network) -> None:
    if one.stored is None:
        raise KvmappError(f"Requested operation is not valid: network '{one.name}' is transient and has no file",
                          "net-define makes it persistent")


async def network_define(call: Call) -> dict:
    if "text" not in call.body:
        raise UsageError("net-define: text is missing")
    networks = call.supervisor.networks
    networks.refresh()
    config = networks.store.parse(call.body["text"], call.body.get("file"))
    made = list(config.made)
    created = networks.store.put(config, call.body["text"])
    return defined(networks.find(config.name), created, made)


async def network_edit(call: Call) -> dict:
    one = call.network()
    want_persistent(one)
    if "text" not in call.body:
        raise UsageError("net-edit: text is missing")
    config = one.store.replace(one.name, call.body["text"], call.body.get("digest"), digest)
    return defined(one, False, list(config.made))


def defined(one: Network, created: bool, made: list[str]) -> dict:
    return {"network": one.summary(), "created": created, "made": made, "warnings": [NEXT_START] if one.active else []}


async def network_undefine(call: Call) -> dict:
    one = call.network()
    want_persistent(one)
    one.store.remove(one.name)
    users = [domain.name for domain in call.supervisor.listed() if domain.config
             and any(card.type == "network" and card.source == one.name for card in domain.config.interfaces)]
    call.supervisor.networks.refresh()
    return {"name": one.name, "still_active": one.active,
            "warnings": [f"domain '{name}' has a card in it" for name in users]}


async def network_start(call: Call) -> dict:
    one = call.network()
    return changed(one, await call.supervisor.networks.start(one))


async def network_destroy(call: Call) -> dict:
    one = call.network()
    return changed(one, await call.supervisor.networks.destroy(one))


async def network_autostart(call: Call) -> dict:
    one = call.network()
    want_persistent(one)
    one.store.set_autostart(one.name, call.body.get("enabled", True))
    return changed(one)


async def network_update(call: Call) -> dict:
    """Both are checked before either is changed."""
    one, body, networks = call.network(), call.body, call.supervisor.networks
    for key in ("command", "section", "name"):
        if key not in body:
            raise UsageError(f"net-update: {key} is missing")
    both = bool(body.get("live")) == bool(body.get("config"))
    live, config = bool(body.get("live") or (both and one.active)), bool(body.get("config") or (both and one.stored is not None))
    if config:
        want_persistent(one)
        updated(one.store.config(one.name), body)
    if live:
        updated(networks.want_active(one), body)
        await networks.update(one, lambda before: updated(before, body))
    if config:                          # an administrator may have changed the file while the network was
        networks.refresh()
        text = one.store.text(one.name)
        one.store.put(updated(one.store.config(one.name), body), text, text)
    return changed(one)


def updated(config: NetworkConfig, body: dict) -> NetworkConfig:
    """The configuration with one [host] or [forward] added, changed or taken away; checked as a file is."""
    section = schema.NETWORK.sections[body["section"]]
    assert section.word
    word, name, command = section.word.key, body["name"], body["command"]
    data = config.to_dict()
    parts = data[section.attribute]
    assert isinstance(parts, list)
    there = next((part for part in parts if part[word] == name), None)
    if command == "add" and there is not None:
        raise NameInUse(f"Network '{config.name}' has a [{section.kind} {name}] already", "modify changes it, delete removes it")
    if command != "add" and there is None:
        known = ", ".join(str(part[word]) for part in parts)
        raise KvmappError(f"Network '{config.name}' has no [{section.kind} {name}]", f"it has: {known or 'none'}")
    if command == "delete":
        parts.remove(there)
    else:
        if there is None:
            there = {word: name}
            parts.append(there)
        there.update(parsed(section, name, body.get("settings", {})))
    return NetworkConfig.from_dict(data)


def parsed(section: schema.Section, name: str, texts: dict[str, str]) -> dict[str, object]:
    values: dict[str, object] = {}
    heading = f"{section.kind} {name}".rstrip()
    for key, text in texts.items():
        setting = section.settings.get(key)
        if setting is None:
            raise ConfigError(f"[{heading}] {key} = {text!r}: unknown key", f"known here: {', '.join(section.settings)}")
        try:
            values[key] = setting.kind.parse(text) if text else None
        except ValueError as error:
            raise ConfigError(f"[{heading}] {key} = {text!r}: expected {error}") from None
    return values
