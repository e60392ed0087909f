from libc.stdint cimport uint16_t, uint32_t

cdef enum:
    ROM_WORDS = 64
    PHY_REGISTERS = 32

    # EECD
    EECD_WRITABLE = 0x77             # clock, chip select, data in, flash enable, request
    EECD_DATA_OUT = 0x08

    COMMAND_BITS = 9                 # a start bit, two of what to do, six of the address

cdef struct Microwire:
    uint32_t pins                    # as the driver drives them, and data out
    uint32_t command                 # what has come of it since chip select
    uint32_t received                # its bits
    uint32_t address                 # of the word that is being read
    uint32_t sent                    # its bits

cdef void rom_write(uint16_t* words, const unsigned char* mac) noexcept nogil
cdef uint32_t rom_read(const uint16_t* words, uint32_t request) noexcept nogil
cdef void microwire_reset(Microwire* wire) noexcept nogil
cdef void microwire_drive(Microwire* wire, const uint16_t* words, uint32_t pins) noexcept nogil
cdef uint32_t microwire_pins(const Microwire* wire) noexcept nogil

cdef void phy_reset(uint16_t* phy) noexcept nogil
cdef bint phy_is_on(const uint16_t* phy) noexcept nogil
cdef uint16_t phy_read(const uint16_t* phy, uint32_t number, bint link) noexcept nogil
cdef bint phy_write(uint16_t* phy, uint32_t number, uint16_t value) noexcept nogil
