"""Every virtual network of this host: what is defined, what is active, started with the host, watched, found again.

One change at a time, each of a second at most; queries wait for none. What other programs take away of an active network (a bridge,
dnsmasq, the rules) is put back: at the heartbeat, at `reload`, and when a daemon that was killed is started again.
"""
from __future__ import annotations

import asyncio
import logging
import os
import time

from kvmapp.daemon import hostnet, netrules, otherfilters
from kvmapp.daemon.network import ACTIVE, STARTING, STOPPING, Members, Network, read_note
from kvmapp.daemon.networkstore import NetworkStore, not_found
from kvmapp.errors import ConfigError, HostError, KvmappError, NetworkActive, NetworkInactive
from kvmapp.hostconfig import NetworkConfig
from kvmapp.hostinfo import boot_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmapp.config import DomainConfig, InterfaceConfig
    from kvmapp.daemon.supervisor import Supervisor

log = logging.getLogger("kvmapp")

TRY_AGAIN_MOST = 60.0                   # seconds between two tries to start a network with the host


class Late:
    """When a network that should have come up with the host is tried again, and what was said of it."""

    def __init__(self, wait: float):
        self.wait, self.due, self.said = wait, 0.0, ""

    def put_off(self, why: str) -> None:
        self.due, self.wait, self.said = time.monotonic() + self.wait, min(2 * self.wait, TRY_AGAIN_MOST), why


class Networks:
    def __init__(self, supervisor: Supervisor):
        self.supervisor, self.paths = supervisor, supervisor.paths
        self.store = NetworkStore(self.paths)
        self.networks: dict[str, Network] = {}
        self.lock = asyncio.Lock()
        self.late: dict[str, Late] = {}         # that were to start with the host and could not, yet
        self.rules_shown: str | None = None     # after we set them; None: by a daemon before us, or not as they should be

    # The set.

    def refresh(self) -> None:
        """A network is there as long as it has a file or is active."""
        self.store.refresh()
        for name in self.store.files:
            self.networks.setdefault(name, Network(name, self.store, self.paths))
        for name, network in list(self.networks.items()):
            if name not in self.store.files and network.live is None:
                del self.networks[name]

    def find(self, reference: str) -> Network:
        """By UUID or name. Raises NetworkNotFound."""
        self.refresh()
        for network in self.networks.values():
            if network.config is not None and network.config.uuid == reference.lower():
                return network
        if reference not in self.networks:
            raise not_found(reference, self.networks)
        return self.networks[reference]

    def listed(self) -> list[Network]:
        self.refresh()
        return [self.networks[name] for name in sorted(self.networks)]

    def active(self) -> list[Network]:
        return [network for network in self.networks.values() if network.active]

    def live_configs(self) -> list[NetworkConfig]:
        return [network.live for network in self.networks.values()
                if network.live is not None and network.phase in (STARTING, ACTIVE) and network.live.mode != "bridge"]

    def members(self, name: str, starting: DomainConfig | None = None) -> Members:
        """The cards in a network: of running domains, and of one that is just being started."""
        found: Members = []
        for domain in self.supervisor.active():
            taps = domain.record.taps if domain.record else {}
            for card in domain.live.interfaces if domain.live else ():
                if card.type == "network" and card.source == name:
                    found.append((card.mac, domain.name, taps.get(str(card.index), "")))
        for card in starting.interfaces if starting else ():
            if card.type == "network" and card.source == name:
                found.append((card.mac, starting.name if starting else "", ""))
        return found

    # With the daemon.

    async def find_running(self) -> None:
        """What an earlier daemon left: active networks are put back whole; one that was half made is cleared away."""
        try:
            await asyncio.to_thread(hostnet.take_turn, os.path.join(self.paths.run, "programs.lock"))
        except OSError as error:
            log.warning("cannot lock %s: %s", error.filename, error.strerror)
        self.refresh()
        half = []
        for entry in sorted(os.listdir(self.paths.network_run)):
            note = read_note(os.path.join(self.paths.network_run, entry)) if entry.endswith(".json") else None
            if note is None:
                continue
            name = str(note["config"]["name"])
            network = self.networks.setdefault(name, Network(name, self.store, self.paths))
            network.take_note(note)
            if network.phase != ACTIVE:
                half.append(network)
        async with self.lock:
            for network in half:
                log.warning("network '%s' was left half %s: clearing it away", network.name,
                            "made" if network.phase == STARTING else "removed")
                network.phase = STOPPING
                await self.clear_away(network)
            if self.active():
                await self.put_back(self.active(), rules=True)
            elif half:
                await self.set_rules()

    async def autostart(self) -> None:
        """Once a boot, before any domain. What fails (a bridge that is not there yet) is tried again at the heartbeat."""
        try:
            with open(self.autostart_note) as file:
                boot, *late = file.read().split("\n")
        except OSError:
            boot, late = "", []
        if boot == boot_id():                           # of an earlier daemon's
            self.late = {name: Late(self.supervisor.heartbeat) for name in late}
            return
        self.refresh()
        for name in sorted(self.store.autostarted):
            await self.start_with_host(name, Late(self.supervisor.heartbeat))
        self.note_autostart()

    @property
    def autostart_note(self) -> str:
        """This boot's id, then a line a network that is late."""
        return os.path.join(self.paths.network_run, "autostarted")

    def note_autostart(self) -> None:
        try:
            with open(f"{self.autostart_note}.new", "w") as file:
                file.write("\n".join((boot_id(), *self.late)))
            os.rename(f"{self.autostart_note}.new", self.autostart_note)
        except OSError as error:
            log.warning("cannot write %s: %s", self.autostart_note, error.strerror)

    def settle_late(self, name: str) -> None:
        """It is late no more, or nobody waits for it."""
        if self.late.pop(name, None):
            self.note_autostart()

    async def start_with_host(self, name: str, late: Late) -> None:
        network = self.networks.get(name)
        try:
            if network is None:
                raise not_found(name, self.networks)
            if not network.active:
                await self.start(network)
        except (KvmappError, OSError) as error:
            if str(error) != late.said:
                log.error("autostart: network '%s' is not started: %s", name, error)
                self.supervisor.events.publish("network", None, type="failed", detail=f"{name}: {error}")
            late.put_off(str(error))
            self.late[name] = late

    async def start_late(self) -> None:
        for name, late in list(self.late.items()):
            network = self.networks.get(name)
            if name not in self.store.autostarted or (network and network.active):
                self.settle_late(name)
            elif late.due <= time.monotonic():
                await self.start_with_host(name, late)

    async def watch(self) -> None:
        """The heartbeat."""
        while True:
            await asyncio.sleep(self.supervisor.heartbeat)
            self.refresh()
            for name in self.networks:
                try:
                    self.store.keep_made(name)
                except KvmappError as error:
                    log.warning("network '%s' has no lasting uuid: %s", name, error)
            await self.start_late()
            if self.active() and not self.lock.locked():
                await self.check()

    async def check(self, *, rules: bool = False) -> None:
        async with self.lock:
            touched = bool(self.live_configs()) and self.rules_shown != await asyncio.to_thread(netrules.shown)
            if touched and self.rules_shown is not None:
                log.warning("somebody changed the rules of networks: they are put back")
            mended = await self.put_back(self.active(), rules=rules or touched)
        if mended:
            await self.supervisor.cards.check()

    async def put_back(self, networks: list[Network], *, rules: bool) -> bool:
        """Returns whether anything of a network was gone: its guests may have to be put back, too."""
        anything = False
        if rules:
            try:
                await self.set_rules()
            except KvmappError as error:
                log.error("%s", error)
        for network in networks:
            try:
                mended = await asyncio.to_thread(network.put_back, self.members(network.name))
                network.warnings = []
            except (KvmappError, OSError) as error:
                if str(error) not in network.warnings:
                    log.error("network '%s' cannot be put back: %s", network.name, error)
                network.warnings = [str(error)]
            else:
                if mended:
                    log.warning("network '%s': %s was gone and is put back", network.name, " and ".join(mended))
                    anything = True
        return anything

    async def set_rules(self) -> None:
        self.rules_shown = await asyncio.to_thread(netrules.apply, self.live_configs())

    # Verbs.

    async def start(self, network: Network) -> list[str]:
        """Warnings. Raises KvmappError; then nothing of it is left."""
        async with self.lock:
            if network.active:
                raise NetworkActive("Requested operation is not valid: network is already active", f"kvmappctl net-info {network.name}")
            self.store.keep_made(network.name, patient=False)
            taken = {other.config.bridge or "" for other in self.networks.values() if other.config and other is not network}
            live = await asyncio.to_thread(network.prepare, taken)
            self.check_forwards(live)
            network.live = live
            network.since = time.time()
            try:
                network.note(STARTING)
                await asyncio.to_thread(network.bring_up, self.members(network.name))
                if network.live.mode != "bridge":
                    await self.set_rules()
                network.note(ACTIVE)
            except BaseException as error:
                await self.undo(network)
                if isinstance(error, OSError):
                    raise HostError(f"Cannot start network '{network.name}': {error.strerror}") from None
                raise
        await self.supervisor.cards.check()             # running domains that were in it get into its bridge
        log.info("network '%s' is active on bridge %s", network.name, network.live.bridge)
        self.supervisor.events.publish("network", None, type="started", detail=network.name)
        if network.live.mode in ("bridge", "open"):
            return []
        warnings = await asyncio.to_thread(otherfilters.complaints, network.live.bridge or "")
        for warning in warnings:
            log.warning("network '%s': %s", network.name, warning)
        return warnings

    async def undo(self, network: Network) -> None:
        network.phase = STOPPING
        await self.clear_away(network)
        try:
            await self.set_rules()
        except KvmappError as error:
            log.error("%s", error)

    async def clear_away(self, network: Network) -> None:
        try:
            await asyncio.to_thread(network.take_down)
        except KvmappError as error:
            log.error("network '%s': %s", network.name, error)
        network.forget()
        self.refresh()

    async def destroy(self, network: Network) -> list[str]:
        """Guests that are in it stay where they are, without a network. Returns warnings."""
        async with self.lock:
            self.want_active(network)
            self.settle_late(network.name)              # somebody has started it since, and wants it no more
            warnings = [f"domain '{name}' runs and has no network until this one is started again"
                        for name in dict.fromkeys(member[1] for member in self.members(network.name))]
            network.note(STOPPING)
            rules_too = network.live is not None and network.live.mode != "bridge"
            await self.clear_away(network)
            if rules_too:
                await self.set_rules()
        log.info("network '%s' is inactive", network.name)
        self.supervisor.events.publish("network", None, type="stopped", detail=network.name)
        return warnings

    async def update(self, network: Network, change: Callable[[NetworkConfig], NetworkConfig]) -> None:
        """Hosts and forwards of an active network, changed while guests use them. What fails changes nothing."""
        async with self.lock:
            before = self.want_active(network)
            live = change(before)               # not sooner: an earlier update is in it
            self.check_forwards(live)
            await asyncio.to_thread(network.check_ports, live, before.forwards)
            network.live = live
            try:
                await self.set_rules()
                await self.tell_dnsmasq(network)
                network.note(ACTIVE)
            except (KvmappError, OSError):
                network.live = before
                await self.set_rules()
                await self.tell_dnsmasq(network)
                raise

    async def tell_dnsmasq(self, network: Network) -> None:
        await asyncio.to_thread(network.renew_dnsmasq, self.members(network.name))
        network.tell_names(self.members(network.name))          # domains may have come meanwhile

    def check_forwards(self, live: NetworkConfig) -> None:
        """A port of the host leads to one guest."""
        for other in self.live_configs():
            for theirs in other.forwards if other.name != live.name else ():
                for ours in live.forwards:
                    if (ours.protocol, ours.port) == (theirs.protocol, theirs.port) and \
                            (ours.listen is None or theirs.listen is None or ours.listen == theirs.listen):
                        raise HostError(f"Cannot forward {ours.protocol} port {ours.port} ([{ours.heading}] of network '{live.name}'): "
                                        f"[{theirs.heading}] of network '{other.name}' has it", "choose another port")

    # For domains.

    def want_active(self, network: Network) -> NetworkConfig:
        if network.live is None or not network.active:
            raise NetworkInactive(f"Requested operation is not valid: network '{network.name}' is not active",
                                  f"kvmappctl net-start {network.name}")
        return network.live

    def bridge_of(self, interface: InterfaceConfig) -> str:
        """The bridge that a card of type network is put into. Raises NetworkNotFound and NetworkInactive."""
        if not interface.source:
            raise ConfigError(f"[{interface.heading}] source is missing: the network's name", "source = default")
        return self.want_active(self.find(interface.source)).bridge or ""

    def is_active(self, name: str | None) -> bool:
        network = self.networks.get(name or "")
        return network is not None and network.active

    def expect(self, config: DomainConfig) -> None:
        """A domain is about to start: its name is to be known when its guest asks for an address."""
        for name in {card.source for card in config.interfaces if card.type == "network" and card.source}:
            if self.is_active(name):
                self.networks[name].tell_names(self.members(name, config))
