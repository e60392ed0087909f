"""Stock Debian with two vCPUs, saved and restored twenty times while its disk and a TCP connection are busy."""
import socket
import threading
import time

import pytest

from kvmapp import statefile
from tests.guest.conftest import GUESTS, debian_disk, host_tap
from tests.guest.working import CLOCK_SECONDS, ECHO_PORT, Worker

ROUNDS, PARTS = 20, 5                                   # a part is one test, for each has its time limit in the lab
KVMCLOCK_SECONDS, TSC_SECONDS = 0.1, 1.0
MSR_IA32_TSC = (0x10).to_bytes(4, "little")
HOST_ADDRESS = "10.77.0.1"


class EchoServer:
    """Sends each message back when it has all of it (loads/net tells the form); counts connections and messages."""

    def __init__(self) -> None:
        self.connections = self.messages = 0
        self.listener = socket.create_server((HOST_ADDRESS, ECHO_PORT))
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        try:
            while True:
                client = self.listener.accept()[0]
                self.connections += 1
                with client, client.makefile("rb") as incoming:
                    while head := incoming.read(4):
                        client.sendall(incoming.read(int.from_bytes(head, "big")))
                        self.messages += 1
        except OSError:                                 # the listener was closed, or the guest is gone
            pass

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


class Host:
    """One guest for all tests here, with what it has outside."""

    def __init__(self, worker, server, disk):
        self.worker, self.server, self.disk = worker, server, disk
        self.rounds = 0
        self.first_look = self.last_look = worker.look()
        self.first_clocks: list[int] = []               # of the first save: the host's, kvmclock, each vCPU's TSC; in ns
        self.last_clocks: list[int] = []


@pytest.fixture(scope="module")
def working(lab):
    with debian_disk(lab) as disk, host_tap() as tap:
        server = EchoServer()
        began = time.monotonic()
        worker = Worker.boot(disk, disk.with_name("saved"), HOST_ADDRESS, tap, lab)
        print(f"it works after {time.monotonic() - began:.0f} s")
        yield Host(worker, server, disk)
        worker.console.kill()
        server.close()


@pytest.fixture
def host(request, working):
    """A failure shows the consoles of both of the last processes."""
    request.node.stash[GUESTS] = working.worker.consoles
    return working


@pytest.mark.parametrize("part", range(1, PARTS + 1))
def test_a_guest_at_work_is_saved_and_restored(host, part):
    for _ in range(ROUNDS // PARTS):
        host.rounds += 1
        saved_and_restored(host)


def saved_and_restored(host):
    worker, server = host.worker, host.server
    messages = server.messages
    began = time.monotonic()
    worker.save()
    saved = time.monotonic()
    check_saved_clocks(host)
    worker.go_on()
    restored = time.monotonic()
    look = worker.look()
    gained = look.gained(host.first_look)
    done = worker.works()
    print(f"round {host.rounds}: saved in {saved - began:.1f} s, restored in {restored - saved:.1f} s, in all "
          f"{time.monotonic() - began:.1f} s; clock {look.clock_error:+.3f} s, uptime {gained:+.3f} s, {done}")
    assert abs(gained) < CLOCK_SECONDS
    assert look.sectors > host.last_look.sectors, "what it found on its disk came from there"
    host.last_look = look
    assert server.messages > messages
    assert server.connections == 1, "the connection that it made at first"


def check_saved_clocks(host):
    """Those that the guest tells the time by went as the host's clock: kvmclock since the first save, and each vCPU's TSC since the last
    one - to a second, for so well are they known while the host is busy, and KVM takes what differs by less for the same."""
    with open(host.worker.file, "rb") as file:
        state = statefile.read(file.fileno(), "the guest").state
    kvm = state["machine"]["kvm"]
    clocks = [state["time"], kvm["chips"]["clock"], *(tsc_ns(vcpu) for vcpu in kvm["vcpus"])]
    host.first_clocks = host.first_clocks or clocks
    kvmclock = gone(host.first_clocks, clocks)[0]
    tsc = gone(host.last_clocks or clocks, clocks)[1:]
    host.last_clocks = clocks
    print(f"kvmclock {kvmclock:+.6f} s; each TSC", *(f"{error:+.6f} s" for error in tsc))
    assert abs(kvmclock) < KVMCLOCK_SECONDS
    assert all(abs(error) < TSC_SECONDS for error in tsc)


def gone(before, after):
    """How much more the guest's clocks went than the host's, seconds."""
    passed = [now - then for then, now in zip(before, after, strict=True)]
    return [(clock - passed[0]) / 1e9 for clock in passed[1:]]


def tsc_ns(vcpu):
    msrs = {vcpu["msrs"][at:at + 4]: vcpu["msrs"][at + 4:at + 12] for at in range(0, len(vcpu["msrs"]), 12)}
    return int.from_bytes(msrs[MSR_IA32_TSC], "little") * 1000000 // vcpu["tsc_khz"]


def test_it_ends_with_all_it_wrote_on_a_whole_disk(host):
    host.worker.end(host.disk)
    assert host.server.connections == 1
