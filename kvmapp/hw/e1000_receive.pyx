"""An 82540EM's way in (3.2): filters, then the driver's buffers. A frame is read into a buffer of ours and copied from there.

All of it runs in the I/O thread with the chip's `rings` held. With no descriptors left, or no link, frames stay in the backend, whose
descriptor is then not waited on.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memmove, memset

from kvmapp.abi.epoll cimport EPOLLET, EPOLLIN
from kvmapp.abi.posix cimport EAGAIN, atomic_store_u32, iovec, pthread_mutex_lock, pthread_mutex_unlock
from kvmapp.abi.tun cimport EBADFD
from kvmapp.hw.e1000_chip cimport (BATCH, BPRC, CRC, CTRL, CTRL_VLAN, DESCRIPTOR, DONE, FRAME_LEAST, FRAME_MOST, GORC, GPRC,
                                   LONG_FRAME_MOST, MPC, MPRC, MTA, PRC64, RAH_VALID, RAL, RCTL, RCTL_ALL_GROUPS, RCTL_ALL_UNICAST,
                                   RCTL_BROADCAST, RCTL_ENABLED, RCTL_LARGE_BUFFERS, RCTL_LONG, RCTL_STRIP_CRC, RCTL_VLAN_FILTER,
                                   RDBAL, RECEIVE_ADDRESSES, RNBC, ROC, RXCSUM, RXCSUM_TRANSPORT, RXDMT0, RXO, RXT0, RX_END,
                                   RX_ERROR, RX_NO_SUMS, RX_TAGGED, RX_TRANSPORT_GOOD, TOR, TPR, VET, VFTA, VLAN_ID, E1000Chip,
                                   Ring)
from kvmapp.hw.e1000_frames cimport (ADDRESS, ETHERNET_HEADER, HEADER_DATA_VALID, VLAN_TAG, get16, group_hash, is_broadcast,
                                     is_group)
from kvmapp.iothread cimport EventSource
from kvmapp.net.backend cimport NET_HEADER


cdef class FrameReader(EventSource):
    """The backend's descriptor."""

    def __cinit__(self, Receiver receiver not None):
        self.receiver = receiver
        self.fd = receiver.chip.backend.fd

    cdef void ready(self, uint32_t events) noexcept nogil:
        self.receiver.frames_ready()


cdef class Receiver:
    def __cinit__(self, E1000Chip chip not None):
        self.chip = chip
        self.reader = FrameReader(self)

    cdef void frames_ready(self) noexcept nogil:
        pthread_mutex_lock(&self.chip.rings)
        if self.running:
            self.receive()
        else:
            self.watch_frames(False)                 # `resume` looks again
        pthread_mutex_unlock(&self.chip.rings)

    cdef void receive(self) noexcept nogil:
        """Frames into the driver's buffers, until there are no more of the one or the other."""
        cdef Ring ring
        cdef iovec vector[2]
        cdef ssize_t length
        cdef uint32_t causes = 0, done = 0
        cdef bint usable = self.chip.registers[RCTL >> 2] & RCTL_ENABLED and self.chip.is_up() and self.chip.open_ring(&ring, RDBAL)
        while done < BATCH:
            if not usable or not self.chip.ready(&ring, RDBAL):
                self.watch_frames(False)
                break
            vector[0].iov_base, vector[0].iov_len = &self.header, NET_HEADER
            vector[1].iov_base, vector[1].iov_len = self.frame, LONG_FRAME_MOST + 1
            length = self.chip.backend.receive(vector, 2) - NET_HEADER
            if length <= -NET_HEADER:                # nothing at all: the other end has gone
                length += NET_HEADER
                if length and length != -EAGAIN:
                    self.chip.report_host(b"no frames from the host", 0, <int>-length)
                self.watch_frames(length < 0 and length != -EBADFD)      # an error is that of one frame: the next one may be good
                break
            if length < ETHERNET_HEADER:
                self.dropped += 1
            else:
                causes |= self.sort(&ring, <uint32_t>length)
            done += 1
        if done == BATCH:
            self.chip.bell.press()
        if causes:
            self.chip.raise_causes(causes)

    cdef uint32_t sort(self, Ring* ring, uint32_t length) noexcept nogil:
        """A frame has come: filters (3.2.1), then the ring. The causes of interrupts that it gives."""
        cdef uint8_t* frame = self.frame
        cdef uint32_t control = self.chip.registers[RCTL >> 2], status = DONE, tag = 0
        cdef bint is_tagged = get16(frame + 2 * ADDRESS) == self.chip.registers[VET >> 2] and length >= ETHERNET_HEADER + VLAN_TAG
        if length < FRAME_LEAST:
            memset(frame + length, 0, FRAME_LEAST - length)
            length = FRAME_LEAST
        self.chip.count(TPR)
        self.chip.count_bytes(TOR, length + CRC)
        if length + CRC > <uint32_t>(LONG_FRAME_MOST if control & RCTL_LONG else FRAME_MOST):
            self.chip.count(ROC)
            self.dropped += 1
            return 0
        if is_tagged:
            tag = get16(frame + ETHERNET_HEADER)
        if not self.is_wanted(frame, is_tagged, tag & VLAN_ID):
            return 0
        self.count_received(frame, length + CRC)
        if is_tagged and self.chip.registers[CTRL >> 2] & CTRL_VLAN:
            memmove(frame + VLAN_TAG, frame, 2 * ADDRESS)
            frame += VLAN_TAG
            length -= VLAN_TAG
            status |= RX_TAGGED
        else:
            tag = 0
        if self.header.flags & HEADER_DATA_VALID and self.chip.registers[RXCSUM >> 2] & RXCSUM_TRANSPORT:
            status |= RX_TRANSPORT_GOOD
        else:
            status |= RX_NO_SUMS
        return self.deliver(ring, frame, length, status | tag << 16)

    cdef bint is_wanted(self, const uint8_t* frame, bint is_tagged, uint32_t vlan) noexcept nogil:
        cdef uint32_t control = self.chip.registers[RCTL >> 2], i, hash
        cdef uint32_t shift = (0x0234 >> 4 * (control >> 12 & 3)) & 15       # by MO: 4, 3, 2, 0
        if is_tagged and control & RCTL_VLAN_FILTER and not self.chip.registers[(VFTA >> 2) + (vlan >> 5)] >> (vlan & 31) & 1:
            return False
        if is_group(frame):
            if control & RCTL_ALL_GROUPS or (control & RCTL_BROADCAST and is_broadcast(frame)):
                return True
            hash = group_hash(frame, shift)
            if self.chip.registers[(MTA >> 2) + (hash >> 5)] >> (hash & 31) & 1:
                return True
        elif control & RCTL_ALL_UNICAST:
            return True
        for i in range(RAL >> 2, (RAL >> 2) + 2 * RECEIVE_ADDRESSES, 2):
            if self.chip.registers[i + 1] & RAH_VALID and memcmp(&self.chip.registers[i], frame, ADDRESS) == 0:
                return True
        return False

    cdef void count_received(self, const uint8_t* frame, uint32_t length) noexcept nogil:
        self.chip.count(GPRC)
        self.chip.count_bytes(GORC, length)
        self.chip.count_size(PRC64, length)
        if is_group(frame):
            self.chip.count(BPRC if is_broadcast(frame) else MPRC)

    cdef uint32_t deliver(self, Ring* ring, const uint8_t* frame, uint32_t length, uint32_t status) noexcept nogil:
        """Into as many buffers as it needs; the causes of interrupts that it gives."""
        cdef uint32_t control = self.chip.registers[RCTL >> 2], whole = length if control & RCTL_STRIP_CRC else length + CRC
        cdef uint32_t size = 2048 >> (control >> 16 & 3), done = 0, part, free = self.chip.ready(ring, RDBAL)
        cdef uint32_t least = ring.count >> (1 + min(control >> 8 & 3, <uint32_t>2))
        cdef uint8_t* place
        cdef uint8_t* target
        cdef uint64_t gpa
        cdef uint32_t word
        if control & RCTL_LARGE_BUFFERS and size < 2048:
            size *= 16
        if free * size < whole:
            self.chip.count(MPC)
            self.chip.count(RNBC)
            self.dropped += 1
            return RXO
        memset(<uint8_t*>frame + length, 0, CRC)
        while done < whole:
            place = ring.base + DESCRIPTOR * ring.head
            part = min(whole - done, size)
            memcpy(&gpa, place, sizeof(gpa))
            word = status
            target = self.chip.memory.translate(gpa, part)
            if target == NULL:
                self.chip.complain(b"a receive buffer outside of RAM", gpa)
                word |= RX_ERROR
            else:
                memcpy(target, frame + done, part)
            done += part
            if done == whole:
                word |= RX_END
            (<uint32_t*>place)[2] = part
            atomic_store_u32(<uint32_t*>(place + 12), word)
            self.chip.advance(ring, RDBAL)
            free -= 1
        self.packets += 1
        self.octets += length
        return RXT0 | (RXDMT0 if free <= least else 0)

    cdef void watch_frames(self, bint wanted) noexcept nogil:
        """Unwanted frames leave the descriptor ready: edge-triggered, without EPOLLIN, it stays quiet."""
        if wanted != self.watching:
            self.watching = wanted
            self.reader.watch(EPOLLIN if wanted else EPOLLET)
