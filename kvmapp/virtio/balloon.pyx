"""The memory balloon (VIRTIO 1.2, 5.5): the guest gives pages up that the host wants, and tells of its memory.

Inflated pages go back to the host at once, and come back as they are touched, so deflating needs no work. Free page reporting
gives the host what the guest does not use at the moment. Statistics stay in their queue, looked at but not used, until the host
asks for newer ones. Drivers before Linux 6.11 number the queues they use without gaps: with hinting not offered, reporting is
their queue 3 and everybody else's queue 4, so both are served. Left out: free page hinting, page poisoning (drivers that poison
free pages then do not report them), MUST_TELL_HOST.
"""
from libc.stdint cimport UINT32_MAX, uint8_t, uint16_t
from libc.string cimport memcpy

from kvmapp.abi.posix cimport (CLOCK_MONOTONIC, atomic_exchange_u32, atomic_store_u32, clock_gettime, pthread_mutex_lock,
                               pthread_mutex_unlock, timespec)
from kvmapp.abi.virtio cimport (VIRTIO_BALLOON_F_DEFLATE_ON_OOM, VIRTIO_BALLOON_F_REPORTING, VIRTIO_BALLOON_F_STATS_VQ,
                                VIRTIO_ID_BALLOON)
from kvmapp.memory cimport GuestMemory
from kvmapp.virtio.device cimport VirtioDevice
from kvmapp.virtio.virtqueue cimport Chain, Virtqueue, chain_allocate, chain_free, chain_take

cdef enum:
    INFLATEQ = 0
    DEFLATEQ = 1
    STATSQ = 2
    QUEUE_SIZE = 128
    PAGE_SHIFT = 12                  # of the balloon's page numbers, whatever the guest's pages are
    REQUEST_PAGES = 8192             # looked at in one request; Linux sends 256
    ACTUAL = 4                       # offset in config space

# VIRTIO_BALLOON_S_*, in the order of their tags (5.5.6.4)
FIGURES = ("swap_in", "swap_out", "major_faults", "minor_faults", "free_memory", "total_memory", "available_memory",
           "disk_caches", "hugetlb_allocations", "hugetlb_failures", "oom_kills", "allocation_stalls", "async_scans",
           "direct_scans", "async_reclaims", "direct_reclaims")

cdef packed struct Statistic:
    uint16_t tag
    uint64_t value


cdef class VirtioBalloon(VirtioDevice):
    """With `deflate_on_oom` the guest may take pages back when it runs out of memory."""

    def __cinit__(self, str name not None, GuestMemory memory not None, *, bint deflate_on_oom=False):
        self.device_id = VIRTIO_ID_BALLOON
        self.offer(VIRTIO_BALLOON_F_STATS_VQ)
        self.offer(VIRTIO_BALLOON_F_REPORTING)
        if deflate_on_oom:
            self.offer(VIRTIO_BALLOON_F_DEFLATE_ON_OOM)
        self.config, self.config_size = &self.layout, sizeof(self.layout)
        for i in range(QUEUES):
            self.add_queue(QUEUE_SIZE)
            chain_allocate(&self.chains[i], QUEUE_SIZE)

    def __dealloc__(self):
        cdef int i
        for i in range(QUEUES):
            chain_free(&self.chains[i])

    @property
    def target(self):
        """Bytes that the host wants in the balloon."""
        return <uint64_t>self.layout.num_pages << PAGE_SHIFT

    @property
    def actual(self):
        """Bytes that the guest says are in the balloon."""
        return <uint64_t>self.layout.actual << PAGE_SHIFT

    def inflate_to(self, uint64_t size):
        """Asks the guest to keep a balloon of `size` bytes. Raises ValueError for more than its memory."""
        if size > self.memory.size:
            raise ValueError(f"{self.name}: a balloon of {size >> 20} MiB is larger than the guest's memory")
        with nogil:
            pthread_mutex_lock(&self.lock)
            if size >> PAGE_SHIFT != self.layout.num_pages:
                self.layout.num_pages = <uint32_t>(size >> PAGE_SHIFT)
                self.notify_config()
            pthread_mutex_unlock(&self.lock)

    def poll_statistics(self):
        """Asks the guest for new figures; they can be read when it has answered."""
        atomic_store_u32(&self.polling, 1)
        (<Virtqueue>self.queue_table[STATSQ]).doorbell.press()

    def statistics(self):
        """(figures by name, seconds of CLOCK_MONOTONIC when they came), ({}, 0) when there are none. Sizes are in bytes."""
        cdef Virtqueue queue = self.queues[STATSQ]
        pthread_mutex_lock(&queue.lock)
        figures = {name: self.figures[tag] for tag, name in enumerate(FIGURES) if self.known >> tag & 1}
        time = self.figures_time
        pthread_mutex_unlock(&queue.lock)
        return figures, time

    def stats(self):
        """The latest figures with their age in seconds ({} when there are none), and asks the guest for newer ones."""
        cdef timespec now
        figures, when = self.statistics()
        self.poll_statistics()
        clock_gettime(CLOCK_MONOTONIC, &now)
        return {**figures, "age": now.tv_sec - when} if figures else {}

    def save_device(self):
        return {"version": 1, "num_pages": self.layout.num_pages, "actual": self.layout.actual}

    def check_device(self, reader):
        checked = reader.uint("num_pages", self.memory.size >> PAGE_SHIFT), reader.uint("actual", UINT32_MAX)
        reader.done()
        return checked

    def restore_device(self, checked):
        self.layout.num_pages, self.layout.actual = checked

    cdef void kicked(self, Virtqueue queue) noexcept nogil:
        cdef Chain* chain = &self.chains[queue.index]
        if queue.index == STATSQ:
            self.serve_statistics(queue, chain)
            return
        while queue.pop(chain) == 1:
            if queue.index == INFLATEQ:
                self.inflate(chain)
            elif queue.index != DEFLATEQ:
                self.report(chain)
            queue.push(chain, 0)
        self.notify_used(queue)

    cdef void inflate(self, Chain* chain) noexcept nogil:
        """An array of page numbers; runs of neighbours, in either direction, go back to the host together."""
        cdef uint32_t page, seen = 0, count = 0
        cdef uint64_t first = 0
        if chain.readable_bytes > REQUEST_PAGES * sizeof(page):
            self.complain("balloon request is longer than 8192 pages, bytes", chain.readable_bytes)
        while seen < REQUEST_PAGES and chain_take(chain, &page, sizeof(page)) == sizeof(page):
            seen += 1
            if count and page == first + count:
                count += 1
            elif count and <uint64_t>page + 1 == first:
                first -= 1
                count += 1
            else:
                self.give_back(first, count)
                first, count = page, 1
        self.give_back(first, count)

    cdef void give_back(self, uint64_t first, uint32_t count) noexcept nogil:
        """`count` pages from page number `first`."""
        cdef uint64_t length = <uint64_t>count << PAGE_SHIFT
        cdef uint8_t* hva
        if count == 0:
            return
        hva = self.memory.translate(first << PAGE_SHIFT, length)
        if hva == NULL:
            self.complain("ballooned page is not in RAM", first << PAGE_SHIFT)
        else:
            self.memory.discard(hva, length)

    cdef void report(self, Chain* chain) noexcept nogil:
        """Free memory, named by the request's own buffers (5.5.6.7)."""
        cdef uint32_t i
        for i in range(chain.writable_count):
            self.memory.discard(<uint8_t*>chain.writable[i].iov_base, chain.writable[i].iov_len)

    cdef void serve_statistics(self, Virtqueue queue, Chain* chain) noexcept nogil:
        """The figures lie in the queue's one buffer; giving it back is how newer ones are asked for (5.5.6.3)."""
        if atomic_exchange_u32(&self.polling, 0):
            while queue.pop(chain) == 1:
                queue.push(chain, 0)
        elif queue.pop(chain) == 1:
            self.note(chain)
            queue.unpop(chain)
        self.notify_used(queue)

    cdef void note(self, Chain* chain) noexcept nogil:
        cdef Statistic statistic
        cdef timespec now
        cdef uint32_t i
        self.known = 0
        for i in range(<uint32_t>STATS_NR):
            if chain_take(chain, &statistic, sizeof(statistic)) != sizeof(statistic):
                break
            if statistic.tag < STATS_NR:
                self.figures[statistic.tag] = statistic.value
                self.known |= <uint64_t>1 << statistic.tag
        clock_gettime(CLOCK_MONOTONIC, &now)
        self.figures_time = now.tv_sec

    cdef void deactivate(self) noexcept nogil:
        self.layout.actual = 0

    cdef void forget(self, Virtqueue queue) noexcept nogil:
        if queue.index == STATSQ:
            pthread_mutex_lock(&queue.lock)
            self.known = 0
            self.figures_time = 0
            pthread_mutex_unlock(&queue.lock)

    cdef void write_config(self, uint32_t offset, uint32_t size, uint64_t value) noexcept nogil:
        if offset >= ACTUAL and offset + size <= ACTUAL + sizeof(self.layout.actual):
            memcpy(<char*>&self.layout.actual + (offset - ACTUAL), &value, size)     # legacy drivers store it byte by byte
        else:
            VirtioDevice.write_config(self, offset, size, value)
