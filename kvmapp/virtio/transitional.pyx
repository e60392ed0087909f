"""A virtio card that drivers older than VIRTIO 1.0 find as well (VIRTIO 1.2, 4.1.4.10; virtio 0.9.5, appendix B).

To the modern card of pci.pyx it adds BAR 0: a few I/O ports, the same for all devices, with the device's config space behind
them. The PCI IDs are those of 0.9.5, which modern drivers take too; devices that are younger than 1.0 have no such ID and stay
modern. The legacy part can stand alone, for a guest that must not see the modern one.

A legacy driver names the page where its ring lies, and the parts of the ring follow from that. Kicks before the driver has begun
leave the guest as ordinary stores, because the device must first settle on features (VirtioDevice.begin_legacy); from then on each
queue's doorbell hangs at the notify port as an ioeventfd. Left out: VIRTIO_F_ANY_LAYOUT and VIRTIO_F_NOTIFY_ON_EMPTY, which
only legacy drivers know and none needs.
"""
from kvmapp.abi.posix cimport atomic_load_u32, atomic_store_u32
from kvmapp.abi.virtio cimport (VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_ID_9P, VIRTIO_ID_BALLOON, VIRTIO_ID_BLOCK,
                                VIRTIO_ID_CONSOLE, VIRTIO_ID_NET, VIRTIO_ID_RNG, VIRTIO_ID_SCSI)
from kvmapp.devices cimport Interrupts
from kvmapp.hw.pci cimport BAR_IO, PCI_COMMAND, PCI_COMMAND_MASTER
from kvmapp.virtio.device cimport VirtioDevice
from kvmapp.virtio.virtqueue cimport Virtqueue

cdef enum:
    VENDOR_REDHAT_QUMRANET = 0x1AF4
    REVISION_LEGACY = 0              # legacy drivers refuse every other

    LEGACY_BAR = 0
    LEGACY = 0x8000                  # its registers follow the memory BAR's
    PAGE_SHIFT = 12
    PAGE_SIZE = 1 << PAGE_SHIFT

# The registers (4.1.4.10); those of MSI-X are there only while the guest has it enabled, and what follows moves up.
cdef enum:
    DEVICE_FEATURES = 0x00
    DRIVER_FEATURES = 0x04
    QUEUE_PAGE = 0x08
    QUEUE_SIZE = 0x0C
    QUEUE_SELECT = 0x0E
    QUEUE_NOTIFY = 0x10
    DEVICE_STATUS = 0x12
    ISR_STATUS = 0x13
    CONFIG_VECTOR = 0x14
    QUEUE_VECTOR = 0x16
    CONFIG_WITHOUT_MSIX = 0x14
    CONFIG_WITH_MSIX = 0x18

# {virtio device ID: (PCI device ID, class code)}
LEGACY_IDS = {VIRTIO_ID_NET: (0x1000, 0x020000), VIRTIO_ID_BLOCK: (0x1001, 0x010000), VIRTIO_ID_BALLOON: (0x1002, 0x00FF00),
              VIRTIO_ID_CONSOLE: (0x1003, 0x078000), VIRTIO_ID_SCSI: (0x1004, 0x010000), VIRTIO_ID_RNG: (0x1005, 0x00FF00),
              VIRTIO_ID_9P: (0x1009, 0x000200)}


def virtio_card(VirtioDevice device not None, Interrupts interrupts not None, str mode not None="transitional"):
    """The card for a device: `mode` is transitional, modern, or legacy. Where there is no legacy ID it is a modern one."""
    if mode == "modern" or device.device_id not in LEGACY_IDS:
        return VirtioPci(device, interrupts)
    return TransitionalPci(device, interrupts, modern=mode == "transitional")


cdef uint32_t width_of(uint32_t field) noexcept nogil:
    """Bytes of the register that begins here; 0 when none does."""
    if field in (DEVICE_FEATURES, DRIVER_FEATURES, QUEUE_PAGE):
        return 4
    if field in (QUEUE_SIZE, QUEUE_SELECT, QUEUE_NOTIFY, CONFIG_VECTOR, QUEUE_VECTOR):
        return 2
    return 1 if field in (DEVICE_STATUS, ISR_STATUS) else 0


cdef class TransitionalPci(VirtioPci):
    """`modern`: whether drivers of VIRTIO 1.0 are served too."""

    def __cinit__(self, VirtioDevice device not None, Interrupts interrupts not None, *, bint modern=True):
        pci_id, class_code = LEGACY_IDS[device.device_id]
        self.identify(VENDOR_REDHAT_QUMRANET, pci_id, class_code, revision=REVISION_LEGACY,
                      subsystem_vendor=VENDOR_REDHAT_QUMRANET, subsystem=device.device_id, pin=1)
        size = 1 << (CONFIG_WITH_MSIX + device.config_size - 1).bit_length()
        self.add_bar(LEGACY_BAR, size, BAR_IO, LEGACY)

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        if offset >= LEGACY:
            return self.read_legacy(<uint32_t>offset - LEGACY, size)
        return VirtioPci.read(self, offset, size)

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        if offset >= LEGACY:
            self.write_legacy(<uint32_t>offset - LEGACY, size, value)
        else:
            VirtioPci.write(self, offset, size, value)

    cdef uint32_t device_config(self) noexcept nogil:
        """Where the device's config space begins."""
        return CONFIG_WITH_MSIX if self.is_msix_enabled() else CONFIG_WITHOUT_MSIX

    cdef uint64_t read_legacy(self, uint32_t offset, uint32_t size) noexcept nogil:
        """A register by an access of its own width or a wider one, or any part of the config space."""
        if offset >= self.device_config():
            return self.device.load_config(offset - self.device_config(), size)
        return self.legacy_value(offset) if size >= width_of(offset) else 0

    cdef uint32_t legacy_value(self, uint32_t field) noexcept nogil:
        if field == DEVICE_FEATURES:
            return self.device.legacy_offered()
        if field == DRIVER_FEATURES:
            return <uint32_t>self.device.wanted
        if field == QUEUE_SELECT:
            return self.state.queue_select
        if field == DEVICE_STATUS:
            return self.device.status_register() & 0xFF
        if field == ISR_STATUS:
            return self.take_isr()
        if field == CONFIG_VECTOR:
            return atomic_load_u32(&self.state.config_vector)
        if self.selected() == NULL:
            return 0
        if field == QUEUE_PAGE:
            return <uint32_t>((<Virtqueue>self.selected()).desc_gpa >> PAGE_SHIFT)
        if field == QUEUE_SIZE:
            return (<Virtqueue>self.selected()).size
        if field == QUEUE_VECTOR:
            return atomic_load_u32(&self.state.queue_vectors[self.state.queue_select])
        return 0

    cdef void write_legacy(self, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint32_t width = width_of(offset)
        if offset >= self.device_config():
            self.device.store_config(offset - self.device_config(), size, value)
        elif width == 0 or size < width:
            self.complain(b"store to a part of a legacy register, offset", offset)
        else:
            self.set_legacy_field(offset, <uint32_t>(value & ((<uint64_t>1 << 8 * width) - 1)))

    cdef void set_legacy_field(self, uint32_t field, uint32_t value) noexcept nogil:
        if field == DRIVER_FEATURES:
            self.device.want(0, value)
        elif field == QUEUE_SELECT:
            self.state.queue_select = value
        elif field == QUEUE_NOTIFY:
            self.kick(value)
        elif field == DEVICE_STATUS:
            self.device.set_legacy_status(value)
            if value == 0:
                self.forget()
            else:
                self.bind_ports(True)
            if value == VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER and not self.is_bus_master():
                # Linux before 2.6.34 leaves that to the firmware, which knows nothing of a card that comes later.
                self.config[PCI_COMMAND] |= PCI_COMMAND_MASTER
                self.command_changed()
        elif field == CONFIG_VECTOR:
            atomic_store_u32(&self.state.config_vector, self.valid_vector(value))
        elif field == QUEUE_VECTOR and self.selected() != NULL:
            atomic_store_u32(&self.state.queue_vectors[self.state.queue_select], self.valid_vector(value))
            self.device.aim()
        elif field == QUEUE_PAGE and self.selected() != NULL:
            self.set_ring(<Virtqueue>self.selected(), value)

    cdef void set_ring(self, Virtqueue queue, uint32_t page) noexcept nogil:
        """The ring lies at this page from now on; page 0 takes the queue back."""
        if page == 0:
            self.bind(queue, False)
            self.bind_port(queue, False)
            self.device.reset_queue(queue)
        elif queue.enabled:
            self.complain(b"an enabled queue cannot be moved, to page", page)
        else:
            queue.lay_out(<uint64_t>page << PAGE_SHIFT, PAGE_SIZE)
            self.device.enable_queue(queue)
            self.bind_port(queue, True)

    cdef void kick(self, uint32_t index) noexcept nogil:
        """A kick that KVM did not take as an ioeventfd."""
        if index >= self.device.queue_count:
            return
        if not self.device.is_begun():
            self.device.begin_legacy()
            self.bind_ports(True)
        (<Virtqueue>self.device.queue_table[index]).doorbell.press()

    # ---- ioeventfds

    cdef void bind_ports(self, bint assign) noexcept nogil:
        cdef uint32_t i
        for i in range(self.device.queue_count):
            self.bind_port(<Virtqueue>self.device.queue_table[i], assign)

    cdef void bind_port(self, Virtqueue queue, bint assign) noexcept nogil:
        """As `bind`, at the notify port, once a legacy driver has begun."""
        cdef int result
        if assign == self.port_bound[queue.index]:
            return
        if assign and not (self.device.legacy and queue.enabled and self.bars[LEGACY_BAR].mapped):
            return
        result = self.pio.ring(self.bars[LEGACY_BAR].address + QUEUE_NOTIFY, 2, queue.doorbell.fd, True, queue.index, assign)
        if result < 0 and assign:
            self.complain(b"the host refuses an ioeventfd, kicks will be slow; error", -result)
            return
        self.port_bound[queue.index] = assign

    cdef void bind(self, Virtqueue queue, bint assign) noexcept nogil:
        """A legacy driver never rings at the modern address."""
        if not assign or not self.device.legacy:
            VirtioPci.bind(self, queue, assign)

    cdef void bar_moved(self, uint32_t index, uint64_t address, bint mapped) noexcept nogil:
        if index == LEGACY_BAR:
            self.bind_ports(mapped)
        else:
            VirtioPci.bar_moved(self, index, address, mapped)

    cdef void forget(self) noexcept nogil:
        VirtioPci.forget(self)
        self.bind_ports(False)
