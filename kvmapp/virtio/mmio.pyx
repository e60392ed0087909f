"""A virtio device without any bus: virtio-mmio (VIRTIO 1.2, 4.2), a window of registers and an interrupt line a device.

For machines without PCI, whose kernels look for nothing and start the sooner. The guest is told where the windows are (by ACPI or
on its command line; boot/). Registers have version 2 of the layout, or version 1 for drivers of virtio 0.9.5 (4.2.4). Interrupts are
edges on the line, sent by an irqfd; each queue's doorbell is an ioeventfd on the one notify register. An acknowledgement takes back
only what the driver had seen, so that it may arrive late (a coalesced store). Left out: shared memory.
"""
from libc.stdint cimport UINT16_MAX, UINT32_MAX

from kvmapp.abi.posix cimport (atomic_load_u32, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
                               pthread_mutex_unlock)
from kvmapp.abi.virtio cimport VIRTIO_F_RING_RESET
from kvmapp.devices cimport Bus, MsiLine
from kvmapp.virtio.device cimport Transport, VirtioDevice, half, with_half
from kvmapp.virtio.virtqueue cimport Virtqueue

from kvmapp.state import StateReader

cdef enum:
    MAGIC_VALUE = 0x000              # the registers (4.2.2), all of 32 bits
    VERSION = 0x004
    DEVICE_ID = 0x008
    VENDOR_ID = 0x00C
    DEVICE_FEATURES = 0x010
    DEVICE_FEATURES_SELECT = 0x014
    DRIVER_FEATURES = 0x020
    DRIVER_FEATURES_SELECT = 0x024
    GUEST_PAGE_SIZE = 0x028          # of version 1
    QUEUE_SELECT = 0x030
    QUEUE_NUM_MAX = 0x034
    QUEUE_NUM = 0x038
    QUEUE_ALIGN = 0x03C              # of version 1
    QUEUE_PFN = 0x040                # of version 1
    QUEUE_READY = 0x044
    QUEUE_NOTIFY = 0x050
    INTERRUPT_STATUS = 0x060
    INTERRUPT_ACK = 0x064
    STATUS = 0x070
    QUEUE_DESC = 0x080               # three 64-bit addresses, each in two halves
    QUEUE_DRIVER = 0x090
    QUEUE_DEVICE = 0x0A0
    SHM_SELECT = 0x0AC
    SHM_LENGTH = 0x0B0               # and its base behind it: all ones, there is no such region
    SHM_END = 0x0C0
    QUEUE_RESET = 0x0C0
    CONFIG_GENERATION = 0x0FC
    CONFIG = 0x100

    MAGIC = 0x74726976               # "virt"
    VENDOR = 0x564B4D41
    WINDOW = 0x1000

    ISR_QUEUE = 1
    ISR_CONFIG = 2

MMIO_WINDOW = WINDOW
MMIO_ACKNOWLEDGE = INTERRUPT_ACK


cdef class MmioSignals(Transport):
    """The way back from a device to its window."""

    def __cinit__(self, VirtioMmio window not None):
        self.window = window

    cdef void queue_interrupt(self, uint32_t queue) noexcept nogil:
        self.window.interrupt(ISR_QUEUE)

    cdef void config_interrupt(self) noexcept nogil:
        self.window.interrupt(ISR_CONFIG)


cdef class VirtioMmio(Device):
    """The window of one virtio device; it owns the device from now on and stands for it in the machine.

    `line` carries its interrupts; with `legacy` it has version 1 of the registers.
    """

    def __cinit__(self, VirtioDevice device not None, MsiLine line not None, *, bint legacy=False):
        pthread_mutex_init(&self.signals, NULL)
        self.rename(device.name)
        self.device = device
        self.line = line
        self.legacy = legacy
        device.connect(MmioSignals(self))

    def __dealloc__(self):
        pthread_mutex_destroy(&self.signals)

    def enter(self, Bus bus not None, uint64_t base):
        """Stands at this address from now on."""
        bus.map(base, WINDOW, self)
        self.bus, self.base = bus, base

    @property
    def interrupt_line(self):
        """Its interrupts' MsiLine."""
        return self.line

    def reset(self):
        self.device.reset()
        self.forget()
        self.state.page_size = self.state.alignment = 0

    def save(self):
        return {"version": 1, "virtio": self.device.save(), "registers": int(1 if self.legacy else 2),
                "device_feature_select": self.state.device_feature_select,
                "driver_feature_select": self.state.driver_feature_select, "queue_select": self.state.queue_select,
                "page_size": self.state.page_size, "alignment": self.state.alignment, "isr": self.state.isr, "unseen": self.state.unseen}

    def restore(self, dict state not None):
        reader = StateReader(self.name, state, version=1)
        cdef MmioState restored
        reader.uint("registers", 1 if self.legacy else 2, 1 if self.legacy else 2)
        restored.device_feature_select = reader.uint("device_feature_select", UINT32_MAX)
        restored.driver_feature_select = reader.uint("driver_feature_select", UINT32_MAX)
        restored.queue_select = reader.uint("queue_select", UINT32_MAX)
        restored.page_size = reader.uint("page_size", UINT32_MAX)
        restored.alignment = reader.uint("alignment", UINT32_MAX)
        restored.isr = reader.uint("isr", ISR_QUEUE | ISR_CONFIG)
        restored.unseen = reader.bits("unseen", restored.isr)
        virtio = reader.take("virtio", dict)
        reader.done()
        self.bind_all(False)
        try:
            self.device.restore(virtio)
            self.state = restored
        finally:
            self.bind_all(True)

    def pause(self):
        self.device.pause()

    def resume(self):
        """An edge that KVM had still to carry when the machine was saved is in none of its chips' states: with a cause left, one more."""
        if self.state.isr:
            self.line.trigger()
        self.device.resume()

    def close(self):
        self.device.close()

    # ---- registers

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        if offset >= CONFIG:
            return self.device.load_config(<uint32_t>offset - CONFIG, size)
        return self.register_value(<uint32_t>offset) if size == 4 else 0

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        if offset >= CONFIG:
            self.device.store_config(<uint32_t>offset - CONFIG, size, value)
        elif size == 4:
            self.set_register(<uint32_t>offset, <uint32_t>value)
        else:
            self.complain(b"store of another width than 32 bits to register", offset)

    cdef uint32_t register_value(self, uint32_t offset) noexcept nogil:
        if offset == MAGIC_VALUE:
            return MAGIC
        if offset == VERSION:
            return 1 if self.legacy else 2
        if offset == DEVICE_ID:
            return self.device.device_id
        if offset == VENDOR_ID:
            return VENDOR
        if offset == DEVICE_FEATURES:
            if self.state.device_feature_select > 1 or (self.legacy and self.state.device_feature_select):
                return 0
            return half(self.device.offered, self.state.device_feature_select)
        if offset == INTERRUPT_STATUS:
            return self.look()
        if offset == STATUS:
            return self.device.status_register()
        if offset == CONFIG_GENERATION:
            return atomic_load_u32(&self.device.generation)
        if SHM_LENGTH <= offset < SHM_END:
            return UINT32_MAX
        if self.selected() == NULL:
            return 0
        return self.queue_value(<Virtqueue>self.selected(), offset)

    cdef uint32_t queue_value(self, Virtqueue queue, uint32_t offset) noexcept nogil:
        if offset == QUEUE_NUM_MAX:
            return 0 if self.legacy and queue.enabled else queue.size_max
        if offset == QUEUE_READY:
            return queue.enabled
        if offset == QUEUE_PFN and self.legacy and self.state.page_size:
            return <uint32_t>(queue.desc_gpa // self.state.page_size)
        return 0                         # QUEUE_RESET: a reset is over before the driver can ask

    cdef void set_register(self, uint32_t offset, uint32_t value) noexcept nogil:
        if offset == QUEUE_NOTIFY:
            self.kick(value)
        elif offset == INTERRUPT_ACK:
            self.acknowledge(value)
        elif offset == DEVICE_FEATURES_SELECT:
            self.state.device_feature_select = value
        elif offset == DRIVER_FEATURES_SELECT:
            self.state.driver_feature_select = value
        elif offset == DRIVER_FEATURES:
            if not self.legacy or self.state.driver_feature_select == 0:
                self.device.want(self.state.driver_feature_select, value)
        elif offset == QUEUE_SELECT:
            self.state.queue_select = value
        elif offset == GUEST_PAGE_SIZE:
            self.state.page_size = value
        elif offset == QUEUE_ALIGN:
            self.state.alignment = value
        elif offset == SHM_SELECT:
            pass                         # whichever is selected, there is none
        elif offset == STATUS:
            if self.legacy:
                self.device.set_legacy_status(value)
            else:
                self.device.set_status(value)
            if value == 0:
                self.forget()
            elif self.legacy:
                self.bind_all(True)
        elif self.selected() != NULL:
            self.set_queue_register(<Virtqueue>self.selected(), offset, value)

    cdef void set_queue_register(self, Virtqueue queue, uint32_t offset, uint32_t value) noexcept nogil:
        cdef bint upper = offset & 4
        if offset == QUEUE_READY and not self.legacy:
            self.set_ready(queue, value & 1)
        elif offset == QUEUE_PFN and self.legacy:
            self.set_ring(queue, value)
        elif offset == QUEUE_RESET:
            if value == 1 and self.device.has(VIRTIO_F_RING_RESET):
                self.set_ready(queue, False)
        elif queue.enabled:
            self.complain(b"an enabled queue cannot be changed, register", offset)
        elif offset == QUEUE_NUM:
            queue.size = min(value, <uint32_t>UINT16_MAX)    # more is as wrong as this, which a saved queue can bear
        elif offset & ~<uint32_t>4 == QUEUE_DESC:
            queue.desc_gpa = with_half(queue.desc_gpa, upper, value)
        elif offset & ~<uint32_t>4 == QUEUE_DRIVER:
            queue.avail_gpa = with_half(queue.avail_gpa, upper, value)
        elif offset & ~<uint32_t>4 == QUEUE_DEVICE:
            queue.used_gpa = with_half(queue.used_gpa, upper, value)

    cdef void set_ready(self, Virtqueue queue, bint ready) noexcept nogil:
        if ready:
            self.device.enable_queue(queue)
            self.bind(queue, True)
        else:
            self.bind(queue, False)
            self.device.reset_queue(queue)

    cdef void set_ring(self, Virtqueue queue, uint32_t page) noexcept nogil:
        """The ring lies at this page of the driver's from now on; page 0 takes the queue back (4.2.4)."""
        if page == 0:
            self.set_ready(queue, False)
        elif queue.enabled:
            self.complain(b"an enabled queue cannot be moved, to page", page)
        elif queue.size > queue.size_max:
            self.complain(b"queue is longer than it may be", queue.size)
        else:
            queue.lay_out(<uint64_t>page * self.state.page_size, self.state.alignment)
            self.set_ready(queue, True)

    cdef void kick(self, uint32_t index) noexcept nogil:
        """A kick that KVM did not take as an ioeventfd."""
        if index >= self.device.queue_count:
            return
        if self.legacy and not self.device.is_begun():
            self.device.begin_legacy()
            self.bind_all(True)
        (<Virtqueue>self.device.queue_table[index]).doorbell.press()

    cdef PyObject* selected(self) noexcept nogil:
        """The queue that QUEUE_SELECT names; NULL when there is none."""
        if self.state.queue_select >= self.device.queue_count:
            return NULL
        return self.device.queue_table[self.state.queue_select]

    cdef void forget(self) noexcept nogil:
        """The registers after a reset of the device, which has been reset already. The page's size stays: Linux tells it before."""
        self.state.device_feature_select = self.state.driver_feature_select = self.state.queue_select = 0
        self.look()
        self.acknowledge(UINT32_MAX)
        self.bind_all(False)

    # ---- kicks and interrupts

    cdef void bind_all(self, bint assign) noexcept nogil:
        cdef uint32_t i
        for i in range(self.device.queue_count):
            self.bind(<Virtqueue>self.device.queue_table[i], assign)

    cdef void bind(self, Virtqueue queue, bint assign) noexcept nogil:
        """Hangs the queue's doorbell at the notify register, or takes it down. Where KVM refuses, `write` takes the kicks.

        A legacy driver's first kick must come to `kick`: only with it has the driver begun.
        """
        cdef int result
        if assign == self.bound[queue.index] or self.bus is None:
            return
        if assign and not (queue.enabled and (self.device.is_begun() or not self.legacy)):
            return
        result = self.bus.ring(self.base + QUEUE_NOTIFY, 4, queue.doorbell.fd, True, queue.index, assign)
        if result < 0 and assign:
            self.complain(b"the host refuses an ioeventfd, kicks will be slow; error", -result)
            return
        self.bound[queue.index] = assign

    cdef void interrupt(self, uint32_t isr_bit) noexcept nogil:
        """Any thread: the status bit, then an edge; the driver looks for all bits whenever one comes."""
        pthread_mutex_lock(&self.signals)
        self.state.isr |= isr_bit
        self.state.unseen |= isr_bit
        pthread_mutex_unlock(&self.signals)
        self.line.trigger()

    cdef uint32_t look(self) noexcept nogil:
        """The driver's load of the causes."""
        cdef uint32_t isr
        pthread_mutex_lock(&self.signals)
        isr = self.state.isr
        self.state.unseen = 0
        pthread_mutex_unlock(&self.signals)
        return isr

    cdef void acknowledge(self, uint32_t causes) noexcept nogil:
        """The driver has seen to these causes; to those that came after its look it has not, however late this arrives."""
        pthread_mutex_lock(&self.signals)
        self.state.isr &= ~causes | self.state.unseen
        pthread_mutex_unlock(&self.signals)
