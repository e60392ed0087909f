"""The virtio file system device: against a back end of the tests' own, against one that lies or dies, and against virtiofsd."""
import fcntl
import os
import shutil
import signal
import struct
import termios
import threading
from pathlib import Path

import pytest

from kvmapp import fileserver
from kvmapp.config import DomainConfig
from kvmapp.devices import set_log
from kvmapp.errors import HostError, StateError
from kvmapp.memory import GuestMemory
from kvmapp.virtio.fs import VirtioFs
from kvmapp.virtio.rng import VirtioRng
from tests.device import vhost_user_backend as protocol
from tests.device.talkers import fuse_request
from tests.device.vhost_user_backend import Backend
from tests.device.virtio_driver import NEEDS_RESET, Guest
from tests.waiting import until

URGENT, REQUESTS = 0, 1
INIT, LOOKUP, FORGET, OPEN, READ, WRITE = 26, 1, 2, 14, 15, 16
ENOTCONN, ENOSYS = 107, 38
PATIENCE = 0.3                           # seconds, where a back end is meant not to answer


@pytest.fixture(params=["pci", "mmio"])
def wiring(request):
    return request.param


class FullLog:
    """A log that has room for one line; whoever has a second one waits until it is emptied."""
    ROOM = 100

    def __init__(self):
        self.read_end, self.write_end = os.pipe()
        self.filled = fcntl.fcntl(self.write_end, fcntl.F_SETPIPE_SZ, 4096) - self.ROOM
        os.write(self.write_end, bytes(self.filled))

    def held(self):
        return int.from_bytes(fcntl.ioctl(self.read_end, termios.FIONREAD, bytes(4)), "little")

    def await_line(self):
        until(lambda: self.held() > self.filled)

    def empty(self):
        while self.held():
            os.read(self.read_end, 65536)


@pytest.fixture
def full_log():
    log = FullLog()
    set_log(log.write_end)
    yield log
    set_log(2)
    log.empty()
    os.close(log.read_end)
    os.close(log.write_end)


class SharedGuest(Guest):
    def __init__(self, wiring="pci", size=32 << 20):
        super().__init__(size, wiring=wiring)
        self.memory = GuestMemory(size, shared=True)


def ask(driver, opcode=INIT, rest=b"", room=4096, queue=REQUESTS, unique=7):
    """One request: (error number, bytes behind the out header)."""
    one = driver.queues[queue]
    one.post(readable=[fuse_request(opcode, unique, rest)], writable=[room])
    one.kick()
    [done] = one.wait()
    size, error, answered = struct.unpack_from("<IiQ", done.data)
    assert (size, answered) == (done.written, unique)
    return -error, done.data[16:done.written]


def serves(driver, **how):
    return ask(driver, **how) == (ENOSYS, b"")


def test_requests_reach_the_back_end_and_answers_the_guest(wiring):
    with SharedGuest(wiring) as guest, Backend(answer=lambda header, rest: (0, rest[::-1])) as backend:
        driver = guest.drive(VirtioFs("fs0", guest.memory, "share", backend.fd))
        assert bytes(driver.config(i, 1) for i in range(36)) == b"share".ljust(36, b"\0")
        assert driver.config(36, 4) == 1
        for number in range(1, 60):
            text = os.urandom(number)
            assert ask(driver, rest=text, unique=number) == (0, text[::-1])
        assert ask(driver, rest=b"first", queue=URGENT) == (0, b"tsrif")
        assert backend.agreed == protocol.F_VERSION_1 | protocol.F_PROTOCOL | protocol.F_INDIRECT | protocol.F_EVENT_IDX


def test_the_whole_of_both_regions_of_memory_is_shared():
    with SharedGuest(size=(3 << 30) + (8 << 20)) as guest, Backend() as backend:
        driver = guest.drive(VirtioFs("fs0", guest.memory, "share", backend.fd))
        assert serves(driver)
        assert [(gpa, size) for gpa, size, *_ in backend.regions] == guest.memory.ranges
        guest.memory.write(1 << 32, b"high")
        assert backend.bytes_at(1 << 32, 4) == b"high"


def test_features_that_the_back_end_lacks_are_not_offered():
    features = protocol.F_VERSION_1 | protocol.F_INDIRECT
    with SharedGuest() as guest, Backend(features=features) as backend:
        driver = guest.drive(VirtioFs("fs0", guest.memory, "share", backend.fd))
        assert not driver.offered() & protocol.F_EVENT_IDX
        assert serves(driver)
        assert backend.agreed == features
        assert protocol.ENABLE not in backend.requests       # without protocol features queues run as soon as they are kicked


def test_a_reset_a_pause_and_a_queue_reset_stop_the_back_end_and_it_goes_on():
    with SharedGuest() as guest, Backend() as backend:
        driver = guest.drive(VirtioFs("fs0", guest.memory, "share", backend.fd))
        assert serves(driver)
        driver.card.pause()
        state = driver.card.save()
        assert state["virtio"]["queues"][1]["last_avail"] == 1
        queue = driver.queues[REQUESTS]
        queue.post(readable=[fuse_request(INIT)], writable=[64])
        queue.kick()
        guest.settle()
        assert backend.served == 1
        driver.card.restore(state)
        driver.card.resume()
        assert len(queue.wait()) == 1
        driver.card.resume()                                 # which runs already: nothing is handed over twice
        assert serves(driver)
        backend.served -= 1
        driver.reset_queue(queue)
        driver.start()
        assert serves(driver)
        assert backend.served == 3
        driver.card.reset()
        guest.host.assign_resources()
        driver.start(msix=False)
        assert backend.requests.count(protocol.SET_MEM_TABLE) >= 3
        driver.queues[REQUESTS].post(readable=[fuse_request(INIT)], writable=[64])
        driver.queues[REQUESTS].kick()
        until(lambda: backend.served == 4)
        driver.await_pin()


def test_a_kick_that_our_thread_has_in_hand_when_the_queue_goes_over_reaches_the_back_end(full_log):
    """The thread has been told of the doorbell, and comes to read it only when the back end is to hear of it: held up in between by
    another device, which has something to say to a log that takes no more."""
    with SharedGuest() as guest, Backend() as backend:
        other = guest.drive(VirtioRng("rng0", guest.memory)).queues[0]
        driver = guest.drive(VirtioFs("fs0", guest.memory, "share", backend.fd))
        assert serves(driver)
        driver.card.pause()
        guest.settle()
        guest.thread.pause()
        for _ in range(2):                                   # one line for each, and room for the first
            other.post(readable=[b"no room for an answer"])
        other.kick()
        queue = driver.queues[REQUESTS]
        queue.post(readable=[fuse_request(INIT)], writable=[64])
        queue.kick(force=True)
        guest.thread.resume()
        full_log.await_line()
        backend.hold.clear()
        driver.card.resume()
        full_log.empty()
        guest.settle()
        backend.hold.set()
        assert len(queue.wait()) == 1


def test_a_masked_vector_is_told_to_the_back_end_and_its_interrupt_waits():
    with SharedGuest() as guest, Backend() as backend:
        driver = guest.drive(VirtioFs("fs0", guest.memory, "share", backend.fd))
        assert serves(driver)
        calls = backend.requests.count(protocol.SET_CALL)
        table = driver.peek(driver.msix + 4, 4)
        control = driver.bar(table & 7) + (table & ~7) + 16 * 2 + 12
        guest.mmio.write(control, 4, 1)
        until(lambda: backend.requests.count(protocol.SET_CALL) == calls + 1)
        driver.interrupted(2)                                # the signal of the answer before may have come after the answer was seen
        driver.queues[REQUESTS].post(readable=[fuse_request(INIT)], writable=[64])
        driver.queues[REQUESTS].kick()
        until(lambda: backend.served == 2)
        guest.settle()
        assert not driver.interrupted(2)
        guest.mmio.write(control, 4, 0)
        assert len(driver.queues[REQUESTS].wait()) == 1


def test_a_back_end_that_dies_leaves_errors_to_the_guest(wiring, log):
    with SharedGuest(wiring) as guest, Backend() as backend:
        driver = guest.drive(VirtioFs("fs0", guest.memory, "share", backend.fd))
        assert serves(driver)
        backend.die()
        until(lambda: not driver.device.connected)
        guest.settle()                                       # what is posted before the queues are taken back counts as under way
        assert ask(driver) == (ENOTCONN, b"")
        assert ask(driver, queue=URGENT) == (ENOTCONN, b"")
        driver.queues[URGENT].post(readable=[fuse_request(FORGET, rest=bytes(8))])
        driver.queues[URGENT].kick()
        assert driver.queues[URGENT].wait()[0].written == 0
        assert not driver.status & NEEDS_RESET
        assert "fs0: host error: the file server has gone" in log()
        driver.card.reset()
        guest.host.assign_resources()
        driver.start()
        assert ask(driver) == (ENOTCONN, b"")


def test_what_was_under_way_when_it_died_stays_unanswered_and_the_rest_is_refused():
    with SharedGuest() as guest, Backend() as backend:
        driver = guest.drive(VirtioFs("fs0", guest.memory, "share", backend.fd))
        assert serves(driver)
        backend.hold.clear()
        queue = driver.queues[REQUESTS]
        lost = [queue.post(readable=[fuse_request(INIT)], writable=[64]) for _ in range(3)]
        queue.kick()
        backend.socket.shutdown(2)
        until(lambda: not driver.device.connected)
        guest.settle()
        head = queue.post(readable=[fuse_request(INIT)], writable=[64])
        queue.kick()
        [done] = queue.wait()
        assert done.head == head and head not in lost
        driver.card.pause()
        driver.card.restore(driver.card.save())


def header(request, size=8, flags=protocol.REPLY | protocol.VERSION):
    return struct.pack("<III", request, flags, size)


BASE = protocol.GET_BASE
LIES = {
    "nothing": lambda honest: None,
    "too little": lambda honest: honest[:-1],
    "a header only": lambda honest: honest[:12],
    "another message": lambda honest: header(protocol.SET_OWNER) + honest[12:],
    "another size": lambda honest: header(BASE, 1 << 31) + honest[12:],
    "no reply": lambda honest: header(BASE, flags=protocol.VERSION) + honest[12:],
    "another version": lambda honest: header(BASE, flags=protocol.REPLY | 2) + honest[12:],
    "another queue": lambda honest: honest[:12] + struct.pack("<II", 77, 1),
    "noise": lambda honest: bytes(range(200)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_back_end_that_lies_when_its_queues_stop_is_lost_and_the_device_goes_on(lie, log):
    with SharedGuest() as guest, Backend(replies={BASE: LIES[lie]}) as backend:
        driver = guest.drive(VirtioFs("fs0", guest.memory, "share", backend.fd))
        assert serves(driver)
        driver.device.server.wait_for(PATIENCE)
        driver.card.pause()
        assert not driver.device.connected
        assert "host error: the file server" in log()
        driver.card.restore(driver.card.save())
        driver.card.resume()
        assert ask(driver) == (ENOTCONN, b"")
        driver.start()
        assert ask(driver) == (ENOTCONN, b"")


def test_a_position_that_no_queue_can_have_is_not_believed(log):
    wrong = {BASE: lambda honest: honest[:12] + struct.pack("<I", honest[12]) + struct.pack("<I", 0x8000_9999)}
    with SharedGuest() as guest, Backend(replies=wrong) as backend:
        driver = guest.drive(VirtioFs("fs0", guest.memory, "share", backend.fd))
        assert serves(driver)
        driver.card.pause()
        state = driver.card.save()
        assert state["virtio"]["queues"][1]["last_avail"] == state["virtio"]["queues"][1]["next_used"] == 1
        assert "more requests under way" in log()
        driver.card.restore(state)


def test_a_back_end_that_does_not_read_holds_nobody_up():
    with SharedGuest() as guest, Backend() as backend:
        driver = guest.drive(VirtioFs("fs0", guest.memory, "share", backend.fd))
        assert serves(driver)
        driver.device.server.wait_for(PATIENCE)
        backend.hold.clear()
        os.write(backend.rings[1].files[protocol.SET_KICK], struct.pack("<Q", 1))        # its thread wakes, and waits
        table = driver.peek(driver.msix + 4, 4)
        control = driver.bar(table & 7) + (table & ~7) + 16 * 2 + 12
        for number in range(20000):                          # a message each, until the socket is full
            guest.mmio.write(control, 4, number & 1)
            if not driver.device.connected:
                break
        assert not driver.device.connected
        guest.mmio.write(control, 4, 0)
        guest.settle()
        assert ask(driver) == (ENOTCONN, b"")


@pytest.mark.parametrize(("replies", "features", "queues"), [
    ({protocol.GET_FEATURES: lambda honest: None}, protocol.FEATURES, 2), ({protocol.GET_FEATURES: lambda honest: b"HTTP/1.1 400 Bad"},
    protocol.FEATURES, 2), ({protocol.GET_PROTOCOL: lambda honest: honest[:5]}, protocol.FEATURES, 2),
    ({}, protocol.F_INDIRECT, 2), ({}, protocol.FEATURES, 1)])
def test_a_back_end_that_is_none_is_an_error_at_the_start(replies, features, queues):
    with (SharedGuest() as guest, Backend(replies=replies, features=features, queues=queues) as backend,
          pytest.raises(HostError, match="fs0: the file server")):
        VirtioFs("fs0", guest.memory, "share", backend.fd, PATIENCE)


def test_a_socket_whose_other_end_is_closed_is_an_error_at_the_start():
    with SharedGuest() as guest, Backend() as backend:
        backend.die()
        with pytest.raises(HostError, match="does not speak vhost-user"):
            VirtioFs("fs0", guest.memory, "share", backend.fd)


def test_tags_and_memory_that_cannot_be_used():
    with SharedGuest() as guest, Backend() as backend:
        for tag in ("", "x" * 37, "ü" * 19):
            with pytest.raises(ValueError, match="1 to 36 bytes"):
                VirtioFs("fs0", guest.memory, tag, backend.fd)
        device = VirtioFs("fs0", guest.memory, "ü" * 18, backend.fd)
        with Backend() as other:
            state = VirtioFs("fs0", guest.memory, "other", other.fd).save()
            with pytest.raises(StateError, match="another tag"):
                device.restore(state)
    with Backend() as backend, pytest.raises(ValueError, match="shared memory"):
        VirtioFs("fs0", GuestMemory(1 << 20), "share", backend.fd)


def test_resets_and_pauses_while_requests_are_served():
    with SharedGuest() as guest, Backend() as backend:
        driver = guest.drive(VirtioFs("fs0", guest.memory, "share", backend.fd))
        over = threading.Event()

        def disturb():
            while not over.is_set():
                driver.card.pause()
                driver.card.resume()

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            for number in range(200):
                assert serves(driver, unique=number + 1)
        finally:
            over.set()
            thread.join()
        assert backend.served == 200


# -- the true file server

def has_server():
    return any(os.access(place, os.X_OK) for place in fileserver.PLACES) or shutil.which("virtiofsd")


def section(**settings):
    return DomainConfig.from_dict({"name": "guest", "memory": 64 << 20, "filesystems": [{"tag": "share", **settings}]}).filesystems[0]


def find(driver, name):
    """The node of a file in the shared folder."""
    error, answer = ask(driver, LOOKUP, name.encode() + b"\0")
    assert error == 0, os.strerror(error)
    return struct.unpack_from("<Q", answer)[0]


def on_node(opcode, node, rest, unique=9):
    return struct.pack("<IIQQIIII", 40 + len(rest), opcode, unique, node, 0, 0, 1, 0) + rest


def ask_node(driver, opcode, node, rest):
    queue = driver.queues[REQUESTS]
    queue.post(readable=[on_node(opcode, node, rest)], writable=[65536])
    queue.kick()
    [done] = queue.wait()
    _, error, _ = struct.unpack_from("<IiQ", done.data)
    return -error, done.data[16:done.written]


def begin(driver):
    error, answer = ask(driver, INIT, struct.pack("<IIII", 7, 31, 1 << 17, 0))
    assert error == 0 and struct.unpack_from("<I", answer)[0] == 7


@pytest.mark.skipif(os.geteuid() != 0 or not has_server(), reason="virtiofsd, and root, are not here")
@pytest.mark.parametrize("readonly", [False, True])
def test_virtiofsd_serves_a_folder(tmp_path, readonly):
    folder = tmp_path / "a, b\\c"
    folder.mkdir()
    (folder / "from-host").write_bytes(b"hello guest")
    with open(tmp_path / "log", "w+b") as log, SharedGuest() as guest:
        server = fileserver.start(section(source=str(folder), readonly=readonly), log.fileno())
        driver = guest.drive(VirtioFs("fs0", guest.memory, "share", server.fd))
        begin(driver)
        node = find(driver, "from-host")
        error, handle = ask_node(driver, OPEN, node, struct.pack("<II", 0, 0))
        assert error == 0
        driver.card.pause()                                  # the server's state outlives a pause of its queues
        driver.card.resume()
        reading = struct.pack("<QQIIQII", struct.unpack_from("<Q", handle)[0], 0, 4096, 0, 0, 0, 0)
        assert ask_node(driver, READ, node, reading) == (0, b"hello guest")
        error, handle = ask_node(driver, OPEN, node, struct.pack("<II", os.O_RDWR, 0))
        assert error == (30 if readonly else 0)              # EROFS
        if not readonly:
            writing = struct.pack("<QQIIQII", struct.unpack_from("<Q", handle)[0], 0, 5, 0, 0, 0, 0) + b"HELLO"
            assert ask_node(driver, WRITE, node, writing)[0] == 0
            assert (folder / "from-host").read_bytes() == b"HELLO guest"
        driver.start()                                       # a guest that reboots begins anew
        begin(driver)
        assert find(driver, "from-host")
        assert server.process.poll() is None
    assert server.process.wait(20) is not None               # it goes with its only client


def free_huge_pages():
    counts = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    return int(counts.read_text()) if counts.exists() else 0


@pytest.mark.skipif(os.geteuid() != 0 or not has_server(), reason="virtiofsd, and root, are not here")
@pytest.mark.skipif(free_huge_pages() < 16, reason="the host's pool has no 16 huge pages of 2 MiB")
def test_virtiofsd_maps_huge_pages(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with open(tmp_path / "log", "w+b") as log, SharedGuest() as guest:
        guest.memory = GuestMemory(32 << 20, shared=True, page=2 << 20)
        server = fileserver.start(section(source=str(tmp_path)), log.fileno())
        driver = guest.drive(VirtioFs("fs0", guest.memory, "share", server.fd))
        begin(driver)
        assert find(driver, "file")
        guest.memory.clear()
        assert not any(guest.memory.read(0, 4 << 20))


@pytest.mark.skipif(os.geteuid() != 0 or not has_server(), reason="virtiofsd, and root, are not here")
def test_virtiofsd_that_is_killed_leaves_errors_to_the_guest(tmp_path):
    with open(tmp_path / "log", "w+b") as log, SharedGuest() as guest:
        server = fileserver.start(section(source=str(tmp_path)), log.fileno())
        driver = guest.drive(VirtioFs("fs0", guest.memory, "share", server.fd))
        begin(driver)
        os.killpg(server.process.pid, signal.SIGKILL)        # its child serves, and may miss that it is to end with it
        server.process.wait()
        until(lambda: not driver.device.connected)
        guest.settle()
        assert ask(driver)[0] == ENOTCONN
