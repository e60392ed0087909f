"""The stream between a device and the control thread, seen from the control thread through a serial port that uses it."""
import select
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvmapp.chardev import CharBackend
from kvmapp.devices import Bus, Interrupts
from kvmapp.hw.ns16550 import Ns16550


def readable(backend):
    return bool(select.select([backend.fd], [], [], 0)[0])


@pytest.fixture
def backend():
    return CharBackend("serial0", output_size=32, input_size=8)


@pytest.fixture
def port(backend):
    """The bus with a port at 0."""
    bus = Bus("pio")
    bus.map(0, 8, Ns16550("serial0", Interrupts().line(4), backend))
    return bus


def say(port, text):
    for byte in text:
        port.write(0, 1, byte)


def test_the_descriptor_is_readable_exactly_while_output_waits(backend, port):
    assert not readable(backend) and backend.take() == b""
    say(port, b"a")
    assert readable(backend)
    say(port, b"b")
    assert backend.take() == b"ab"
    assert not readable(backend) and backend.take() == b""
    say(port, b"c")
    assert readable(backend)


def test_output_goes_around_the_ring_in_order(backend, port):
    text = bytes(range(256))
    heard = b""
    for start in range(0, 256, 24):
        say(port, text[start:start + 24])
        heard += backend.take()
    assert heard == text


def test_a_full_ring_loses_nothing_and_goes_on_when_taken(backend, port):
    port.write(2, 1, 1)
    say(port, bytes(range(32 + 16)))
    assert backend.waiting == (32, 0)
    assert backend.take() == bytes(range(32))
    assert readable(backend)
    assert backend.take() == bytes(range(32, 48))


def test_input_beyond_the_ring_is_refused_and_the_descriptor_tells_when_there_is_room(backend, port):
    assert backend.give(b"0123456789") == 9, "one in the receiver, eight in the ring"
    assert not readable(backend)
    assert port.read(0, 1) == ord("0")
    assert readable(backend)
    backend.take()
    assert not readable(backend)
    assert backend.give(b"9") == 1
    assert bytes(port.read(0, 1) for _ in range(9)) == b"123456789"


def test_nothing_is_accepted_of_nothing(backend):
    assert backend.give(b"") == 0
    assert backend.give(b"abc") == 3, "a backend without a device keeps what it is given"
    assert backend.waiting == (0, 3)


def test_a_discarding_backend_drops_what_waits_and_what_comes(backend, port):
    say(port, bytes(40))
    backend.discard(True)
    say(port, bytes(100))
    assert backend.take() == b"" and not readable(backend)
    assert port.read(5, 1) & 0x60 == 0x60
    backend.discard(False)
    say(port, b"x")
    assert backend.take() == b"x"


def test_a_guest_and_a_console_that_run_at_once_lose_nothing(backend, port):
    """The guest sends when THRE says so; the console takes when the descriptor says so, and echoes everything."""
    text = bytes(i * 7 & 0xFF for i in range(20_000))
    heard = bytearray()

    def guest():
        sent = 0
        while sent < len(text) or len(heard) < len(text):
            status = port.read(5, 1)
            if status & 0x20 and sent < len(text):
                port.write(0, 1, text[sent])
                sent += 1
            if status & 0x01:
                heard.append(port.read(0, 1))

    with ThreadPoolExecutor() as threads:
        running = threads.submit(guest)
        echo = b""
        while not running.done():
            select.select([backend.fd], [], [], 0.01)
            echo += backend.take()
            echo = echo[backend.give(echo):]
        running.result()
    assert bytes(heard) == text


@pytest.mark.parametrize("size", [0, 3, 2**31])
def test_a_ring_is_a_power_of_two(size):
    with pytest.raises(ValueError, match="a ring cannot have"):
        CharBackend("serial0", output_size=size)
