"""What of a machine may come and go while its guest runs: disks and network cards, each with I/O threads of its own.

Made from their sections by diskcards.py and netcards.py; the guest is told through ACPI (hw/pci_hotplug.pyx). Mixed into machine.Machine.
"""
import gc

from kvmapp.errors import BadRequest, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from kvmapp.config import DiskConfig, InterfaceConfig
    from kvmapp.iothread import IoThread


class Removables:
    """What it needs of the machine."""
    config: "Any"
    vm: "Any"
    memory: "Any"
    power: "Any"
    slots: "Any"
    hotplug: "Any"
    devices: "list[Any]"
    cards: "dict[str, Any]"
    threads: "list[IoThread]"
    card_threads: "dict[str, list[IoThread]]"
    running: bool
    _insert: "Callable[[Any], None]"

    def full_disks(self) -> list[str]:
        """The disks, by name, for whose writes the host has no room; they are tried again at `resume`."""
        return [name for name, disk in self.disks().items() if disk.is_full]

    def disks(self) -> "dict[str, Any]":
        """{name: device} of the disks, 'vda' and so on."""
        return {name: self.cards[name].device for name in self.card_threads if hasattr(self.cards[name].device, "disk")}

    def network_cards(self) -> "dict[str, Any]":
        """{name: device} of the network cards, 'net0' and so on."""
        return {name: self.cards[name].device for name in self.card_threads if hasattr(self.cards[name].device, "set_link")}

    def attach_disk(self, disk: "DiskConfig", files: dict[str, int], wanted: "Callable[[], bool]" = lambda: True) -> int:
        """As attach_interface."""
        return self._attach(disk.name, disk.slot, self.disks(), lambda: self._plug_disk(disk, files), wanted)

    def attach_interface(self, interface: "InterfaceConfig", files: dict[str, int], wanted: "Callable[[], bool]" = lambda: True) -> int:
        """A network card for the guest as it runs; the slot: its own, or one behind those of its kind. Takes what it uses out of `files`.
        The guest hears nothing of it where it is not `wanted` any more when it is made, which may take long.

        Raises KvmappError, OSError.
        """
        return self._attach(f"net{interface.index}", interface.slot, self.network_cards(),
                            lambda: self._plug_interface(interface, files), wanted)

    def _attach(self, name: str, slot: int | None, peers: "Iterable[str]", plug: "Callable[[], None]",
                wanted: "Callable[[], bool]") -> int:
        self._require_hotplug()
        self.slots.reserve(name, slot, peers)
        try:
            plug()
        except BaseException:
            self.slots.release(name)
            raise
        try:
            if not wanted():
                raise BadRequest("nobody waits for this device any more")
            if self.running:
                self.start_card(name)
        except BaseException:
            self._take_out(name)
            raise
        self.hotplug.insert(self.slots.slot_of(name))
        return self.slots.slot_of(name)

    def ask_for_card(self, name: str) -> None:
        """Asks the guest to let go of a disk or network card; then `hotplug.fd` becomes readable."""
        self._require_hotplug()
        self.hotplug.ask(self.slots.slot_of(name))

    def take_ejected(self, asked: bool = False) -> list[str]:
        """Takes out what the guest has let go of, or was `asked` for: the names."""
        if not self.hotplug:
            return []
        slots = [*self.hotplug.take_ejected(), *(self.hotplug.wanted() if asked else ())]
        names = [name for name in self.card_threads if self.slots.slot_of(name) in slots]
        for name in names:
            self._take_out(name)
        return names

    def _take_out(self, name: str) -> None:
        if self.running:
            self.stop_card(name)
        self.hotplug.forget(self.slots.slot_of(name))
        card = self.slots.unplug(name)
        self.devices.remove(card)
        del self.cards[name]
        card.close()
        for thread in self.card_threads.pop(name):
            thread.close()
            self.threads.remove(thread)
        card.part()
        if self.running:
            self.vm.resume()
        del card
        gc.collect()                            # their eventfds go with them, which no want of descriptors would bring about

    def resize_disk(self, name: str, size: int | None, *, shrink: bool = False) -> int:
        """Bytes that the disk has now; None takes over what its file has. Raises KvmappError."""
        if not self.running:
            return self.disks()[name].resize(size, shrink=shrink)
        self.stop_card(name)
        try:
            return self.disks()[name].resize(size, shrink=shrink)
        finally:
            self.start_card(name)
            self.vm.resume()

    def stop_card(self, name: str) -> None:
        """No vCPU and no thread of the card's is on its way to it when this returns. Other cards go on: one whose server hangs holds up
        nothing but itself."""
        self.vm.pause()
        self.cards[name].pause()
        for thread in self.card_threads[name]:
            thread.pause()

    def start_card(self, name: str) -> None:
        self.cards[name].resume()
        for thread in self.card_threads[name]:
            thread.resume()

    def _require_hotplug(self) -> None:
        if self.hotplug is None:
            raise Unsupported(f"Domain '{self.config.name}' is a {self.config.machine}, whose devices stay as they were at its start",
                              "change the file and start it anew")
        if not self.config.acpi:
            raise Unsupported(f"Domain '{self.config.name}' has no ACPI, so its guest cannot be told of devices that come and go",
                              "set acpi = yes in its file, or change the file and start it anew")

    def _plug_disk(self, disk: "DiskConfig", files: dict[str, int]) -> None:
        from kvmapp.diskcards import make_device
        self._plug_removable(*make_device(disk, files, self.memory, self.power))

    def _plug_interface(self, interface: "InterfaceConfig", files: dict[str, int]) -> None:
        from kvmapp.netcards import make_device
        self._plug_removable(*make_device(interface, files, self.memory))

    def _plug_removable(self, device, threads: "list[IoThread]") -> None:
        """Puts it into its slot."""
        try:
            self._insert(device)
        except BaseException:
            device.close()
            for thread in threads:
                thread.close()
            raise
        self.card_threads[device.name] = threads
        self.threads += threads
