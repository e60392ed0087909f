"""What a device is, the buses that carry accesses to it, and the lines that carry its interrupts and power events away.

A device knows registers, never addresses: `Bus.map` gives it a window and it sees offsets. Nothing here knows a concrete device.
Without a VM (vm_fd = -1) buses and lines work all the same and only record: that is how devices are tested without KVM.

Locks, outermost first: Device.lock (taken by Bus around read and write, by I/O threads around their work) → Bus.lock and
Interrupts.lock (leaves). No GIL is taken while one of them is held.
"""
from libc.string cimport memcpy, memmove, memset

from kvmapp.abi.kvm cimport (KVM_IOEVENTFD, KVM_IOEVENTFD_FLAG_DATAMATCH, KVM_IOEVENTFD_FLAG_DEASSIGN,
                             KVM_IOEVENTFD_FLAG_PIO, kvm_ioeventfd)
from kvmapp.abi.posix cimport (CLOCK_MONOTONIC, EEXIST, EFD_CLOEXEC, EFD_NONBLOCK, EINVAL, ENOENT, ENOSPC, atomic_exchange_u64,
                               atomic_fence_acquire, atomic_fence_release, atomic_load_u32, atomic_load_u64, atomic_store_u32,
                               atomic_swap_u64, clock_gettime, close, dprintf, errno, eventfd, ioctl, pthread_mutex_destroy,
                               pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, strerror, timespec)
from kvmapp.abi cimport posix

import os

from kvmapp.layout import GSI_MSI_BASE

cdef enum:
    COMPLAINTS_A_PERIOD = 10
    COMPLAINT_PERIOD = 5             # seconds

cdef int log_fd = 2


def set_log(int fd):
    """Where devices write their lines about the guest's misdeeds: a descriptor that stays open (standard error until told)."""
    global log_fd
    log_fd = fd


cdef class Device:
    """One chip or card. Subclasses override `read` and `write` (offsets within their windows, 1, 2, 4 or 8 bytes up to `width`),
    `reset`, `save`, `restore`, and where they own threads or descriptors `pause`, `resume` and `close`."""

    def __cinit__(self, *args, **kwargs):
        pthread_mutex_init(&self.lock, NULL)
        self.rename(type(self).__name__.lower())
        self.width = 8

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return <uint64_t>-1

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        pass

    cdef void complain(self, const char* what, uint64_t value) noexcept nogil:
        """A line in the domain's log about what the guest did, at most ten in five seconds."""
        if self.may_speak():
            dprintf(log_fd, b"%s: guest error: %s (0x%llx)\n", self.label, what, <unsigned long long>value)

    cdef void report_host(self, const char* what, uint64_t value, int error) noexcept nogil:
        """The same about what the host refused to the device; `error` is an errno."""
        if self.may_speak():
            dprintf(log_fd, b"%s: host error: %s (0x%llx): %s\n", self.label, what, <unsigned long long>value, strerror(error))

    cdef bint may_speak(self) noexcept nogil:
        cdef timespec now
        clock_gettime(CLOCK_MONOTONIC, &now)
        if now.tv_sec - self.complaint_epoch >= COMPLAINT_PERIOD:
            self.complaint_epoch = now.tv_sec
            self.complaints = 0
        self.complaints += 1
        return self.complaints <= COMPLAINTS_A_PERIOD

    def rename(self, str name not None):
        """Names the device as the domain file does ('vda', 'serial0'): in logs and in saved state."""
        cdef bytes label = name.encode()[:sizeof(self.label) - 1]
        self.name = name
        memset(self.label, 0, sizeof(self.label))
        memcpy(self.label, <const char*>label, len(label))

    def reset(self):
        """Back to power-on, as the guest sees it."""

    def save(self):
        """What the guest can see, as a dict of str keys and int, bytes, str, bool, list or dict values, with 'version'."""
        return {"version": 1}

    def restore(self, dict state not None):
        """Puts back what `save` gave. Raises StateError (kvmapp.state) and changes nothing for a state it cannot trust."""

    def pause(self):
        """Returns when no work of this device is under way and none will start."""

    def resume(self):
        """Goes on after `pause`, or starts."""

    def close(self):
        """Gives host resources back; the device is not used afterwards."""


cdef class Bus:
    """An address space of windows: port I/O or MMIO. Lookups take no lock (a sequence counter tells a reader to look again)."""

    def __cinit__(self, str name not None="mmio", *, int vm_fd=-1):
        pthread_mutex_init(&self.lock, NULL)
        self.name = name
        self.is_pio = name == "pio"
        self.vm_fd = vm_fd
        self.devices = []

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)

    def map(self, uint64_t base, uint64_t size, Device device not None, uint64_t offset=0):
        """Gives `device` the `size` bytes from `base`; it sees the first as `offset`. Raises OSError when they are taken."""
        self.adopt(device)
        cdef int result = self.place(base, size, device, offset)
        if result < 0:
            raise OSError(-result, f"{device.name}: cannot map {base:#x}+{size:#x} on {self.name}: {os.strerror(-result)}")

    def unmap(self, uint64_t base, uint64_t size):
        """Takes the window at exactly these bytes away; KeyError when there is none."""
        if self.remove(base, size) < 0:
            raise KeyError(f"no window {base:#x}+{size:#x} on {self.name}")

    def adopt(self, Device device not None):
        """Keeps the device alive as long as the bus; needed before `place` (nogil) may map it."""
        if device not in self.devices:
            self.devices.append(device)

    def forget(self, Device device not None):
        """Lets go of a device that has no window any more; no vCPU may run, for one might still be on its way to it."""
        if device in self.devices:
            self.devices.remove(device)

    def windows(self):
        """[(base, size, device name)] in ascending order."""
        return [(self.ranges[i].base, self.ranges[i].size, (<Device>self.ranges[i].device).name) for i in range(self.count)]

    def read(self, uint64_t address, uint32_t size=1):
        """One guest load of 1, 2, 4 or 8 bytes; all ones where nothing answers."""
        cdef uint64_t value
        with nogil:
            value = self.load(address, size)
        return value

    def write(self, uint64_t address, uint32_t size, uint64_t value):
        """One guest store of 1, 2, 4 or 8 bytes; of `value` only so many count."""
        if size < 8:
            value &= (<uint64_t>1 << (8 * size)) - 1
        with nogil:
            self.store(address, size, value)

    cdef uint64_t load(self, uint64_t address, uint32_t size) noexcept nogil:
        cdef uint64_t ones = <uint64_t>-1 if size >= 8 else (<uint64_t>1 << (8 * size)) - 1
        cdef Range hit
        cdef uint64_t value
        cdef uint32_t step
        if not self.find(address, &hit):
            return ones
        if size <= (<Device>hit.device).width and address - hit.base <= hit.size - size:
            pthread_mutex_lock(&(<Device>hit.device).lock)
            value = (<Device>hit.device).read(hit.offset + (address - hit.base), size)
            pthread_mutex_unlock(&(<Device>hit.device).lock)
            return value & ones
        if size == 1:
            return ones
        # Wider than the device, or over the window's edge: in halves, as the hardware's bus would.
        step = size >> 1
        return self.load(address, step) | self.load(address + step, step) << (8 * step)

    cdef void store(self, uint64_t address, uint32_t size, uint64_t value) noexcept nogil:
        cdef Range hit
        cdef uint32_t step
        if not self.find(address, &hit):
            return
        if size <= (<Device>hit.device).width and address - hit.base <= hit.size - size:
            pthread_mutex_lock(&(<Device>hit.device).lock)
            (<Device>hit.device).write(hit.offset + (address - hit.base), size, value)
            pthread_mutex_unlock(&(<Device>hit.device).lock)
        elif size > 1:
            step = size >> 1
            self.store(address, step, value & ((<uint64_t>1 << (8 * step)) - 1))
            self.store(address + step, step, value >> (8 * step))

    cdef bint find(self, uint64_t address, Range* hit) noexcept nogil:
        """The window that holds `address`, by binary search; looks again when a writer was at work meanwhile."""
        cdef uint32_t before, low, high, middle
        cdef bint found
        while True:
            before = atomic_load_u32(&self.sequence)
            low, high = 0, self.count
            while low < high:
                middle = (low + high) >> 1
                if self.ranges[middle].base <= address:
                    low = middle + 1
                else:
                    high = middle
            found = low > 0
            if found:
                hit[0] = self.ranges[low - 1]
            atomic_fence_acquire()
            if not before & 1 and before == atomic_load_u32(&self.sequence):
                return found and address - hit.base < hit.size

    cdef int place(self, uint64_t base, uint64_t size, Device device, uint64_t offset) noexcept nogil:
        """Maps an adopted device; 0, -EEXIST when bytes are taken, -EINVAL for no bytes or a wrap, -ENOSPC."""
        cdef uint32_t i = 0
        cdef int result = 0
        if size == 0 or base + (size - 1) < base:
            return -EINVAL
        pthread_mutex_lock(&self.lock)
        while i < self.count and self.ranges[i].base < base:
            i += 1
        if self.count == MAX_RANGES:
            result = -ENOSPC
        elif i > 0 and base - self.ranges[i - 1].base < self.ranges[i - 1].size:
            result = -EEXIST
        elif i < self.count and self.ranges[i].base - base < size:
            result = -EEXIST
        else:
            atomic_store_u32(&self.sequence, self.sequence + 1)
            atomic_fence_release()       # nothing of the change before the odd count
            memmove(&self.ranges[i + 1], &self.ranges[i], (self.count - i) * sizeof(Range))
            self.ranges[i].base = base
            self.ranges[i].size = size
            self.ranges[i].offset = offset
            self.ranges[i].device = <PyObject*>device
            self.count += 1
            atomic_store_u32(&self.sequence, self.sequence + 1)
        pthread_mutex_unlock(&self.lock)
        return result

    cdef int remove(self, uint64_t base, uint64_t size) noexcept nogil:
        """Unmaps exactly this window; 0 or -ENOENT."""
        cdef uint32_t i
        cdef int result = -ENOENT
        pthread_mutex_lock(&self.lock)
        for i in range(self.count):
            if self.ranges[i].base == base and self.ranges[i].size == size:
                atomic_store_u32(&self.sequence, self.sequence + 1)
                atomic_fence_release()
                memmove(&self.ranges[i], &self.ranges[i + 1], (self.count - i - 1) * sizeof(Range))
                self.count -= 1
                atomic_store_u32(&self.sequence, self.sequence + 1)
                result = 0
                break
        pthread_mutex_unlock(&self.lock)
        return result

    cdef int ring(self, uint64_t address, uint32_t size, int fd, bint match, uint64_t value, bint assign) noexcept nogil:
        """An ioeventfd: a guest store to `address` (of `value`, when `match`) writes `fd` in the kernel, without an exit.

        A device must also handle the same store in `write`: that is what happens without KVM. size 0 matches any width (MMIO).
        Answers 0 or -errno.
        """
        cdef kvm_ioeventfd request
        if self.vm_fd < 0:
            return 0
        memset(&request, 0, sizeof(request))
        request.addr = address
        request.len = size
        request.fd = fd
        request.datamatch = value
        if match:
            request.flags |= KVM_IOEVENTFD_FLAG_DATAMATCH
        if self.is_pio:
            request.flags |= KVM_IOEVENTFD_FLAG_PIO
        if not assign:
            request.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN
        return 0 if ioctl(self.vm_fd, KVM_IOEVENTFD, &request) == 0 else -errno


cdef class Interrupts:
    """The interrupt controller as devices see it. This one only records; irqchip.KvmInterrupts drives the in-kernel irqchip."""

    def __cinit__(self, *args, **kwargs):
        pthread_mutex_init(&self.lock, NULL)
        self.lines = []
        self.free_gsis = []

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)

    def line(self, uint32_t gsi):
        """A new source on pin `gsi` (0-23); sources on one pin are wired together (OR)."""
        if gsi >= MAX_PINS:
            raise ValueError(f"gsi {gsi} is not a pin (0-{MAX_PINS - 1})")
        return IrqLine.__new__(IrqLine, self, gsi)

    def msi(self):
        """A new MSI vector with an eventfd of its own. Raises OSError (ENOSPC) when there are no more."""
        if not self.free_gsis and self.msi_count >= MAX_MSI:
            raise OSError(ENOSPC, "no more MSI vectors")
        gsi = GSI_MSI_BASE + self.msi_count
        if self.free_gsis:
            gsi = self.free_gsis.pop()
        else:
            self.msi_count += 1
        line = MsiLine.__new__(MsiLine, self, gsi)
        self.lines.append(line)
        return line

    def release(self, MsiLine line not None):
        """Takes a vector back whose card is gone; its number goes to the next one."""
        self.unbind_msi(line.gsi, line.fd)
        self.lines.remove(line)
        self.free_gsis.append(line.gsi)

    def pulse(self, uint32_t gsi):
        """A new source of edges on pin `gsi` (0-23), with an eventfd of its own: each `trigger` is one edge. Raises OSError."""
        if gsi >= MAX_PINS:
            raise ValueError(f"gsi {gsi} is not a pin (0-{MAX_PINS - 1})")
        line = MsiLine.__new__(MsiLine, self, gsi)
        self.lines.append(line)
        return line

    def level(self, uint32_t gsi):
        """Whether the pin is asserted."""
        return self.asserted[gsi] > 0

    def edge_count(self, uint32_t gsi):
        """How often the pin went from low to high."""
        return self.edges[gsi]

    cdef void wire(self, uint32_t gsi, bint level) noexcept nogil:
        """One source on the pin was asserted or let go."""
        pthread_mutex_lock(&self.lock)
        if level:
            self.asserted[gsi] += 1
            if self.asserted[gsi] == 1:
                self.edges[gsi] += 1
                self.set_pin(gsi, True)
        else:
            self.asserted[gsi] -= 1
            if self.asserted[gsi] == 0:
                self.set_pin(gsi, False)
        pthread_mutex_unlock(&self.lock)

    cdef void set_pin(self, uint32_t gsi, bint level) noexcept nogil:
        """The wired level of the pin changed; called with the lock held."""

    cdef int bind_msi(self, uint32_t gsi, int fd) except -1:
        """A write to `fd` shall raise `gsi`."""
        return 0

    cdef void unbind_msi(self, uint32_t gsi, int fd) noexcept nogil:
        """A write to `fd` raises nothing any more."""

    cdef int set_msi_route(self, uint32_t gsi, uint64_t address, uint32_t data) noexcept nogil:
        """The message that `gsi` shall send; 0 or -errno."""
        return 0


cdef class IrqLine:
    """One device's end of an interrupt pin. `set` may be called with any level at any time."""

    def __cinit__(self, Interrupts controller not None, uint32_t gsi):
        self.controller = controller
        self.gsi = gsi

    @property
    def asserted(self):
        return bool(self.level)

    cdef void set(self, bint level) noexcept nogil:
        if level != self.level:
            self.level = level
            self.controller.wire(self.gsi, level)


cdef class MsiLine:
    """An interrupt that is an event: an MSI or MSI-X vector, where `route` says which message, or an edge on a pin. `trigger` sends it;
    vhost and others may write `fd` themselves."""

    def __cinit__(self, Interrupts controller not None, uint32_t gsi):
        self.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.fd < 0:
            raise OSError(errno, f"eventfd: {os.strerror(errno)}")
        self.controller = controller
        self.gsi = gsi
        controller.bind_msi(gsi, self.fd)

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    @property
    def message(self):
        """(address, data) that the guest asked for."""
        return self.address, self.data

    def taken(self):
        """How often it was triggered since the last call; only without KVM, which otherwise takes the events itself."""
        cdef uint64_t events = 0
        if posix.read(self.fd, &events, sizeof(events)) != sizeof(events):
            return 0
        return events

    cdef int route(self, uint64_t address, uint32_t data) noexcept nogil:
        """Routes are costly in the kernel: only a changed message is told to it. Answers 0 or -errno."""
        cdef int result
        if address == self.address and data == self.data:
            return 0
        result = self.controller.set_msi_route(self.gsi, address, data)
        if result == 0:
            self.address = address
            self.data = data
        return result

    cdef void trigger(self) noexcept nogil:
        cdef uint64_t one = 1
        posix.write(self.fd, &one, sizeof(one))


class PowerEvent:
    """devices.pxd's numbers. An enum's import would cost every start of a guest some milliseconds."""
    RUNNING, POWER_OFF, RESET, CRASH, DEBUG_EXIT, PANIC, CRASH_KERNEL, WATCHDOG, DISK_FULL = range(9)


cdef class Power:
    """Where the guest's wish to end arrives, from a device or a vCPU: the first wins until it is taken; `fd` is readable then.

    What only tells something gives way: whoever wished to end would wait for it for ever.
    """

    def __cinit__(self):
        self.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.fd < 0:
            raise OSError(errno, f"eventfd: {os.strerror(errno)}")

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    def take(self):
        """(a number of PowerEvent, code) and forgets it; (RUNNING, 0) when nothing was asked for."""
        cdef uint64_t events
        posix.read(self.fd, &events, sizeof(events))
        cdef uint64_t wish = atomic_exchange_u64(&self.wish, RUNNING)
        return <uint32_t>wish, wish >> 32

    @property
    def asked(self):
        """Whether a wish waits to be taken."""
        return bool(self.pending())

    def ask(self, uint32_t event, uint32_t code=0):
        """The same wish from the host's side."""
        self.request(event, code)

    cdef void request(self, uint32_t event, uint32_t code) noexcept nogil:
        cdef uint64_t one = 1, before = atomic_load_u64(&self.wish)
        while weight(event) > weight(<uint32_t>before):
            if atomic_swap_u64(&self.wish, &before, event | <uint64_t>code << 32):
                posix.write(self.fd, &one, sizeof(one))
                return

    cdef bint pending(self) noexcept nogil:
        return atomic_load_u64(&self.wish) != RUNNING


cdef uint32_t weight(uint32_t event) noexcept nogil:
    """Which wish gives way to which."""
    if event == RUNNING:
        return 0
    if event == DISK_FULL:           # which tells so again if the guest goes on
        return 1
    if event == CRASH_KERNEL:
        return 2
    return 3 if event == WATCHDOG else 4
