"""Packed virtqueues, the device's side (VIRTIO 1.2, 2.8), with indirect descriptors and event suppression by descriptor.

A PackedVirtqueue is any device's queue: it has a packed ring when the driver agreed to VIRTIO_F_RING_PACKED, and else is the split one
of virtqueue.pyx. Devices see no difference. One ring of descriptors takes both directions: the driver makes descriptors available in
the ring's order, the device writes used ones over them, and each side's wrap counter tells which flags mean now. What is pushed in a
round shows at its end, because the flags of the first of it are stored last. `desc_gpa` is the ring, `avail_gpa` the driver's and
`used_gpa` the device's event suppression structure. Left out: VIRTIO_F_IN_ORDER.

`unpop` needs that nothing popped later was pushed, and that pushes came in the order of the pops: the ring still holds the chain then.
"""
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from kvmapp.abi.posix cimport atomic_fence
from kvmapp.abi.virtio cimport (VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, ring_load_desc, ring_load_u16,
                                ring_store_u16, vring_desc)
from kvmapp.virtio.virtqueue cimport chain_begin

from kvmapp.state import StateError

cdef enum:
    DESC_SIZE = 16
    DESC_LEN = 8                     # offsets in a descriptor
    DESC_ID = 12
    DESC_FLAGS = 14
    AVAIL_BIT = 7                    # of the flags
    USED_BIT = 15
    EVENT_SIZE = 4                   # of an event suppression structure: position and wrap counter, then flags
    EVENT_FLAGS = 2
    EVENT_ALIGN = 4
    EVENTS_ENABLED = 0
    EVENTS_DISABLED = 1
    EVENTS_BY_DESC = 2
    WRAP_BIT = 15                    # of a position
    POSITION = (1 << WRAP_BIT) - 1


cdef class PackedVirtqueue(Virtqueue):
    """A queue with whichever ring the driver agreed to."""

    def __cinit__(self, *args):
        self.avail_wrap = self.used_wrap = True
        self.spans = <uint16_t*>calloc(self.size_max, sizeof(uint16_t))
        self.order = <uint16_t*>calloc(self.size_max, sizeof(uint16_t))
        if self.spans == NULL or self.order == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.spans)
        free(self.order)

    cdef int enable(self, bint indirect, bint event_index) noexcept nogil:
        cdef uint64_t size = self.size
        if not self.packed:
            return Virtqueue.enable(self, indirect, event_index)
        if size == 0 or size > self.size_max:
            return self.fail("queue size is not one up to the queue's maximum", size)
        if self.desc_gpa % DESC_SIZE:
            return self.fail("descriptor ring is not aligned to 16 bytes", self.desc_gpa)
        if self.avail_gpa % EVENT_ALIGN or self.used_gpa % EVENT_ALIGN:
            return self.fail("event suppression structure is not aligned to 4 bytes", self.avail_gpa | self.used_gpa)
        self.desc = self.memory.translate(self.desc_gpa, DESC_SIZE * size)
        self.avail = self.memory.translate(self.avail_gpa, EVENT_SIZE)
        self.used = self.memory.translate(self.used_gpa, EVENT_SIZE)
        if self.desc == NULL:
            return self.fail("descriptor ring is not in RAM", self.desc_gpa)
        if self.avail == NULL or self.used == NULL:
            return self.fail("event suppression structure is not in RAM", self.used_gpa if self.used == NULL else self.avail_gpa)
        self.indirect = indirect
        self.event_index = event_index
        self.budget = self.size
        self.enabled = True
        return 0

    cdef void disable(self) noexcept nogil:
        Virtqueue.disable(self)
        self.avail_wrap = self.used_wrap = True
        self.outstanding = self.unseen = 0
        self.held = NULL
        memset(self.spans, 0, self.size_max * sizeof(uint16_t))

    cdef bint waits(self) noexcept nogil:
        return self.is_available(self.last_avail, self.avail_wrap) if self.packed else Virtqueue.waits(self)

    cdef int pop(self, Chain* chain) noexcept nogil:
        if not self.packed:
            return Virtqueue.pop(self, chain)
        if self.broken:
            return -1
        if not self.waits() and (self.quiet or self.kicks_wanted or not self.arm()):
            return 0
        if self.budget == 0:
            self.doorbell.press()
            return 0
        if self.take(chain) < 0:
            return -1
        self.budget -= 1
        if self.kicks_wanted:
            self.kicks_wanted = False
            ring_store_u16(self.used + EVENT_FLAGS, EVENTS_DISABLED)
        return 1

    cdef void unpop(self, Chain* chain) noexcept nogil:
        cdef uint16_t id, span
        if not self.packed:
            Virtqueue.unpop(self, chain)
            return
        self.popped -= 1
        id = self.order[self.popped & (self.size_max - 1)]
        span = self.spans[id]
        self.spans[id] = 0
        self.outstanding -= span
        if span > self.last_avail:
            self.last_avail += self.size
            self.avail_wrap = not self.avail_wrap
        self.last_avail -= span

    cdef void push(self, Chain* chain, uint32_t written) noexcept nogil:
        cdef uint8_t* place
        cdef uint16_t span, flags
        if not self.packed:
            Virtqueue.push(self, chain, written)
            return
        if not self.enabled or self.spans[chain.head] == 0:
            return
        place = self.desc + DESC_SIZE * self.next_used
        span = self.spans[chain.head]
        flags = (1 << AVAIL_BIT | 1 << USED_BIT) if self.used_wrap else 0
        if written:
            flags |= VRING_DESC_F_WRITE
        memcpy(place + DESC_LEN, &written, sizeof(written))
        memcpy(place + DESC_ID, &chain.head, sizeof(chain.head))
        if self.held == NULL:
            self.held = place
            self.held_flags = flags
        else:
            ring_store_u16(place + DESC_FLAGS, flags)
        self.spans[chain.head] = 0
        self.outstanding -= span
        self.unseen += span
        self.next_used += span
        if self.next_used >= self.size:
            self.next_used -= self.size
            self.used_wrap = not self.used_wrap

    cdef bint publish(self) noexcept nogil:
        cdef uint32_t moved = self.unseen
        if not self.packed:
            return Virtqueue.publish(self)
        self.budget = self.size
        if not self.enabled or self.held == NULL:
            return False
        ring_store_u16(self.held + DESC_FLAGS, self.held_flags)
        self.held = NULL
        self.unseen = 0
        self.published = self.next_used
        return self.driver_wants(moved)

    cdef bint arm(self) noexcept nogil:
        if not self.packed:
            return Virtqueue.arm(self)
        self.kicks_wanted = True
        if self.event_index:
            ring_store_u16(self.used, <uint16_t>(self.last_avail | <uint32_t>self.avail_wrap << WRAP_BIT))
            ring_store_u16(self.used + EVENT_FLAGS, EVENTS_BY_DESC)
        else:
            ring_store_u16(self.used + EVENT_FLAGS, EVENTS_ENABLED)
        atomic_fence()                       # our wish before our load of the descriptor's flags
        return self.waits()

    # ---- within

    cdef bint is_available(self, uint32_t index, bint wrap) noexcept nogil:
        """Whether the driver has made the descriptor at this position available (2.8.1)."""
        cdef uint16_t flags = ring_load_u16(self.desc + DESC_SIZE * index + DESC_FLAGS)
        return (flags >> AVAIL_BIT & 1) == wrap and (flags >> USED_BIT & 1) != wrap

    cdef int take(self, Chain* chain) noexcept nogil:
        """Collects the buffers of the chain that begins at `last_avail`, and goes on behind it; 0, or -1 and broken."""
        cdef uint32_t index = self.last_avail, count = 0
        cdef uint16_t id
        cdef vring_desc desc
        chain_begin(chain)
        while True:
            if self.outstanding + count == self.size:
                return self.fail("descriptor chain is longer than the ring has room for", count)
            ring_load_desc(&desc, self.desc + DESC_SIZE * index)
            id = desc.flags                  # a packed descriptor has its id where a split one has flags, and flags where that has next
            desc.flags = desc.next
            count += 1
            index = index + 1 if index + 1 < self.size else 0
            if desc.flags & VRING_DESC_F_INDIRECT:
                # It must be the only one of its chain (2.8.7).
                if not self.indirect or count > 1 or desc.flags & VRING_DESC_F_NEXT:
                    return self.fail("indirect descriptor where none may be, flags", desc.flags)
                if self.take_table(chain, &desc) < 0:
                    return -1
                break
            if self.add(chain, &desc) < 0:
                return -1
            if not desc.flags & VRING_DESC_F_NEXT:
                break
        if id >= self.size:
            return self.fail("buffer id is not less than the queue's size", id)
        if self.spans[id]:
            return self.fail("buffer id is under way already", id)
        chain.head = id
        self.spans[id] = count
        self.order[self.popped & (self.size_max - 1)] = id
        self.popped += 1
        self.outstanding += count
        if self.last_avail + count >= self.size:
            self.avail_wrap = not self.avail_wrap
        self.last_avail = index
        return 0

    cdef int take_table(self, Chain* chain, const vring_desc* desc) noexcept nogil:
        """The buffers of an indirect table: all of its descriptors, in their order (2.8.7)."""
        cdef const uint8_t* table
        cdef vring_desc inner
        cdef uint32_t i
        if desc.len == 0 or desc.len % DESC_SIZE:
            return self.fail("indirect table's length is not a multiple of 16", desc.len)
        table = self.memory.translate(desc.addr, desc.len)
        if table == NULL:
            return self.fail("indirect table is not in RAM", desc.addr)
        for i in range(desc.len // DESC_SIZE):
            ring_load_desc(&inner, table + DESC_SIZE * i)
            inner.flags = inner.next & VRING_DESC_F_WRITE
            if self.add(chain, &inner) < 0:
                return -1
        return 0

    cdef bint driver_wants(self, uint32_t moved) noexcept nogil:
        """Whether the driver asked to hear of the `moved` descriptors before `next_used` (2.8.21)."""
        cdef uint16_t flags, event
        cdef uint32_t behind
        atomic_fence()                       # our store of the used flags before our load of the driver's wish
        flags = ring_load_u16(self.avail + EVENT_FLAGS)
        if flags != EVENTS_BY_DESC or not self.event_index:
            return flags != EVENTS_DISABLED
        event = ring_load_u16(self.avail)
        behind = self.next_used - (event & POSITION)
        if <bint>(event >> WRAP_BIT) != self.used_wrap:
            behind += self.size
        return behind - 1 < moved

    # ---- state

    def save(self):
        state = Virtqueue.save(self)
        if self.packed:
            state["last_avail"] = self.last_avail | <int>self.avail_wrap << WRAP_BIT
            state["next_used"] = self.next_used | <int>self.used_wrap << WRAP_BIT
        return state

    def check_positions(self, str owner, uint32_t size, uint32_t last_avail, uint32_t next_used, bint packed):
        if not packed:
            Virtqueue.check_positions(self, owner, size, last_avail, next_used, False)
        elif last_avail != next_used:
            raise StateError(f"{owner}: requests are under way (last_avail {last_avail:#x}, next_used {next_used:#x})")
        elif last_avail & POSITION and last_avail & POSITION >= size:
            raise StateError(f"{owner}: 'last_avail' is {last_avail:#x}, a position outside of the {size} descriptors")

    def go_to(self, uint32_t last_avail, uint32_t next_used):
        if self.packed:
            self.avail_wrap, self.used_wrap = last_avail >> WRAP_BIT, next_used >> WRAP_BIT
            last_avail &= POSITION
            next_used &= POSITION
        Virtqueue.go_to(self, last_avail, next_used)
