"""What an 82540EM's driver reaches bit by bit: the EEPROM behind its serial interface, and the PHY behind MDIC (e1000.pyx tells of
which manual; chapter 5 the EEPROM, chapter 8 the PHY, 13.4.3 EECD, 13.4.4 EERD).

The EEPROM has 64 words and answers the microwire command READ, word after word as long as it is clocked. The PHY is a Marvell 88E1011
whose partner agrees to 1000 Mb/s full duplex at once. Left out: writing and erasing the EEPROM (these commands are heard and do
nothing), other speeds, the PHY's loopback, its latched link status.
"""
from libc.stdint cimport uint16_t, uint32_t
from libc.string cimport memset

cdef enum:
    CLOCK = 0x01
    SELECT = 0x02
    DATA_IN = 0x04
    REQUEST = 0x40
    GRANT = 0x80
    PRESENT = 0x100

    READ = 6                         # start bit and operation code
    ADDRESS_BITS = 6
    WORD_BITS = 16
    CHECKSUM_WORD = 0x3F
    CHECKSUM = 0xBABA                # the sum of all words (5.6.35)

    EERD_START = 0x01
    EERD_DONE = 0x10

    PHY_CONTROL = 0                  # IEEE 802.3, 22.2.4
    PHY_STATUS = 1
    PHY_ID1 = 2
    PHY_ID2 = 3
    PHY_ADVERTISEMENT = 4
    PHY_PARTNER = 5
    PHY_1000T_CONTROL = 9
    PHY_1000T_STATUS = 10
    PHY_EXTENDED_STATUS = 15
    PHY_SPECIFIC_CONTROL = 16
    PHY_SPECIFIC_STATUS = 17
    PHY_INTERRUPT_ENABLE = 18
    PHY_EXTENDED_CONTROL = 20
    PHY_PAGE = 29
    PHY_PAGE_DATA = 30
    PHY_RESET = 0x8000
    PHY_POWER_DOWN = 0x0800
    PHY_RESTART = 0x0200             # negotiation
    PHY_SELF_CLEARING = PHY_RESET | PHY_RESTART
    STATUS_LINK = 0x0024             # up, and negotiated
    SPECIFIC_LINK = 0x0C00           # up, and speed and duplex are settled

cdef uint32_t PHY_WRITABLE = sum(1 << number for number in (
    PHY_CONTROL, PHY_ADVERTISEMENT, PHY_1000T_CONTROL, PHY_SPECIFIC_CONTROL, PHY_INTERRUPT_ENABLE, PHY_EXTENDED_CONTROL, PHY_PAGE,
    PHY_PAGE_DATA))


# ---- EEPROM

cdef void rom_write(uint16_t* words, const unsigned char* mac) noexcept nogil:
    """Its contents as they leave the factory (5.6)."""
    cdef uint32_t i, total = 0
    memset(words, 0, ROM_WORDS * sizeof(uint16_t))
    for i in range(3):
        words[i] = mac[2 * i] | <uint16_t>mac[2 * i + 1] << 8
    words[0x05] = words[0x06] = words[0x07] = 0xFFFF
    words[0x08], words[0x09] = 0xA79C, 0x0003        # the board's number
    words[0x0A] = 0x4408                             # initialization control 1
    words[0x0B] = 0x001E                             # subsystem
    words[0x0C] = words[0x0E] = 0x8086
    words[0x0D] = 0x100E
    words[0x0F] = 0x3040                             # initialization control 2
    for i in range(<uint32_t>CHECKSUM_WORD):
        total += words[i]
    words[CHECKSUM_WORD] = <uint16_t>(CHECKSUM - total)


cdef uint32_t rom_read(const uint16_t* words, uint32_t request) noexcept nogil:
    """EERD after a store of `request`."""
    cdef uint32_t address = request >> 8 & 0xFF
    if not request & EERD_START:
        return address << 8
    return <uint32_t>(words[address] if address < ROM_WORDS else 0) << 16 | address << 8 | EERD_DONE


cdef void microwire_reset(Microwire* wire) noexcept nogil:
    memset(wire, 0, sizeof(wire[0]))
    wire.pins = EECD_DATA_OUT                        # ready


cdef uint32_t microwire_pins(const Microwire* wire) noexcept nogil:
    """EECD as it is read."""
    return wire.pins | PRESENT | (GRANT if wire.pins & REQUEST else 0)


cdef void microwire_drive(Microwire* wire, const uint16_t* words, uint32_t pins) noexcept nogil:
    """A store to EECD: bits go in and out at the clock's rising edge, and chip select's end ends a command."""
    cdef bint rises = pins & CLOCK and not wire.pins & CLOCK
    wire.pins = pins & EECD_WRITABLE | wire.pins & EECD_DATA_OUT
    if not pins & SELECT:
        wire.command = wire.received = wire.address = wire.sent = 0
        wire.pins |= EECD_DATA_OUT
    elif rises and wire.received < COMMAND_BITS:
        if wire.received or pins & DATA_IN:          # zeroes before the start bit mean nothing
            wire.command = wire.command << 1 | (1 if pins & DATA_IN else 0)
            wire.received += 1
        if wire.received == COMMAND_BITS and wire.command >> ADDRESS_BITS == READ:
            wire.address = wire.command & (ROM_WORDS - 1)
            wire.pins &= ~<uint32_t>EECD_DATA_OUT    # a zero goes before the word
    elif rises and wire.command >> ADDRESS_BITS == READ:
        wire.pins &= ~<uint32_t>EECD_DATA_OUT
        if words[wire.address] >> (WORD_BITS - 1 - wire.sent) & 1:
            wire.pins |= EECD_DATA_OUT
        wire.sent += 1
        if wire.sent == WORD_BITS:
            wire.sent = 0
            wire.address = (wire.address + 1) % ROM_WORDS


# ---- PHY

cdef void phy_reset(uint16_t* phy) noexcept nogil:
    memset(phy, 0, PHY_REGISTERS * sizeof(uint16_t))
    phy[PHY_CONTROL] = 0x1140                        # negotiation on; 1000 Mb/s, full duplex
    phy[PHY_ADVERTISEMENT] = 0x0DE1
    phy[PHY_1000T_CONTROL] = 0x0E00
    phy[PHY_SPECIFIC_CONTROL] = 0x0360
    phy[PHY_EXTENDED_CONTROL] = 0x0D60


cdef bint phy_is_on(const uint16_t* phy) noexcept nogil:
    return not phy[PHY_CONTROL] & PHY_POWER_DOWN


cdef uint16_t phy_read(const uint16_t* phy, uint32_t number, bint link) noexcept nogil:
    """`link`: the cable is in, and the PHY on."""
    if number == PHY_STATUS:
        return 0x7949 | (STATUS_LINK if link else 0)
    if number == PHY_ID1:
        return 0x0141
    if number == PHY_ID2:
        return 0x0C20
    if number == PHY_PARTNER:
        return 0x45E1 if link else 0
    if number == PHY_1000T_STATUS:
        return 0x3C00 if link else 0
    if number == PHY_EXTENDED_STATUS:
        return 0x3000
    if number == PHY_SPECIFIC_STATUS:
        return 0xA000 | (SPECIFIC_LINK if link else 0)
    return phy[number]


cdef bint phy_write(uint16_t* phy, uint32_t number, uint16_t value) noexcept nogil:
    """Whether it made the PHY negotiate anew."""
    if not PHY_WRITABLE >> number & 1:
        return False
    if number != PHY_CONTROL:
        phy[number] = value
        return False
    if value & PHY_RESET:
        phy_reset(phy)
    else:
        phy[PHY_CONTROL] = value & ~<uint16_t>PHY_SELF_CLEARING
    return value & PHY_SELF_CLEARING != 0
