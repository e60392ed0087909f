from libc.stdint cimport uint8_t, uint16_t, uint32_t

cdef enum:
    ADDRESS = 6                      # bytes
    ETHERNET_HEADER = 14
    VLAN_TAG = 4

    # Of a context descriptor's TUCMD.
    TUCMD_TCP = 1
    TUCMD_IP4 = 2
    TUCMD_TSE = 4

cdef packed struct Context:          # a context descriptor (3.3.6); starts and places are offsets in the frame, ends are inclusive
    uint8_t ip_start
    uint8_t ip_place                 # of the sum
    uint16_t ip_end
    uint8_t transport_start
    uint8_t transport_place
    uint16_t transport_end           # 0: the frame's
    uint32_t command                 # PAYLEN, DTYP, and TUCMD in the upper byte
    uint8_t status
    uint8_t header_length
    uint16_t segment                 # MSS

cdef packed struct NetHeader:        # virtio_net_hdr_v1
    uint8_t flags
    uint8_t gso_type
    uint16_t header_length
    uint16_t gso_size
    uint16_t sum_start
    uint16_t sum_offset
    uint16_t buffers

cdef enum:
    HEADER_NEEDS_SUM = 1
    HEADER_DATA_VALID = 2
    GSO_TCP4 = 1
    GSO_TCP6 = 4

cdef bint put_sum(uint8_t* frame, uint32_t length, uint32_t start, uint32_t place, uint32_t end, bint never_zero) noexcept nogil
cdef bint can_segment(const Context* context, uint32_t length) noexcept nogil
cdef void fit_headers(uint8_t* frame, uint32_t length, const Context* context, bint ip_sum) noexcept nogil
cdef void number_segment(uint8_t* frame, const Context* context, uint32_t number, uint32_t offset, bint last) noexcept nogil
cdef bint is_group(const uint8_t* frame) noexcept nogil
cdef bint is_broadcast(const uint8_t* frame) noexcept nogil
cdef uint32_t group_hash(const uint8_t* frame, uint32_t shift) noexcept nogil
cdef uint16_t get16(const uint8_t* place) noexcept nogil
cdef void put16(uint8_t* place, uint32_t value) noexcept nogil
cdef void insert_tag(uint8_t* frame, uint32_t kind, uint32_t tag) noexcept nogil
