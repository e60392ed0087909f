"""The file of a saved machine: what is written comes back, and whatever else is in it is an error with a hint, never a crash."""
import contextlib
import errno
import io
import os
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmapp import statefile
from kvmapp.errors import HostError, KvmappError, StateError
from kvmapp.memory import GuestMemory
from kvmapp.statefile import PAGE, Draft, read, write

MIB = 1 << 20
CONFIG = {"name": "a", "memory": 4 * MIB, "disks": [{"name": "vda"}], "title": None}
STATE = {"version": 1, "data": b"\0\xff" * 50, "list": [1, True, "ä", b""], "big": 2**64 - 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file's bytes, and the memory that is in it."""
    memory = GuestMemory(4 * MIB)
    for gpa in (0, 3 * PAGE, 4 * PAGE, 2 * MIB, 4 * MIB - PAGE):
        memory.write(gpa, bytes([1 + gpa % 251]) * 100)
    path = tmp_path_factory.mktemp("state") / "a.save"
    with Draft(str(path)) as draft:
        write(draft.fd, CONFIG, STATE, memory)
        draft.publish()
    return path.read_bytes(), memory


OPENED: list[int] = []


@pytest.fixture(autouse=True)
def closed_afterwards():
    yield
    while OPENED:
        os.close(OPENED.pop())


def read_bytes(data: bytes, name: str = "a.save"):
    fd = os.memfd_create(name)
    OPENED.append(fd)
    os.write(fd, data)
    return read(fd, name)


def test_everything_comes_back_and_zeroes_take_no_room(whole):
    data, memory = whole
    saved = read_bytes(data)
    assert (saved.config, saved.state) == (CONFIG, STATE)
    assert saved.stretches() == [(0, PAGE, PAGE), (3 * PAGE, 2 * PAGE, 2 * PAGE), (2 * MIB, PAGE, 4 * PAGE),
                                 (4 * MIB - PAGE, PAGE, 5 * PAGE)]
    assert len(data) < 8 * PAGE
    saved.verify()
    again = GuestMemory(4 * MIB)
    for gpa, length, offset in saved.stretches():
        again.map_file(saved.fd, gpa, length, offset)
    assert again.read(0, 4 * MIB) == memory.read(0, 4 * MIB)


def test_a_mapped_file_is_never_written_and_forgotten_at_a_reset(whole):
    data, _ = whole
    saved = read_bytes(data)
    memory = GuestMemory(4 * MIB)
    for gpa, length, offset in saved.stretches():
        memory.map_file(saved.fd, gpa, length, offset)
    memory.write(0, b"\xee" * PAGE)
    saved.verify()
    memory.clear()
    assert not any(memory.read(0, 4 * MIB))
    assert memory.runs(PAGE) == []


def test_runs_are_cut_at_the_end_of_the_memory():
    memory = GuestMemory(3 * PAGE)
    memory.write(3 * PAGE - 1, b"x")
    assert memory.runs(2 * PAGE) == [(2 * PAGE, PAGE)]


def test_only_whole_pages_inside_of_ram_are_mapped(whole):
    saved = read_bytes(whole[0])
    memory = GuestMemory(2 * PAGE)
    with pytest.raises(ValueError, match="not made of pages"):
        memory.map_file(saved.fd, 0, 100, 0)
    with pytest.raises(ValueError, match="not in RAM"):
        memory.map_file(saved.fd, PAGE, 2 * PAGE, 0)


@pytest.mark.parametrize(("where", "what", "error"), [
    (0, b"\x7fELF", "it is no saved machine"),
    (0, bytes(8), "not written to its end"),
    (8, struct.pack("<I", 2), "format is version 2"),
    (16, struct.pack("<Q", 1 << 40), "header is damaged"),
    (100, b"\xff", "header is damaged"),
])
def test_headers_that_are_refused(whole, where, what, error):
    data = bytearray(whole[0])
    data[where:where + len(what)] = what
    with pytest.raises(StateError, match=error) as refused:
        read_bytes(bytes(data))
    assert "a.save" in str(refused.value)
    assert refused.value.hint


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_flipped_or_missing_byte_is_found(whole, choice):
    data = bytearray(whole[0])
    at = choice.draw(st.integers(0, len(data) - 1))
    if choice.draw(st.booleans()):
        data[at] ^= choice.draw(st.integers(1, 255))
    else:
        del data[at:]
    with pytest.raises(StateError):
        read_bytes(bytes(data)).verify()


def sealed(sections: list[tuple[int, int, int, int]], size: int) -> bytes:
    return statefile.header(size, [statefile.SECTION.pack(*section) for section in sections])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(0, 1 << 64 - 1) | st.integers(0, 4 * PAGE),
                          st.integers(0, 1 << 64 - 1) | st.integers(0, 4 * PAGE)), max_size=20), st.binary(max_size=4 * PAGE))
def test_hostile_section_tables(sections, rest):
    """Their checksum is right: whoever made the file meant it."""
    with pytest.raises(StateError):
        read_bytes(sealed(sections, PAGE + len(rest)) + rest)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | st.sampled_from([b'{"a":' * 100_000, b"[" * 1_000_000, b'{"a":NaN}', b'{"a":1.5}', b'{"base64":3}',
                                                  b'{"base64":"?","b":1}', b'{"a":{"base64":"!!"}}', b"9" * 10_000, b"[]"]),
       st.lists(st.tuples(st.integers(0, 1 << 64 - 1), st.integers(0, 1 << 32 - 1), st.just(0)), max_size=5))
def test_hostile_sections(text, runs):
    table = b"".join(statefile.RUN.pack(*run) for run in runs)
    parts = [(statefile.CONFIG, text), (statefile.STATE, text), (statefile.RUNS, table)]
    body, sections = io.BytesIO(), []
    for kind, data in parts:
        sections.append((kind, zlib.crc32(data), PAGE + body.tell(), len(data)))
        body.write(data)
    sections.append((statefile.MEMORY, 0, PAGE, 0))
    data = sealed(sections, PAGE + len(body.getvalue())) + body.getvalue()
    try:
        saved = read_bytes(data)
    except StateError:
        return
    assert isinstance(saved.config, dict)
    assert all(length % PAGE == 0 for _, length, _ in saved.runs)


class Full:
    """Memory whose writing the disk refuses."""
    size = MIB

    def runs(self, _granule):
        return [(0, MIB)]

    def view(self, _gpa, length):
        return memoryview(bytes(length))


def test_a_full_disk_is_an_error_with_a_hint():
    fd = os.open("/dev/full", os.O_RDWR)
    with pytest.raises(HostError, match="No space left on device") as refused:
        write(fd, CONFIG, STATE, Full())
    assert "make room" in refused.value.hint
    os.close(fd)


def test_a_draft_that_is_not_published_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.save"
    path.write_text("old")
    with pytest.raises(KeyError), Draft(str(path)) as draft:
        os.write(draft.fd, b"new")
        raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.save"]


def test_a_draft_whose_name_may_not_last_leaves_none(tmp_path, monkeypatch):
    """It is said to have failed and the guest goes on: restored later, it would find its disks changed."""
    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(statefile, "sync_folder", fail)
    with pytest.raises(HostError, match="Input/output error"), Draft(str(tmp_path / "a.save")) as draft:
        draft.publish()
    assert os.listdir(tmp_path) == []


def test_a_draft_whose_folder_has_gone_is_an_error_to_who_publishes_it_only(tmp_path):
    """Whoever closes it after that has a guest that goes on."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with Draft(str(folder / "a.save")) as draft:
        for name in os.listdir(folder):
            (folder / name).unlink()
        folder.rmdir()
        with pytest.raises(HostError, match="No such file or directory"):
            draft.publish()


@pytest.mark.parametrize("path", ["/no/such/folder/a.save", "/proc/a.save", "/tmp"])
def test_a_place_that_takes_no_file(path):
    with pytest.raises(KvmappError, match="Cannot save to"):
        Draft(path)


def test_what_is_no_file_is_not_replaced(tmp_path):
    """Such as /dev/null, or a volume's node: the rename would put a file into devtmpfs in its place."""
    fifo, link, plain = tmp_path / "fifo", tmp_path / "link", tmp_path / "plain"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    for path in (fifo, link):
        with pytest.raises(HostError, match="it is a device, not a file"):
            Draft(str(path))
    assert fifo.is_fifo() and sorted(os.listdir(tmp_path)) == ["fifo", "link"]
    plain.write_bytes(b"before")
    link.unlink()
    link.symlink_to(plain)
    with Draft(str(link)) as draft:
        draft.publish()
    assert not link.is_symlink() and plain.read_bytes() == b"before"


def test_a_draft_that_was_given_up_before_it_has_its_name_gets_none(tmp_path):
    with Draft(str(tmp_path / "a.save")) as draft:
        draft.given_up = True
        draft.publish()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("given_up", "fails"), [(True, False), (True, True), (False, True)])
def test_and_one_that_has_it_stays_unless_that_is_said_to_have_failed(tmp_path, monkeypatch, given_up, fails):
    """Its domain may have seen the name, and ended."""
    def sync_folder(_folder):
        draft.given_up = given_up
        if fails:
            raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(statefile, "sync_folder", sync_folder)
    with Draft(str(tmp_path / "a.save")) as draft, pytest.raises(HostError) if fails else contextlib.nullcontext():
        draft.publish()
    assert os.listdir(tmp_path) == (["a.save"] if given_up else [])


def test_what_cannot_be_saved_is_a_defect_of_ours():
    with pytest.raises(TypeError, match="set"):
        statefile.encode({"a": {1, 2}})


def test_two_that_are_saved_to_one_path_at_once_are_each_whole(tmp_path):
    path = tmp_path / "a.save"
    with Draft(str(path)) as first, Draft(str(path)) as second:
        for draft in (first, second):
            os.write(draft.fd, str(draft is second).encode())
        first.publish()
        assert path.read_text() == "False"
        second.publish()
        assert path.read_text() == "True"
    assert os.listdir(tmp_path) == ["a.save"]
