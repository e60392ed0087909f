"""The domain files of /etc/kvmapp/domains: read, checked, written, and looked at again whenever somebody asks.

An administrator may copy, edit and remove files by hand; `refresh` sees it by their status and reads only what changed. A file
that cannot be used is a broken domain with the reason, never an end of the daemon. Every write is one atomic step; the one verb
that takes two (rename) leaves a note first, which the next start finishes. Left out: what runs; supervisor.py knows that.
"""
from __future__ import annotations

import json
import os
import time

from kvmapp.config import DomainConfig, read_domain, write_domain
from kvmapp.errors import ConfigError, DomainNotFound, KvmappError, NameInUse
from kvmapp.ini import FILE_LIMIT, Ini, decode, permission_hint, read_text, sync_folder, write_atomically
from kvmapp.settings import apply, nearest_of
from kvmapp.values import Name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.daemon.paths import Paths

SUFFIX = ".conf"
RENAME_NOTE = ".rename"
SETTLED = 2.0                           # seconds without a change before a file of somebody else's is written to

Key = tuple[int, int, int, int]


class Changed(KvmappError):
    """The file is not what the caller started from."""
    code = "changed-meanwhile"


class Stored:
    """One file: its configuration, or why there is none."""
    __slots__ = ("config", "error", "key", "name", "path", "twin", "unwritten")

    def __init__(self, name: str, path: str, key: Key):
        self.name, self.path, self.key = name, path, key
        self.config: DomainConfig | None = None
        self.error: KvmappError | None = None
        self.unwritten = False          # UUID or MACs were made and are not in the file yet
        self.twin = False               # broken only because another file has its UUID

    @property
    def settled(self) -> bool:
        return time.time() - self.key[0] / 1e9 > SETTLED or self.key[0] / 1e9 > time.time() + SETTLED


class Store:
    def __init__(self, paths: Paths):
        self.paths = paths
        self.files: dict[str, Stored] = {}
        self.autostarted: frozenset[str] = frozenset()
        self.warnings: list[str] = []
        self.finish_rename()
        self.refresh()

    # Looking.

    def refresh(self) -> set[str]:
        """Reads what changed since the last look. Returns the names that came, went or changed."""
        seen = self.look()
        changed = {name for name in self.files if name not in seen}
        for name in changed:
            del self.files[name]
        for name, (path, key) in seen.items():
            old = self.files.get(name)
            if old is None or old.key != key or old.path != path:
                self.files[name] = self.read(name, path, key, old)
                changed.add(name)
        if changed:
            for stored in [stored for stored in self.files.values() if stored.twin]:
                self.files[stored.name] = self.read(stored.name, stored.path, stored.key, stored)
            self.part_twins(changed)
        self.write_made()
        return changed

    def look(self) -> dict[str, tuple[str, Key]]:
        """The files that are there, and the links of autostart."""
        seen = {}
        try:
            with os.scandir(self.paths.domains) as entries:
                for entry in entries:
                    if entry.name.endswith(SUFFIX) and entry.name[0] != ".":
                        seen[shown_name(entry.name[:-len(SUFFIX)])] = (entry.path, status_key(entry.path))
            links = os.listdir(self.paths.autostart) if os.path.isdir(self.paths.autostart) else []
        except OSError as error:
            self.warnings = [f"Cannot read '{self.paths.domains}': {error.strerror}"]
            return {name: (stored.path, stored.key) for name, stored in self.files.items()}
        self.warnings = []
        self.autostarted = frozenset(shown_name(name[:-len(SUFFIX)]) for name in links if name.endswith(SUFFIX))
        return dict(sorted(seen.items()))

    def read(self, name: str, path: str, key: Key, old: Stored | None) -> Stored:
        stored = Stored(name, path, key)
        try:
            config = read_domain(path)
            if config.name != name:
                raise ConfigError(f"name = {config.name!r}: the file's name says {name!r}",
                                  f"write name = {name}, or rename the file to {config.name}{SUFFIX}", file=path)
        except KvmappError as error:
            stored.error = error
            return stored
        adopt(config, old.config if old else None)
        stored.config, stored.unwritten = config, bool(config.made)
        return stored

    def part_twins(self, changed: set[str]) -> None:
        """A UUID is one domain's: of several files with the same one, those that were there before have it."""
        owners: dict[str, str] = {}
        for name, stored in self.files.items():
            if stored.config is not None:
                other = owners.setdefault(stored.config.uuid, name)
                if other != name:
                    owners[stored.config.uuid] = min(other, name, key=lambda name: self.claim(name, changed))
        for name, stored in self.files.items():
            owner = owners[stored.config.uuid] if stored.config is not None else name
            if stored.config is not None and owner != name:
                stored.error = ConfigError(f"uuid = {stored.config.uuid}: domain '{owner}' has it already",
                                           "leave uuid out of a copy, and its mac keys: they are made anew", file=stored.path)
                stored.config, stored.twin = None, True

    def claim(self, name: str, changed: set[str]) -> tuple:
        """The least has the UUID. To a daemon that starts all files are new: then what runs is none of the copies, nor what starts by
        itself; and a copy is younger than its original."""
        runs = os.path.exists(os.path.join(self.paths.records, f"{name}.json"))
        return name in changed, not runs, name not in self.autostarted, self.files[name].key[:2], name

    def write_made(self) -> None:
        """Stores UUIDs and MACs that were made, once whoever writes the file is done with it."""
        for stored in list(self.files.values()):
            if stored.unwritten and stored.config and stored.settled and status_key(stored.path) == stored.key:
                try:
                    write_domain(stored.path, stored.config)
                except KvmappError as error:
                    self.warnings.append(f"domain '{stored.name}' has no lasting uuid: {error}")
                else:
                    self.take_over(stored.name)

    def config(self, name: str) -> DomainConfig:
        """Raises DomainNotFound, or the reason why the file is broken."""
        stored = self.files.get(name)
        if stored is None:
            raise not_found(name, self.files)
        if stored.config is None:
            assert stored.error
            raise stored.error
        return stored.config

    def owner_of_uuid(self, uuid: str) -> str | None:
        return next((name for name, stored in self.files.items() if stored.config and stored.config.uuid == uuid), None)

    def mac_clashes(self, config: DomainConfig) -> list[str]:
        """In words, for warnings: whose MAC addresses these are as well."""
        wanted = {interface.mac for interface in config.interfaces}
        return [f"MAC {interface.mac} is an interface's of domain '{name}' too"
                for name, stored in self.files.items() if stored.config and name != config.name
                for interface in stored.config.interfaces if interface.mac in wanted]

    def text(self, name: str) -> str:
        stored = self.files.get(name)
        return read_text(stored.path) if stored else ""

    # Writing.

    def parse(self, text: str, file: str | None) -> DomainConfig:
        """A client's text, checked; what it leaves out of UUID and MACs is what the domain of this name has."""
        path = file or "/dev/stdin"
        data = text.encode("utf-8", "surrogateescape")
        if len(data) > FILE_LIMIT:
            raise ConfigError(f"is larger than {FILE_LIMIT >> 10} KiB: no domain file", file=path)
        config = read_domain(path, decode(data, path))
        old = self.files.get(config.name)
        adopt(config, old.config if old else None)
        return config

    def put(self, config: DomainConfig, text: str, before: str | None = None) -> bool:
        """Makes this the domain's file: `text` with what differs changed. Returns whether it is a new one. `before`: what is there."""
        self.check_identity(config)
        path = self.paths.domain_config(config.name)
        created = config.name not in self.files
        write_atomically(path, render(text, config, path), before=before)
        self.take_over(config.name)
        return created

    def check_identity(self, config: DomainConfig) -> None:
        old = self.files.get(config.name)
        if old and old.config and old.config.uuid != config.uuid:
            raise NameInUse(f"domain '{config.name}' already exists with uuid {old.config.uuid}",
                            "leave uuid out to change that domain, or give this one another name")
        owner = self.owner_of_uuid(config.uuid)
        if owner not in (None, config.name):
            raise NameInUse(f"domain '{owner}' is already defined with uuid {config.uuid}",
                            "leave uuid out and one is made; to rename a domain: kvmappctl domrename")

    def take_over(self, name: str) -> None:
        """A file that was just written, as it is by now: somebody else may have written it since."""
        path = self.paths.domain_config(name)
        self.files[name] = self.read(name, path, status_key(path), self.files.get(name))

    def replace(self, name: str, text: str, digest: str | None, digest_of) -> DomainConfig:
        """`edit`: the new text, if the file is still what it was made from. A broken file may be mended so."""
        before = None if digest is None else self.text(name)
        if before is not None and digest != digest_of(before):
            raise Changed(f"The file of domain '{name}' was changed meanwhile", "edit it again: your text was not saved")
        config = self.parse(text, self.paths.domain_config(name))
        if config.name != name:
            raise ConfigError(f"name = {config.name!r}: edit does not rename domain '{name}'", "kvmappctl domrename does")
        self.put(config, text, before)
        return config

    def remove(self, name: str) -> None:
        """The link first: a domain that is not started by itself any more is a better half than a link to nothing."""
        path = self.files[name].path
        self.set_autostart(name, False)
        try:
            os.unlink(path)
            sync_folder(self.paths.domains)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigError(f"Cannot remove the file: {error.strerror}", permission_hint(path, error), file=path) from None
        del self.files[name]

    def set_autostart(self, name: str, enabled: bool) -> None:
        link = os.path.join(self.paths.autostart, f"{name}{SUFFIX}")
        try:
            if not enabled and os.path.lexists(link):
                os.unlink(link)
            elif enabled and not os.path.lexists(link):
                os.symlink(f"../{name}{SUFFIX}", link)
            sync_folder(self.paths.autostart)
        except OSError as error:
            raise ConfigError(f"Cannot change the link: {error.strerror}", permission_hint(link, error), file=link) from None
        self.autostarted = self.autostarted | {name} if enabled else self.autostarted - {name}

    # Renaming: two files and a link, made to look like one step by a note.

    def rename(self, old: str, new: str) -> None:
        try:
            Name().parse(new)
        except ValueError as error:
            raise ConfigError(f"name = {new!r}: expected {error}") from None
        if new in self.files:
            raise NameInUse(f"domain '{new}' already exists")
        config = DomainConfig.from_dict({**self.config(old).to_dict(), "name": new})
        path = self.paths.domain_config(new)
        text = render(self.text(old), config, path)
        note = os.path.join(self.paths.domains, RENAME_NOTE)
        write_atomically(note, json.dumps({"old": old, "new": new, "uuid": config.uuid}))
        try:
            write_atomically(path, text)
        except ConfigError:
            os.unlink(note)
            raise
        self.finish_rename()
        del self.files[old]
        self.take_over(new)

    def finish_rename(self) -> None:
        """What the note says and is not done yet. Before the new file stands whole, nothing has happened."""
        note = os.path.join(self.paths.domains, RENAME_NOTE)
        try:
            names = json.loads(read_text(note)) if os.path.lexists(note) else None
            old, new = (str(names[key]) for key in ("old", "new")) if names else ("", "")
        except (KvmappError, ValueError, KeyError, TypeError):
            old = new = ""
        if old and os.path.exists(self.paths.domain_config(new)):
            if os.path.lexists(os.path.join(self.paths.autostart, f"{old}{SUFFIX}")):
                self.set_autostart(new, True)
                self.set_autostart(old, False)
            if os.path.lexists(self.paths.domain_config(old)):
                os.unlink(self.paths.domain_config(old))
        if os.path.lexists(note):
            os.unlink(note)
            sync_folder(self.paths.domains)


def adopt(config: DomainConfig, old: DomainConfig | None) -> None:
    """UUID and MACs that were just made give way to those that the domain had: they are made once."""
    if old is None or not config.made:
        return
    macs = {interface.index: interface.mac for interface in old.interfaces}
    taken = {interface.mac for interface in config.interfaces if f"[{interface.heading}] mac" not in config.made}
    if "uuid" in config.made:
        config.uuid = old.uuid
    for interface in config.interfaces:
        mac = macs.get(interface.index)
        if mac and mac not in taken and f"[{interface.heading}] mac" in config.made:
            interface.mac = mac


def render(text: str, config: DomainConfig, path: str) -> str:
    """`text` changed so that it says what `config` is when it stands at `path`; comments and order stay."""
    ini = Ini(text, path)
    apply(ini, config, os.path.dirname(path))
    rendered = ini.render()
    if read_domain(path, rendered) != config:
        raise ConfigError("the file as it would be written reads back differently; nothing was changed", file=path)
    return rendered


def status_key(path: str) -> Key:
    """What changes whenever the file does; zeros for what cannot be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0, 0, 1)
    return (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)


def shown_name(name: str) -> str:
    """A file's name as text that can be printed; bytes that are no UTF-8 as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def not_found(name: str, known) -> DomainNotFound:
    nearest = nearest_of(name, list(known))
    return DomainNotFound(f"failed to get domain '{name}'", f"did you mean {nearest}?" if nearest else None)
