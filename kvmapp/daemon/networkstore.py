"""The network files of /etc/kvmapp/networks: as store.py does for domains, with the same status keys and the same patience.

A file that cannot be used is a broken network with the reason. Left out: what is active; networks.py knows that.
"""
from __future__ import annotations

import os
import time

from kvmapp.daemon.store import SETTLED, SUFFIX, Changed, Key, shown_name, status_key
from kvmapp.errors import ConfigError, KvmappError, NameInUse, NetworkNotFound
from kvmapp.hostconfig import NetworkConfig, read_network, write_network
from kvmapp.ini import FILE_LIMIT, Ini, clear_leftovers, decode, permission_hint, read_text, sync_folder, write_atomically
from kvmapp.settings import apply, nearest_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.daemon.paths import Paths


class StoredNetwork:
    """One file: its configuration, or why there is none."""
    __slots__ = ("config", "error", "key", "name", "path")

    def __init__(self, name: str, path: str, key: Key):
        self.name, self.path, self.key = name, path, key
        self.config: NetworkConfig | None = None
        self.error: KvmappError | None = None


class NetworkStore:
    def __init__(self, paths: Paths):
        self.paths = paths
        self.files: dict[str, StoredNetwork] = {}
        self.autostarted: frozenset[str] = frozenset()
        if os.path.isdir(paths.networks):
            clear_leftovers(paths.networks)
        self.refresh()

    def refresh(self) -> None:
        """Reads what changed since the last look."""
        seen = {}
        try:
            with os.scandir(self.paths.networks) as entries:
                for entry in entries:
                    if entry.name.endswith(SUFFIX) and entry.name[0] != ".":
                        seen[shown_name(entry.name[:-len(SUFFIX)])] = (entry.path, status_key(entry.path))
            links = os.listdir(self.paths.network_autostart) if os.path.isdir(self.paths.network_autostart) else []
        except OSError:
            return                      # a folder that cannot be read now: what was known stays
        self.autostarted = frozenset(shown_name(name[:-len(SUFFIX)]) for name in links if name.endswith(SUFFIX))
        for name in [name for name in self.files if name not in seen]:
            del self.files[name]
        for name, (path, key) in sorted(seen.items()):
            old = self.files.get(name)
            if old is None or old.key != key or old.path != path:
                self.files[name] = self.read(name, path, key, old)

    def read(self, name: str, path: str, key: Key, old: StoredNetwork | None) -> StoredNetwork:
        stored = StoredNetwork(name, path, key)
        try:
            config = read_network(path)
            if config.name != name:
                raise ConfigError(f"name = {config.name!r}: the file's name says {name!r}",
                                  f"write name = {name}, or rename the file to {config.name}{SUFFIX}", file=path)
            adopt(config, old.config if old else None)
            self.check_identity(config)
        except KvmappError as error:
            stored.error = error
            return stored
        stored.config = config
        return stored

    def check_identity(self, config: NetworkConfig) -> None:
        for name, stored in self.files.items():
            if name != config.name and stored.config and stored.config.uuid == config.uuid:
                raise NameInUse(f"network '{name}' is already defined with uuid {config.uuid}",
                                "leave uuid out of a copy, and mac: they are made anew")

    def config(self, name: str) -> NetworkConfig:
        """Raises NetworkNotFound, or the reason why the file is broken."""
        stored = self.files.get(name)
        if stored is None:
            raise not_found(name, self.files)
        if stored.config is None:
            assert stored.error
            raise stored.error
        return stored.config

    def text(self, name: str) -> str:
        stored = self.files.get(name)
        return read_text(stored.path) if stored else ""

    # Writing.

    def path(self, name: str) -> str:
        return os.path.join(self.paths.networks, f"{name}{SUFFIX}")

    def parse(self, text: str, file: str | None) -> NetworkConfig:
        """A client's text, checked; what it leaves out of UUID and MAC is what the network of this name has."""
        path = file or "/dev/stdin"
        data = text.encode("utf-8", "surrogateescape")
        if len(data) > FILE_LIMIT:
            raise ConfigError(f"is larger than {FILE_LIMIT >> 10} KiB: no network file", file=path)
        config = read_network(path, decode(data, path))
        old = self.files.get(config.name)
        adopt(config, old.config if old else None)
        return config

    def put(self, config: NetworkConfig, text: str, before: str | None = None) -> bool:
        """Makes this the network's file: `text` with what differs changed. Returns whether it is a new one. `before`: what is there."""
        old = self.files.get(config.name)
        if old and old.config and old.config.uuid != config.uuid:
            raise NameInUse(f"network '{config.name}' already exists with uuid {old.config.uuid}",
                            "leave uuid out to change that network, or give this one another name")
        self.check_identity(config)
        path = self.path(config.name)
        write_atomically(path, render(config, text, path), before=before)
        self.take_over(config.name)
        return old is None

    def take_over(self, name: str) -> None:
        """As Store.take_over."""
        self.files[name] = self.read(name, self.path(name), status_key(self.path(name)), self.files.get(name))

    def replace(self, name: str, text: str, digest: str | None, digest_of) -> NetworkConfig:
        """`net-edit`: the new text, if the file is still what it was made from. A broken file may be mended so."""
        before = None if digest is None else self.text(name)
        if before is not None and digest != digest_of(before):
            raise Changed(f"The file of network '{name}' was changed meanwhile", "edit it again: your text was not saved")
        config = self.parse(text, self.path(name))
        if config.name != name:
            raise ConfigError(f"name = {config.name!r}: net-edit does not rename network '{name}'",
                              "net-define the text, then net-undefine the old network")
        self.put(config, text, before)
        return config

    def keep_made(self, name: str, *, patient: bool = True) -> None:
        """Stores a UUID and a MAC that were made; patient: once whoever writes the file is done with it."""
        stored = self.files.get(name)
        if stored and stored.config and stored.config.made and status_key(stored.path) == stored.key:
            if patient and abs(time.time() - stored.key[0] / 1e9) < SETTLED:
                return
            write_network(stored.path, stored.config)
            self.take_over(name)

    def remove(self, name: str) -> None:
        path = self.files[name].path
        self.set_autostart(name, False)
        try:
            os.unlink(path)
            sync_folder(self.paths.networks)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigError(f"Cannot remove the file: {error.strerror}", permission_hint(path, error), file=path) from None
        del self.files[name]

    def set_autostart(self, name: str, enabled: bool) -> None:
        link = os.path.join(self.paths.network_autostart, f"{name}{SUFFIX}")
        try:
            if not enabled and os.path.lexists(link):
                os.unlink(link)
            elif enabled and not os.path.lexists(link):
                os.symlink(f"../{name}{SUFFIX}", link)
            sync_folder(self.paths.network_autostart)
        except OSError as error:
            raise ConfigError(f"Cannot change the link: {error.strerror}", permission_hint(link, error), file=link) from None
        self.autostarted = self.autostarted | {name} if enabled else self.autostarted - {name}


def adopt(config: NetworkConfig, old: NetworkConfig | None) -> None:
    """A UUID and a MAC that were just made give way to those that the network had."""
    for key in config.made if old is not None else ():
        if key in ("uuid", "mac") and getattr(old, key):
            setattr(config, key, getattr(old, key))


def render(config: NetworkConfig, text: str = "", path: str = "/network.conf") -> str:
    """`text` changed so that it says what `config` is; comments and order stay."""
    ini = Ini(text, path)
    apply(ini, config, os.path.dirname(path))
    rendered = ini.render()
    if read_network(path, rendered) != config:
        raise ConfigError("the file as it would be written reads back differently; nothing was changed", file=path)
    return rendered


def not_found(name: str, known) -> NetworkNotFound:
    nearest = nearest_of(name, list(known))
    return NetworkNotFound(f"Network not found: no network with matching name '{name}'",
                           f"did you mean {nearest}?" if nearest else "kvmappctl net-list --all shows what there is")
