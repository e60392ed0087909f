"""One PCI function: configuration space, base address registers, capabilities, INTx and MSI-X (PCI Local Bus 3.0, chapter 6).

A subclass is a card. In its `__cinit__` it calls `identify`, `add_bar`, `add_capability` and `add_msix`; its registers form one
linear space of offsets, and each BAR shows a window of it to the guest wherever the guest puts that BAR. `read` and `write`
of the subclass handle its own registers and pass the rest on to PciFunction's, which hold the MSI-X table.

Nogil methods run with Device.lock held: Bus takes it for BAR accesses, PciHost for configuration accesses. `signal`,
`is_msix_enabled` and `set_intx` are for any thread with any lock held: what they touch has a lock of its own, `signals`, the
innermost but for Interrupts.lock. Left out: header types 1 and 2, expansion ROMs, plain MSI, power management, extended
capabilities.
"""
from libc.string cimport memcpy

from kvmapp.abi.posix cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock
from kvmapp.devices cimport Bus, Device, Interrupts, IrqLine
from kvmapp.hw.msix cimport MsixTable

from kvmapp.state import StateError, StateReader

cdef enum:
    VENDOR_ID = 0x00
    STATUS = 0x06
    STATUS_INTX = 0x08
    STATUS_CAPABILITIES = 0x10
    REVISION_ID = 0x08               # and the class code in the three bytes above
    CACHE_LINE_SIZE = 0x0C
    HEADER_TYPE = 0x0E
    BAR0 = 0x10
    SUBSYSTEM_VENDOR_ID = 0x2C
    CAPABILITIES_POINTER = 0x34
    INTERRUPT_LINE = 0x3C
    INTERRUPT_PIN = 0x3D
    CAPABILITIES = 0x40              # the first one stands here
    CAPABILITIES_END = 0x100

    COMMAND_WRITABLE = 0x0547        # I/O, memory, master, parity, SERR, INTx disable
    BAR_FLAG_IO = 1
    BAR_FLAG_MEM64 = 4
    BAR_FLAG_PREFETCH = 8

    CAPABILITY_MSIX = 0x11
    MSIX_CONTROL = 2                 # in the capability
    MSIX_CONTROL_MASKED = 0x4000
    MSIX_CONTROL_ENABLED = 0x8000

    NO_CAPABILITY = 0
    FULL_IO_SPACE = 0x10000


class BarKind:
    """pci.pxd's numbers."""
    BAR_IO, BAR_MEM32, BAR_MEM64, BAR_MEM64_PREFETCH = range(4)


cdef class PciFunction(Device):
    """A function of a PCI device, not yet in a slot: PciHost.attach puts it there."""

    def __cinit__(self, *args, **kwargs):
        pthread_mutex_init(&self.signals, NULL)
        self.free_capability = CAPABILITIES
        self.known_to = ()
        self.define(PCI_COMMAND, 2, 0, COMMAND_WRITABLE)
        self.define(CACHE_LINE_SIZE, 1, 0, 0xFF)
        self.define(INTERRUPT_LINE, 1, 0, 0xFF)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.signals)

    def identify(self, uint16_t vendor, uint16_t device, uint32_t class_code, *, uint8_t revision=0,
                 uint16_t subsystem_vendor=0, uint16_t subsystem=0, uint8_t pin=0):
        """Who it is; `class_code` holds class, subclass and interface; `pin` 1-4 is INTA-INTD, 0 none."""
        if pin > 4:
            raise ValueError(f"{self.name}: interrupt pin {pin} is not one of INTA-INTD (1-4)")
        self.define(VENDOR_ID, 4, vendor | <uint32_t>device << 16, 0)
        self.define(REVISION_ID, 4, revision | class_code << 8, 0)
        self.define(SUBSYSTEM_VENDOR_ID, 4, subsystem_vendor | <uint32_t>subsystem << 16, 0)
        self.define(INTERRUPT_PIN, 1, pin, 0)

    def add_bar(self, uint32_t index, uint64_t size, uint32_t kind, uint64_t offset=0):
        """BAR `index` shows the `size` bytes at `offset` of the function's register space."""
        cdef uint32_t registers = 2 if kind >= BAR_MEM64 else 1
        cdef uint32_t low_flags = {BAR_IO: BAR_FLAG_IO, BAR_MEM32: 0, BAR_MEM64: BAR_FLAG_MEM64,
                                   BAR_MEM64_PREFETCH: BAR_FLAG_MEM64 | BAR_FLAG_PREFETCH}[kind]
        if index + registers > MAX_BARS or self.has_bar(index) or (registers == 2 and self.has_bar(index + 1)):
            raise ValueError(f"{self.name}: BAR {index} is not free")
        if size & (size - 1) or size < (4 if kind == BAR_IO else 16) or (registers == 1 and size > <uint64_t>1 << 31):
            raise ValueError(f"{self.name}: BAR {index} cannot have {size:#x} bytes")
        self.bars[index].size = size
        self.bars[index].kind = kind
        self.bars[index].offset = offset
        self.define(BAR0 + 4 * index, 4, low_flags, <uint32_t>~(size - 1))
        if registers == 2:
            self.define(BAR0 + 4 * index + 4, 4, 0, <uint32_t>(~(size - 1) >> 32))

    def add_capability(self, uint8_t identifier, bytes body not None, writable=None):
        """Appends a capability of these bytes (those after ID and next pointer; `writable` masks them); its offset."""
        cdef uint32_t offset = self.free_capability
        cdef uint32_t size = 2 + len(body)
        cdef bytes mask = bytes(len(body)) if writable is None else bytes(writable)
        if len(mask) != len(body) or size > CAPABILITIES_END - offset:
            raise ValueError(f"{self.name}: no place for capability {identifier:#x} of {size} bytes")
        self.define(offset, 2, identifier, 0)
        for i, (value, bits) in enumerate(zip(body, mask, strict=True)):
            self.define(offset + 2 + i, 1, value, bits)
        self.define(CAPABILITIES_POINTER if self.last_capability == NO_CAPABILITY else self.last_capability + 1, 1, offset, 0)
        self.define(STATUS, 2, STATUS_CAPABILITIES, 0)
        self.last_capability = offset
        self.free_capability = (offset + size + 3) & ~<uint32_t>3
        return offset

    def add_msix(self, uint32_t count, uint32_t bar, uint32_t table_offset, uint32_t pending_offset,
                 Interrupts interrupts not None):
        """`count` vectors; table and pending bits at these offsets in `bar`, whose windows pass to PciFunction.read and write."""
        cdef uint64_t pending_size = (count + 63) // 64 * 8
        if self.msix is not None or not self.has_bar(bar) or self.bars[bar].kind == BAR_IO:
            raise ValueError(f"{self.name}: MSI-X needs a memory BAR, and only one table")
        if (table_offset | pending_offset) & 7 or table_offset + 16 * <uint64_t>count > self.bars[bar].size \
                or pending_offset + pending_size > self.bars[bar].size:
            raise ValueError(f"{self.name}: the MSI-X table does not fit BAR {bar}")
        self.msix = MsixTable.__new__(MsixTable, count, interrupts)
        self.msix_table = self.bars[bar].offset + table_offset
        self.msix_pending = self.bars[bar].offset + pending_offset
        body = b"".join(value.to_bytes(size, "little")
                        for size, value in ((2, count - 1), (4, table_offset | bar), (4, pending_offset | bar)))
        control = (MSIX_CONTROL_MASKED | MSIX_CONTROL_ENABLED).to_bytes(2, "little")
        self.msix_capability = self.add_capability(CAPABILITY_MSIX, body, control + bytes(8))
        return self.msix_capability

    def reset(self):
        """Config space as built: no BAR is mapped, nothing is enabled. The machine stands still."""
        self.unmap_bars()
        memcpy(self.config, self.initial, CONFIG_SIZE)
        pthread_mutex_lock(&self.signals)
        if self.msix is not None:
            self.msix.reset()
        self.intx_level = False
        self.drive_intx()
        pthread_mutex_unlock(&self.signals)
        self.command_changed()

    def save(self):
        """Config space (with the BARs' addresses), the INTx level, and the MSI-X table."""
        return {"version": 1, "config": (<char*>self.config)[:CONFIG_SIZE], "intx": bool(self.intx_level),
                "msix": {} if self.msix is None else self.msix.save()}

    def restore(self, dict state not None):
        """Onto a machine just reset: no other function may stand where this one's BARs belong."""
        reader = StateReader(self.name, state, version=1)
        cdef bytes config = self.check_config(reader.data("config", CONFIG_SIZE, CONFIG_SIZE))
        cdef bint intx = reader.flag("intx")
        if self.msix is None and reader.take("msix", dict):
            raise StateError(f"{self.name}: 'msix' is for a device with MSI-X, which this is not")
        table_and_pending = None if self.msix is None else self.msix.check(reader.nested("msix", version=1))
        reader.done()
        self.unmap_bars()
        memcpy(self.config, <const char*>config, CONFIG_SIZE)
        self.move_bars()
        pthread_mutex_lock(&self.signals)
        self.intx_level = intx
        if table_and_pending is not None:
            self.msix.restore(*table_and_pending)
            self.apply_msix_control()
        self.drive_intx()
        pthread_mutex_unlock(&self.signals)
        self.command_changed()

    @property
    def vectors(self):
        """The MsiLine of each MSI-X vector."""
        return [] if self.msix is None else self.msix.vectors

    def send(self, uint32_t vector):
        """`signal`, from the control thread."""
        with nogil:
            self.signal(vector)

    def drive(self, bint level):
        """`set_intx`, from the control thread."""
        with nogil:
            self.set_intx(level)

    def mapped_bars(self):
        """{index: address} of the BARs that the guest can reach."""
        return {i: self.bars[i].address for i in range(MAX_BARS) if self.bars[i].mapped}

    def wanted_bars(self):
        """[(index, size, kind)] of the BARs that firmware has to place."""
        return [(i, self.bars[i].size, self.bars[i].kind) for i in range(MAX_BARS) if self.bars[i].size]

    def enter(self, Bus pio not None, Bus mmio not None, IrqLine intx, list windows not None):
        """Puts the function onto its buses; `windows` are the (base, size) for I/O, 32-bit and 64-bit BARs. For PciHost."""
        pio.adopt(self)
        mmio.adopt(self)
        self.known_to = (pio, mmio)
        pthread_mutex_lock(&self.lock)
        self.pio, self.mmio, self.intx = pio, mmio, intx
        self.windows.io, self.windows.mem32, self.windows.mem64 = [Window(base=base, size=size) for base, size in windows]
        pthread_mutex_unlock(&self.lock)

    def part(self):
        """After `leave` and `close`, with no vCPU running: nothing of the machine knows the function any more."""
        for bus in self.known_to:
            bus.forget(self)
        self.known_to = ()
        if self.msix is not None:
            self.msix.release()

    def leave(self):
        """Takes the function off its buses and its pin. For PciHost."""
        pthread_mutex_lock(&self.lock)
        self.unmap_bars()
        self.set_intx(False)
        self.pio = self.mmio = self.intx = None
        pthread_mutex_unlock(&self.lock)

    def define(self, uint32_t offset, uint32_t size, uint32_t value, uint32_t writable):
        """Lays a field of config space down: its value after a reset and the bits that the guest may write."""
        memcpy(&self.initial[offset], &value, size)
        memcpy(&self.writable[offset], &writable, size)
        memcpy(&self.config[offset], &value, size)

    def has_bar(self, uint32_t index):
        """Whether a BAR uses this register, as its upper half too."""
        return index < MAX_BARS and (self.bars[index].size > 0 or (index > 0 and self.bars[index - 1].kind >= BAR_MEM64))

    def check_config(self, bytes config not None):
        """`config`, when it differs from ours in nothing but what the guest may write."""
        cdef const uint8_t* saved = <const uint8_t*><const char*>config
        for i in range(CONFIG_SIZE):
            if (saved[i] ^ self.initial[i]) & ~self.writable[i]:
                raise StateError(f"{self.name}: 'config' is of another device (byte {i:#x} is {saved[i]:#x})")
        return config

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        """The MSI-X table and pending bits; zero for registers that are not there."""
        if self.msix is None:
            return 0
        if offset >= self.msix_table and offset + size <= self.msix_table + 16 * self.msix.count:
            return self.msix.read(offset - self.msix_table, size)
        if offset >= self.msix_pending and offset + size <= self.msix_pending + (self.msix.count + 63) // 64 * 8:
            return self.msix.read_pending(offset - self.msix_pending, size)
        return 0

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef int result
        if self.msix is not None and offset >= self.msix_table and offset + size <= self.msix_table + 16 * self.msix.count:
            pthread_mutex_lock(&self.signals)
            result = self.msix.write(offset - self.msix_table, size, value)
            pthread_mutex_unlock(&self.signals)
            if result < 0:
                self.complain(b"the host refuses an MSI-X message, error", -result)

    cdef uint64_t config_read(self, uint32_t offset, uint32_t size) noexcept nogil:
        """A guest's load from config space; offset + size is within it. A hook: capabilities with side effects live here."""
        cdef uint64_t value = 0
        memcpy(&value, &self.config[offset], size)
        if offset <= STATUS < offset + size and self.intx_level:
            value |= <uint64_t>STATUS_INTX << 8 * (STATUS - offset)
        return value

    cdef void config_write(self, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil:
        """A guest's store to config space; offset + size is within it. A hook, as `config_read`."""
        cdef uint32_t i, end = offset + size, msix_control = self.msix_capability + MSIX_CONTROL
        cdef uint8_t bits
        for i in range(offset, end):
            bits = self.writable[i]
            self.config[i] = (self.config[i] & ~bits) | (<uint8_t>value & bits)
            value >>= 8
        if offset < PCI_COMMAND + 2 and end > PCI_COMMAND:
            self.move_bars()
            pthread_mutex_lock(&self.signals)
            self.drive_intx()
            pthread_mutex_unlock(&self.signals)
            self.command_changed()
        elif offset < BAR0 + 4 * MAX_BARS and end > BAR0:
            self.move_bars()
        elif self.msix is not None and offset < msix_control + 2 and end > msix_control:
            pthread_mutex_lock(&self.signals)
            self.apply_msix_control()
            self.drive_intx()
            pthread_mutex_unlock(&self.signals)

    cdef void bar_moved(self, uint32_t index, uint64_t address, bint mapped) noexcept nogil:
        """A hook, called after BAR `index` was mapped at `address` and before it is unmapped from there: for ioeventfds."""

    cdef void command_changed(self) noexcept nogil:
        """A hook, called after the command register may have changed: for cards that must heed `is_bus_master` at once."""

    cdef bint is_bus_master(self) noexcept nogil:
        """Whether the guest lets the card reach guest memory."""
        return self.config[PCI_COMMAND] & PCI_COMMAND_MASTER != 0

    cdef bint is_msix_enabled(self) noexcept nogil:
        """Whether `signal` is heard; otherwise the card raises its pin with `set_intx`."""
        return self.msix is not None and self.msix.enabled

    cdef void signal(self, uint32_t vector) noexcept nogil:
        """Sends an MSI-X vector; nothing when MSI-X is off or there is no such vector."""
        if self.msix is not None:
            pthread_mutex_lock(&self.signals)
            self.msix.signal(vector)
            pthread_mutex_unlock(&self.signals)

    cdef int vector_fd(self, uint32_t vector) noexcept nogil:
        """The eventfd that sends an MSI-X vector as long as it is not masked; -1 when it is, or is not there."""
        cdef int fd = -1
        if self.msix is not None:
            pthread_mutex_lock(&self.signals)
            fd = self.msix.open_fd(vector)
            pthread_mutex_unlock(&self.signals)
        return fd

    cdef void set_intx(self, bint level) noexcept nogil:
        """The level that the card drives its interrupt pin to."""
        pthread_mutex_lock(&self.signals)
        self.intx_level = level
        self.drive_intx()
        pthread_mutex_unlock(&self.signals)

    cdef uint32_t field(self, uint32_t offset, uint32_t size) noexcept nogil:
        cdef uint32_t value = 0
        memcpy(&value, &self.config[offset], size)
        return value

    cdef void drive_intx(self) noexcept nogil:
        """The pin follows the level unless the command register's disable bit or MSI-X forbids it (6.2.2, 6.8.2.3).

        With `signals` held. The status bit tells the level in any case; it is laid over what `config_read` loads.
        """
        if self.intx is not None:
            self.intx.set(self.intx_level and not self.is_msix_enabled() and
                          not self.field(PCI_COMMAND, 2) & PCI_COMMAND_INTX_DISABLE)

    cdef void apply_msix_control(self) noexcept nogil:
        """With `signals` held."""
        cdef uint32_t control = self.field(self.msix_capability + MSIX_CONTROL, 2)
        cdef int result = self.msix.control(control & MSIX_CONTROL_ENABLED != 0, control & MSIX_CONTROL_MASKED != 0)
        if result < 0:
            self.complain(b"the host refuses an MSI-X message, error", -result)

    cdef bint wanted(self, uint32_t index, uint64_t* address) noexcept nogil:
        """Whether the guest wants this BAR mapped, and where. Only the windows of the PCI hole are allowed: RAM is elsewhere."""
        cdef Bar* bar = &self.bars[index]
        cdef uint64_t base = self.field(BAR0 + 4 * index, 4)
        cdef uint64_t ones = <uint32_t>~(bar.size - 1)
        cdef bint is_io = bar.kind == BAR_IO
        if bar.size == 0 or not self.config[PCI_COMMAND] & (PCI_COMMAND_IO if is_io else PCI_COMMAND_MEMORY):
            return False
        base &= ones
        if bar.kind >= BAR_MEM64:
            base |= <uint64_t>self.field(BAR0 + 4 * index + 4, 4) << 32
        address[0] = base
        if is_io:
            # Ports below 0x1000 are the platform's.
            if inside(base, bar.size, 0x1000, FULL_IO_SPACE - 0x1000):
                return True
        elif inside(base, bar.size, self.windows.mem32.base, self.windows.mem32.size):
            return True
        elif bar.kind != BAR_MEM32 and inside(base, bar.size, self.windows.mem64.base, self.windows.mem64.size):
            return True
        # No address yet, or a guest that asks for the size with decoding left on: common, and no fault.
        if base != 0 and base & ones != ones and <uint32_t>(base >> 32) != <uint32_t>0xFFFFFFFF:
            self.complain(b"a BAR outside the PCI windows stays unmapped", base)
        return False

    cdef void move_bars(self) noexcept nogil:
        """Maps every BAR where the guest wants it. All are taken down before any is put up: two may swap their places."""
        cdef uint64_t address = 0
        cdef int i
        if self.mmio is None:
            return
        for i in range(MAX_BARS):
            if self.bars[i].mapped and not (self.wanted(i, &address) and address == self.bars[i].address):
                self.unmap_bar(i)
        for i in range(MAX_BARS):
            if not self.bars[i].mapped and self.wanted(i, &address):
                self.map_bar(i, address)

    cdef void unmap_bars(self) noexcept nogil:
        cdef int i
        for i in range(MAX_BARS):
            if self.bars[i].mapped:
                self.unmap_bar(i)

    cdef void map_bar(self, uint32_t index, uint64_t address) noexcept nogil:
        cdef Bar* bar = &self.bars[index]
        cdef int result
        if bar.kind == BAR_IO:
            result = self.pio.place(address, bar.size, self, bar.offset)
        else:
            result = self.mmio.place(address, bar.size, self, bar.offset)
        if result < 0:
            self.complain(b"a BAR over something else stays unmapped", address)
            return
        bar.address = address
        bar.mapped = True
        self.bar_moved(index, address, True)

    cdef void unmap_bar(self, uint32_t index) noexcept nogil:
        cdef Bar* bar = &self.bars[index]
        self.bar_moved(index, bar.address, False)
        if bar.kind == BAR_IO:
            self.pio.remove(bar.address, bar.size)
        else:
            self.mmio.remove(bar.address, bar.size)
        bar.mapped = False


cdef bint inside(uint64_t base, uint64_t size, uint64_t start, uint64_t length) noexcept nogil:
    """Whether [base, base + size) lies in [start, start + length); no sum here can wrap."""
    return base >= start and base - start < length and size <= length - (base - start)
