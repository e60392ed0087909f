"""The PCI host bridge: bus 0 with 32 slots, reached by configuration mechanism 1 (PCI Local Bus 3.0, 3.2.2.3.2) and by the
enhanced mechanism (PCI Express Base 3.0, 7.2.2).

Its windows: 8 bytes at port 0xCF8 (offset 0) and, from ECAM_OFFSET, the 256 MiB of configuration memory. Of the first four ports
only a whole dword is the address register; a byte at offset 1 is port 0xCF9, the reset control register, which belongs to
another chip and is passed on to it. `assign_resources` stands in for firmware when a kernel is booted without one.
Locks: the host's → a function's → Bus.lock. Left out: buses behind bridges, error reporting, hot-plug notification.
"""
from kvmapp.abi.posix cimport pthread_mutex_lock, pthread_mutex_unlock
from kvmapp.devices cimport Bus, Device, Interrupts
from kvmapp.hw.pci cimport (BAR_IO, BAR_MEM32, CONFIG_SIZE, PCI_COMMAND, PCI_COMMAND_IO, PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY,
                            PciFunction)

from kvmapp.layout import GSI_INTX, PCI_IO_BASE, PCI_IO_SIZE, PCI_MMIO32_BASE, PCI_MMIO32_SIZE, PCI_MMIO64_SIZE
from kvmapp.state import StateReader

ECAM_OFFSET = 1 << 28                # where the window of the enhanced mechanism begins

cdef enum:
    CONFIG_ADDRESS = 0
    RESET_CONTROL = 1
    CONFIG_DATA = 4
    ADDRESS_ENABLE = 0x80000000
    ADDRESS_WRITABLE = 0x80FFFFFC
    ECAM = 1 << 28

    # Red Hat's generic host bridge: no guest loads a chipset driver for it.
    VENDOR_REDHAT = 0x1B36
    DEVICE_GENERIC_HOST = 0x0008
    CLASS_HOST_BRIDGE = 0x060000

    BAR0 = 0x10
    HEADER_TYPE = 0x0E
    HEADER_MULTIFUNCTION = 0x80
    INTERRUPT_LINE = 0x3C
    INTERRUPT_PIN = 0x3D
    LARGE_BAR = 64 << 20             # 64-bit BARs from this size up go above 4 GiB, where there is room for them


cdef class PciHost(Device):
    """Bus 0 and its functions; 00:00.0 is the host bridge itself.

    `mmio64_base` is where the 64-bit window begins (0: none); it must lie above all RAM. `reset_control` answers at port 0xCF9.
    """

    def __cinit__(self, str name not None, Bus pio not None, Bus mmio not None, Interrupts interrupts not None, *,
                  uint64_t mmio64_base=0, Device reset_control=None):
        self.rename(name)
        self.width = 4
        self.pio, self.mmio, self.interrupts, self.reset_control = pio, mmio, interrupts, reset_control
        self.windows = [(PCI_IO_BASE, PCI_IO_SIZE), (PCI_MMIO32_BASE, PCI_MMIO32_SIZE),
                        (mmio64_base, PCI_MMIO64_SIZE if mmio64_base else 0)]
        self.attached = {}
        self.bridge = PciFunction.__new__(PciFunction)
        self.bridge.rename(f"{name}-bridge")
        self.bridge.identify(VENDOR_REDHAT, DEVICE_GENERIC_HOST, CLASS_HOST_BRIDGE)
        self.attach(0, self.bridge)

    def attach(self, uint32_t slot, PciFunction function not None, uint32_t number=0):
        """Plugs a function in. Raises ValueError when that place is not free."""
        if slot >= SLOTS or number >= FUNCTIONS or (slot, number) in self.attached:
            raise ValueError(f"{self.name}: slot {slot:#x}.{number} for '{function.name}' is not free")
        if number:
            if (slot, 0) not in self.attached:
                raise ValueError(f"{self.name}: slot {slot:#x} has no function 0 yet, which '{function.name}' needs")
            main = <PciFunction>self.attached[slot, 0]
            main.define(HEADER_TYPE, 1, HEADER_MULTIFUNCTION, 0)
        pin = function.config[INTERRUPT_PIN]
        gsi = GSI_INTX[(slot + pin - 1) % 4] if pin else 0
        function.enter(self.pio, self.mmio, self.interrupts.line(gsi) if pin else None, self.windows)
        function.define(INTERRUPT_LINE, 1, gsi, 0xFF)
        self.attached[slot, number] = function
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.functions[slot * FUNCTIONS + number] = <PyObject*>function
            pthread_mutex_unlock(&self.lock)

    def detach(self, uint32_t slot, uint32_t number=0):
        """Pulls a function out and answers it; KeyError when there is none."""
        cdef PciFunction function = self.attached[slot, number]
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.functions[slot * FUNCTIONS + number] = NULL
            pthread_mutex_unlock(&self.lock)
        del self.attached[slot, number]
        function.leave()
        return function

    def slots(self):
        """{(slot, function number): function}"""
        return dict(self.attached)

    def assign_resources(self):
        """Gives every BAR an address and enables decoding and bus mastering, as firmware does before a kernel starts.

        The largest BARs go first, which packs naturally aligned windows without gaps. Raises ValueError when one does not fit.
        """
        wanted = [(size, key, index, kind) for key, function in self.attached.items()
                  for index, size, kind in function.wanted_bars()]
        cursors = [base for base, _ in self.windows]
        for size, key, index, kind in sorted(wanted, key=lambda bar: (-bar[0], bar[1], bar[2])):
            self.place_bar(self.attached[key], size, index, kind, cursors)
        for slot, number in self.attached:
            if self.attached[slot, number] is not self.bridge:
                self.poke(slot, number, PCI_COMMAND, 2, PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER)

    def place_bar(self, PciFunction function, size, index, kind, list cursors):
        """Programs one BAR with the next free address of the first window that holds it; `cursors` move on."""
        slot, number = next(key for key, value in self.attached.items() if value is function)
        if kind == BAR_IO:
            choices = [0]
        elif kind == BAR_MEM32:
            choices = [1]
        else:
            choices = [2, 1] if size >= LARGE_BAR else [1, 2]
        for window in choices:
            base = (cursors[window] + size - 1) & ~(size - 1)
            start, length = self.windows[window]
            if base + size <= start + length:
                cursors[window] = base + size
                self.poke(slot, number, BAR0 + 4 * index, 4, base & 0xFFFFFFFF)
                if kind not in (BAR_IO, BAR_MEM32):
                    self.poke(slot, number, BAR0 + 4 * index + 4, 4, base >> 32)
                return
        raise ValueError(f"{function.name}: no room for BAR {index} of {size:#x} bytes in the PCI windows")

    def peek(self, uint32_t slot, uint32_t number, uint32_t offset, uint32_t size):
        """A load from a function's configuration space; all ones when there is none."""
        cdef uint64_t value
        with nogil:
            pthread_mutex_lock(&self.lock)
            value = self.config_read(0, slot * FUNCTIONS + number, offset, size)
            pthread_mutex_unlock(&self.lock)
        return value & ((<uint64_t>1 << 8 * size) - 1)

    def poke(self, uint32_t slot, uint32_t number, uint32_t offset, uint32_t size, uint64_t value):
        """A store to a function's configuration space."""
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.config_write(0, slot * FUNCTIONS + number, offset, size, value)
            pthread_mutex_unlock(&self.lock)

    def reset(self):
        self.address = 0
        self.bridge.reset()

    def save(self):
        """The host and its own function; the cards in the slots save themselves."""
        return {"version": 1, "address": self.address, "bridge": self.bridge.save()}

    def restore(self, dict state not None):
        reader = StateReader(self.name, state, version=1)
        cdef uint32_t address = reader.bits("address", <uint32_t>ADDRESS_WRITABLE)
        bridge = reader.take("bridge", dict)
        reader.done()
        self.bridge.restore(bridge)
        self.address = address

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        cdef uint32_t place
        cdef uint64_t value = <uint64_t>-1
        if offset >= ECAM:
            place = <uint32_t>(offset - ECAM)
            return self.config_read(place >> 20, place >> 12 & 0xFF, place & 0xFFF, size)
        if offset >= CONFIG_DATA:
            if self.address & ADDRESS_ENABLE:
                value = self.config_read(self.address >> 16 & 0xFF, self.address >> 8 & 0xFF,
                                         (self.address & 0xFC) + <uint32_t>(offset - CONFIG_DATA), size)
        elif offset == CONFIG_ADDRESS and size == 4:
            value = self.address
        elif offset == RESET_CONTROL and size == 1 and self.reset_control is not None:
            pthread_mutex_lock(&self.reset_control.lock)
            value = self.reset_control.read(0, 1)
            pthread_mutex_unlock(&self.reset_control.lock)
        return value

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint32_t place
        if offset >= ECAM:
            place = <uint32_t>(offset - ECAM)
            self.config_write(place >> 20, place >> 12 & 0xFF, place & 0xFFF, size, value)
        elif offset >= CONFIG_DATA:
            if self.address & ADDRESS_ENABLE:
                self.config_write(self.address >> 16 & 0xFF, self.address >> 8 & 0xFF,
                                  (self.address & 0xFC) + <uint32_t>(offset - CONFIG_DATA), size, value)
        elif offset == CONFIG_ADDRESS and size == 4:
            self.address = <uint32_t>value & <uint32_t>ADDRESS_WRITABLE
        elif offset == RESET_CONTROL and size == 1 and self.reset_control is not None:
            pthread_mutex_lock(&self.reset_control.lock)
            self.reset_control.write(0, 1, value)
            pthread_mutex_unlock(&self.reset_control.lock)

    cdef uint64_t config_read(self, uint32_t bus, uint32_t devfn, uint32_t offset, uint32_t size) noexcept nogil:
        """All ones where no function answers; the host's lock is held."""
        cdef uint64_t value
        if bus != 0 or self.functions[devfn] == NULL or offset + size > CONFIG_SIZE:
            return <uint64_t>-1
        pthread_mutex_lock(&(<PciFunction>self.functions[devfn]).lock)
        value = (<PciFunction>self.functions[devfn]).config_read(offset, size)
        pthread_mutex_unlock(&(<PciFunction>self.functions[devfn]).lock)
        return value

    cdef void config_write(self, uint32_t bus, uint32_t devfn, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil:
        """Vanishes where no function listens; the host's lock is held."""
        if bus != 0 or self.functions[devfn] == NULL or offset + size > CONFIG_SIZE:
            return
        pthread_mutex_lock(&(<PciFunction>self.functions[devfn]).lock)
        (<PciFunction>self.functions[devfn]).config_write(offset, size, value)
        pthread_mutex_unlock(&(<PciFunction>self.functions[devfn]).lock)
