"""The host's side of every running domain's cards: what a start puts there, what is put back, what is taken away at the end.

Looked at when the kernel tells of a changed device, when a network has lent an address, at the heartbeat, and at `reload`. A tap goes
with its domain process, and takes its VLAN and rates along; its filter's table is ours to remove.
"""
from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import suppress
from itertools import count

from kvmapp.config import DomainConfig
from kvmapp.daemon import cardfilter, dnsmasq, ports, shaping
from kvmapp.daemon.domain import removable
from kvmapp.daemon.links import LinkWatch
from kvmapp.daemon.owners import Owners
from kvmapp.daemon.ports import Known
from kvmapp.errors import KvmappError
from kvmapp.places import keep_places

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmapp.config import InterfaceConfig
    from kvmapp.daemon.domain import Domain
    from kvmapp.daemon.network import Network
    from kvmapp.daemon.supervisor import Supervisor

LEASE_POLL = 0.2                        # seconds; a guest that was just lent an address uses it at once
SETTLE = 0.02                           # devices change in bursts
CLOSING = (0.02, 0.1, 0.5, 2.0)         # seconds between looks at whether a tap is gone that is being closed
log = logging.getLogger("kvmapp")


class Cards:
    """`filters`: each filtered tap's domain, and what its table says of addresses; `owners`: of each network's addresses."""

    def __init__(self, supervisor: Supervisor):
        self.supervisor = supervisor
        self.filters: dict[str, tuple[str, Known]] = {}
        self.owners: dict[str, Owners] = {}
        self.complaints: dict[str, str] = {}
        self.lock = asyncio.Lock()
        self.woken = asyncio.Event()

    def running(self) -> Iterator[tuple[str, InterfaceConfig, str, str]]:
        """Domain, card, tap and bridge ('' while its network is not active) of each card that is in a bridge."""
        for domain in self.supervisor.active():
            taps = domain.record.taps if domain.record else {}
            for card in domain.live.interfaces if domain.live else ():
                tap = taps.get(str(card.index))
                if tap and card.type in ("bridge", "network") and f"net{card.index}" not in domain.plugging:
                    yield domain.name, card, tap, self.bridge_of(card)

    def has(self, domain: str, tap: str) -> bool:
        """Still: a domain may end while a thread works, and another's tap has the name then."""
        return any((name, there) == (domain, tap) for name, _, there, _ in self.running())

    def bridge_of(self, card: InterfaceConfig) -> str:
        if card.type == "bridge":
            return card.source or ""
        network = self.supervisor.networks.networks.get(card.source or "")
        return network.live.bridge or "" if network and network.live and network.active else ""

    def known(self, card: InterfaceConfig, looked: set[str] | None = None) -> Known:
        """What is fixed in the domain's file; else what the network lends; else what the guest uses first. `looked`: networks whose
        leases have been looked at by now, for all of their cards.
        """
        if card.addresses:
            return Known(frozenset(card.addresses), False)
        if card.type == "bridge":
            return Known(frozenset(), True)
        network = self.supervisor.networks.networks.get(card.source or "")
        if network is None or network.live is None:             # it leads nowhere until the network is started again
            return Known(frozenset(), False)
        if network.live.mode == "bridge":
            return Known(frozenset(), True)
        owners = self.owners_in(network, set() if looked is None else looked)
        own = owners.fixed.get(card.mac, frozenset())
        lends = bool(network.live.ipv4 and network.live.ipv4.dhcp) or any(":" not in one for one in own)
        return Known(own | owners.lent.get(card.mac, frozenset()), not lends, follows=True)

    def owners_in(self, network: Network, looked: set[str]) -> Owners:
        """Where dnsmasq heeds client identifiers, with which a guest gets its neighbour's lease, the neighbour must be gone first."""
        owners = self.owners.get(network.name)
        if owners is None or owners.since != network.since:
            owners = self.owners[network.name] = Owners(network)
        elif network.name in looked:
            return owners
        owners.look(network, lambda: set() if dnsmasq.ignores_client_ids() else {card.mac for _, card, _, _ in self.running()})
        looked.add(network.name)
        return owners

    # With domains.

    async def settle(self, domain: str, card: InterfaceConfig, tap: str, bridge: str) -> None:
        """A tap that was just made. Raises KvmappError."""
        async with self.lock:
            known = self.known(card)
            if card.filter != "none":
                self.note(domain, tap, known)
            elif self.filters.pop(tap, None):
                await asyncio.to_thread(cardfilter.remove, tap)
            await asyncio.to_thread(ports.settle, card, tap, bridge, known)

    def release(self, domain: str, only: str | None = None) -> None:
        """The domain, or this tap of it, is gone."""
        gone = [tap for tap, (owner, _) in self.filters.items() if owner == domain and only in (None, tap)]
        for tap in gone:
            del self.filters[tap]
        if gone:
            self.supervisor.run(self.remove_filters(gone), f"filters of {domain}")

    async def remove_filters(self, taps: list[str]) -> None:
        async with self.lock:
            for tap in taps:
                if tap in self.filters:
                    continue            # another domain's tap has this name by now, and the table is its own
                try:
                    await asyncio.to_thread(cardfilter.remove, tap)
                except KvmappError as error:
                    log.warning("%s", error)

    async def change(self, domain: str, before: InterfaceConfig, after: InterfaceConfig, tap: str) -> None:
        """Filter and rates of a running domain's card. Raises KvmappError."""
        async with self.lock:
            if after.filter != "none":
                await self.apply_filter(domain, after, tap, self.known(after))
            elif self.filters.pop(tap, None):
                await asyncio.to_thread(cardfilter.remove, tap)
            if any(getattr(before, key) != getattr(after, key) for key in shaping.RATES):
                await asyncio.to_thread(shaping.apply, after, tap)

    async def apply_filter(self, domain: str, card: InterfaceConfig, tap: str, known: Known) -> None:
        if not self.has(domain, tap):
            return
        await asyncio.to_thread(cardfilter.apply, card.heading, tap, card.mac, known.addresses, known.learns)
        if self.has(domain, tap):
            self.note(domain, tap, known)
        elif any(there == tap for _, _, there, _ in self.running()):        # the name is another card's by now
            await asyncio.to_thread(cardfilter.remove, tap)
        elif tap not in self.filters:                                       # it was let go of meanwhile
            self.filters[tap] = domain, known
            self.supervisor.run(self.release_gone(domain, card, tap, self.filters[tap]), f"filter of {tap}")

    def note(self, domain: str, tap: str, known: Known) -> None:
        if known.follows and not self.follow_leases():
            self.woken.set()                    # the watch may be asleep until the heartbeat
        self.filters[tap] = domain, known

    def follow_leases(self) -> bool:
        return any(known.follows for _, known in self.filters.values())

    def compare(self, domain: Domain, devices: list[str]) -> None:
        """These are what the running domain has: the guest may have let go of others while no daemon was there to hear of it."""
        for device in removable(domain.live) - {*devices} - domain.plugging:
            self.removed(domain, device)

    def removed(self, domain: Domain, device: str) -> None:
        """The guest has let go of a card, and its tap is gone; or of a disk."""
        if self.forget(domain, device):
            log.info("domain '%s': %s is detached", domain.name, device)
            self.supervisor.events.publish("device-removed", domain.name, uuid=domain.uuid, id=domain.id, detail=device)

    def forget(self, domain: Domain, device: str) -> bool:
        """The running domain does not have it; whether we thought so."""
        if domain.live is None or domain.record is None:
            return False
        tap = domain.record.taps.pop(device.removeprefix("net"), None) if device.startswith("net") else None
        domain.record.disks = [disk for disk in domain.record.disks if disk[0] != device]
        if device not in removable(domain.live):
            return False
        gone = next((card for card in domain.live.interfaces if f"net{card.index}" == device), None)
        cards = [card.to_dict() for card in domain.live.interfaces if card is not gone]
        disks = [disk.to_dict() for disk in domain.live.disks if disk.name != device]
        live = DomainConfig.from_dict({**domain.live.to_dict(), "interfaces": cards, "disks": disks})
        if not domain.outdated:
            keep_places(domain.live, live)
        domain.live = live
        domain.record.config = domain.live.to_dict()
        domain.note()
        domain.notify()
        if tap in self.filters and gone is not None:
            self.supervisor.run(self.release_gone(domain.name, gone, tap, self.filters[tap]), f"filter of {tap}")
        return True

    async def release_gone(self, domain: str, card: InterfaceConfig, tap: str, filtered: tuple[str, Known]) -> None:
        """A domain process that says it has let go of a card, or would not take it, and keeps its tap, keeps the filter, too, and no
        address: each may be another's by and by.
        """
        for number in count():
            if self.filters.get(tap) is not filtered:           # the domain has ended, or the name is another card's
                return
            if not os.path.exists(f"/sys/class/net/{tap}"):
                self.release(domain, tap)
                return
            if number == len(CLOSING):
                log.error("domain '%s' has let go of a card and keeps its tap %s: the tap's filter stays", domain, tap)
                await self.take_addresses(card, tap, filtered)
            await asyncio.sleep(CLOSING[number] if number < len(CLOSING) else self.supervisor.heartbeat)

    async def take_addresses(self, card: InterfaceConfig, tap: str, filtered: tuple[str, Known]) -> None:
        async with self.lock:
            if self.filters.get(tap) is filtered:
                try:
                    await asyncio.to_thread(cardfilter.apply, card.heading, tap, card.mac, (), False)
                except KvmappError as error:
                    log.error("%s", error)

    # With the daemon.

    async def find_running(self) -> None:
        """What an earlier daemon left."""
        with suppress(KvmappError):
            await asyncio.to_thread(cardfilter.remove_stale)
        for domain in self.supervisor.active():             # what guests let go of meanwhile
            for index, tap in list(domain.record.taps.items()) if domain.record else ():
                if not os.path.exists(f"/sys/class/net/{tap}"):
                    self.removed(domain, f"net{index}")
        await self.check(everything=True)

    async def watch(self) -> None:
        links = LinkWatch(self.woken.set)
        looked = time.monotonic()
        try:
            while True:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.woken.wait(), LEASE_POLL if self.follow_leases() else self.supervisor.heartbeat)
                    await asyncio.sleep(SETTLE)
                beat = self.woken.is_set() or time.monotonic() - looked >= self.supervisor.heartbeat
                self.woken.clear()
                if beat:
                    looked = time.monotonic()
                await self.check(tables=beat)
        finally:
            links.close()

    async def check(self, *, tables: bool = True, everything: bool = False) -> None:
        """`tables`: whether the filters' are still there, too; `everything`: the rates, too."""
        async with self.lock:
            cards, looked = list(self.running()), set[str]()
            present = await self.tables() if (tables or everything) and any(card.filter != "none" for _, card, _, _ in cards) else None
            for domain, card, tap, bridge in cards:
                try:
                    await self.put_back(domain, card, tap, bridge, present, looked)
                    if everything and shaping.is_limited(card) and self.has(domain, tap) and os.path.exists(f"/sys/class/net/{tap}"):
                        await asyncio.to_thread(shaping.apply, card, tap)
                except KvmappError as error:
                    if self.complaints.get(tap) != str(error):
                        log.error("domain '%s': %s", domain, error)
                    self.complaints[tap] = str(error)
                else:
                    self.complaints.pop(tap, None)

    async def tables(self) -> set[str] | None:
        try:
            return await asyncio.to_thread(cardfilter.tables)
        except KvmappError:
            return set()

    async def put_back(self, domain: str, card: InterfaceConfig, tap: str, bridge: str, present: set[str] | None,
                       looked: set[str]) -> None:
        if ports.is_loose(tap, bridge) and self.has(domain, tap):
            await asyncio.to_thread(ports.put_back, card, tap, bridge)
            log.warning("domain '%s': bridge %s is there again, and %s is in it", domain, bridge, tap)
        if card.filter == "none" or not os.path.exists(f"/sys/class/net/{tap}"):
            return
        known = self.known(card, looked)
        gone = present is not None and cardfilter.PREFIX + tap not in present
        if gone or self.filters.get(tap, ("", None))[1] != known:
            await self.apply_filter(domain, card, tap, known)
            if gone:
                log.warning("domain '%s': the filter of %s was gone and is put back", domain, tap)
