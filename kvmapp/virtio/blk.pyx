"""The virtio block device (VIRTIO 1.2, 5.2): the guest's disk, carried by any BlockBackend.

A request's data goes between guest memory and the host without a copy: its descriptors become the vector that the host reads or
writes. Each queue has a channel of its own into the disk and works in the I/O thread that it was given; a kick takes all requests
that wait, starts them as one batch, and what is done comes back as one batch with at most one interrupt.

Reset, pause and a queue's reset wait until the host has let go of all guest memory. A write for which the host has no room stays with
the queue, the machine is asked to pause (Power, DISK_FULL), and what is left of it is tried again when it goes on. Left out: secure
erase, lifetime, zones, SCSI commands, several segments in one discard.
"""
from cpython.object cimport PyObject
from libc.stdint cimport UINT64_MAX, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from kvmapp.abi.posix cimport (EDQUOT, ENOSPC, ERANGE, EROFS, atomic_load_u32, atomic_store_u32, iovec, pthread_cond_broadcast,
                               pthread_cond_destroy, pthread_cond_init, pthread_cond_wait, pthread_mutex_lock,
                               pthread_mutex_unlock)
from kvmapp.abi.virtio cimport VIRTIO_ID_BLOCK
from kvmapp.abi.virtio_blk cimport (VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
                                    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
                                    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
                                    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
                                    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
                                    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, virtio_blk_config,
                                    virtio_blk_discard_write_zeroes, virtio_blk_outhdr)
from kvmapp.block.backend cimport (BLOCK_DISCARD, BLOCK_FLUSH, BLOCK_FUA, BLOCK_MAY_UNMAP, BLOCK_OPERATIONS, BLOCK_READ,
                                   BLOCK_SECTOR, BLOCK_WRITE, BLOCK_WRITE_ZEROES, BlockBackend, block_pop, block_push)
from kvmapp.devices cimport DISK_FULL, Power
from kvmapp.memory cimport GuestMemory
from kvmapp.virtio.virtqueue cimport Virtqueue, chain_cut_last, chain_put, chain_take

from kvmapp.errors import HostError
from kvmapp.state import StateError

cdef enum:
    QUEUE_SIZE = 256
    SEGMENTS_MOST = QUEUE_SIZE - 2   # of data: header and status are the other two
    SEGMENT_MOST = 1 << 20           # bytes, on the average of a request: what a reset waits for is bounded
    DISCARD_MOST = 1 << 21           # sectors
    WRITE_ZEROES_MOST = 1 << 18      # sectors; a host may have to write them all
    SECTOR_SHIFT = 9
    WRITEBACK = 32                   # offset in the config space

cdef const char* FAILURES[BLOCK_OPERATIONS]
FAILURES[:] = [b"cannot read at byte", b"cannot write at byte", b"cannot flush", b"cannot discard at byte",
               b"cannot write zeroes at byte"]


cdef class BlkQueue(BlockClient):
    """One virtqueue and its channel. Everything here runs in the queue's I/O thread (or the control thread in its place)."""

    def __cinit__(self, VirtioBlk device not None, Virtqueue queue not None):
        cdef uint32_t i
        pthread_cond_init(&self.idle, NULL)
        self.device = device
        self.queue = queue
        self.slots = <BlkSlot*>calloc(queue.size_max, sizeof(BlkSlot))
        self.vectors = <iovec*>calloc(queue.size_max * queue.size_max, sizeof(iovec))
        if self.slots == NULL or self.vectors == NULL:
            raise MemoryError
        self.under_way = queue.size_max
        for i in range(queue.size_max):
            self.slots[i].chain.storage = self.vectors + i * queue.size_max
            self.slots[i].chain.capacity = queue.size_max
            self.rest(&self.slots[i])

    def __dealloc__(self):
        free(self.slots)
        free(self.vectors)
        pthread_cond_destroy(&self.idle)

    def open_channel(self, thread):
        """From now on requests are carried in this thread."""
        self.close_channel()
        self.channel = self.device.disk.open_channel(thread, self)

    def close_channel(self):
        if self.channel is not None:
            self.channel.close()

    cdef void work(self) noexcept nogil:
        """A kick, with the queue's lock held."""
        cdef BlkSlot* slot
        cdef BlockRequest* request
        if atomic_load_u32(&self.stuck):
            return
        self.working = True
        self.starved = False
        while True:
            request = block_pop(&self.stranded)
            if request == NULL:
                break
            self.under_way += 1
            self.channel.resubmit(request)
        while True:
            slot = <BlkSlot*>self.free
            if slot == NULL:
                self.starved = True
                break
            if self.queue.pop(&slot.chain) != 1:
                break
            self.free = slot.request.next
            self.under_way += 1
            self.begin(slot)
        self.channel.commit()
        self.working = False
        self.end_round()

    cdef void completed(self, BlockRequest* requests) noexcept nogil:
        cdef BlkSlot* slot
        cdef bint locks = not self.working
        cdef bint full = False
        if locks:
            pthread_mutex_lock(&self.queue.lock)
        while requests != NULL:
            slot = <BlkSlot*>requests
            requests = slot.request.next
            if slot.request.result == 0:
                self.answer(slot, VIRTIO_BLK_S_OK, slot.room if slot.request.operation == BLOCK_READ else 0)
                continue
            self.device.say_failed(&slot.request)
            if self.device.waits_for_room(&slot.request):
                full = True
                self.under_way -= 1
                block_push(&self.stranded, &slot.request)
            else:
                self.answer(slot, VIRTIO_BLK_S_IOERR, 0)
        if full:
            atomic_store_u32(&self.stuck, True)
            self.device.power.request(DISK_FULL, 0)
        if locks:
            self.end_round()
            pthread_mutex_unlock(&self.queue.lock)

    cdef void await_idle(self) noexcept nogil:
        """Returns when the guest's memory is the guest's again; for any thread but the queue's, which must run."""
        pthread_mutex_lock(&self.queue.lock)
        while self.under_way:
            pthread_cond_wait(&self.idle, &self.queue.lock)
        pthread_mutex_unlock(&self.queue.lock)

    cdef void begin(self, BlkSlot* slot) noexcept nogil:
        """Makes a request of a chain: a 16-byte header, data, and the status in the last writable byte, cut up at will."""
        cdef virtio_blk_outhdr header
        cdef BlockRequest* request = &slot.request
        slot.status = chain_cut_last(&slot.chain)
        slot.room = slot.chain.writable_bytes
        if slot.status == NULL:
            self.device.complain(b"request without a byte for its status, head", slot.chain.head)
            self.queue.push(&slot.chain, 0)
            self.rest(slot)
            return
        if chain_take(&slot.chain, &header, sizeof(header)) != sizeof(header):
            self.refuse(slot, b"request without a whole header, head", slot.chain.head)
            return
        request.flags = request.vector_count = 0
        request.offset = request.length = 0
        if header.type == VIRTIO_BLK_T_IN or header.type == VIRTIO_BLK_T_OUT:
            self.begin_transfer(slot, &header)
        elif header.type == VIRTIO_BLK_T_FLUSH:
            request.operation = BLOCK_FLUSH
            self.channel.submit(request)
        elif header.type == VIRTIO_BLK_T_GET_ID:
            self.answer(slot, VIRTIO_BLK_S_OK, chain_put(&slot.chain, self.device.serial, VIRTIO_BLK_ID_BYTES))
        elif header.type == VIRTIO_BLK_T_DISCARD and self.device.has(VIRTIO_BLK_F_DISCARD):
            self.begin_range(slot, BLOCK_DISCARD, 0, DISCARD_MOST)
        elif header.type == VIRTIO_BLK_T_WRITE_ZEROES and self.device.has(VIRTIO_BLK_F_WRITE_ZEROES):
            self.begin_range(slot, BLOCK_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, WRITE_ZEROES_MOST)
        else:
            self.answer(slot, VIRTIO_BLK_S_UNSUPP, 0)

    cdef void begin_transfer(self, BlkSlot* slot, virtio_blk_outhdr* header) noexcept nogil:
        """A read or a write: the chain's own vectors go to the host."""
        cdef BlockRequest* request = &slot.request
        if header.type == VIRTIO_BLK_T_IN:
            request.operation = BLOCK_READ
            request.length = slot.room
            request.vector = slot.chain.writable
            request.vector_count = slot.chain.writable_count
        else:
            request.operation = BLOCK_WRITE
            request.length = slot.chain.readable_bytes
            request.vector = slot.chain.readable
            request.vector_count = slot.chain.readable_count
            if atomic_load_u32(&self.device.write_through):
                request.flags = BLOCK_FUA
        if request.length > <uint64_t>SEGMENTS_MOST * SEGMENT_MOST:
            self.refuse(slot, b"request of more bytes than seg_max and size_max allow", request.length)
        else:
            self.submit_at(slot, header.sector)

    cdef void begin_range(self, BlkSlot* slot, uint32_t operation, uint32_t flags, uint32_t most) noexcept nogil:
        """Discard and write-zeroes: a range of up to `most` sectors instead of data, with these `flags` at most (5.2.6)."""
        cdef virtio_blk_discard_write_zeroes span
        cdef BlockRequest* request = &slot.request
        if slot.chain.readable_bytes != sizeof(span):
            self.refuse(slot, b"discard or write-zeroes of other than one range, bytes", slot.chain.readable_bytes)
            return
        chain_take(&slot.chain, &span, sizeof(span))
        if span.flags & ~flags:
            self.answer(slot, VIRTIO_BLK_S_UNSUPP, 0)
        elif span.num_sectors > most:
            self.refuse(slot, b"discard or write-zeroes of too many sectors", span.num_sectors)
        else:
            request.operation = operation
            request.length = <uint64_t>span.num_sectors << SECTOR_SHIFT
            if span.flags:
                request.flags = BLOCK_MAY_UNMAP
            if operation == BLOCK_WRITE_ZEROES and atomic_load_u32(&self.device.write_through):
                request.flags |= BLOCK_FUA
            self.submit_at(slot, span.sector)

    cdef void submit_at(self, BlkSlot* slot, uint64_t sector) noexcept nogil:
        """The channel checks that the request lies on the disk; here only that its first byte has a number."""
        if sector >> (64 - SECTOR_SHIFT):
            self.refuse(slot, b"request beyond the end of the disk, sector", sector)
            return
        slot.request.offset = sector << SECTOR_SHIFT
        self.channel.submit(&slot.request)

    cdef void refuse(self, BlkSlot* slot, const char* what, uint64_t value) noexcept nogil:
        self.device.complain(what, value)
        self.answer(slot, VIRTIO_BLK_S_IOERR, 0)

    cdef void answer(self, BlkSlot* slot, uint8_t status, uint64_t filled) noexcept nogil:
        """Gives the chain back, `filled` bytes of its data and its status set; the driver sees it at the round's end.

        Only bytes without a gap from the first one on may be counted as written (2.7.8.2): the status after whole data only.
        """
        slot.status[0] = status
        self.queue.push(&slot.chain, <uint32_t>filled + (filled == slot.room))
        self.rest(slot)

    cdef void rest(self, BlkSlot* slot) noexcept nogil:
        slot.request.next = self.free
        self.free = &slot.request
        self.under_way -= 1

    cdef void forget(self) noexcept nogil:
        """The queue is being reset: nobody waits for its requests any more."""
        cdef BlockRequest* request
        pthread_mutex_lock(&self.queue.lock)
        while True:
            request = block_pop(&self.stranded)
            if request == NULL:
                break
            self.under_way += 1
            self.rest(<BlkSlot*>request)
        atomic_store_u32(&self.stuck, False)
        pthread_mutex_unlock(&self.queue.lock)

    cdef void try_again(self) noexcept nogil:
        """The next kick begins with what had no room."""
        atomic_store_u32(&self.stuck, False)

    cdef void give_up(self) noexcept nogil:
        """Nothing is begun again on a broken queue: what had no room has failed."""
        cdef BlockRequest* request
        while True:
            request = block_pop(&self.stranded)
            if request == NULL:
                break
            self.under_way += 1
            self.answer(<BlkSlot*>request, VIRTIO_BLK_S_IOERR, 0)
        atomic_store_u32(&self.stuck, False)

    cdef void end_round(self) noexcept nogil:
        """Shows the driver what was answered, with the queue's lock held."""
        if self.queue.broken:
            self.give_up()
        self.device.notify_used(self.queue)
        if self.starved and self.free != NULL:
            self.queue.doorbell.press()
        if self.under_way == 0:
            pthread_cond_broadcast(&self.idle)


cdef class VirtioBlk(VirtioDevice):
    """`disk` belongs to the device from now on. `serial`: up to 20 characters that the guest can ask for. `power`, if given, is asked
    to pause the machine when the host has no room for what the guest writes; else the guest gets an error."""

    def __cinit__(self, str name not None, GuestMemory memory not None, BlockBackend disk not None, *, str serial not None="",
                  uint32_t queues=1, Power power=None):
        cdef bytes text = serial.encode("ascii")
        if len(text) > VIRTIO_BLK_ID_BYTES:
            raise ValueError(f"{name}: a serial number has at most {VIRTIO_BLK_ID_BYTES} characters, not {serial!r}")
        memcpy(self.serial, <const char*>text, len(text))
        self.disk = disk
        self.power = power
        self.device_id = VIRTIO_ID_BLOCK
        self.ways = []
        for i in range(queues):
            self.ways.append(BlkQueue(self, self.add_queue(QUEUE_SIZE)))
            self.way_table[i] = <PyObject*>self.ways[i]
        self.config = &self.blk
        self.config_size = sizeof(virtio_blk_config)
        self.describe(queues)
        self.deactivate()

    def describe(self, uint32_t queues):
        """Offers what the disk can do and fills the config space."""
        cdef virtio_blk_config* blk = &self.blk
        cdef uint32_t blocks = self.disk.physical_block // BLOCK_SECTOR
        for feature in (VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_TOPOLOGY,
                        VIRTIO_BLK_F_FLUSH):
            self.offer(feature)
        blk.size_max = SEGMENT_MOST
        blk.seg_max = SEGMENTS_MOST
        blk.blk_size = BLOCK_SECTOR
        blk.physical_block_exp = blocks.bit_length() - 1
        blk.min_io_size = blocks
        blk.num_queues = queues
        if queues > 1:
            self.offer(VIRTIO_BLK_F_MQ)
        if self.disk.read_only:
            self.offer(VIRTIO_BLK_F_RO)
            return
        if self.disk.write_cache:
            self.offer(VIRTIO_BLK_F_CONFIG_WCE)
        self.offer(VIRTIO_BLK_F_WRITE_ZEROES)
        blk.max_write_zeroes_sectors = WRITE_ZEROES_MOST
        blk.max_write_zeroes_seg = 1
        blk.write_zeroes_may_unmap = self.disk.discard_granularity > 0
        if self.disk.discard_granularity:
            self.offer(VIRTIO_BLK_F_DISCARD)
            blk.max_discard_sectors = DISCARD_MOST
            blk.max_discard_seg = 1
            blk.discard_sector_alignment = max(self.disk.discard_granularity // BLOCK_SECTOR, <uint32_t>1)

    # ---- the control thread's side

    def run_on(self, thread, queues=None):
        for i in range(self.queue_count) if queues is None else queues:
            self.leave_thread(self.queues[i])
            self.ways[i].open_channel(thread)
        VirtioDevice.run_on(self, thread, queues)

    def resume(self):
        cdef BlkQueue way
        for way in self.ways:
            way.try_again()
        VirtioDevice.resume(self)

    @property
    def is_full(self):
        """Whether writes wait until the host has room for them."""
        cdef BlkQueue way
        return any([atomic_load_u32(&way.stuck) for way in self.ways])

    def resize(self, size=None, *, bint shrink=False):
        """As BlockBackend.resize, and the guest is told; the machine is paused. The size, in bytes."""
        self.disk.resize(size, shrink=shrink)
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.blk.capacity = self.disk.size // BLOCK_SECTOR
            self.notify_config()
            pthread_mutex_unlock(&self.lock)
        return self.disk.size

    def close(self):
        VirtioDevice.close(self)
        self.disk.close()

    def stats(self):
        """{operation: {requests, bytes, errors, nanoseconds}} since the start."""
        return self.disk.counters()

    def save_device(self):
        cdef BlkQueue way
        if any([atomic_load_u32(&way.stuck) or way.stranded.first != NULL for way in self.ways]):
            raise HostError(f"Cannot save the guest now: the host has no room for what it has written to disk '{self.name}'",
                            "make room, and let the guest go on: kvmappctl resume")
        return {"version": 1, "capacity": self.blk.capacity, "writeback": bool(self.blk.writeback)}

    def check_device(self, reader):
        capacity = reader.uint("capacity", UINT64_MAX >> SECTOR_SHIFT)
        writeback = reader.flag("writeback")
        reader.done()
        if capacity > self.blk.capacity:
            raise StateError(f"{self.name}: the disk has {self.blk.capacity} sectors now; the guest knows {capacity}",
                             f"make its file or block device as large as it was: {capacity << SECTOR_SHIFT} bytes")
        return capacity, writeback

    def restore_device(self, checked):
        """A disk that is larger by now stays what the guest knows, until it is told (blockresize --capacity) or begins anew."""
        self.blk.capacity, self.blk.writeback = checked

    # ---- hooks

    cdef void kicked(self, Virtqueue queue) noexcept nogil:
        (<BlkQueue>self.way_table[queue.index]).work()

    cdef void drain(self, Virtqueue queue) noexcept nogil:
        (<BlkQueue>self.way_table[queue.index]).await_idle()

    cdef void forget(self, Virtqueue queue) noexcept nogil:
        (<BlkQueue>self.way_table[queue.index]).forget()

    cdef void activate(self) noexcept nogil:
        """Who can neither flush nor switch the cache gets a disk without one (5.2.5.2)."""
        cdef bint writeback = self.has(VIRTIO_BLK_F_FLUSH)
        if self.has(VIRTIO_BLK_F_CONFIG_WCE):
            writeback = self.blk.writeback
        atomic_store_u32(&self.write_through, not writeback)

    cdef void deactivate(self) noexcept nogil:
        self.blk.writeback = self.disk.write_cache
        self.blk.capacity = self.disk.size // BLOCK_SECTOR

    cdef void write_config(self, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil:
        if offset != WRITEBACK or size != 1 or not self.has(VIRTIO_BLK_F_CONFIG_WCE):
            self.complain(b"store to a read-only config field at offset", offset)
            return
        self.blk.writeback = value & 1
        atomic_store_u32(&self.write_through, not self.blk.writeback)

    cdef bint waits_for_room(self, BlockRequest* request) noexcept nogil:
        """Not so a flush: what it has lost is lost, and the guest shall know."""
        return (self.power is not None and (request.result == -ENOSPC or request.result == -EDQUOT)
                and request.operation != BLOCK_FLUSH)

    cdef void say_failed(self, BlockRequest* request) noexcept nogil:
        if request.result == -ERANGE:
            self.complain(b"request beyond the end of the disk, or not of whole sectors, at byte", request.offset)
        elif request.result == -EROFS:
            self.complain(b"change of a read-only disk at byte", request.offset)
        else:
            self.report_host(FAILURES[request.operation], request.offset, -request.result)
