"""Whose the addresses of a virtual network are, as its cards' filters go by them: a [host]'s, and those that it lends.

What a guest was lent stays its own when the lease has run out (a guest that was paused or saved goes on with it) until another MAC
has it, or it was lent many more since: a guest may ask for one after the other of a wide range. The next daemon finds that noted beside
the network's other files.
"""
from __future__ import annotations

import logging

from kvmapp.errors import KvmappError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmapp.daemon.network import Network

MOST_FORMER = 16                        # addresses of one MAC that are lent no more
log = logging.getLogger("kvmapp")


class Owners:
    """Of one network since its start. `holders`: to which MAC it lent each address last; `fixed`, `lent`: what is a MAC's own."""

    def __init__(self, network: Network):
        self.since = network.since
        self.holders = network.noted_lent()
        self.noted = dict(self.holders)
        self.leased: set[str] = set()
        self.fixed: dict[str, frozenset[str]] = {}
        self.lent: dict[str, frozenset[str]] = {}

    def look(self, network: Network, rivals: Callable[[], set[str]]) -> None:
        """`rivals`: MACs whose guests must be gone before another one gets their addresses."""
        hosts = network.live.hosts if network.live else ()
        fixed = {address: host.mac for host in hosts for address in (host.ipv4, host.ipv6) if address}
        leases = {lease.address: str(lease.mac) for lease in network.valid_leases()}
        changed = {address: holder for address, holder in leases.items() if self.holders.get(address) != holder}
        if changed:
            there = rivals()
            self.holders.update({address: holder for address, holder in changed.items() if self.holders.get(address) not in there})
        for address in leases.keys() - self.leased:             # the last ones last
            if address in self.holders:
                self.holders[address] = self.holders.pop(address)
        self.leased = {*leases}
        for former in by_mac({address: holder for address, holder in self.holders.items() if address not in leases}).values():
            if len(former) > MOST_FORMER:
                for address in [one for one in self.holders if one in former][:-MOST_FORMER]:
                    del self.holders[address]
        if network.active and self.holders != self.noted:       # what is about to stop has no files any more
            self.note(network)
        self.fixed = by_mac(fixed)
        self.lent = by_mac({address: holder for address, holder in self.holders.items() if address in leases or address not in fixed})

    def note(self, network: Network) -> None:
        self.noted = dict(self.holders)
        try:
            network.note_lent(self.holders)
        except KvmappError as error:                            # its guests have what they have
            log.warning("network '%s': what it lends is not known to the next daemon: %s", network.name, error)


def by_mac(owners: dict[str, str]) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for address, mac in owners.items():
        found.setdefault(mac, set()).add(address)
    return {mac: frozenset(addresses) for mac, addresses in found.items()}
