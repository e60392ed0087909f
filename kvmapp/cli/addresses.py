"""Where a guest is on the network and what went through its cards: domifaddr, domifstat."""
from __future__ import annotations

from kvmapp.cli import render
from kvmapp.cli.table import argument, domain, flag, value, verb
from kvmapp.client import of
from kvmapp.errors import UsageError

COUNTERS = ("rx_bytes", "rx_packets", "rx_drop", "tx_bytes", "tx_packets", "tx_drop")


@verb("domifaddr", "the network addresses of a running domain", domain(complete="active"),
      value("interface", "of this one only: its name on the host, vnetN"),
      flag("full", "the name and MAC address on each line, too"),
      value("source", "where from: lease, what our networks lent; arp, whom this host spoke with of late, on any bridge",
            choices=("lease", "arp")),
      failure="Failed to query for interfaces addresses")
def domifaddr(session, given):
    addresses = [one for one in session.daemon.get(of(given.domain, "addresses"), source=given.source)["addresses"]
                 if given.interface in (None, one["interface"])]
    session.answer({"addresses": addresses}, lambda: addresses_text(addresses, given.full, header=not session.quiet))


def addresses_text(addresses: list[dict], full: bool, header: bool) -> str:
    """virsh's widths, which are not those of its tables."""
    lines = [f" {'Name':<10} {'MAC address':<20} {'Protocol':<8}     Address", "-" * 79] if header else []
    last = None
    for one in addresses:
        name, mac = (render.or_dash(one["interface"]), one["mac"]) if full or one["interface"] != last else ("-", "-")
        last = one["interface"]
        prefix = f"/{one['prefix']}" if one["prefix"] else "/0"
        lines.append(f" {name:<10} {mac:<17}    {one['protocol']:<12} {one['address']}{prefix}")
    return "\n".join(lines) + "\n" if lines else ""


@verb("domifstat", "what went through a network card of a running domain", domain(complete="active"),
      argument("interface", "its name on the host (vnetN) or its MAC address: see domiflist"),
      text="rx is what the guest received.",
      failure="Failed to get interface stats {domain} {interface}")
def domifstat(session, given):
    cards = session.daemon.get(of(given.domain, "stats"))["interfaces"]
    found = next((one for one in cards if given.interface.lower() in (one["target"], one["mac"])), None)
    if found is None:
        known = ", ".join(render.or_dash(one["target"]) for one in cards)
        raise UsageError(f"invalid path, '{given.interface}' is not a known interface", f"it has {known or 'none'}")
    name = render.or_dash(found["target"])
    session.answer(found, "".join(f"{name} {counter} {found[counter]}\n" for counter in COUNTERS))
