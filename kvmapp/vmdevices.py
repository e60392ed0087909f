"""The control socket's verbs for a running domain's devices, and what a domain does that finds no room on the host.

    → {"verb": "link", "device": "net0", "up": false}          ← {"device": "net0", "up": false}
      plugs the cable of a network card in or out; the guest is told. `netN` is the card of [interface N].
    → {"verb": "attach-device", "interface": {"index": 1, "type": "tap", ...}, "files": ["interface:1"]}   and descriptors
                                                                ← {"device": "net1", "slot": 5}
      plugs a network card in. `interface` is what config.InterfaceConfig.to_dict gives; the descriptors that the daemon opened for it
      come by SCM_RIGHTS with the request's first byte, in the order of `files` (netcards.file_name). The guest is told through ACPI.
    → {"verb": "detach-device", "device": "net1"}               ← {"device": "net1"}
      asks the guest for the card. When it has let go, its descriptors are closed and subscribers hear
      {"type": "device-removed", "name": DOMAIN, "device": "net1"}; a guest without ACPI hotplug never does. A reset lets go, too.
    → {"verb": "attach-disk", "disk": {"name": "vdb", "source": ...}, "files": ["disk:vdb"]}            ← {"device": "vdb", "slot": 5}
    → {"verb": "detach-disk", "device": "vdb"}                  ← {"device": "vdb"}
      the same for disks.
    → {"verb": "resize-disk", "device": "vda", "bytes": 21474836480, "shrink": false}      ← {"device": "vda", "bytes": 21474836480}
      gives a disk this many bytes, fewer than it has only with `shrink`; null takes over what its file or block device has by now.

Mixed into vmprocess.Domain, which says in which states the domain is.
"""
import gc
import os

from kvmapp.errors import BadRequest, KvmappError, NameInUse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvmapp.config import DomainConfig
    from kvmapp.control import ControlServer
    from kvmapp.machine import Machine


IO_ERROR = "I/O error"                  # why it is paused, in virsh's words
ROOM_SECONDS = 5                        # between looks for room


class DeviceNotFound(KvmappError):
    """The running domain has no device of this name."""
    code = "device-not-found"


class DeviceVerbs:
    """What it needs of the domain: `require`, `change`, `publish`, `log`."""
    machine: "Machine"
    config: "Any"
    server: "ControlServer | None"
    log: "Callable[[str], None]"
    loop: "Any"
    state: str
    reason: str

    def require(self, *states: str) -> None:
        raise NotImplementedError

    def change(self, state: str, reason: str) -> None:
        raise NotImplementedError

    def publish(self, event: dict) -> None:
        raise NotImplementedError

    def disk_full(self) -> None:
        """The machine is paused, and keeps what it could not write. Who resumes it has made room; where nobody can, it tries again."""
        disks = self.machine.full_disks()
        self.log(f"the host has no room for what the guest writes to {', '.join(disks)}: paused; make room"
                 + (f", then kvmappctl resume {self.config.name}" if self.server else ""))
        for disk in disks:
            self.publish({"type": "io-error", "device": disk})
        self.change("paused", IO_ERROR)
        if not self.server:
            self.loop.later(ROOM_SECONDS, self.try_again)

    @property
    def waits_for_room(self) -> bool:
        return (self.state, self.reason) == ("paused", IO_ERROR)

    def try_again(self) -> None:
        if self.waits_for_room:
            self.machine.resume()
            self.change("running", "unpaused")

    def verb_link(self, _connection, request) -> dict:
        device, up = wanted(request, "device", str), wanted(request, "up", bool)
        self.card(device).set_link(up)
        return {"device": device, "up": up}

    def verb_attach_device(self, connection, request) -> dict:
        self.require("running", "paused")
        if connection.deserted():               # the daemon gave it up, and has taken the tap's filter away
            raise BadRequest("nobody waits for this card any more")
        config, interface = self.with_interface(wanted(request, "interface", dict))
        return self.attach(connection, request, config, interface, f"net{interface.index}", self.machine.attach_interface)

    def verb_attach_disk(self, connection, request) -> dict:
        self.require("running", "paused")
        config, disk = self.with_disk(wanted(request, "disk", dict))
        return self.attach(connection, request, config, disk, disk.name, self.machine.attach_disk)

    def attach(self, connection, request, config, section, name: str, plug: "Callable[..., int]") -> dict:
        files = self.take_files(connection, request)
        try:
            slot = plug(section, files, lambda: not connection.deserted())
        except BaseException as error:
            self.loop.call(gc.collect)          # once this error is answered: its traceback holds what was made, with descriptors
            if isinstance(error, OSError):
                raise KvmappError(f"Cannot attach {section.heading} to domain '{config.name}': {error}") from None
            raise
        finally:
            for fd in files.values():           # what the device did not take
                os.close(fd)
        self.config = self.machine.config = config
        return {"device": name, "slot": slot}

    def verb_detach_device(self, _connection, request) -> dict:
        return self.detach(request, self.card)

    def verb_detach_disk(self, _connection, request) -> dict:
        return self.detach(request, self.disk)

    def detach(self, request, find: "Callable[[str], Any]") -> dict:
        self.require("running", "paused")
        device = wanted(request, "device", str)
        find(device)
        self.machine.ask_for_card(device)
        return {"device": device}

    def verb_resize_disk(self, _connection, request) -> dict:
        self.require("running", "paused")
        name, size, shrink = wanted(request, "device", str), request.get("bytes"), wanted(request, "shrink", bool)
        if type(size) not in (int, type(None)):
            raise BadRequest(f"'bytes' is {size!r}, not a number")
        self.disk(name)
        size = self.machine.resize_disk(name, size, shrink=shrink)
        self.log(f"{name} has {size} bytes now")
        return {"device": name, "bytes": size}

    def device_ejected(self, _events: int) -> None:
        """The guest has let go of cards."""
        for device in self.machine.take_ejected():
            self.device_removed(device)

    def device_removed(self, device: str) -> None:
        self.config = self.machine.config = self.with_sections(
            interfaces=[one.to_dict() for one in self.config.interfaces if f"net{one.index}" != device],
            disks=[one.to_dict() for one in self.config.disks if one.name != device])
        self.log(f"{device} was taken out")
        if self.server:
            self.server.publish({"type": "device-removed", "name": self.config.name, "device": device})

    def with_interface(self, section: dict):
        """The domain's configuration with one more card, and that card; checked as a file is. Raises KvmappError."""
        index = section.get("index")
        if any(one.index == index for one in self.config.interfaces):
            raise NameInUse(f"Domain '{self.config.name}' has an [interface {index}] already", "give it another index")
        config = self.with_sections(interfaces=[*(one.to_dict() for one in self.config.interfaces), section])
        return config, next(one for one in config.interfaces if one.index == index)

    def with_disk(self, section: dict):
        """As with_interface."""
        name = section.get("name")
        if any(one.name == name for one in self.config.disks):
            raise NameInUse(f"Domain '{self.config.name}' has a disk '{name}' already", "give it another name")
        config = self.with_sections(disks=[*(one.to_dict() for one in self.config.disks), section])
        return config, next(one for one in config.disks if one.name == name)

    def with_sections(self, **sections: list[dict]) -> "DomainConfig":
        return type(self.config).from_dict({**self.config.to_dict(), **sections})

    def take_files(self, connection, request) -> dict[str, int]:
        """The descriptors that came with the request, by name; they are the caller's to close."""
        names, files = request.get("files") or [], list(connection.fds)
        if not isinstance(names, list) or len(names) != len(files) or not all(isinstance(name, str) for name in names):
            raise BadRequest(f"'files' is {names!r}, but {len(files)} descriptors came", "send them with the request's first byte")
        connection.fds.clear()
        return dict(zip(names, files, strict=True))

    def disk(self, name: str):
        """The disk of that name."""
        disks = self.machine.disks()
        if name not in disks:
            raise DeviceNotFound(f"Domain '{self.machine.config.name}' has no disk '{name}'", f"it has: {', '.join(disks) or 'none'}")
        return disks[name]

    def card(self, name: str):
        """The network card of that name."""
        cards = self.machine.network_cards()
        if name not in cards:
            raise DeviceNotFound(f"Domain '{self.machine.config.name}' has no network card '{name}'",
                                 f"it has: {', '.join(cards)}" if cards else "attach one, or add [interface 0] to its file")
        return cards[name]


def wanted(request: dict, key: str, kind: type):
    """An argument of this type. Raises BadRequest."""
    value = request.get(key)
    if type(value) is not kind:
        raise BadRequest(f"'{key}' is {value!r}, not a {kind.__name__}")
    return value
