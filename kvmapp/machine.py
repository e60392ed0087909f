"""One guest's hardware, put together from its configuration: which device stands on which bus, at which address and interrupt.

    machine = Machine(config)
    machine.boot(); machine.resume(); ...; machine.pause(); machine.close()
    machine.save_state() -> dict; machine.restore_state(dict)       # paused; memory is snapshot.py's matter

A new device is built here, in one of the `_add_...` steps, and nowhere else. Control methods belong to one thread.
"""
from kvmapp.boot.cpuid import address_bits, guest_cpuid, require_features, xsave_components
from kvmapp.boot.direct import DirectBoot
from kvmapp.boot.e820 import pci_window64
from kvmapp.boot.platform import Platform
from kvmapp.boot.topology import Topology
from kvmapp.chardev import CharBackend
from kvmapp.core import Kvm, Vm
from kvmapp.devices import Bus, Device
from kvmapp.errors import GuestImageError, HostError, Unsupported
from kvmapp.hw.acpi_pm import AcpiPm
from kvmapp.hw.cmos_rtc import CmosRtc
from kvmapp.hw.debug_exit import DebugExit
from kvmapp.hw.debug_port import DebugPort
from kvmapp.hw.i8042 import I8042
from kvmapp.hw.ns16550 import Ns16550
from kvmapp.hw.pci_host import ECAM_OFFSET, PciHost
from kvmapp.hw.pci_hotplug import PciHotplug
from kvmapp.hw.port92 import Port92
from kvmapp.hw.reset_control import ResetControl
from kvmapp.iothread import IoThread
from kvmapp.layout import (
    GSI_COM1,
    GSI_COM2,
    GSI_KEYBOARD,
    GSI_RTC,
    GSI_SCI,
    PCI_ECAM_BASE,
    PCI_ECAM_SIZE,
    PORT_ACPI_PM,
    PORT_ACPI_PM_SIZE,
    PORT_ACPI_RESET,
    PORT_CMOS,
    PORT_COM1,
    PORT_COM2,
    PORT_DEBUG_CONSOLE,
    PORT_DEBUG_EXIT,
    PORT_I8042_COMMAND,
    PORT_I8042_DATA,
    PORT_PCI_CONFIG_ADDRESS,
    PORT_PCI_HOTPLUG,
    PORT_PCI_HOTPLUG_SIZE,
    PORT_PVPANIC,
    PORT_SYSTEM_CONTROL_A,
)
from kvmapp.memory import GuestMemory
from kvmapp.places import places
from kvmapp.removables import Removables
from kvmapp.slots import MmioSlots, PciSlots
from kvmapp.state import StateError, StateReader
from kvmapp.tuning import Tuning
from kvmapp.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


STATE_VERSION = 2                                       # 1 did not tell of slots
HUGE_PAGES = {"no": 0, "2M": 2 << 20, "1G": 1 << 30}
SERIAL_PLACES = ((PORT_COM1, GSI_COM1), (PORT_COM2, GSI_COM2))


class Machine(Removables):
    """The hardware of one guest. `characters` are (name, CharBackend, section of the configuration) for each console."""
    vm: "Any" = None
    direct: "Any" = None
    slots: "Any"
    hotplug: "Any" = None                               # where there is PCI

    def __init__(self, config, files: dict[str, int] | None = None, cpuids: list | None = None,
                 slots: dict[str, int] | None = None, *, cache: str | None = None, warn: "Callable[[str], None] | None" = None):
        """Builds it, powered off. `files` are descriptors opened by others, by what they are for ('disk:vda', 'interface:0');
        `cache` is the folder of unpacked kernels. Of a restored guest, `cpuids` are the CPUID entries that each vCPU has seen,
        `slots` where its cards stand (not where the configuration has them), and `warn` hears of places that this host lacks.

        Raises KvmappError, and then nothing is left open.
        """
        self.config, self.cache = config, cache
        self.files = files or {}
        self.cpuids: list = cpuids or []
        self.kept_slots = places(config) if slots is None else slots
        self.devices: list[Device] = []
        self.cards: dict[str, Any] = {}                 # by name of the virtio device: its card or window
        self.threads: list[IoThread] = []
        self.card_threads: dict[str, list[IoThread]] = {}           # of each disk and network card, which may come and go
        self.running = False
        self.booting = False                            # whether stores to the ports of PCI configuration need no exit
        self.vcpus_started = False
        self.characters: list[tuple] = []
        self.debug_console: CharBackend | None = None
        try:
            self.tuning = Tuning(config, warn)
            self.tuning.take_place()
            self._open_kernel()
            self._make_vm()
            self._add_platform()
            self._add_serial_ports()
            self._add_disks_and_interfaces()
            self._add_virtio_extras()
            self._add_watchdog()
            self.slots.assign_resources()
            self.vm.keep_initial()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise HostError(f"Cannot build the machine of domain '{config.name}': {error.strerror}", "see ulimit -n") from None
            raise

    # Life.

    def boot(self) -> None:
        """Loads the kernel and points the first vCPU at it. Raises KvmappError."""
        uuid = bytes.fromhex(self.config.uuid.replace("-", ""))
        platform = Platform(self.topology, name=self.config.name, uuid=uuid, acpi=self.config.acpi,
                            serial_ports=tuple(SERIAL_PLACES[serial.index] for serial in self.config.serials),
                            pci_window64=self.window64, virtio_mmio=getattr(self.slots, "windows", None),
                            pvpanic=self.config.panic is not None, hotplug_slots=self.slots.removable(self.card_threads))
        self.vm.set_entry(self.direct.setup(self.memory, platform))
        if not self.booting:
            self.vm.coalesce_port(PORT_PCI_CONFIG_ADDRESS, 4)   # without a PCI bus as well: a kernel looks for one there all the same
            self.booting = True

    def settle(self) -> None:
        """The guest has seen its devices. Among those ports is the one that resets (0xCF9), and a guest that sleeps after a store there
        makes no exit at which that would be done."""
        if self.booting:
            self.vm.uncoalesce_port(PORT_PCI_CONFIG_ADDRESS, 4)
            self.booting = False

    def resume(self) -> None:
        """Starts the guest, or lets it go on."""
        for device in self.devices:
            device.resume()
        for thread in self.threads:
            thread.resume()
        self.start_vcpus()
        self.vm.resume()
        self.running = True

    def start_vcpus(self) -> None:
        """Their threads, each at its place, where they wait for `resume`; a second call does nothing."""
        if not self.vcpus_started:
            self.tuning.start_vcpus(self.vm.vcpus)
            self.vcpus_started = True

    def pause(self) -> None:
        """Returns when nothing of the machine moves: no vCPU, no I/O in flight."""
        self.running = False
        self.vm.pause()
        for device in self.devices:
            device.pause()
        for thread in self.threads:
            thread.pause()

    def reset(self) -> list[str]:
        """As after a power cycle; the machine is paused. `boot` comes next. A guest that starts anew holds no card back: the names of those
        that were taken out. What the guest wished for before is void."""
        self.power.take()
        names = self.take_ejected(asked=True)
        for device in self.devices:
            device.reset()
        self.vm.reset()                                 # KVM writes clocks and stolen time for the guest until then
        self.memory.clear()
        self.slots.assign_resources()
        return names

    def save_state(self, moment: int = 0) -> dict:
        """Everything that the guest can see but its memory, clocks as of the moment (vmstate.pyx); the machine is paused.
        Raises HostError."""
        return {"version": STATE_VERSION, "cpuids": self.cpuids, "slots": self.slots.places(), "kvm": self.vm.save(moment),
                "devices": {device.name: device.save() for device in self.devices}}

    def restore_state(self, state: dict, moment: int = 0) -> bool:
        """Puts back what `save_state` gave, with clocks that went on since the moment; the machine has not run yet, its memory is there.

        False: this host cannot run the guest's TSC at the rate it had. Raises StateError, HostError.
        """
        reader = StateReader("machine", state, STATE_VERSION)
        reader.take("cpuids", list)
        if reader.version > 1:
            reader.take("slots", dict)
        kvm, devices = reader.take("kvm", dict), dict(reader.take("devices", dict))
        reader.done()
        for device in self.devices:                     # a card's BARs may belong where those of another stand now
            device.reset()
        for device in self.devices:
            if not isinstance(devices.get(device.name), dict):
                raise StateError(f"The saved machine has no device '{device.name}'", "restore it with the configuration it was saved with")
            device.restore(devices.pop(device.name))
        if devices:
            raise StateError(f"The saved machine has a device '{min(map(str, devices))}' that this configuration lacks",
                             "restore it with the configuration it was saved with")
        return self.vm.restore(kvm, moment, xsave_components(self.cpuids[0]))

    def close(self) -> None:
        """Gives everything back to the host; a second call does nothing."""
        if self.vm:
            self.vm.close()
        for device in self.devices:
            device.close()
        for thread in self.threads:
            thread.close()
        if self.direct:
            self.direct.close()
        self.devices.clear()
        self.threads.clear()

    # What the control thread asks of it.

    @property
    def power(self):
        """Where the guest's wishes arrive."""
        return self.vm.power

    def press_power_button(self) -> None:
        self.acpi_pm.press_power_button()

    def resize_consoles(self, columns: int, rows: int) -> None:
        for name, card in self.cards.items():
            if name.startswith("console"):
                card.device.resize(columns, rows)

    def retune(self, config) -> None:
        """Moves its threads to where this configuration, of the same machine, has them. Raises HostError."""
        self.tuning.change(config, self.vm.vcpus)
        self.config = config

    def set_balloon(self, size: int) -> None:
        """Asks the guest to use no more than `size` bytes. Raises Unsupported without a balloon."""
        if "balloon" not in self.cards:
            raise Unsupported(f"Domain '{self.config.name}' has no balloon", "add [balloon] to its file and start it anew")
        self.cards["balloon"].device.inflate_to(self.memory.size - size)

    def balloon_size(self) -> int:
        """Bytes of memory that the guest has now."""
        taken = self.cards["balloon"].device.actual if "balloon" in self.cards else 0
        return self.memory.size - taken

    def inventory(self) -> list[dict]:
        """[{name, slot}] of the virtio devices, and of the PCI bus where there is one."""
        return self.slots.inventory()

    def stats(self) -> dict:
        """Counters since the start: exits by reason, CPU time of each vCPU (ns), what KVM counts of it, disks, cards."""
        from kvmapp.kvmstats import read_counters, thread_time
        vcpus = [{"index": vcpu.index, "exits": vcpu.exit_counts(), "time": thread_time(vcpu.thread_number),
                  "kvm": read_counters(vcpu.stats_fd)}
                 for vcpu in self.vm.vcpus]
        return {"vcpus": vcpus, "balloon": self.balloon_size(),
                "devices": {name: card.device.stats() for name, card in self.cards.items() if hasattr(card.device, "stats")}}

    def crash_report(self) -> list[str]:
        """Lines for the log: why KVM gave up, and every vCPU's registers. The machine is paused."""
        lines = []
        for vcpu in self.vm.vcpus:
            try:
                registers = " ".join(f"{name}={value:#x}" for name, value in vcpu.registers().items())
            except HostError as error:                  # a VM that KVM has given up answers nothing more
                registers = error.message
            lines += [f"vcpu {vcpu.index}: {vcpu.failure_text()}", f"vcpu {vcpu.index}: {registers}"]
        return lines

    # Building it, in this order.

    def _open_kernel(self) -> None:
        boot = self.config.boot
        if boot.kernel is None:
            raise GuestImageError(f"Domain '{self.config.name}' has nothing to boot", "give it a kernel: [boot] kernel = FILE")
        self.direct = DirectBoot(boot.kernel, boot.initrd, boot.cmdline, self.cache if boot.unpack else None, self.config.memory)

    def _make_vm(self) -> None:
        """Memory, chips of the kernel's, vCPUs."""
        config, kvm = self.config, Kvm()
        if config.vcpus > kvm.most_vcpus:
            raise HostError(f"This host's KVM allows {kvm.most_vcpus} vCPUs, not {config.vcpus}", "lower the domain's vcpus")
        self.memory = GuestMemory(config.memory, mergeable=config.ksm, huge_pages=config.thp, page=HUGE_PAGES[config.hugepages],
                                  prealloc=config.prealloc, locked=config.locked, policy=self.tuning.policy, nodes=self.tuning.nodes,
                                  shared=bool(config.filesystems))
        self.vm = Vm(kvm, self.memory)
        self.topology = Topology(config.vcpus)
        supported = kvm.supported_cpuid()
        if self.cpuids:
            require_features(config.name, self.cpuids[0], supported, tsc_deadline=kvm.has_tsc_deadline)
        else:
            # A KVM that interprets guest code has an x2APIC that its few guests cannot use.
            self.cpuids = [guest_cpuid(supported, self.topology, index, model=config.cpu, x2apic=not kvm.interprets,
                                       tsc_deadline=kvm.has_tsc_deadline) for index in range(config.vcpus)]
        for index, leaves in enumerate(self.cpuids):
            self.vm.add_vcpu(leaves, self.topology.apic_id(index))
        bits = address_bits(self.cpuids[0])
        if sum(self.memory.ranges[-1]) > 1 << bits:
            raise HostError(f"{config.memory >> 30} GiB of memory do not fit into the {bits} address bits of the guest's CPUs",
                            "lower the domain's memory" + ("" if config.cpu == "host" else ", or set cpu = host"))
        self.window64 = pci_window64(self.memory.ranges, bits)
        self.io = self._thread("io")

    def _add_platform(self) -> None:
        """The chips that every PC has."""
        config, pio, irqs = self.config, self.vm.pio, self.vm.interrupts
        reset_control = ResetControl("reset-control", self.power)
        self._place(reset_control, pio, PORT_ACPI_RESET, 1)
        self.acpi_pm = AcpiPm("acpi-pm", irqs.line(GSI_SCI), self.power, self.io)
        self._place(self.acpi_pm, pio, PORT_ACPI_PM, PORT_ACPI_PM_SIZE)
        self._add_slots(reset_control)
        self._place(CmosRtc("rtc", irqs.line(GSI_RTC), self.io, memory=config.memory, vcpus=config.vcpus), pio, PORT_CMOS, 2)
        keyboard = I8042("i8042", irqs.line(GSI_KEYBOARD), self.power)
        self._place(keyboard, pio, PORT_I8042_DATA, 1, 0)
        self._place(keyboard, pio, PORT_I8042_COMMAND, 1, 4)
        self._place(Port92("port92", self.power), pio, PORT_SYSTEM_CONTROL_A, 1)
        if config.debug.port_402:
            self.debug_console = CharBackend("debug")
            self._place(DebugPort("debug-port", self.debug_console), pio, PORT_DEBUG_CONSOLE, 1)
        if config.debug.exit_port:
            self._place(DebugExit("debug-exit", self.power), pio, PORT_DEBUG_EXIT, 4)
        if config.panic:
            from kvmapp.hw.pvpanic import Pvpanic
            self._place(Pvpanic("panic", self.power), pio, PORT_PVPANIC, 1)

    def _add_slots(self, reset_control: ResetControl) -> None:
        """What carries the virtio devices: the PCI bus, or nothing but addresses."""
        config, pio, mmio, irqs = self.config, self.vm.pio, self.vm.mmio, self.vm.interrupts
        if config.machine == "microvm":
            self.slots = MmioSlots(self.vm, acpi=config.acpi, legacy=config.virtio == "legacy")
            return
        pci = PciHost("pci", pio, mmio, irqs, mmio64_base=self.window64[0] if self.window64 else 0, reset_control=reset_control)
        self._place(pci, pio, PORT_PCI_CONFIG_ADDRESS, 8)
        self._place(pci, mmio, PCI_ECAM_BASE, PCI_ECAM_SIZE, ECAM_OFFSET)
        self.slots = PciSlots(pci, irqs, config.virtio, self.kept_slots)
        self.vm.set_level_triggered()
        self.hotplug = PciHotplug("pci-hotplug", self.acpi_pm)
        self._place(self.hotplug, pio, PORT_PCI_HOTPLUG, PORT_PCI_HOTPLUG_SIZE)

    def _add_serial_ports(self) -> None:
        for serial in self.config.serials:
            port, gsi = SERIAL_PLACES[serial.index]
            backend = self._character(f"serial{serial.index}", serial)
            self._place(Ns16550(backend.name, self.vm.interrupts.line(gsi), backend), self.vm.pio, port, 8)

    def _add_disks_and_interfaces(self) -> None:
        """In the order of windows, and of the cards of a saved machine that does not tell of slots."""
        for disk in self.config.disks:
            self._plug_disk(disk, self.files)
        for interface in self.config.interfaces:
            self._plug_interface(interface, self.files)

    def _add_virtio_extras(self) -> None:
        """Cards that are seldom busy share the machine's I/O thread."""
        if self.config.rng:
            from kvmapp.virtio.rng import VirtioRng
            self._plug(VirtioRng("rng", self.memory), self.io)
        for console in self.config.consoles:
            from kvmapp.virtio.console import VirtioConsole
            backend = self._character(f"console{console.index}", console)
            self._plug(VirtioConsole(backend.name, self.memory, backend), self.io)
        if self.config.balloon:
            from kvmapp.virtio.balloon import VirtioBalloon
            self._plug(VirtioBalloon("balloon", self.memory, deflate_on_oom=self.config.balloon.deflate_on_oom), self.io)
        if self.config.vsock:
            from kvmapp.virtio.vsock import VirtioVsock
            self._plug(VirtioVsock("vsock", self.memory, self.config.vsock.cid, self.config.vsock.path), self.io)
        for folder in self.config.filesystems:           # whose file servers were started by those who started us (fileserver.py)
            from kvmapp.virtio.fs import VirtioFs
            device = VirtioFs(f"fs-{folder.tag}", self.memory, folder.tag, self.files.pop(f"filesystem:{folder.tag}", -1))
            self._plug(device, self._thread(f"fs {folder.tag}"))

    def _add_watchdog(self) -> None:
        if self.config.watchdog:
            from kvmapp.hw.i6300esb import I6300Esb
            watchdog = I6300Esb("watchdog", self.power, self.io)
            assert isinstance(self.slots, PciSlots)              # config.py sees to it
            self.slots.attach(watchdog)
            self.devices.append(watchdog)

    # The steps' tools.

    def _place(self, device: Device, bus: Bus, base: int, size: int, offset: int = 0) -> None:
        bus.map(base, size, device, offset)
        if device not in self.devices:
            self.devices.append(device)

    def _plug(self, device, thread: IoThread) -> None:
        """Plugs a virtio device in, whose I/O the thread does."""
        self._insert(device)
        device.run_on(thread)

    def _insert(self, device) -> None:
        """A virtio device gets a card, or a window; a PCI card is one."""
        card = device
        if isinstance(device, VirtioDevice):
            if self.config.packed:
                device.offer_packed()
            card = self.slots.plug(device)
        else:
            assert isinstance(self.slots, PciSlots)              # config.py sees to it
            self.slots.attach(card)
        self.devices.append(card)
        self.cards[device.name] = card

    def _character(self, name: str, section) -> CharBackend:
        backend = CharBackend(name)
        if section.type == "null":
            backend.discard(True)
        self.characters.append((name, backend, section))
        return backend

    def _thread(self, name: str) -> IoThread:
        self.threads.append(IoThread(name))
        return self.threads[-1]
