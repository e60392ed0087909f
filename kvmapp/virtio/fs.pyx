"""The virtio file system device (VIRTIO 1.2, 5.11): a folder of the host's that the guest mounts, served by another process.

The device itself is a tag, the name by which the guest mounts it, and two queues: one for what must not wait (FORGET, INTERRUPT), one
for requests. What is in them is FUSE (linux/fuse.h), which virtiofsd understands; this process only hands the queues over
(vhost_user.pyx). When the file server is lost, requests are answered here, each with "not connected", so that programs of the guest get
an error; what was under way in that moment stays unanswered, and its caller in the guest waits until the guest is reset.

What the guest has open lives in the file server, so a machine with such a device cannot be saved (snapshot.py); save and restore here
are for the contract of devices, and for a server that knows nothing yet. Left out: VIRTIO_FS_F_NOTIFICATION, several request queues,
DAX (the shared memory window), packed rings.
"""
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from kvmapp.abi.posix cimport ENOTCONN, pthread_mutex_lock, pthread_mutex_unlock
from kvmapp.abi.virtio cimport VIRTIO_ID_FS, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC
from kvmapp.memory cimport GuestMemory
from kvmapp.virtio.device cimport VirtioDevice
from kvmapp.virtio.vhost_user cimport VhostUser
from kvmapp.virtio.virtqueue cimport Chain, Virtqueue, chain_allocate, chain_free, chain_put, chain_take

from kvmapp.state import StateError
from kvmapp.virtio.vhost_user import PATIENCE

cdef enum:
    TAG = 36                         # bytes of a tag in the config space; a shorter one is followed by zeroes
    URGENT_SIZE = 128
    REQUEST_SIZE = 1024              # descriptors; a request for 1 MiB takes 257

cdef struct FsConfig:                # struct virtio_fs_config
    uint8_t tag[TAG]
    uint32_t request_queues

cdef struct FuseIn:                  # the beginning of struct fuse_in_header
    uint32_t size
    uint32_t opcode
    uint64_t unique

cdef struct FuseOut:                 # struct fuse_out_header
    uint32_t size
    int32_t error
    uint64_t unique


cdef class VirtioFs(VirtioDevice):
    """`tag` is what the guest mounts (1 to 36 bytes of UTF-8); `fd`, then this object's, is a stream socket to the file server, which is
    waited for up to `patience` seconds.

    Raises ValueError for a tag of another length or memory that is not shared, HostError for a server that cannot be used.
    """

    cdef FsConfig fs_config
    cdef Chain chain
    cdef readonly VhostUser server

    def __cinit__(self, str name not None, GuestMemory memory not None, str tag not None, int fd, double patience=PATIENCE):
        cdef bytes text = tag.encode()
        if not 1 <= len(text) <= TAG:
            raise ValueError(f"{name}: a tag has 1 to {TAG} bytes, not {len(text)}")
        memcpy(self.fs_config.tag, <const char*>text, len(text))
        self.fs_config.request_queues = 1
        self.device_id = VIRTIO_ID_FS
        self.config, self.config_size = &self.fs_config, sizeof(self.fs_config)
        self.add_queue(URGENT_SIZE)
        self.add_queue(REQUEST_SIZE)
        chain_allocate(&self.chain, REQUEST_SIZE)
        self.server = VhostUser(self, fd, patience)
        for feature in (VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX):
            if not self.server.offered >> <uint32_t>feature & 1:
                self.offered &= ~(<uint64_t>1 << <uint32_t>feature)

    def __dealloc__(self):
        chain_free(&self.chain)

    @property
    def connected(self):
        """Whether the file server is there."""
        return self.server.connected

    def offer_packed(self):
        """No file server knows packed rings."""

    def run_on(self, thread, queues=None):
        VirtioDevice.run_on(self, thread, queues)
        if queues is None or 0 in queues:
            self.server.run_on(thread)

    def close(self):
        VirtioDevice.close(self)
        self.server.close()

    def save_device(self):
        return {"version": 1, "tag": (<char*>self.fs_config.tag)[:TAG]}

    def check_device(self, reader):
        tag = reader.data("tag", TAG, TAG)
        reader.done()
        if tag != (<char*>self.fs_config.tag)[:TAG]:
            raise StateError(f"{self.name}: the guest knows another tag, {tag!r}")

    # ---- hooks

    cdef void activate(self) noexcept nogil:
        self.server.settle(self.features)

    cdef void start(self, Virtqueue queue) noexcept nogil:
        if self.server.works_on(queue):
            return
        VirtioDevice.start(self, queue)
        pthread_mutex_lock(&queue.lock)
        if queue.live and not self.server.is_lost():
            self.server.begin(queue)
        pthread_mutex_unlock(&queue.lock)

    cdef void drain(self, Virtqueue queue) noexcept nogil:
        pthread_mutex_lock(&queue.lock)
        self.server.end(queue)
        queue.live = False               # a server that was lost meanwhile had left the queue to us
        pthread_mutex_unlock(&queue.lock)

    cdef void aim(self) noexcept nogil:
        cdef uint32_t i
        pthread_mutex_lock(&self.lock)
        for i in range(self.queue_count):
            self.aim_queue(<Virtqueue>self.queue_table[i])
        pthread_mutex_unlock(&self.lock)

    cdef void aim_queue(self, Virtqueue queue) noexcept nogil:
        pthread_mutex_lock(&queue.lock)
        self.server.aim(queue)
        pthread_mutex_unlock(&queue.lock)

    cdef void serve(self, Virtqueue queue) noexcept nogil:
        """A kick, in the I/O thread: one that it had been told of before the queue went over is the server's, who may not have seen it."""
        VirtioDevice.serve(self, queue)
        if self.server.works_on(queue):
            queue.doorbell.press()

    cdef void kicked(self, Virtqueue queue) noexcept nogil:
        """Only a queue that no server works on is live."""
        if not self.server.is_lost():
            return                       # it is just being handed over
        while queue.pop(&self.chain) == 1:
            queue.push(&self.chain, self.refuse())
        self.notify_used(queue)

    cdef uint32_t refuse(self) noexcept nogil:
        """Answers the request at hand: not connected. What wants no answer has no room for one."""
        cdef FuseIn request
        cdef FuseOut answer
        if chain_take(&self.chain, &request, sizeof(request)) != sizeof(request) or self.chain.writable_bytes < sizeof(answer):
            return 0
        answer.size, answer.error, answer.unique = sizeof(answer), -ENOTCONN, request.unique
        return <uint32_t>chain_put(&self.chain, &answer, sizeof(answer))
