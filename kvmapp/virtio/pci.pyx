"""A virtio device on PCI: the modern transport (VIRTIO 1.2, 4.1), one card a device.

One memory BAR shows the four virtio structures (common, ISR, device, notify; 4.1.4) and the MSI-X table behind them. Each queue
has a notify address of its own, where its doorbell hangs as an ioeventfd while the queue is enabled. Interrupts are MSI-X
vectors, one for the config space and one a queue, or INTx with the ISR register. A guest that takes bus mastering away (as a
kernel does before kexec) stops the queues until it gives it back. transitional.pyx adds the legacy I/O BAR (4.1.4.10). Left
out: shared memory, NOTIFICATION_DATA.
"""
from libc.stdint cimport UINT16_MAX, UINT32_MAX, uint8_t

from kvmapp.abi.posix cimport atomic_load_u32, atomic_store_u32, pthread_mutex_lock, pthread_mutex_unlock
from kvmapp.abi.virtio cimport (VIRTIO_F_RING_RESET, VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_NET, VIRTIO_MSI_NO_VECTOR,
                                VIRTIO_PCI_CAP_COMMON_CFG, VIRTIO_PCI_CAP_DEVICE_CFG, VIRTIO_PCI_CAP_ISR_CFG,
                                VIRTIO_PCI_CAP_NOTIFY_CFG, VIRTIO_PCI_CAP_PCI_CFG)
from kvmapp.devices cimport Interrupts
from kvmapp.hw.pci cimport BAR_MEM32, PciFunction
from kvmapp.virtio.device cimport Transport, VirtioDevice, half, with_half
from kvmapp.virtio.virtqueue cimport Virtqueue

import struct

from kvmapp.state import StateError, StateReader

cdef enum:
    VENDOR_REDHAT_QUMRANET = 0x1AF4
    DEVICE_BASE = 0x1040             # the PCI device ID is this and the virtio device ID (4.1.2.1)
    REVISION_MODERN = 1
    SUBSYSTEM = 0x1100               # what Windows' drivers look for first

    BAR = 1                          # BAR 0 is the legacy transport's
    COMMON = 0x0000                  # the structures in the BAR, a page each
    ISR = 0x1000
    DEVICE = 0x2000
    NOTIFY = 0x3000
    MSIX_TABLE = 0x4000
    MSIX_PENDING = 0x6000
    BAR_SIZE = 0x8000
    NOTIFY_MULTIPLIER = 4

    CAPABILITY_VENDOR = 0x09
    WINDOW_BAR = 4                   # fields of the configuration access capability (4.1.4.9)
    WINDOW_OFFSET = 8
    WINDOW_LENGTH = 12
    WINDOW_DATA = 16

    ISR_QUEUE = 1
    ISR_CONFIG = 2

# struct virtio_pci_common_cfg (4.1.4.3)
cdef enum:
    DEVICE_FEATURE_SELECT = 0x00
    DEVICE_FEATURE = 0x04
    DRIVER_FEATURE_SELECT = 0x08
    DRIVER_FEATURE = 0x0C
    CONFIG_MSIX_VECTOR = 0x10
    NUM_QUEUES = 0x12
    DEVICE_STATUS = 0x14
    CONFIG_GENERATION = 0x15
    QUEUE_SELECT = 0x16
    QUEUE_SIZE = 0x18
    QUEUE_MSIX_VECTOR = 0x1A
    QUEUE_ENABLE = 0x1C
    QUEUE_NOTIFY_OFF = 0x1E
    QUEUE_DESC = 0x20                # three 64-bit addresses, each stored in two halves
    QUEUE_DRIVER = 0x28
    QUEUE_DEVICE = 0x30
    QUEUE_NOTIFY_DATA = 0x38
    QUEUE_RESET = 0x3A
    COMMON_SIZE = 0x3C

CLASS_CODES = {VIRTIO_ID_NET: 0x020000, VIRTIO_ID_BLOCK: 0x010000, VIRTIO_ID_CONSOLE: 0x078000}
CLASS_OTHER = 0x00FF00


cdef uint32_t width_of(uint32_t offset) noexcept nogil:
    """Bytes of the common configuration's field that holds this offset; fields are aligned to their widths."""
    if offset < CONFIG_MSIX_VECTOR or QUEUE_DESC <= offset < QUEUE_NOTIFY_DATA:
        return 4
    return 1 if offset in (DEVICE_STATUS, CONFIG_GENERATION) else 2


cdef class PciSignals(Transport):
    """The way back from a device to its card."""

    def __cinit__(self, VirtioPci card not None):
        self.card = card

    cdef void queue_interrupt(self, uint32_t queue) noexcept nogil:
        self.card.interrupt(atomic_load_u32(&self.card.state.queue_vectors[queue]), ISR_QUEUE)

    cdef int interrupt_fd(self, uint32_t queue) noexcept nogil:
        return self.card.vector_fd(atomic_load_u32(&self.card.state.queue_vectors[queue]))

    cdef void config_interrupt(self) noexcept nogil:
        self.card.interrupt(atomic_load_u32(&self.card.state.config_vector), ISR_CONFIG)


cdef class VirtioPci(PciFunction):
    """The card of one virtio device; it owns the device from now on and stands for it in the machine.

    Without `modern` its memory BAR holds MSI-X alone: for cards with registers elsewhere.
    """

    def __cinit__(self, VirtioDevice device not None, Interrupts interrupts not None, *, bint modern=True):
        self.rename(device.name)
        self.device = device
        self.identify(VENDOR_REDHAT_QUMRANET, DEVICE_BASE + device.device_id, CLASS_CODES.get(device.device_id, CLASS_OTHER),
                      revision=REVISION_MODERN, subsystem_vendor=VENDOR_REDHAT_QUMRANET, subsystem=SUBSYSTEM, pin=1)
        self.add_bar(BAR, BAR_SIZE, BAR_MEM32)
        self.add_msix(device.queue_count + 1, BAR, MSIX_TABLE, MSIX_PENDING, interrupts)
        self.modern = modern
        if modern:
            self.add_structures()
        device.connect(PciSignals(self))
        self.forget()
        self.command_changed()

    def add_structures(self):
        """The capabilities that tell where the registers are."""
        cdef VirtioDevice device = self.device
        self.add_structure(VIRTIO_PCI_CAP_COMMON_CFG, COMMON, COMMON_SIZE)
        self.add_structure(VIRTIO_PCI_CAP_ISR_CFG, ISR, 1)
        if device.config_size:
            self.add_structure(VIRTIO_PCI_CAP_DEVICE_CFG, DEVICE, device.config_size)
        self.add_structure(VIRTIO_PCI_CAP_NOTIFY_CFG, NOTIFY, NOTIFY_MULTIPLIER * device.queue_count,
                           struct.pack("<I", NOTIFY_MULTIPLIER))
        self.config_window = self.add_structure(VIRTIO_PCI_CAP_PCI_CFG, 0, 0, bytes(4), writable=True)

    def add_structure(self, uint8_t kind, uint32_t offset, uint32_t length, bytes more=b"", *, bint writable=False):
        """Adds a struct virtio_pci_cap (4.1.4); `more` follows it. The offset of the capability in config space."""
        body = struct.pack("<BBBxxxII", 16 + len(more), kind, BAR, offset, length) + more
        mask = struct.pack("<BBBxxxII", 0, 0, 0xFF, UINT32_MAX, UINT32_MAX) if writable else bytes(14)
        return self.add_capability(CAPABILITY_VENDOR, body, mask + bytes(len(more)))

    def reset(self):
        self.device.reset()
        self.forget()
        PciFunction.reset(self)

    def save(self):
        return {"version": 1, "pci": PciFunction.save(self), "virtio": self.device.save(),
                "device_feature_select": self.state.device_feature_select,
                "driver_feature_select": self.state.driver_feature_select,
                "queue_select": self.state.queue_select, "isr": self.state.isr, "config_vector": self.state.config_vector,
                "queue_vectors": [self.state.queue_vectors[i] for i in range(self.device.queue_count)]}

    def restore(self, dict state not None):
        reader = StateReader(self.name, state, version=1)
        cdef PciTransportState restored
        restored.device_feature_select = reader.uint("device_feature_select", UINT32_MAX)
        restored.driver_feature_select = reader.uint("driver_feature_select", UINT32_MAX)
        restored.queue_select = reader.uint("queue_select", UINT16_MAX)
        restored.isr = reader.uint("isr", ISR_QUEUE | ISR_CONFIG)
        restored.config_vector = self.check_vector(reader.uint("config_vector", VIRTIO_MSI_NO_VECTOR))
        vectors = reader.uints("queue_vectors", self.device.queue_count, VIRTIO_MSI_NO_VECTOR)
        for i in range(self.device.queue_count):
            restored.queue_vectors[i] = self.check_vector(vectors[i])
        pci, virtio = reader.take("pci", dict), reader.take("virtio", dict)
        reader.done()
        before = self.device.save()
        self.device.restore(virtio)
        try:
            PciFunction.restore(self, pci)   # maps the BAR, and with it the doorbells of the device's queues
        except StateError:
            self.device.restore(before)
            raise
        self.state = restored

    def check_vector(self, uint32_t vector):
        """`vector`, when the guest can have chosen it."""
        if self.valid_vector(vector) != vector:
            raise StateError(f"{self.name}: there is no MSI-X vector {vector}")
        return vector

    def pause(self):
        self.device.pause()

    def resume(self):
        self.device.resume()

    def close(self):
        self.device.close()

    # ---- registers

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        if offset < MSIX_TABLE and not self.modern:
            return 0
        if offset < ISR:
            return self.read_common(<uint32_t>offset - COMMON, size)
        if offset < DEVICE:
            return self.take_isr() if offset == ISR else 0
        if offset < NOTIFY:
            return self.device.load_config(<uint32_t>offset - DEVICE, size)
        return PciFunction.read(self, offset, size)

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint32_t index
        if offset < MSIX_TABLE and not self.modern:
            return
        if offset < ISR:
            self.write_common(<uint32_t>offset - COMMON, size, value)
        elif DEVICE <= offset < NOTIFY:
            self.device.store_config(<uint32_t>offset - DEVICE, size, value)
        elif NOTIFY <= offset < MSIX_TABLE:
            # Reached only where KVM did not take the kick as an ioeventfd.
            index = <uint32_t>(offset - NOTIFY) // NOTIFY_MULTIPLIER
            if index < self.device.queue_count:
                (<Virtqueue>self.device.queue_table[index]).doorbell.press()
        else:
            PciFunction.write(self, offset, size, value)
            self.device.aim()

    cdef uint64_t read_common(self, uint32_t offset, uint32_t size) noexcept nogil:
        """Any width works: each byte is that of the field it belongs to. No field here changes by being read."""
        cdef uint64_t value = 0
        cdef uint32_t i, inner
        for i in range(min(size, COMMON_SIZE - offset) if offset < COMMON_SIZE else 0):
            inner = (offset + i) % width_of(offset + i)
            value |= <uint64_t>(self.field_value(offset + i - inner) >> 8 * inner & 0xFF) << 8 * i
        return value

    cdef uint32_t field_value(self, uint32_t field) noexcept nogil:
        cdef PciTransportState* state = &self.state
        if field == DEVICE_FEATURE_SELECT:
            return state.device_feature_select
        if field == DEVICE_FEATURE:
            return half(self.device.offered, state.device_feature_select) if state.device_feature_select < 2 else 0
        if field == DRIVER_FEATURE_SELECT:
            return state.driver_feature_select
        if field == DRIVER_FEATURE:
            return half(self.device.wanted, state.driver_feature_select) if state.driver_feature_select < 2 else 0
        if field == CONFIG_MSIX_VECTOR:
            return state.config_vector
        if field == NUM_QUEUES:
            return self.device.queue_count
        if field == DEVICE_STATUS:
            return self.device.status_register()
        if field == CONFIG_GENERATION:
            return atomic_load_u32(&self.device.generation) & 0xFF
        if field == QUEUE_SELECT:
            return state.queue_select
        if self.selected() == NULL:
            return 0
        return self.queue_field_value(<Virtqueue>self.selected(), field)

    cdef uint32_t queue_field_value(self, Virtqueue queue, uint32_t field) noexcept nogil:
        cdef bint upper = field & 4
        if field == QUEUE_SIZE:
            return queue.size
        if field == QUEUE_MSIX_VECTOR:
            return self.state.queue_vectors[queue.index]
        if field == QUEUE_ENABLE:
            return queue.enabled
        if field == QUEUE_NOTIFY_OFF:
            return queue.index
        if QUEUE_DESC <= field < QUEUE_DRIVER:
            return half(queue.desc_gpa, upper)
        if QUEUE_DRIVER <= field < QUEUE_DEVICE:
            return half(queue.avail_gpa, upper)
        if QUEUE_DEVICE <= field < QUEUE_NOTIFY_DATA:
            return half(queue.used_gpa, upper)
        return 0                         # QUEUE_RESET: a reset is over before the driver can ask (4.1.4.3.1)

    cdef void write_common(self, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil:
        """A store of one field or of several whole ones."""
        cdef uint32_t width
        while size and offset < COMMON_SIZE:
            width = width_of(offset)
            if offset % width or width > size:
                self.complain(b"store to a part of a common configuration field, offset", offset)
                return
            self.set_field(offset, <uint32_t>(value & ((<uint64_t>1 << 8 * width) - 1)))
            offset += width
            size -= width
            value >>= 8 * width

    cdef void set_field(self, uint32_t field, uint32_t value) noexcept nogil:
        if field == DEVICE_FEATURE_SELECT:
            self.state.device_feature_select = value
        elif field == DRIVER_FEATURE_SELECT:
            self.state.driver_feature_select = value
        elif field == DRIVER_FEATURE:
            self.device.want(self.state.driver_feature_select, value)
        elif field == CONFIG_MSIX_VECTOR:
            atomic_store_u32(&self.state.config_vector, self.valid_vector(value))
        elif field == DEVICE_STATUS:
            self.device.set_status(value)
            if value == 0:
                self.forget()
        elif field == QUEUE_SELECT:
            self.state.queue_select = value
        elif field >= QUEUE_SIZE and self.selected() != NULL:
            self.set_queue_field(<Virtqueue>self.selected(), field, value)

    cdef void set_queue_field(self, Virtqueue queue, uint32_t field, uint32_t value) noexcept nogil:
        cdef bint upper = field & 4
        if field == QUEUE_MSIX_VECTOR:
            atomic_store_u32(&self.state.queue_vectors[queue.index], self.valid_vector(value))
            self.device.aim()
        elif field == QUEUE_RESET:
            if value == 1 and self.device.has(VIRTIO_F_RING_RESET):
                self.bind(queue, False)
                self.device.reset_queue(queue)
        elif queue.enabled:
            if field != QUEUE_ENABLE:
                self.complain(b"an enabled queue cannot be changed, field", field)
        elif field == QUEUE_SIZE:
            queue.size = value
        elif field == QUEUE_ENABLE:
            if value == 1:
                self.device.enable_queue(queue)
                self.bind(queue, True)
        elif QUEUE_DESC <= field < QUEUE_DRIVER:
            queue.desc_gpa = with_half(queue.desc_gpa, upper, value)
        elif QUEUE_DRIVER <= field < QUEUE_DEVICE:
            queue.avail_gpa = with_half(queue.avail_gpa, upper, value)
        elif QUEUE_DEVICE <= field < QUEUE_NOTIFY_DATA:
            queue.used_gpa = with_half(queue.used_gpa, upper, value)

    cdef PyObject* selected(self) noexcept nogil:
        """The queue that QUEUE_SELECT names; NULL when there is none."""
        if self.state.queue_select >= self.device.queue_count:
            return NULL
        return self.device.queue_table[self.state.queue_select]

    cdef uint32_t valid_vector(self, uint32_t vector) noexcept nogil:
        """What the driver reads back: its vector, or NO_VECTOR when it cannot be had (4.1.5.1.2)."""
        return vector if vector < self.msix.count else VIRTIO_MSI_NO_VECTOR

    cdef void forget(self) noexcept nogil:
        """The registers after a reset of the device, which has been reset already."""
        cdef uint32_t i
        self.state.device_feature_select = self.state.driver_feature_select = self.state.queue_select = 0
        atomic_store_u32(&self.state.config_vector, VIRTIO_MSI_NO_VECTOR)
        for i in range(self.device.queue_count):
            atomic_store_u32(&self.state.queue_vectors[i], VIRTIO_MSI_NO_VECTOR)
            self.bind(<Virtqueue>self.device.queue_table[i], False)
        self.take_isr()

    # ---- kicks and interrupts

    cdef void bind(self, Virtqueue queue, bint assign) noexcept nogil:
        """Hangs the queue's doorbell at its notify address, or takes it down. Where KVM refuses, `write` takes the kicks."""
        cdef uint64_t address = self.bars[BAR].address + NOTIFY + NOTIFY_MULTIPLIER * queue.index
        cdef int result
        if assign == self.bound[queue.index] or (assign and not (queue.enabled and self.bars[BAR].mapped)):
            return
        result = self.mmio.ring(address, 0, queue.doorbell.fd, False, 0, assign)
        if result < 0 and assign:
            self.complain(b"the host refuses an ioeventfd, kicks will be slow; error", -result)
            return
        self.bound[queue.index] = assign

    cdef void bar_moved(self, uint32_t index, uint64_t address, bint mapped) noexcept nogil:
        cdef uint32_t i
        if index == BAR and self.modern:
            for i in range(self.device.queue_count):
                self.bind(<Virtqueue>self.device.queue_table[i], mapped)

    cdef void command_changed(self) noexcept nogil:
        self.device.hold(not self.is_bus_master())

    cdef void interrupt(self, uint32_t vector, uint32_t isr_bit) noexcept nogil:
        """Any thread: an MSI-X message where the driver chose a vector, else the ISR bit and the pin (4.1.5.3, 4.1.5.4). Which of them is
        asked with the lock held: a driver that switches meanwhile finds it on the one side or the other."""
        pthread_mutex_lock(&self.signals)
        if self.is_msix_enabled():
            self.msix.signal(vector)
        else:
            self.state.isr |= isr_bit
            self.intx_level = True
            self.drive_intx()
        pthread_mutex_unlock(&self.signals)

    cdef uint32_t take_isr(self) noexcept nogil:
        """Reading the ISR register clears it and lets the pin go (4.1.4.5)."""
        cdef uint32_t isr
        pthread_mutex_lock(&self.signals)
        isr = self.state.isr
        self.state.isr = 0
        self.intx_level = False
        self.drive_intx()
        pthread_mutex_unlock(&self.signals)
        return isr

    # ---- the BAR seen through config space, for firmware without access to memory BARs (4.1.4.9)

    cdef uint64_t config_read(self, uint32_t offset, uint32_t size) noexcept nogil:
        cdef uint32_t place = self.window(offset, size)
        if place < BAR_SIZE:
            return self.read(place, self.field(self.config_window + WINDOW_LENGTH, 4))
        return PciFunction.config_read(self, offset, size)

    cdef void config_write(self, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint32_t place = self.window(offset, size)
        if place < BAR_SIZE:
            self.write(place, self.field(self.config_window + WINDOW_LENGTH, 4), value)
        else:
            PciFunction.config_write(self, offset, size, value)
            self.device.aim()

    cdef uint32_t window(self, uint32_t offset, uint32_t size) noexcept nogil:
        """The place in the BAR that this access to config space means; BAR_SIZE when it means none."""
        cdef uint32_t length, place
        if offset != self.config_window + WINDOW_DATA or self.config_window == 0:
            return BAR_SIZE
        length = self.field(self.config_window + WINDOW_LENGTH, 4)
        place = self.field(self.config_window + WINDOW_OFFSET, 4)
        if self.field(self.config_window + WINDOW_BAR, 1) != BAR or length not in (1, 2, 4) or length > size:
            return BAR_SIZE
        return place if place % length == 0 and place <= BAR_SIZE - length else BAR_SIZE
