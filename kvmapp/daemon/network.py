"""One virtual network in the daemon's memory, and the steps by which it comes up and goes.

What is up is noted in RUN/networks before the first step is taken and until the last one is undone, so that whoever comes after a
killed daemon knows what to put back and what to clear away. The steps block; networks.py calls them in threads, one at a time.
"""
from __future__ import annotations

import json
import os
import time
from contextlib import suppress

from kvmapp.daemon import dnsmasq, hostnet
from kvmapp.errors import ConfigError, HostError, KvmappError
from kvmapp.hostconfig import NetworkConfig
from kvmapp.values import WORD_CHARACTERS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.daemon.networkstore import NetworkStore, StoredNetwork
    from kvmapp.daemon.paths import Paths

STARTING, ACTIVE, STOPPING = "starting", "active", "stopping"
Members = list[tuple[str, str, str]]            # MAC, domain and tap of each card that is in the network


class Network:
    """`live` is what it was started with, changed by live updates; None when it is not active."""

    def __init__(self, name: str, store: NetworkStore, paths: Paths):
        self.name, self.store, self.paths = name, store, paths
        self.live: NetworkConfig | None = None
        self.since: float | None = None
        self.phase = ""
        self.warnings: list[str] = []           # what of it could not be put back
        self.lease_file = dnsmasq.LeaseFile()

    @property
    def stored(self) -> StoredNetwork | None:
        return self.store.files.get(self.name)

    @property
    def config(self) -> NetworkConfig | None:
        """As it is active, else as its next start will take it."""
        if self.live is not None:
            return self.live
        return self.stored.config if self.stored else None

    @property
    def active(self) -> bool:
        return self.live is not None and self.phase == ACTIVE

    @property
    def files(self) -> dnsmasq.Files:
        return dnsmasq.Files(self.paths.network_run, self.paths.network_state, self.stem)

    @property
    def stem(self) -> str:
        """The name where it can stand in dnsmasq's configuration as it is."""
        config = self.config
        return self.name if config is None or WORD_CHARACTERS.issuperset(self.name) else config.uuid

    @property
    def note_path(self) -> str:
        return os.path.join(self.paths.network_run, f"{self.stem}.json")

    def note(self, phase: str) -> None:
        """Raises OSError."""
        assert self.live
        self.phase = phase
        with open(f"{self.note_path}.new", "w") as file:
            json.dump({"config": self.live.to_dict(), "phase": phase, "since": self.since}, file)
        os.rename(f"{self.note_path}.new", self.note_path)

    def take_note(self, data: dict) -> None:
        self.live = NetworkConfig.from_dict(data["config"])
        self.phase, self.since = str(data["phase"]), float(data["since"])

    def forget(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.note_path)
        self.live, self.since, self.phase, self.warnings = None, None, "", []

    # Steps. None changes what is right already, so that each may be taken again.

    def prepare(self, taken: set[str]) -> NetworkConfig:
        """What it will be started with: checked against this host, its bridge chosen."""
        live = NetworkConfig.from_dict(self.store.config(self.name).to_dict())
        if live.mode == "bridge":
            return live
        live.bridge = live.bridge or hostnet.free_bridge(taken)
        for key in ("bridge", "device"):
            value = getattr(live, key)
            if value and not WORD_CHARACTERS.issuperset(value):
                raise ConfigError(f"{key} = {value!r}: letters, digits, dots, dashes and underscores make a device's name here",
                                  file=self.store.path(self.name))
        hostnet.check_ranges(live)
        self.check_ports(live, [])
        return live

    def check_ports(self, live: NetworkConfig, before: list) -> None:
        """Of forwards that were not there before."""
        for forward in live.forwards:
            if forward not in before:
                hostnet.check_port_free(forward.protocol, forward.listen, forward.port, forward.name, live.name)

    def bring_up(self, members: Members) -> None:
        assert self.live
        live, self.warnings = self.live, []
        if live.mode == "bridge":
            from kvmapp.daemon.taps import check_bridge
            check_bridge(f"network '{live.name}'", live.bridge or "")
            return
        hostnet.make_bridge(live)
        if dnsmasq.is_wanted(live):
            dnsmasq.start(live, self.files, names_of(members))

    def put_back(self, members: Members) -> list[str]:
        """What somebody else took away. Returns what it was, in words."""
        assert self.live
        live, mended = self.live, []
        if live.mode == "bridge":
            return []
        if not hostnet.exists(live.bridge or ""):
            hostnet.make_bridge(live)
            dnsmasq.stop(self.files)
            mended.append(f"bridge {live.bridge}")
        if dnsmasq.is_wanted(live) and not dnsmasq.pid_of(self.files):
            dnsmasq.start(live, self.files, names_of(members))
            mended.append("dnsmasq")
        return mended

    def tell_names(self, members: Members) -> None:
        if self.live and dnsmasq.is_wanted(self.live):
            dnsmasq.tell(self.live, self.files, names_of(members))

    def renew_dnsmasq(self, members: Members) -> None:
        """After an update: what its configuration tells it, it does not read again."""
        assert self.live
        if not dnsmasq.is_wanted(self.live):
            dnsmasq.stop(self.files)
        elif not dnsmasq.runs_as(self.live, self.files):
            dnsmasq.start(self.live, self.files, names_of(members))

    def take_down(self) -> None:
        """Whatever of it is there. Goes on past what fails, then raises the first failure."""
        assert self.live
        failure: KvmappError | None = None
        if self.live.mode != "bridge":
            dnsmasq.stop(self.files)
            self.files.remove()
            try:
                hostnet.remove_bridge(self.live.bridge or "", self.live.mac)
            except HostError as error:
                failure = error
        if failure:
            raise failure

    # What queries show: shapes.py's Network.

    def summary(self) -> dict[str, object]:
        config, stored = self.config, self.stored
        pid = dnsmasq.pid_of(self.files) if self.live else 0
        return {
            "name": self.name, "uuid": config.uuid if config else None,
            "state": "active" if self.active else "broken" if stored and stored.error else "inactive",
            "text": str(stored.error) if stored and stored.error else None, "active": self.active, "persistent": stored is not None,
            "autostart": self.name in self.store.autostarted, "mode": config.mode if config else None,
            "bridge": config.bridge if config else None, "since": self.since, "dnsmasq": pid or None,
            "ipv4": config.ipv4.address if config and config.ipv4 else None,
            "ipv6": config.ipv6.address if config and config.ipv6 else None,
            "file": stored.path if stored else None, "warnings": list(self.warnings)}

    def leases(self) -> list[dict[str, object]]:
        return [{"expires": lease.expires or None, "mac": lease.mac, "protocol": "ipv6" if ":" in lease.address else "ipv4",
                 "address": lease.address, "prefix": self.prefix(lease.address), "hostname": lease.name, "client": lease.client}
                for lease in self.valid_leases()]

    def valid_leases(self) -> list[dnsmasq.Lease]:
        return self.lease_file.valid(self.files.leases)

    def note_lent(self, holders: dict[str, str]) -> None:
        """To which MAC each address was lent last: dnsmasq forgets leases that ran out. Raises KvmappError."""
        dnsmasq.write(self.files.lent, json.dumps({"since": self.since, "holders": holders}))

    def noted_lent(self) -> dict[str, str]:
        """Of this start of the network."""
        try:
            with open(self.files.lent) as file:
                data = json.load(file)
            return {str(address): str(mac) for address, mac in data["holders"].items()} if data["since"] == self.since else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def prefix(self, address: str) -> int:
        from ipaddress import ip_interface
        part = (self.config.ipv6 if ":" in address else self.config.ipv4) if self.config else None
        return ip_interface(part.address).network.prefixlen if part else 128 if ":" in address else 32


def names_of(members: Members) -> list[tuple[str, str]]:
    return [(mac, domain) for mac, domain, _ in members]


def read_note(path: str) -> dict | None:
    """A note of RUN/networks; None when it is none that can be used."""
    try:
        with open(path) as file:
            data = json.load(file)
        NetworkConfig.from_dict(data["config"])
        return {"config": data["config"], "phase": str(data["phase"]), "since": float(data.get("since") or time.time())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, KvmappError):
        return None
