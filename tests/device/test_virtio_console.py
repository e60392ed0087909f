"""The virtio console: bytes both ways, a full backend that loses nothing, the terminal's size."""
import select

import pytest

from kvmapp.chardev import CharBackend
from kvmapp.state import StateError
from kvmapp.virtio.console import VirtioConsole
from tests.device.virtio_driver import Guest
from tests.device.virtio_wirings import ALL
from tests.waiting import TIMEOUT

RECEIVEQ, TRANSMITQ = 0, 1


class Console:
    """A guest with a console, and its other end."""

    def __init__(self, guest, backend=None, **options):
        self.backend = backend or CharBackend("hvc0")
        self.device = VirtioConsole("hvc0", guest.memory, self.backend, cols=80, rows=25)
        self.driver = guest.drive(self.device, **options)
        self.input, self.output = self.driver.queues

    def taken(self, count):
        """`count` bytes of output, as they come."""
        data = b""
        while len(data) < count:
            assert select.select([self.backend.fd], [], [], TIMEOUT)[0], f"only {len(data)} of {count} bytes came"
            data += self.backend.take()
        return data


@pytest.fixture(params=ALL)
def guest(request):
    with Guest(wiring=request.param) as guest:
        yield guest


def test_output_arrives_in_order(guest):
    console = Console(guest)
    for text in (b"Linux ", b"version ", b"6.1"):
        console.output.post(readable=[text[:2], text[2:]])
    console.output.kick()
    assert console.taken(17) == b"Linux version 6.1"
    assert [done.written for done in console.output.wait(3)] == [0, 0, 0]


def test_input_waits_for_a_buffer_and_a_buffer_for_input(guest):
    console = Console(guest)
    assert console.backend.give(b"root\n") == 5
    console.input.post(writable=[3, 1])
    console.input.kick()
    assert console.input.wait()[0].data == b"root"
    console.input.post(writable=[100])
    console.input.kick()
    assert console.input.wait()[0].data == b"\n"
    console.input.post(writable=[100])
    console.input.kick()
    console.backend.give(b"ls\n")
    assert console.input.wait()[0].data == b"ls\n"


def test_a_full_backend_holds_the_guest_back_and_loses_nothing(guest):
    console = Console(guest, CharBackend("hvc0", output_size=64))
    text = bytes(i % 251 for i in range(5000))
    for start in range(0, len(text), 500):
        console.output.post(readable=[text[start:start + 300], text[start + 300:start + 500]], indirect=True)
    console.output.kick()
    assert console.taken(len(text)) == text
    assert len(console.output.wait(10)) == 10


def test_half_sent_output_goes_on_after_a_restore(guest):
    console = Console(guest, CharBackend("hvc0", output_size=64))
    text = bytes(range(200))
    console.output.post(readable=[text[:50], text[50:]])
    console.output.kick()
    select.select([console.backend.fd], [], [], TIMEOUT)
    console.device.pause()
    state = console.driver.card.save()
    sent = state["virtio"]["device"]["sent"]
    assert sent == console.backend.waiting[0]
    console.driver.card.reset()
    console.driver.card.restore(state)
    assert console.driver.card.save() == state
    console.device.resume()
    assert console.taken(200) == text
    console.output.wait()


def test_a_queue_reset_forgets_what_was_half_sent(guest):
    console = Console(guest, CharBackend("hvc0", output_size=64))
    console.output.post(readable=[bytes(200)])
    console.output.kick()
    select.select([console.backend.fd], [], [], TIMEOUT)
    console.driver.reset_queue(console.output)
    assert console.device.save()["device"]["sent"] == 0
    assert console.device.save()["device"]["cols"] == 80


def test_the_guest_hears_of_a_new_size(guest):
    console = Console(guest)
    assert [console.driver.config(offset, 2) for offset in (0, 2)] == [80, 25]
    generation = console.driver.generation()
    console.device.resize(132, 50)
    console.driver.await_vector(0)
    assert [console.driver.config(offset, 2) for offset in (0, 2)] == [132, 50]
    assert console.driver.generation() != generation
    console.device.resize(132, 50)
    assert not console.driver.interrupted(0)


def test_emergency_write_needs_no_driver(guest):
    backend = CharBackend("hvc0")
    driver = guest.plug(VirtioConsole("hvc0", guest.memory, backend))
    for character in b"Oops":
        driver.put_config(8, 4, character)
    driver.put_config(0, 2, 5)
    assert backend.take() == b"Oops"
    assert driver.config(0, 2) == 0


def test_an_input_buffer_that_cannot_be_written_comes_back(guest):
    console = Console(guest)
    console.input.post(readable=[b"no room"])
    console.input.post(writable=[8])
    console.input.kick()
    console.backend.give(b"input")
    assert [done.data for done in console.input.wait(2)] == [b"", b"input"]


@pytest.mark.parametrize("change", [{"cols": 0x10000}, {"rows": -1}, {"sent": 2**60}, {"sent": None}, {"more": 1},
                                    {"version": 2}])
def test_a_state_it_cannot_trust_changes_nothing(guest, change):
    console = Console(guest)
    console.device.pause()
    before = console.driver.card.save()
    spoiled = {**before, "virtio": {**before["virtio"], "device": {**before["virtio"]["device"], **change}}}
    with pytest.raises(StateError, match="hvc0"):
        console.driver.card.restore(spoiled)
    assert console.driver.card.save() == before
