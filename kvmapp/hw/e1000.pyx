"""Intel's 82540EM Gigabit Ethernet controller, for guests without virtio drivers: "PCI/PCI-X Family of Gigabit Ethernet Controllers
Software Developer's Manual" (317453), chapters 3 (descriptors, offloads), 5 and 8 (e1000_rom.pyx), 9 (VLANs) and 13 (registers).

e1000_chip.pyx has what both directions share, e1000_send.pyx and e1000_receive.pyx one each, e1000_frames.pyx what is done to a frame's
bytes. Frames are worked on by one I/O thread: a store to a tail register rings its doorbell. A frame is copied once, between guest
memory and a buffer of ours; large sends go to a tap as they are, behind a virtio_net_hdr, or are cut here.

Locks: Device.lock (vCPUs) → `rings` (what the I/O thread works with) → `causes` (interrupts) → PciFunction.signals. Tail registers are
atomic. What is done to the rings, and to the enabling bits, waits for the frames under way: after it the card touches no memory.

Left out: what the guest's driver cannot tell from a wire without it: flow control, loopback, wake on LAN, SMBus; the delays of interrupts
but for ITR's; split and checksummed receive descriptors (PCSS); segmentation of UDP; the frame's CRC is zeroes.
"""
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from kvmapp.abi.epoll cimport EPOLLET
from kvmapp.abi.posix cimport atomic_load_u32, atomic_store_u32, pthread_mutex_lock, pthread_mutex_unlock
from kvmapp.hw.e1000_chip cimport (BITS, CTRL, CTRL_DEFAULT, CTRL_PHY_RESET, CTRL_RESET, EECD, EERD, ICR, IMC, IO_ADDRESS_BITS,
                                   IO_BAR, IO_DATA, IO_SIZE, IO_WINDOW, LSC, MDAC, MDIC, MDIC_DATA, MDIC_ERROR, MDIC_INTERRUPT,
                                   MDIC_READ, MDIC_READY, MDIC_WRITE, MEMORY_BAR, PBA, PHY_ADDRESS, RAH_VALID, RAL, RCTL, RDT,
                                   REGISTERS, STATISTICS, STATISTICS_END, STATUS, STATUS_ALWAYS, STATUS_LINK, TCTL, TDT, VET,
                                   E1000Chip)
from kvmapp.hw.e1000_frames cimport ADDRESS
from kvmapp.hw.e1000_receive cimport Receiver
from kvmapp.hw.e1000_rom cimport (COMMAND_BITS, PHY_REGISTERS, ROM_WORDS, Microwire, microwire_drive, microwire_pins, microwire_reset,
                                  phy_is_on, phy_read, phy_reset, phy_write, rom_read, rom_write)
from kvmapp.hw.e1000_send cimport Sender
from kvmapp.hw.pci cimport BAR_IO, BAR_MEM32, PciFunction
from kvmapp.iothread cimport Doorbell, EventSource, IoThread
from kvmapp.memory cimport GuestMemory
from kvmapp.net.backend cimport NET_HEADER, NetBackend

from kvmapp.hw.e1000_chip import check_words
from kvmapp.state import StateError, StateReader


cdef class CardDoorbell(Doorbell):
    cdef E1000 card

    def __cinit__(self, E1000 card not None):
        self.card = card

    cdef void rung(self) noexcept nogil:
        self.card.work()


cdef class E1000(E1000Chip):
    """A card with the address `mac` (6 bytes); `link` is whether its cable is in. Made paused: frames flow from `resume` on."""
    cdef Sender sender
    cdef Receiver receiver
    cdef uint16_t rom[ROM_WORDS]
    cdef Microwire wire
    cdef uint32_t io_address

    def __cinit__(self, str name not None, GuestMemory memory not None, NetBackend backend not None, bytes mac not None, *,
                  bint link=True):
        if len(mac) != ADDRESS:
            raise ValueError(f"{name}: a MAC address has 6 bytes, not {len(mac)}")
        self.width = 4
        self.cable = link
        self.sender, self.receiver, self.bell = Sender(self), Receiver(self), CardDoorbell(self)
        self.identify(0x8086, 0x100E, 0x020000, revision=2, subsystem_vendor=0x8086, subsystem=0x1E, pin=1)
        self.add_bar(MEMORY_BAR, IO_WINDOW, BAR_MEM32)
        self.add_bar(IO_BAR, IO_SIZE, BAR_IO, IO_WINDOW)
        rom_write(self.rom, mac)
        phy_reset(self.phy)
        microwire_reset(&self.wire)
        self.clear()
        backend.set_header(NET_HEADER)
        backend.set_offloads(0)

    def run_on(self, IoThread thread not None):
        """Frames and interrupts' pauses are this thread's."""
        thread.add(self.bell)
        thread.add(self.throttle)
        if self.receiver.reader.fd >= 0:
            thread.add(self.receiver.reader, EPOLLET)
        if self.backend.waiter is not None:
            thread.wait_by(self.backend.waiter, self.receiver.reader)

    def reset(self):
        PciFunction.reset(self)
        with nogil:
            pthread_mutex_lock(&self.rings)
            phy_reset(self.phy)
            microwire_reset(&self.wire)
            self.io_address = 0
            self.clear()
            pthread_mutex_unlock(&self.rings)

    def pause(self):
        with nogil:
            pthread_mutex_lock(&self.rings)
            self.receiver.running = False
            pthread_mutex_unlock(&self.rings)

    def resume(self):
        with nogil:
            pthread_mutex_lock(&self.rings)
            self.receiver.running = True
            pthread_mutex_unlock(&self.rings)
            self.throttle_over()
            self.bell.press()

    def save(self):
        """A frame that is half put together is part of it; one that has come and found no room is lost, as on a wire."""
        return {"version": 1, "pci": PciFunction.save(self), "registers": (<char*>self.registers)[:sizeof(self.registers)],
                "phy": [self.phy[i] for i in range(PHY_REGISTERS)], "link": bool(self.cable), "io_address": self.io_address,
                "microwire": [self.wire.pins, self.wire.command, self.wire.received, self.wire.address, self.wire.sent],
                "send": self.sender.save()}

    def restore(self, dict saved not None):
        cdef Microwire wire
        reader = StateReader(self.name, saved, version=1)
        pci = reader.take("pci", dict)
        cdef bytes registers = reader.data("registers", sizeof(self.registers), sizeof(self.registers))
        phy = reader.uints("phy", PHY_REGISTERS, 0xFFFF)
        link = reader.flag("link")
        io_address = reader.uint("io_address", IO_ADDRESS_BITS)
        wire.pins, wire.command, wire.received, wire.address, wire.sent = reader.uints("microwire", 5, (1 << COMMAND_BITS) - 1)
        send = self.sender.check(reader.nested("send", version=1))
        reader.done()
        check_words(self.name, registers)
        if wire.received > COMMAND_BITS or wire.address >= ROM_WORDS or wire.sent > 15:
            raise StateError(f"{self.name}: 'microwire' is in no state that it can be in")
        PciFunction.restore(self, pci)
        pthread_mutex_lock(&self.rings)
        memcpy(self.registers, <const char*>registers, sizeof(self.registers))
        self.sender.restore(*send)
        self.io_address, self.wire, self.cable = io_address, wire, link
        for i in range(PHY_REGISTERS):
            self.phy[i] = phy[i]
        pthread_mutex_unlock(&self.rings)

    def close(self):
        if self.backend.waiter is not None and self.receiver.reader.thread is not None:
            self.receiver.reader.thread.wait_by(None)
        for source in (self.bell, self.receiver.reader, self.throttle):
            if (<EventSource>source).thread is not None:
                (<EventSource>source).thread.remove(source)
        self.backend.close()

    @property
    def device(self):
        """The card is its own device: machine.py asks cards for theirs."""
        return self

    @property
    def link(self):
        """Whether the cable is plugged in."""
        return bool(self.cable)

    def set_link(self, bint up):
        """Plugs the cable in or out; the driver is told."""
        with nogil:
            pthread_mutex_lock(&self.rings)
            self.cable = up
            pthread_mutex_unlock(&self.rings)
            self.raise_causes(LSC)
            self.bell.press()

    def stats(self):
        """{counter: value} since the start, from the host's view: rx is what the guest received."""
        return {"rx_packets": self.receiver.packets, "rx_bytes": self.receiver.octets, "rx_drop": self.receiver.dropped,
                "tx_packets": self.sender.packets, "tx_bytes": self.sender.octets, "tx_drop": self.sender.dropped}

    # ---- registers

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        cdef uint32_t value
        if offset < IO_WINDOW:
            value = self.load(<uint32_t>offset & ~3)
        elif offset & ~3 == IO_WINDOW:
            value = self.io_address
        elif offset & ~3 == IO_WINDOW + IO_DATA:
            value = self.load(self.io_address & ~3)
        else:
            value = 0
        return value >> 8 * (offset & 3)

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        """Whole words only (13.2.1)."""
        if size != 4 or offset & 3:
            return
        if offset < IO_WINDOW:
            self.store(<uint32_t>offset, <uint32_t>value)
        elif offset == IO_WINDOW:
            self.io_address = <uint32_t>value & IO_ADDRESS_BITS
        elif offset == IO_WINDOW + IO_DATA:
            self.store(self.io_address & ~3, <uint32_t>value)

    cdef uint32_t load(self, uint32_t offset) noexcept nogil:
        if offset >= 4 * REGISTERS:
            return 0
        if offset == ICR:
            return self.take_causes()
        if offset == STATUS:
            return STATUS_ALWAYS | (STATUS_LINK if self.is_up() else 0)
        if offset == EECD:
            return microwire_pins(&self.wire)
        if offset >= STATISTICS and offset < STATISTICS_END:
            return self.take_statistic(offset)
        return atomic_load_u32(&self.registers[offset >> 2])

    cdef void store(self, uint32_t offset, uint32_t value) noexcept nogil:
        if offset >= 4 * REGISTERS:
            return
        if offset == TDT or offset == RDT:
            atomic_store_u32(&self.registers[offset >> 2], value & BITS[offset >> 2])
            self.bell.press()
        elif offset >= ICR and offset <= IMC:
            self.store_interrupts(offset, value)
        else:
            pthread_mutex_lock(&self.rings)
            self.configure(offset, value)
            pthread_mutex_unlock(&self.rings)
            if offset == CTRL or offset == RCTL or offset == TCTL or offset == MDIC:
                self.bell.press()

    cdef void configure(self, uint32_t offset, uint32_t value) noexcept nogil:
        cdef bint was_up = self.is_up(), negotiated = False
        if offset == CTRL and value & CTRL_RESET:
            self.clear()
            return
        if offset == EECD:
            microwire_drive(&self.wire, self.rom, value)
        elif offset == EERD:
            self.registers[EERD >> 2] = rom_read(self.rom, value)
        elif offset == MDIC:
            negotiated = self.talk_to_phy(value)
        elif offset < STATISTICS or offset >= STATISTICS_END:
            self.registers[offset >> 2] = value & BITS[offset >> 2]
        if offset == CTRL and value & CTRL_PHY_RESET:
            phy_reset(self.phy)
            negotiated = True
        if negotiated or self.is_up() != was_up:
            self.raise_causes(LSC)

    cdef bint talk_to_phy(self, uint32_t value) noexcept nogil:
        """A store to MDIC; whether the PHY negotiates anew."""
        cdef uint32_t number = value >> 16 & 31, operation = value >> 26 & 3
        cdef bint negotiated = False
        cdef uint32_t answer = value & ~<uint32_t>MDIC_ERROR | MDIC_READY
        if value >> 21 & 31 != PHY_ADDRESS or operation not in (MDIC_READ, MDIC_WRITE):
            answer |= MDIC_ERROR
        elif operation == MDIC_READ:
            answer = answer & ~<uint32_t>MDIC_DATA | phy_read(self.phy, number, self.cable and phy_is_on(self.phy))
        else:
            negotiated = phy_write(self.phy, number, <uint16_t>value)
        self.registers[MDIC >> 2] = answer
        if value & MDIC_INTERRUPT:
            self.raise_causes(MDAC)
        return negotiated

    cdef void clear(self) noexcept nogil:
        """As after a reset of the MAC, with `rings` held."""
        pthread_mutex_lock(&self.causes)
        memset(self.registers, 0, sizeof(self.registers))
        self.settle_pin()
        pthread_mutex_unlock(&self.causes)
        self.registers[CTRL >> 2] = CTRL_DEFAULT
        self.registers[VET >> 2] = 0x8100
        self.registers[PBA >> 2] = 0x00100030        # KiB: to send, to receive
        memcpy(&self.registers[RAL >> 2], self.rom, ADDRESS)
        self.registers[(RAL + 4) >> 2] |= RAH_VALID
        self.sender.clear()

    cdef void command_changed(self) noexcept nogil:
        """Without bus mastering no memory is touched from now on."""
        pthread_mutex_lock(&self.rings)
        pthread_mutex_unlock(&self.rings)
        self.bell.press()

    # ---- the I/O thread

    cdef void work(self) noexcept nogil:
        """The driver has moved a tail, or changed what may be done."""
        pthread_mutex_lock(&self.rings)
        if self.receiver.running:
            self.sender.transmit()
            self.receiver.receive()
        pthread_mutex_unlock(&self.rings)
