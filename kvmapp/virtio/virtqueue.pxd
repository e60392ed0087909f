from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from kvmapp.abi.posix cimport iovec, pthread_mutex_t
from kvmapp.devices cimport Device
from kvmapp.iothread cimport Doorbell
from kvmapp.memory cimport GuestMemory

cdef enum:
    QUEUE_SIZE_MAX = 1024            # descriptors; also the longest chain that any device here takes

# One request of the driver: its buffers as host memory. The device may consume the vectors in place; `storage` stays whole.
cdef struct Chain:
    iovec* readable                  # what the driver wrote for the device
    iovec* writable                  # what the device shall fill
    uint32_t readable_count
    uint32_t writable_count
    uint64_t readable_bytes
    uint64_t writable_bytes
    uint16_t head                    # the request's id, for `push`
    iovec* storage                   # `capacity` entries, the owner's
    uint32_t capacity

cdef int chain_allocate(Chain* chain, uint32_t capacity) except -1
cdef void chain_begin(Chain* chain) noexcept nogil
cdef void chain_free(Chain* chain) noexcept nogil
cdef uint64_t chain_take(Chain* chain, void* target, uint64_t length) noexcept nogil
cdef uint64_t chain_put(Chain* chain, const void* source, uint64_t length) noexcept nogil
cdef void chain_clip(Chain* chain, uint64_t most) noexcept nogil
cdef uint8_t* chain_cut_last(Chain* chain) noexcept nogil


cdef class Virtqueue:
    cdef readonly uint32_t index
    cdef readonly uint32_t size_max
    cdef Device owner
    cdef GuestMemory memory
    cdef Doorbell doorbell           # the driver's kicks arrive here; a device presses it to come back later
    cdef pthread_mutex_t lock        # whoever pops, pushes or asks `live`; after Device.lock

    # what the driver set
    cdef readonly uint32_t size
    cdef readonly bint enabled
    cdef uint64_t desc_gpa
    cdef uint64_t avail_gpa
    cdef uint64_t used_gpa
    cdef bint packed                 # the ring is a packed one (packed.pyx)
    cdef bint indirect
    cdef bint event_index

    # under way
    cdef bint live                   # enabled, and the device may work on it now
    cdef readonly bint broken        # the driver broke the ring: nothing more until a reset
    cdef bint kicks_wanted           # the driver was told to kick
    cdef bint quiet                  # it need not be: the queue's thread looks by itself
    cdef uint32_t budget             # pops left in this round
    cdef uint16_t last_avail         # next entry of the avail ring to take
    cdef uint16_t next_used          # next entry of the used ring to fill
    cdef uint16_t published          # used.idx as the driver sees it
    cdef uint8_t* desc
    cdef uint8_t* avail
    cdef uint8_t* used

    cdef int enable(self, bint indirect, bint event_index) noexcept nogil
    cdef void settle(self, bint indirect, bint event_index) noexcept nogil
    cdef void lay_out(self, uint64_t base, uint64_t align) noexcept nogil
    cdef void disable(self) noexcept nogil
    cdef bint waits(self) noexcept nogil
    cdef int pop(self, Chain* chain) noexcept nogil
    cdef bint take_over(self, uint16_t last_avail) noexcept nogil
    cdef void unpop(self, Chain* chain) noexcept nogil
    cdef void push(self, Chain* chain, uint32_t written) noexcept nogil
    cdef bint publish(self) noexcept nogil
    cdef bint needs_interrupt(self, uint16_t old) noexcept nogil
    cdef bint arm(self) noexcept nogil
    cdef int walk(self, uint16_t head, Chain* chain) noexcept nogil
    cdef int add(self, Chain* chain, const void* descriptor) noexcept nogil
    cdef int fail(self, const char* what, uint64_t value) noexcept nogil
