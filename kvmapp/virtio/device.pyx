"""What every virtio device is, whatever carries it (VIRTIO 1.2, chapters 2 and 3): features, status, config space, queues.

A concrete device overrides hooks (`kicked` at least) and is given to a transport (pci.pyx), which makes registers of it:

    cdef class VirtioRng(VirtioDevice):
        def __cinit__(self, str name not None, GuestMemory memory not None):
            self.device_id = VIRTIO_ID_RNG
            self.add_queue(64)

        cdef void kicked(self, Virtqueue queue) noexcept nogil:
            while queue.pop(&self.chain) == 1:
                queue.push(&self.chain, self.fill(&self.chain))
            self.notify_used(queue)

Locks, outermost first: the transport's lock (taken by Bus) → Device.lock (features, status, config space) → Virtqueue.lock (one
queue's work) → the transport's interrupt state. Queue work runs in I/O threads, one queue at a time under that queue's lock;
it must never take Device.lock, because a vCPU that resets the device waits (`drain`) with Device.lock held.
Made paused: `resume` starts it. Drivers older than VIRTIO 1.0 come through the transports' legacy registers: they settle on
features without FEATURES_OK, and some kick, or change their mind about features, before DRIVER_OK (`begin_legacy`).
Left out: shared memory regions.
"""
from libc.stdint cimport UINT8_MAX, UINT32_MAX, UINT64_MAX, uint16_t
from libc.string cimport memcpy

from kvmapp.abi.posix cimport (atomic_load_u32, atomic_or_u32, atomic_store_u32, pthread_mutex_lock,
                               pthread_mutex_unlock)
from kvmapp.abi.virtio cimport (VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
                                VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
                                VIRTIO_F_RING_PACKED, VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX,
                                VIRTIO_RING_F_INDIRECT_DESC)
from kvmapp.virtio.packed cimport PackedVirtqueue

from kvmapp.state import StateError, StateReader

cdef enum:
    KNOWN_STATUS = (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK |
                    VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_FAILED)
    LEGACY_STATUS = KNOWN_STATUS & ~VIRTIO_CONFIG_S_FEATURES_OK


cdef class Transport:
    """What a device needs of the transport that carries it; this one is connected to nothing. Both may be called from any
    thread, with Device.lock or a Virtqueue.lock held."""

    cdef void queue_interrupt(self, uint32_t queue) noexcept nogil:
        """The driver wants to know that this queue has used buffers."""

    cdef int interrupt_fd(self, uint32_t queue) noexcept nogil:
        """An eventfd by which something else may raise the queue's interrupt for now; -1 when only `queue_interrupt` can."""
        return -1

    cdef void config_interrupt(self) noexcept nogil:
        """The config space or the status changed."""


cdef class QueueDoorbell(Doorbell):
    """One queue's kicks: an ioeventfd of the transport, or pressed by it, or by the device itself."""

    def __cinit__(self, VirtioDevice device not None, Virtqueue queue not None):
        self.device = device
        self.queue = queue
        self.can_look = True

    cdef bint look(self) noexcept nogil:
        return self.device.look(self.queue)

    cdef void hush(self, bint quiet) noexcept nogil:
        self.device.hush(self.queue, quiet)

    cdef void rung(self) noexcept nogil:
        self.device.serve(self.queue)


cdef class VirtioDevice(Device):
    """The base of all virtio devices; `name` is the domain file's, `memory` the guest's RAM."""

    def __cinit__(self, str name not None, GuestMemory memory not None, *args, **kwargs):
        self.rename(name)
        self.memory = memory
        self.queues = []
        self.transport = Transport()
        self.state_version = 1
        self.paused = True
        self.offer(VIRTIO_F_VERSION_1)
        self.offer(VIRTIO_RING_F_INDIRECT_DESC)
        self.offer(VIRTIO_RING_F_EVENT_IDX)
        self.offer(VIRTIO_F_RING_RESET)

    # ---- the control thread's side

    def run_on(self, thread, queues=None):
        """The I/O thread that serves these queues' kicks (by number; all of them when None), in place of an earlier one."""
        for queue in self.queues if queues is None else [self.queues[i] for i in queues]:
            self.leave_thread(queue)
            thread.add((<Virtqueue?>queue).doorbell)

    def leave_thread(self, Virtqueue queue not None):
        """When this returns no kick of the queue is served any more."""
        if queue.doorbell.thread is not None:
            queue.doorbell.thread.remove(queue.doorbell)

    def connect(self, Transport transport not None):
        """From now on interrupts go there."""
        self.transport = transport

    def offer_packed(self):
        """Offers packed rings as well; before a driver looks."""
        self.offer(VIRTIO_F_RING_PACKED)

    @property
    def status(self):
        """The status register."""
        return self.status_register()

    def reset(self):
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.clear()
            atomic_store_u32(&self.generation, 0)
            pthread_mutex_unlock(&self.lock)

    def pause(self):
        cdef uint32_t i
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.paused = True
            for i in range(self.queue_count):
                self.stop(<Virtqueue>self.queue_table[i])
            pthread_mutex_unlock(&self.lock)

    def resume(self):
        cdef uint32_t i
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.paused = False
            for i in range(self.queue_count):
                self.start(<Virtqueue>self.queue_table[i])
            pthread_mutex_unlock(&self.lock)

    def close(self):
        self.pause()
        for queue in self.queues:
            self.leave_thread(queue)

    def save(self):
        return {"version": 2, "status": self.status, "driver_features": self.wanted, "legacy": bool(self.legacy),
                "generation": atomic_load_u32(&self.generation),
                "queues": [queue.save() for queue in self.queues], "device": self.save_device()}

    def restore(self, dict state not None):
        reader = StateReader(self.name, state, version=2)
        status = reader.uint("status", UINT8_MAX)
        wanted = reader.uint("driver_features", UINT64_MAX)
        legacy = reader.flag("legacy") if reader.version > 1 else False
        generation = reader.uint("generation", UINT32_MAX)
        agreed = bool(status & VIRTIO_CONFIG_S_FEATURES_OK)
        packed = agreed and bool(wanted >> VIRTIO_F_RING_PACKED & 1)
        queues = [queue.check(saved, packed) for queue, saved in
                  zip(self.queues, reader.nested_list("queues", self.queue_count, version=1), strict=True)]
        device = self.check_device(reader.nested("device", self.state_version))
        reader.done()
        if status & ~(KNOWN_STATUS | VIRTIO_CONFIG_S_NEEDS_RESET):
            raise StateError(f"{self.name}: 'status' is {status:#x}, which has unknown bits")
        if agreed and wanted & ~self.offered:
            raise StateError(f"{self.name}: the guest uses features {wanted & ~self.offered:#x} that are not offered here")
        if legacy and agreed:
            raise StateError(f"{self.name}: 'legacy' does not go with 'status' {status:#x}")
        if status & VIRTIO_CONFIG_S_DRIVER_OK and not agreed and not legacy:
            raise StateError(f"{self.name}: 'status' is {status:#x}: the driver runs without having agreed on features")
        self.reset()
        self.wanted = wanted
        self.features = wanted if agreed else 0
        self.legacy = legacy
        if legacy and self.accepts(wanted & self.legacy_offered()):      # what is beyond them was wished for since
            self.features = wanted & self.legacy_offered()
        self.generation = generation
        for queue, checked in zip(self.queues, queues, strict=True):
            queue.restore(checked, self.has(VIRTIO_RING_F_INDIRECT_DESC), self.has(VIRTIO_RING_F_EVENT_IDX), packed)
        self.restore_device(device)
        atomic_store_u32(&self.state, status)
        if self.is_begun():
            self.activate()
        if not self.paused:
            self.resume()

    def save_device(self):
        """What the guest can see of this kind of device beyond features, status and queues."""
        return {"version": self.state_version}

    def check_device(self, reader):
        """Reads what `save_device` gave from a StateReader, calls its `done`, and answers what `restore_device` takes."""
        reader.done()

    def restore_device(self, checked):
        """Takes over what `check_device` answered, after a reset and before `activate`."""

    # ---- for concrete devices

    cdef Virtqueue add_queue(self, uint32_t size_max):
        """The next queue, for `__cinit__`."""
        if self.queue_count == MAX_QUEUES:
            raise ValueError(f"{self.name}: a virtio device has at most {MAX_QUEUES} queues")
        queue = PackedVirtqueue(self, self.memory, self.queue_count, size_max)
        queue.doorbell = QueueDoorbell(self, queue)
        self.queues.append(queue)
        self.queue_table[self.queue_count] = <PyObject*>queue
        self.queue_count += 1
        return queue

    cdef void offer(self, uint32_t feature) noexcept:
        """Offers one more feature (VIRTIO_..._F_..., a bit's number), for `__cinit__`."""
        self.offered |= <uint64_t>1 << feature

    cdef bint has(self, uint32_t feature) noexcept nogil:
        """Whether the driver agreed to this feature."""
        return self.features >> feature & 1

    cdef void notify_used(self, Virtqueue queue) noexcept nogil:
        """Ends a round of work on the queue: shows the driver what was pushed. Called with the queue's lock held."""
        if queue.publish():
            self.transport.queue_interrupt(queue.index)
        if queue.broken:
            queue.live = False
            self.need_reset()

    cdef void notify_config(self) noexcept nogil:
        """The device changed its config space, with Device.lock held."""
        atomic_store_u32(&self.generation, self.generation + 1)
        if self.is_begun():
            self.transport.config_interrupt()

    cdef void need_reset(self) noexcept nogil:
        """The device cannot go on: only a reset by the driver helps (2.1.2)."""
        cdef uint32_t before = atomic_or_u32(&self.state, VIRTIO_CONFIG_S_NEEDS_RESET)
        if not before & VIRTIO_CONFIG_S_NEEDS_RESET and (self.legacy or before & VIRTIO_CONFIG_S_DRIVER_OK):
            self.transport.config_interrupt()

    # ---- hooks

    cdef void kicked(self, Virtqueue queue) noexcept nogil:
        """Work on a live queue, in its I/O thread with its lock held. Also called without a kick, after a pause."""

    cdef bint accepts(self, uint64_t features) noexcept nogil:
        """Whether these features (all offered) go together; with Device.lock held."""
        return True

    cdef void activate(self) noexcept nogil:
        """The driver is ready, `features` are settled; no queue is live yet. With Device.lock held."""

    cdef void drain(self, Virtqueue queue) noexcept nogil:
        """The queue is not live any more: returns when nothing popped from it is under way.

        With Device.lock held, not the queue's, while the I/O threads run: a completion finds `live` false but can still push.
        """

    cdef void forget(self, Virtqueue queue) noexcept nogil:
        """The queue is being reset and drained: what belonged to it is void. With Device.lock held."""

    cdef void deactivate(self) noexcept nogil:
        """The device is being reset, its queues have been: the rest of what the driver set is void. With Device.lock held."""

    cdef void aim(self) noexcept nogil:
        """What the transport answers to `interrupt_fd` may have changed. With the transport's lock held."""

    cdef uint64_t read_config(self, uint32_t offset, uint32_t size) noexcept nogil:
        """A load that lies within the config space; with Device.lock held."""
        cdef uint64_t value = 0
        memcpy(&value, <char*>self.config + offset, size)
        return value

    cdef void write_config(self, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil:
        """A store that lies within the config space; with Device.lock held. Read-only unless overridden."""
        self.complain("store to a read-only config field at offset", offset)

    # ---- for transports

    cdef uint32_t status_register(self) noexcept nogil:
        return atomic_load_u32(&self.state)

    cdef void set_status(self, uint32_t value) noexcept nogil:
        """The driver's store to the status register (3.1.1). Bits are only added; 0 resets, and is over on return."""
        cdef uint32_t fresh, i
        pthread_mutex_lock(&self.lock)
        if value == 0:
            self.clear()
        fresh = value & KNOWN_STATUS & ~atomic_load_u32(&self.state)
        if fresh & VIRTIO_CONFIG_S_FEATURES_OK and (self.legacy or not self.agree()):
            fresh &= ~<uint32_t>VIRTIO_CONFIG_S_FEATURES_OK
        if fresh & VIRTIO_CONFIG_S_DRIVER_OK and not (self.state | fresh) & VIRTIO_CONFIG_S_FEATURES_OK:
            self.complain("DRIVER_OK before FEATURES_OK, status", value)
            fresh &= ~<uint32_t>VIRTIO_CONFIG_S_DRIVER_OK
        if fresh & VIRTIO_CONFIG_S_DRIVER_OK:
            self.activate()
        atomic_or_u32(&self.state, fresh)
        if fresh & VIRTIO_CONFIG_S_DRIVER_OK:
            for i in range(self.queue_count):
                self.start(<Virtqueue>self.queue_table[i])
        pthread_mutex_unlock(&self.lock)

    cdef void set_legacy_status(self, uint32_t value) noexcept nogil:
        """The same by a legacy register (3.1.2), which knows no FEATURES_OK."""
        cdef uint32_t fresh
        pthread_mutex_lock(&self.lock)
        if value == 0:
            self.clear()
        fresh = value & LEGACY_STATUS & ~atomic_load_u32(&self.state)
        if fresh & VIRTIO_CONFIG_S_DRIVER_OK and not self.agree_legacy():
            fresh &= ~<uint32_t>VIRTIO_CONFIG_S_DRIVER_OK
        atomic_or_u32(&self.state, fresh)
        pthread_mutex_unlock(&self.lock)

    cdef void begin_legacy(self) noexcept nogil:
        """A kick through a legacy register: drivers up to Linux 3.17 use their queues before they set DRIVER_OK."""
        pthread_mutex_lock(&self.lock)
        if not self.is_begun():
            self.agree_legacy()
        pthread_mutex_unlock(&self.lock)

    cdef uint64_t legacy_offered(self) noexcept nogil:
        """The features that a legacy register shows: those with the lower numbers."""
        return <uint32_t>self.offered

    cdef void want(self, uint32_t word, uint32_t bits) noexcept nogil:
        """The driver's store to 32 of its feature bits; too late after FEATURES_OK, or a legacy driver's DRIVER_OK."""
        if word > 1:
            return
        pthread_mutex_lock(&self.lock)
        if atomic_load_u32(&self.state) & (VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK):
            self.complain("feature bits changed after they were settled", bits)
        else:
            self.wanted = self.wanted & ~(<uint64_t>0xFFFF_FFFF << 32 * word) | <uint64_t>bits << 32 * word
        pthread_mutex_unlock(&self.lock)

    cdef void hold(self, bint held) noexcept nogil:
        """Whether the device must stay away from guest memory for now (a PCI card that is not bus master)."""
        cdef uint32_t i
        pthread_mutex_lock(&self.lock)
        if held != self.held:
            self.held = held
            for i in range(self.queue_count):
                if held:
                    self.stop(<Virtqueue>self.queue_table[i])
                else:
                    self.start(<Virtqueue>self.queue_table[i])
        pthread_mutex_unlock(&self.lock)

    cdef uint64_t load_config(self, uint32_t offset, uint32_t size) noexcept nogil:
        """The driver's load from the config space; zeroes past its end."""
        cdef uint64_t value
        if offset >= self.config_size:
            return 0
        pthread_mutex_lock(&self.lock)
        value = self.read_config(offset, min(size, self.config_size - offset))
        pthread_mutex_unlock(&self.lock)
        return value

    cdef void store_config(self, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil:
        """The driver's store to the config space."""
        if offset > self.config_size or size > self.config_size - offset:
            return
        pthread_mutex_lock(&self.lock)
        self.write_config(offset, size, value)
        pthread_mutex_unlock(&self.lock)

    cdef void enable_queue(self, Virtqueue queue) noexcept nogil:
        """The driver set the queue's size and addresses and wants it used from now on."""
        pthread_mutex_lock(&self.lock)
        if not queue.enabled:
            queue.packed = self.has(VIRTIO_F_RING_PACKED)
            queue.last_avail = queue.next_used = queue.published = 0        # a saved state may have said something else
            if queue.enable(self.has(VIRTIO_RING_F_INDIRECT_DESC), self.has(VIRTIO_RING_F_EVENT_IDX)) < 0:
                self.need_reset()
            self.start(queue)
        pthread_mutex_unlock(&self.lock)

    cdef void reset_queue(self, Virtqueue queue) noexcept nogil:
        """One queue back to its reset state (2.6.1); on return nothing of it is under way."""
        pthread_mutex_lock(&self.lock)
        self.stop(queue)
        self.forget(queue)
        queue.disable()
        pthread_mutex_unlock(&self.lock)

    # ---- within

    cdef void serve(self, Virtqueue queue) noexcept nogil:
        """A kick, in the I/O thread."""
        pthread_mutex_lock(&queue.lock)
        if queue.live:
            self.kicked(queue)
        pthread_mutex_unlock(&queue.lock)

    cdef bint look(self, Virtqueue queue) noexcept nogil:
        """Without a kick, in the I/O thread: serves the queue when a request waits; whether one could be taken."""
        cdef uint16_t before
        cdef bint found = False
        pthread_mutex_lock(&queue.lock)
        if queue.live and queue.waits():
            before = queue.last_avail
            self.kicked(queue)
            found = queue.last_avail != before
        pthread_mutex_unlock(&queue.lock)
        return found

    cdef void hush(self, Virtqueue queue, bint quiet) noexcept nogil:
        """Whether the driver need not kick, for the I/O thread looks. Its end asks for kicks, as any round that finds no more requests."""
        pthread_mutex_lock(&queue.lock)
        queue.quiet = quiet
        if queue.live and not quiet:
            self.kicked(queue)
        pthread_mutex_unlock(&queue.lock)

    cdef bint agree(self) noexcept nogil:
        """FEATURES_OK was asked for: settles `features`, or refuses them (2.2.2)."""
        if self.wanted & ~self.offered:
            self.complain("driver wants features that were not offered", self.wanted & ~self.offered)
            return False
        if not self.wanted >> VIRTIO_F_VERSION_1 & 1:
            self.complain("driver does not know VIRTIO 1.0, its features are", self.wanted)
            return False
        if not self.accepts(self.wanted):
            self.complain("driver wants features that do not go together", self.wanted)
            return False
        self.features = self.wanted
        return True

    cdef bint agree_legacy(self) noexcept nogil:
        """A legacy driver begins, or begins anew after having changed its features: none of them can be refused (2.2.3)."""
        cdef uint32_t i
        if atomic_load_u32(&self.state) & VIRTIO_CONFIG_S_FEATURES_OK:
            self.complain("driver mixes legacy and modern registers, status", self.state)
            return False
        for i in range(self.queue_count):
            self.stop(<Virtqueue>self.queue_table[i])
        if self.wanted & ~self.legacy_offered():
            self.complain("driver wants features that were not offered", self.wanted & ~self.legacy_offered())
        self.wanted &= self.legacy_offered()
        if not self.accepts(self.wanted):
            self.complain("driver wants features that do not go together", self.wanted)
            self.wanted = 0
        self.features = self.wanted
        self.legacy = True
        self.activate()
        for i in range(self.queue_count):
            (<Virtqueue>self.queue_table[i]).settle(self.has(VIRTIO_RING_F_INDIRECT_DESC), self.has(VIRTIO_RING_F_EVENT_IDX))
            self.start(<Virtqueue>self.queue_table[i])
        return True

    cdef bint is_begun(self) noexcept nogil:
        """Whether the driver uses the device."""
        return self.legacy or atomic_load_u32(&self.state) & VIRTIO_CONFIG_S_DRIVER_OK

    cdef void start(self, Virtqueue queue) noexcept nogil:
        """Lets a queue that may be worked on be worked on; requests may wait in it already."""
        cdef bint live
        pthread_mutex_lock(&queue.lock)
        live = queue.enabled and not queue.broken and not self.paused and not self.held and self.is_begun()
        queue.live = live
        pthread_mutex_unlock(&queue.lock)
        if live:
            queue.doorbell.press()

    cdef void stop(self, Virtqueue queue) noexcept nogil:
        """No more work on the queue, and none under way on return."""
        pthread_mutex_lock(&queue.lock)
        queue.live = False
        pthread_mutex_unlock(&queue.lock)
        self.drain(queue)

    cdef void clear(self) noexcept nogil:
        """The driver's reset (2.4): every queue stops before anything is forgotten."""
        cdef uint32_t i
        for i in range(self.queue_count):
            self.stop(<Virtqueue>self.queue_table[i])
        for i in range(self.queue_count):
            self.forget(<Virtqueue>self.queue_table[i])
            (<Virtqueue>self.queue_table[i]).disable()
        self.deactivate()
        self.wanted = self.features = 0
        self.legacy = False
        atomic_store_u32(&self.state, 0)
