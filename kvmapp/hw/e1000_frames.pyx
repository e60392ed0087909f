"""What an 82540EM does to frames: sums (3.6), segmentation (3.5), hashes of group addresses (13.5.1), VLAN tags (9).

All of it works on frames in our own memory, never the guest's; offsets that a guest chose are checked here against the frame.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memmove

cdef enum:
    IP4_LENGTH = 2                   # offsets in an IPv4 header
    IP4_ID = 4
    IP4_HEADER = 20
    IP6_LENGTH = 4
    IP6_HEADER = 40
    TCP_SEQUENCE = 4
    TCP_FLAGS = 13
    TCP_HEADER = 20
    TCP_ENDS = 0x09                  # FIN and PSH: for the last segment
    TCP_CWR = 0x80                   # for the first
    HASH_BITS = 0xFFF


cdef bint put_sum(uint8_t* frame, uint32_t length, uint32_t start, uint32_t place, uint32_t end, bint never_zero) noexcept nogil:
    """The Internet checksum of frame[start..end] into `place`; an `end` of 0 is the frame's. False when it is not in the frame."""
    cdef uint16_t total
    if end == 0:
        end = length - 1
    if start > end or end >= length or place + 2 > length:
        return False
    total = ~sum16(frame + start, end + 1 - start)
    if never_zero and total == 0:                    # UDP: zero says that there is none
        total = 0xFFFF
    memcpy(frame + place, &total, 2)
    return True


cdef uint16_t sum16(const uint8_t* data, uint32_t length) noexcept nogil:
    """The ones' complement sum of 16-bit words in the host's order, which gives the network's when stored again (RFC 1071)."""
    cdef uint64_t total = 0
    cdef uint32_t word
    while length >= 4:
        memcpy(&word, data, 4)
        total += word
        data += 4
        length -= 4
    word = 0
    memcpy(&word, data, length)
    total += word
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return <uint16_t>total


cdef bint can_segment(const Context* context, uint32_t length) noexcept nogil:
    """Whether all that segmentation touches lies in the header, and the header in the frame; TCP only."""
    cdef uint32_t header = context.header_length
    cdef uint32_t ip_header = IP4_HEADER if context.command >> 24 & TUCMD_IP4 else IP6_HEADER
    return (context.command >> 24 & TUCMD_TCP and context.segment > 0 and header < length and context.ip_start >= ETHERNET_HEADER and
            context.ip_start + ip_header <= context.transport_start and <uint32_t>context.transport_start + TCP_HEADER <= header and
            <uint32_t>context.ip_place + 2 <= header and context.ip_start <= context.ip_end < header and
            context.transport_start <= context.transport_place and <uint32_t>context.transport_place + 2 <= header)


cdef void fit_headers(uint8_t* frame, uint32_t length, const Context* context, bint ip_sum) noexcept nogil:
    """Headers that `can_segment` has seen get this frame's length, and IPv4's sum; drivers leave the length out of TCP's seed (3.5.4)."""
    cdef uint8_t* seed = frame + context.transport_place
    cdef uint32_t total
    if context.command >> 24 & TUCMD_IP4:
        put16(frame + context.ip_start + IP4_LENGTH, length - context.ip_start)
        if ip_sum:
            put_sum(frame, length, context.ip_start, context.ip_place, context.ip_end, False)
    else:
        put16(frame + context.ip_start + IP6_LENGTH, length - context.ip_start - IP6_HEADER)
    total = get16(seed) + length - context.transport_start
    put16(seed, (total & 0xFFFF) + (total >> 16))


cdef void number_segment(uint8_t* frame, const Context* context, uint32_t number, uint32_t offset, bint last) noexcept nogil:
    """The header of one segment of several, whose payload starts `offset` bytes into the whole."""
    cdef uint8_t* tcp = frame + context.transport_start
    cdef uint8_t* ip = frame + context.ip_start
    cdef uint32_t sequence = (<uint32_t>get16(tcp + TCP_SEQUENCE) << 16 | get16(tcp + TCP_SEQUENCE + 2)) + offset
    put16(tcp + TCP_SEQUENCE, sequence >> 16)
    put16(tcp + TCP_SEQUENCE + 2, sequence)
    if context.command >> 24 & TUCMD_IP4:
        put16(ip + IP4_ID, get16(ip + IP4_ID) + number)
    if not last:
        tcp[TCP_FLAGS] &= ~<uint8_t>TCP_ENDS
    if number:
        tcp[TCP_FLAGS] &= ~<uint8_t>TCP_CWR


cdef bint is_group(const uint8_t* frame) noexcept nogil:
    return frame[0] & 1


cdef bint is_broadcast(const uint8_t* frame) noexcept nogil:
    return memcmp(frame, b"\xff\xff\xff\xff\xff\xff", ADDRESS) == 0


cdef uint32_t group_hash(const uint8_t* frame, uint32_t shift) noexcept nogil:
    """Twelve bits of the destination, from bit 32 + `shift` of it on."""
    return (<uint32_t>frame[4] >> shift | <uint32_t>frame[5] << (8 - shift)) & HASH_BITS


cdef uint16_t get16(const uint8_t* place) noexcept nogil:
    return <uint16_t>place[0] << 8 | place[1]


cdef void put16(uint8_t* place, uint32_t value) noexcept nogil:
    place[0] = <uint8_t>(value >> 8)
    place[1] = <uint8_t>value


cdef void insert_tag(uint8_t* frame, uint32_t kind, uint32_t tag) noexcept nogil:
    """A VLAN tag behind the addresses; the frame then begins VLAN_TAG bytes earlier, where there is room."""
    memmove(frame - VLAN_TAG, frame, 2 * ADDRESS)
    put16(frame + 2 * ADDRESS - VLAN_TAG, kind)
    put16(frame + 2 * ADDRESS - VLAN_TAG + 2, tag)
