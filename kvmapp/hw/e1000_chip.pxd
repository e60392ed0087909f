from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from kvmapp.abi.posix cimport pthread_mutex_t
from kvmapp.hw.e1000_rom cimport PHY_REGISTERS
from kvmapp.hw.pci cimport PciFunction
from kvmapp.iothread cimport Doorbell, Timer
from kvmapp.memory cimport GuestMemory
from kvmapp.net.backend cimport NetBackend

cdef enum:
    # Registers (13.3), offsets in BAR 0.
    CTRL = 0x0000
    CTRL_LINK = 0x00000040           # SLU: the MAC heeds the PHY's link
    CTRL_RESET = 0x04000000
    CTRL_VLAN = 0x40000000           # VME: tags come and go in descriptors
    CTRL_PHY_RESET = 0x80000000
    CTRL_DEFAULT = 0x00140241        # link, full duplex, 1000 Mb/s, software pins as the EEPROM has them
    STATUS = 0x0008
    STATUS_LINK = 0x02
    STATUS_ALWAYS = 0x81             # full duplex, 1000 Mb/s
    EECD = 0x0010
    EERD = 0x0014
    MDIC = 0x0020
    MDIC_WRITE = 1
    MDIC_READ = 2
    MDIC_READY = 0x10000000
    MDIC_INTERRUPT = 0x20000000
    MDIC_ERROR = 0x40000000
    MDIC_DATA = 0x0000FFFF
    PHY_ADDRESS = 1
    VET = 0x0038
    ICR = 0x00C0
    ITR = 0x00C4
    ITR_UNIT = 256                   # ns
    ICS = 0x00C8
    IMS = 0x00D0
    IMC = 0x00D8
    RCTL = 0x0100
    RCTL_ENABLED = 0x00000002
    RCTL_ALL_UNICAST = 0x00000008
    RCTL_ALL_GROUPS = 0x00000010
    RCTL_LONG = 0x00000020
    RCTL_BROADCAST = 0x00008000
    RCTL_VLAN_FILTER = 0x00040000
    RCTL_LARGE_BUFFERS = 0x02000000
    RCTL_STRIP_CRC = 0x04000000
    TCTL = 0x0400
    TCTL_ENABLED = 0x2
    PBA = 0x1000
    RDBAL = 0x2800                   # then BAH, LEN, head and tail, as of the other ring
    RDT = 0x2818
    TDBAL = 0x3800
    TDT = 0x3818
    RING_HIGH = 0x04
    RING_LENGTH = 0x08
    RING_HEAD = 0x10
    RING_TAIL = 0x18
    STATISTICS = 0x4000
    STATISTICS_END = 0x4100
    RXCSUM = 0x5000
    RXCSUM_TRANSPORT = 0x200         # TUOFL
    MTA = 0x5200
    RAL = 0x5400                     # then its RAH; 16 pairs
    RAH_VALID = 0x80000000
    RECEIVE_ADDRESSES = 16
    VFTA = 0x5600
    TABLE_SIZE = 0x200               # of MTA and VFTA
    REGISTERS = 0x1700               # words

    # Statistics (13.7) that tell something here; in a group of sizes the first one.
    MPC = 0x4010
    PRC64 = 0x405C
    GPRC = 0x4074
    BPRC = 0x4078
    MPRC = 0x407C
    GPTC = 0x4080
    GORC = 0x4088
    GOTC = 0x4090
    RNBC = 0x40A0
    ROC = 0x40AC
    TOR = 0x40C0
    TOT = 0x40C8
    TPR = 0x40D0
    TPT = 0x40D4
    PTC64 = 0x40D8
    MPTC = 0x40F0
    BPTC = 0x40F4
    TSCTC = 0x40F8

    # BAR 1: an address, and the register there (13.2.2).
    IO_WINDOW = 0x20000              # behind BAR 0 in our register space
    IO_DATA = 4
    IO_ADDRESS_BITS = 0x000FFFFF
    MEMORY_BAR = 0
    IO_BAR = 1
    IO_SIZE = 0x40

    # Causes of interrupts (13.4.17).
    TXDW = 0x01
    TXQE = 0x02
    LSC = 0x04
    RXDMT0 = 0x10
    RXO = 0x40
    RXT0 = 0x80
    MDAC = 0x200
    CAUSES = 0x1FFFF

    # Descriptors (3.2.3, 3.3).
    DESCRIPTOR = 16
    DONE = 0x01
    RX_END = 0x02
    RX_NO_SUMS = 0x04                # IXSM
    RX_TAGGED = 0x08
    RX_TRANSPORT_GOOD = 0x20
    RX_ERROR = 0x8000                # RXE, in the byte above
    TX_END = 0x01                    # bits of the command
    TX_SUM = 0x04                    # legacy: IC; extended: TSE
    TX_REPORT = 0x18                 # RS, RPS
    TX_EXTENDED = 0x20
    TX_TAGGED = 0x40
    TX_IP_SUM = 0x01                 # POPTS
    TX_TRANSPORT_SUM = 0x02
    TYPE_CONTEXT = 0
    TYPE_DATA = 1

    CRC = 4
    FRAME_LEAST = 60                 # without CRC; what comes shorter is padded
    FRAME_MOST = 1522                # with CRC and a VLAN tag, unless long ones are wanted
    LONG_FRAME_MOST = 16384
    BATCH = 256                      # descriptors and frames in a round, then others have their turn
    VLAN_ID = 0xFFF

cdef uint32_t BITS[REGISTERS]        # what a register can hold; ICR, IMS and what the hardware alone changes among them

cdef struct Ring:
    uint8_t* base
    uint32_t count                   # descriptors
    uint32_t head

cdef packed struct Descriptor:       # transmit's, or receive's whose length stands in `lower`
    uint64_t address
    uint32_t lower                   # length, and above it CSO or DTYP, then the command
    uint32_t upper                   # status, CSS or POPTS, and the tag


cdef class E1000Chip(PciFunction):
    cdef GuestMemory memory
    cdef readonly NetBackend backend
    cdef Doorbell bell
    cdef Throttle throttle
    cdef pthread_mutex_t rings
    cdef pthread_mutex_t causes
    cdef bint cable
    cdef bint throttled              # the timer will look at the interrupt again
    cdef int64_t quiet_until         # ns of CLOCK_MONOTONIC: no interrupt before
    cdef uint16_t phy[PHY_REGISTERS]
    cdef uint32_t registers[REGISTERS]

    cdef bint is_up(self) noexcept nogil
    cdef uint32_t take_statistic(self, uint32_t offset) noexcept nogil
    cdef void count(self, uint32_t offset) noexcept nogil
    cdef void count_bytes(self, uint32_t offset, uint32_t length) noexcept nogil
    cdef void count_size(self, uint32_t offset, uint32_t length) noexcept nogil
    cdef uint32_t take_causes(self) noexcept nogil
    cdef void store_interrupts(self, uint32_t offset, uint32_t value) noexcept nogil
    cdef void raise_causes(self, uint32_t causes) noexcept nogil
    cdef void settle_pin(self) noexcept nogil
    cdef void throttle_over(self) noexcept nogil
    cdef bint open_ring(self, Ring* ring, uint32_t first) noexcept nogil
    cdef uint32_t ready(self, Ring* ring, uint32_t first) noexcept nogil
    cdef void advance(self, Ring* ring, uint32_t first) noexcept nogil


cdef class Throttle(Timer):
    cdef E1000Chip chip
