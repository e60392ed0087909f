"""An 82540EM's way out (3.3 to 3.6): descriptors become frames in a buffer of ours, sums are put in, large ones are cut or handed on.

All of it runs in the I/O thread with the chip's `rings` held. A frame may be in the making between two rounds, and is saved.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from kvmapp.abi.posix cimport atomic_store_u32, iovec
from kvmapp.hw.e1000_chip cimport (BATCH, BPTC, CRC, CTRL, CTRL_VLAN, DESCRIPTOR, DONE, GOTC, GPTC, LONG_FRAME_MOST, MPTC, PTC64,
                                   TCTL, TCTL_ENABLED, TDBAL, TOT, TPT, TSCTC, TXDW, TXQE, TX_END, TX_EXTENDED, TX_IP_SUM,
                                   TX_REPORT, TX_SUM, TX_TAGGED, TX_TRANSPORT_SUM, TYPE_CONTEXT, TYPE_DATA, VET, Descriptor,
                                   E1000Chip, Ring)
from kvmapp.hw.e1000_frames cimport (ETHERNET_HEADER, GSO_TCP4, GSO_TCP6, HEADER_NEEDS_SUM, TUCMD_IP4, TUCMD_TCP, TUCMD_TSE,
                                     VLAN_TAG, Context, NetHeader, can_segment, fit_headers, insert_tag, is_broadcast, is_group,
                                     number_segment, put_sum)
from kvmapp.net.backend cimport LARGEST_FRAME


cdef class Sender:
    def __cinit__(self, E1000Chip chip not None):
        self.chip = chip

    def save(self):
        return {"version": 1, "contexts": (<char*>self.contexts)[:sizeof(self.contexts)], "flags": self.flags,
                "frame": (<char*>self.frame)[VLAN_TAG:VLAN_TAG + self.length]}

    def check(self, reader):
        """What `restore` takes, from a state that may be anything. Raises StateError."""
        checked = (reader.data("contexts", sizeof(self.contexts), sizeof(self.contexts)), reader.bits("flags", FRAME_FLAGS),
                   reader.data("frame", LARGEST_FRAME - VLAN_TAG))
        reader.done()
        return checked

    def restore(self, bytes contexts not None, uint32_t flags, bytes frame not None):
        memcpy(self.contexts, <const char*>contexts, sizeof(self.contexts))
        memcpy(&self.frame[VLAN_TAG], <const char*>frame, len(frame))
        self.flags, self.length = flags, len(frame)

    cdef void clear(self) noexcept nogil:
        memset(self.contexts, 0, sizeof(self.contexts))
        self.flags = self.length = 0

    cdef void transmit(self) noexcept nogil:
        cdef Ring ring
        cdef Descriptor descriptor
        cdef uint8_t* place
        cdef uint32_t causes = 0, done = 0
        if not self.chip.registers[TCTL >> 2] & TCTL_ENABLED or not self.chip.open_ring(&ring, TDBAL):
            return
        while done < BATCH and self.chip.ready(&ring, TDBAL):
            place = ring.base + DESCRIPTOR * ring.head
            memcpy(&descriptor, place, DESCRIPTOR)
            done += 1 + self.take(&descriptor)
            self.chip.advance(&ring, TDBAL)
            if descriptor.lower >> 24 & TX_REPORT:
                atomic_store_u32(<uint32_t*>(place + 12), descriptor.upper | DONE)
                causes |= TXDW
        if done >= BATCH:
            self.chip.bell.press()
        elif done:
            causes |= TXQE
        if causes:
            self.chip.raise_causes(causes)

    cdef uint32_t take(self, Descriptor* descriptor) noexcept nogil:
        """One descriptor; how many frames went out for it."""
        cdef uint32_t command = descriptor.lower >> 24, kind = descriptor.lower >> 20 & 15
        cdef bint extended = command & TX_EXTENDED != 0
        if extended and kind == TYPE_CONTEXT:
            memcpy(&self.contexts[1 if command & TUCMD_TSE else 0], descriptor, DESCRIPTOR)
            return 0
        if extended and kind != TYPE_DATA:
            self.chip.complain(b"a transmit descriptor of no known type", kind)
            return 0
        if not self.flags & STARTED:
            self.length = 0
            self.flags = STARTED
            if extended:
                self.flags |= descriptor.upper >> 8 & (TX_IP_SUM | TX_TRANSPORT_SUM)
                self.flags |= SEGMENTED if command & TX_SUM else 0
        self.append(descriptor.address, descriptor.lower & (0xFFFFF if extended else 0xFFFF))
        if not command & TX_END:
            return 0
        if not extended and command & TX_SUM and not self.flags & SPOILED:
            put_sum(&self.frame[VLAN_TAG], self.length, descriptor.upper >> 8 & 0xFF, descriptor.lower >> 16 & 0xFF, 0, False)
        return self.finish(command & TX_TAGGED and self.chip.registers[CTRL >> 2] & CTRL_VLAN, descriptor.upper >> 16)

    cdef void append(self, uint64_t gpa, uint32_t length) noexcept nogil:
        cdef uint8_t* source
        if self.flags & SPOILED or not length:
            return
        source = NULL
        if length <= LARGEST_FRAME - VLAN_TAG - self.length:
            source = self.chip.memory.translate(gpa, length)
            if source == NULL:
                self.chip.complain(b"a frame outside of RAM", gpa)
        else:
            self.chip.complain(b"a frame too long", self.length + <uint64_t>length)
        if source == NULL:
            self.flags |= SPOILED
            self.length = 0
            return
        memcpy(&self.frame[VLAN_TAG + self.length], source, length)
        self.length += length

    cdef uint32_t finish(self, bint tagged, uint32_t tag) noexcept nogil:
        """The frame is whole: sends it; how many it became."""
        cdef uint32_t flags = self.flags, length = self.length, sent = 1
        cdef NetHeader header
        memset(&header, 0, sizeof(header))
        self.flags = self.length = 0
        if flags & SPOILED or length < ETHERNET_HEADER or (length > LONG_FRAME_MOST and not flags & SEGMENTED):
            if not flags & SPOILED:
                self.chip.complain(b"frame of impossible length", length)
            self.dropped += 1
        elif not self.chip.is_up():
            self.dropped += 1
        elif flags & SEGMENTED:
            sent = self.send_large(&header, length, flags, tagged, tag)
        else:
            self.put_sums(&header, length, flags)
            self.send(&header, &self.frame[VLAN_TAG], length, tagged, tag)
        return sent

    cdef void put_sums(self, NetHeader* header, uint32_t length, uint32_t flags) noexcept nogil:
        """What POPTS asks for (3.6); the transport's is left to the host's kernel where that takes it."""
        cdef Context* context = &self.contexts[0]
        cdef uint8_t* frame = &self.frame[VLAN_TAG]
        if flags & TX_IP_SUM:
            put_sum(frame, length, context.ip_start, context.ip_place, context.ip_end, False)
        if not flags & TX_TRANSPORT_SUM:
            return
        if self.chip.backend.has_offloads and not context.transport_end and context.transport_start <= context.transport_place and \
                context.transport_place + 2 <= <int>length:
            header.flags = HEADER_NEEDS_SUM
            header.sum_start = context.transport_start
            header.sum_offset = context.transport_place - context.transport_start
        else:
            put_sum(frame, length, context.transport_start, context.transport_place, context.transport_end,
                    not context.command >> 24 & TUCMD_TCP)

    cdef uint32_t send_large(self, NetHeader* header, uint32_t length, uint32_t flags, bint tagged, uint32_t tag) noexcept nogil:
        """TCP segmentation (3.5): the host's kernel's, or ours; how many frames were sent. Each segment's header is written before its
        payload, over what was sent already."""
        cdef Context* context = &self.contexts[1]
        cdef uint32_t headers = context.header_length, offset = 0, number = 0, part
        cdef uint8_t saved[256]
        cdef uint8_t* frame = &self.frame[VLAN_TAG]
        if not can_segment(context, length):
            self.chip.complain(b"a frame that cannot be segmented, its header has bytes", headers)
            self.dropped += 1
            return 1
        self.chip.count(TSCTC)
        if self.chip.backend.has_offloads:
            fit_headers(frame, length, context, flags & TX_IP_SUM)
            header.flags = HEADER_NEEDS_SUM
            if length - headers > context.segment:       # what fits one segment is none of several to the kernel
                header.gso_type = GSO_TCP4 if context.command >> 24 & TUCMD_IP4 else GSO_TCP6
                header.header_length = headers
                header.gso_size = context.segment
            header.sum_start = context.transport_start
            header.sum_offset = context.transport_place - context.transport_start
            self.send(header, frame, length, tagged, tag)
            return 1
        memcpy(saved, frame, headers)
        while offset < length - headers:
            part = min(length - headers - offset, <uint32_t>context.segment)
            memcpy(frame, saved, headers)
            number_segment(frame, context, number, offset, offset + part == length - headers)
            fit_headers(frame, headers + part, context, flags & TX_IP_SUM)
            if flags & TX_TRANSPORT_SUM:
                put_sum(frame, headers + part, context.transport_start, context.transport_place, 0, False)
            self.send(header, frame, headers + part, tagged, tag)
            offset += part
            number += 1
            frame += part
        return number

    cdef void send(self, NetHeader* header, uint8_t* frame, uint32_t length, bint tagged, uint32_t tag) noexcept nogil:
        """One frame to the backend; what it does not take is dropped, as on a wire. The VLAN_TAG bytes before it may be used."""
        cdef iovec vector[2]
        if tagged:
            insert_tag(frame, self.chip.registers[VET >> 2], tag)
            frame -= VLAN_TAG
            length += VLAN_TAG
            header.sum_start += VLAN_TAG if header.flags else 0
            header.header_length += VLAN_TAG if header.gso_type else 0
        vector[0].iov_base, vector[0].iov_len = header, sizeof(header[0])
        vector[1].iov_base, vector[1].iov_len = frame, length
        if self.chip.backend.send(vector, 2) < 0:
            self.dropped += 1
            return
        self.packets += 1
        self.octets += length
        self.chip.count(TPT)
        self.chip.count(GPTC)
        self.chip.count_bytes(TOT, length + CRC)
        self.chip.count_bytes(GOTC, length + CRC)
        self.chip.count_size(PTC64, length + CRC)
        if is_group(frame):
            self.chip.count(BPTC if is_broadcast(frame) else MPTC)
