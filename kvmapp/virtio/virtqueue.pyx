"""Split virtqueues, the device's side (VIRTIO 1.2, 2.7), with indirect descriptors and event indices.

The rings lie in guest RAM. Their addresses are checked once, when the driver enables the queue; every index, length and address
that is read from them is loaded once and checked before use. A ring that breaks the rules is `broken`: a line in the log, and
`pop` answers -1 until the next reset. packed.pyx adds packed rings (2.8). Left out: VIRTIO_F_IN_ORDER.

A round of work, with `lock` held and only while `live`:

    while queue.pop(&chain) == 1:
        ... chain.readable[0 .. readable_count], chain.writable[0 .. writable_count] ...
        queue.push(&chain, written)
    self.notify_used(queue)              # VirtioDevice: shows the driver all pushed chains at once, interrupts if it wants that

Chains may be pushed in any order and in a later round. A round ends after as many pops as the queue is long, whatever the driver
adds meanwhile: `pop` answers 0 then, and the doorbell is pressed for the next round. A device that stops earlier must come back
by itself: only an empty `pop` asks the driver for kicks.
"""
from libc.stdint cimport UINT16_MAX, UINT64_MAX
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from kvmapp.abi.posix cimport (atomic_fence, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
                               pthread_mutex_unlock)
from kvmapp.abi.virtio cimport (VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
                                VRING_USED_F_NO_NOTIFY, ring_load_desc, ring_load_u16, ring_store_u16, vring_desc,
                                vring_used_elem)

from kvmapp.state import StateError

cdef enum:
    DESC_SIZE = 16
    USED_ELEM_SIZE = 8
    RING_HEADER = 4                  # flags and idx, before the entries of the avail and used rings
    AVAIL_ALIGN = 2
    USED_ALIGN = 4


cdef int chain_allocate(Chain* chain, uint32_t capacity) except -1:
    """Gives the chain room for `capacity` buffers; freed by `chain_free`."""
    chain.storage = <iovec*>calloc(capacity, sizeof(iovec))
    if chain.storage == NULL:
        raise MemoryError
    chain.capacity = capacity
    return 0


cdef void chain_begin(Chain* chain) noexcept nogil:
    """No buffers yet."""
    chain.readable = chain.writable = chain.storage
    chain.readable_count = chain.writable_count = 0
    chain.readable_bytes = chain.writable_bytes = 0


cdef void chain_free(Chain* chain) noexcept nogil:
    free(chain.storage)
    chain.storage = NULL
    chain.capacity = 0


cdef uint64_t chain_take(Chain* chain, void* target, uint64_t length) noexcept nogil:
    """Moves the first `length` readable bytes to `target` (NULL: nowhere) and out of the chain; fewer when there are fewer."""
    cdef uint64_t done = 0, step
    while done < length and chain.readable_count:
        step = min(length - done, <uint64_t>chain.readable.iov_len)
        if target != NULL:
            memcpy(<char*>target + done, chain.readable.iov_base, step)
        done += step
        chain.readable.iov_base = <char*>chain.readable.iov_base + step
        chain.readable.iov_len -= step
        if chain.readable.iov_len == 0:
            chain.readable += 1
            chain.readable_count -= 1
    chain.readable_bytes -= done
    return done


cdef uint64_t chain_put(Chain* chain, const void* source, uint64_t length) noexcept nogil:
    """Fills the first `length` writable bytes and takes them out of the chain; fewer when there are fewer."""
    cdef uint64_t done = 0, step
    while done < length and chain.writable_count:
        step = min(length - done, <uint64_t>chain.writable.iov_len)
        memcpy(chain.writable.iov_base, <const char*>source + done, step)
        done += step
        chain.writable.iov_base = <char*>chain.writable.iov_base + step
        chain.writable.iov_len -= step
        if chain.writable.iov_len == 0:
            chain.writable += 1
            chain.writable_count -= 1
    chain.writable_bytes -= done
    return done


cdef void chain_clip(Chain* chain, uint64_t most) noexcept nogil:
    """Leaves only the first `most` writable bytes."""
    cdef uint32_t i
    for i in range(chain.writable_count):
        if chain.writable[i].iov_len > most:
            chain.writable_bytes -= chain.writable[i].iov_len - most
            chain.writable[i].iov_len = most
        most -= chain.writable[i].iov_len
    while chain.writable_count and chain.writable[chain.writable_count - 1].iov_len == 0:
        chain.writable_count -= 1


cdef uint8_t* chain_cut_last(Chain* chain) noexcept nogil:
    """Takes the last writable byte out of the chain: where it lies, or NULL when there is none."""
    cdef iovec* last
    if chain.writable_count == 0:
        return NULL
    last = &chain.writable[chain.writable_count - 1]
    last.iov_len -= 1
    chain.writable_bytes -= 1
    if last.iov_len == 0:
        chain.writable_count -= 1
    return <uint8_t*>last.iov_base + last.iov_len


cdef class Virtqueue:
    """One queue of `owner`, whose log it complains in. The transport sets size and addresses through the device."""

    def __cinit__(self, Device owner not None, GuestMemory memory not None, uint32_t index, uint32_t size_max):
        if not 1 <= size_max <= QUEUE_SIZE_MAX or size_max & (size_max - 1):
            raise ValueError(f"a virtqueue has a power of two up to {QUEUE_SIZE_MAX} descriptors, not {size_max}")
        pthread_mutex_init(&self.lock, NULL)
        self.owner = owner
        self.memory = memory
        self.index = index
        self.size_max = self.size = size_max

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)

    cdef int enable(self, bint indirect, bint event_index) noexcept nogil:
        """Checks what the driver set and finds the rings in host memory; 0, or -1 and broken."""
        cdef uint64_t size = self.size
        if size == 0 or size > self.size_max or size & (size - 1):
            return self.fail("queue size is not a power of two up to the queue's maximum", size)
        if self.desc_gpa % DESC_SIZE:
            return self.fail("descriptor table is not aligned to 16 bytes", self.desc_gpa)
        if self.avail_gpa % AVAIL_ALIGN:
            return self.fail("available ring is not aligned to 2 bytes", self.avail_gpa)
        if self.used_gpa % USED_ALIGN:
            return self.fail("used ring is not aligned to 4 bytes", self.used_gpa)
        # Both rings end in an event index, whether it is negotiated or not (2.7.6, 2.7.8).
        self.desc = self.memory.translate(self.desc_gpa, DESC_SIZE * size)
        self.avail = self.memory.translate(self.avail_gpa, RING_HEADER + 2 * size + 2)
        self.used = self.memory.translate(self.used_gpa, RING_HEADER + USED_ELEM_SIZE * size + 2)
        if self.desc == NULL:
            return self.fail("descriptor table is not in RAM", self.desc_gpa)
        if self.avail == NULL:
            return self.fail("available ring is not in RAM", self.avail_gpa)
        if self.used == NULL:
            return self.fail("used ring is not in RAM", self.used_gpa)
        self.indirect = indirect
        self.event_index = event_index
        self.budget = self.size
        self.enabled = True
        return 0

    cdef void settle(self, bint indirect, bint event_index) noexcept nogil:
        """Which features hold for the ring that is enabled: a legacy driver may tell them after it has set the ring up."""
        pthread_mutex_lock(&self.lock)
        self.indirect = indirect
        self.event_index = event_index
        self.kicks_wanted = False        # the wish stands where the other feature has it: the first empty pop says it anew
        pthread_mutex_unlock(&self.lock)

    cdef void lay_out(self, uint64_t base, uint64_t align) noexcept nogil:
        """Where a legacy driver's ring has its parts (2.7.2): one after the other, the used ring on a multiple of `align`."""
        self.desc_gpa = base
        self.avail_gpa = base + DESC_SIZE * self.size
        self.used_gpa = (self.avail_gpa + RING_HEADER + 2 * self.size + 2 + align - 1) & ~(align - 1)

    cdef void disable(self) noexcept nogil:
        """As before the driver touched it (after a reset of the device or of this queue)."""
        pthread_mutex_lock(&self.lock)
        self.live = self.enabled = self.broken = self.packed = self.indirect = self.event_index = False
        self.kicks_wanted = False        # a new ring asks for kicks in fact; the first empty pop says so again
        self.size = self.size_max
        self.desc_gpa = self.avail_gpa = self.used_gpa = 0
        self.desc = self.avail = self.used = NULL
        self.last_avail = self.next_used = self.published = 0
        pthread_mutex_unlock(&self.lock)

    cdef bint waits(self) noexcept nogil:
        """Whether there is a request; where not, the driver is not asked for kicks as by `pop`, and the device has to come back."""
        return ring_load_u16(self.avail + 2) != self.last_avail

    cdef int pop(self, Chain* chain) noexcept nogil:
        """The next request: 1 and a filled chain, 0 when this round is over (a kick will come), -1 when the ring is broken."""
        cdef uint16_t waiting
        if self.broken:
            return -1
        waiting = ring_load_u16(self.avail + 2) - self.last_avail
        if waiting == 0:
            if self.quiet or self.kicks_wanted or not self.arm():
                return 0
            waiting = ring_load_u16(self.avail + 2) - self.last_avail
        if self.budget == 0:
            self.doorbell.press()
            return 0
        if waiting > self.size:
            return self.fail("available index is further ahead than the queue is long", waiting)
        if self.walk(ring_load_u16(self.avail + RING_HEADER + 2 * (self.last_avail & (self.size - 1))), chain) < 0:
            return -1
        self.last_avail += 1
        self.budget -= 1
        if self.kicks_wanted:
            # With event indices the one left behind in the used ring tells the same.
            self.kicks_wanted = False
            if not self.event_index:
                ring_store_u16(self.used, VRING_USED_F_NO_NOTIFY)
        return 1

    cdef void unpop(self, Chain* chain) noexcept nogil:
        """Takes the latest `pop` back: the next one will answer this chain again."""
        self.last_avail -= 1

    cdef bint take_over(self, uint16_t last_avail) noexcept nogil:
        """The ring from somebody who answered it for us, and has read so far. False: what the guest made of the used ring's index fits
        no ring; it goes on as if nothing were under way."""
        self.next_used = self.published = ring_load_u16(self.used + 2)
        self.last_avail = last_avail
        if <uint16_t>(last_avail - self.published) <= self.size:
            return True
        self.last_avail = self.published
        return False

    cdef void push(self, Chain* chain, uint32_t written) noexcept nogil:
        """Gives the chain back with `written` bytes in its writable part. The driver sees it after `publish`."""
        cdef vring_used_elem* entry
        if not self.enabled:
            return
        entry = <vring_used_elem*>(self.used + RING_HEADER + USED_ELEM_SIZE * (self.next_used & (self.size - 1)))
        entry.id = chain.head
        entry.len = written
        self.next_used += 1

    cdef bint publish(self) noexcept nogil:
        """Ends a round: shows the driver every chain pushed so far; whether it wants an interrupt for that."""
        cdef uint16_t old = self.published
        self.budget = self.size
        if not self.enabled or self.next_used == old:
            return False
        self.published = self.next_used
        ring_store_u16(self.used + 2, self.next_used)
        return self.needs_interrupt(old)

    cdef bint needs_interrupt(self, uint16_t old) noexcept nogil:
        """Whether the driver asked to hear that used.idx went from `old` to `published` (2.7.7)."""
        cdef uint16_t event
        atomic_fence()                   # our store of used.idx before our load of the driver's wish
        if not self.event_index:
            return not ring_load_u16(self.avail) & VRING_AVAIL_F_NO_INTERRUPT
        event = ring_load_u16(self.avail + RING_HEADER + 2 * self.size)
        return <uint16_t>(self.published - event - 1) < <uint16_t>(self.published - old)

    cdef bint arm(self) noexcept nogil:
        """Asks for a kick at the next request that is to be popped (2.7.10); whether it came before the driver could know.

        The wish is for `last_avail`, not for what the driver shows by now: a request that came since the last look would lie behind it,
        and neither a kick nor this answer would tell of it.
        """
        self.kicks_wanted = True
        if self.event_index:
            ring_store_u16(self.used + RING_HEADER + USED_ELEM_SIZE * self.size, self.last_avail)
        else:
            ring_store_u16(self.used, 0)
        atomic_fence()                   # our wish before our load of avail.idx
        return self.waits()

    cdef int walk(self, uint16_t head, Chain* chain) noexcept nogil:
        """Collects the buffers of the chain that starts at `head`; 0, or -1 and broken."""
        cdef const uint8_t* table = self.desc
        cdef uint64_t count = self.size, index = head, left = self.size
        cdef bint nested = False
        cdef vring_desc desc
        chain_begin(chain)
        chain.head = head
        while True:
            if index >= count:
                return self.fail("descriptor index is outside its table", index)
            if left == 0:
                return self.fail("descriptor chain has a loop; it starts at", head)
            left -= 1
            ring_load_desc(&desc, table + DESC_SIZE * index)
            if desc.flags & VRING_DESC_F_INDIRECT:
                # The table is the last link of the chain, and its WRITE flag means nothing (2.7.5.3).
                if not self.indirect or nested or desc.flags & VRING_DESC_F_NEXT:
                    return self.fail("indirect descriptor where none may be, flags", desc.flags)
                if desc.len == 0 or desc.len % DESC_SIZE:
                    return self.fail("indirect table's length is not a multiple of 16", desc.len)
                table = self.memory.translate(desc.addr, desc.len)
                if table == NULL:
                    return self.fail("indirect table is not in RAM", desc.addr)
                nested = True
                count = left = desc.len // DESC_SIZE
                index = 0
                continue
            if self.add(chain, &desc) < 0:
                return -1
            if not desc.flags & VRING_DESC_F_NEXT:
                return 0
            index = desc.next

    cdef int add(self, Chain* chain, const void* descriptor) noexcept nogil:
        """Appends one buffer; 0, or -1 and broken."""
        cdef const vring_desc* desc = <const vring_desc*>descriptor
        cdef uint32_t used = chain.readable_count + chain.writable_count
        cdef iovec* vector = chain.storage + used
        if used == chain.capacity:
            return self.fail("descriptor chain is longer than the device takes", used)
        if desc.len == 0:
            return self.fail("descriptor has no length; its address is", desc.addr)
        vector.iov_base = self.memory.translate(desc.addr, desc.len)
        vector.iov_len = desc.len
        if vector.iov_base == NULL:
            return self.fail("buffer is not in RAM", desc.addr)
        if desc.flags & VRING_DESC_F_WRITE:
            if chain.writable_count == 0:
                chain.writable = vector
            chain.writable_count += 1
            chain.writable_bytes += desc.len
        elif chain.writable_count:
            return self.fail("readable buffer after a writable one (2.7.4.2)", desc.addr)
        else:
            chain.readable_count += 1
            chain.readable_bytes += desc.len
        return 0

    cdef int fail(self, const char* what, uint64_t value) noexcept nogil:
        self.broken = True
        self.owner.complain(what, value)
        return -1

    def save(self):
        """What the driver set and how far the device got; nothing may be under way."""
        return {"version": 1, "size": self.size, "enabled": bool(self.enabled), "broken": bool(self.broken),
                "desc": self.desc_gpa, "avail": self.avail_gpa, "used": self.used_gpa,
                "last_avail": self.last_avail, "next_used": self.published}

    def check(self, reader, bint packed):
        """Reads what `save` gave from a StateReader, for `restore`. Raises StateError, also for rings that are not in RAM."""
        size = reader.uint("size", UINT16_MAX)
        flags = reader.flag("enabled"), reader.flag("broken")
        addresses = tuple(reader.uint(key, UINT64_MAX) for key in ("desc", "avail", "used"))
        positions = reader.uint("last_avail", UINT16_MAX), reader.uint("next_used", UINT16_MAX)
        reader.done()
        self.check_positions(reader.owner, size, *positions, packed)
        trial = type(self)(self.owner, self.memory, self.index, self.size_max)
        trial.restore((size, flags, addresses, positions), False, False, packed)
        if flags[0] and not trial.enabled:
            raise StateError(f"{reader.owner}: the rings at {', '.join(map(hex, addresses))}, size {size}, cannot be used")
        return size, flags, addresses, positions

    def check_positions(self, str owner, uint32_t size, uint32_t last_avail, uint32_t next_used, bint packed):
        """Raises StateError for positions in the ring that no device can have come to."""
        if (last_avail - next_used) % 0x10000 > self.size_max:
            raise StateError(f"{owner}: more requests under way than the queue holds (last_avail {last_avail}, next_used {next_used})")

    def restore(self, tuple checked not None, bint indirect, bint event_index, bint packed):
        """Takes over what `check` answered; the queue is not live yet."""
        cdef bint enabled, broken
        self.disable()
        self.size, (enabled, broken), (self.desc_gpa, self.avail_gpa, self.used_gpa), positions = checked
        self.packed = packed and enabled         # a queue that is yet to be set up begins at the ring's beginning, wherever it was saved
        self.go_to(*positions)
        if enabled:
            self.enable(indirect, event_index)
        self.broken = self.broken or broken

    def go_to(self, uint32_t last_avail, uint32_t next_used):
        """Goes on from these positions."""
        self.last_avail, self.next_used = last_avail, next_used
        self.published = self.next_used
