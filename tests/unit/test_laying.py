"""Laying a runtime tree down: whole or not at all, whenever it is cut; and taking away what is in nobody's use."""
import fcntl
import os
import shutil
import struct
import subprocess

import pytest

from kvmapp import laying, runtime

ROOM = 128
# Elf64_Ehdr with one Elf64_Phdr, the PT_INTERP of 128 bytes behind it.
PROGRAM = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF", 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0) + struct.pack(
    "<IIQQQQQQ", laying.PT_INTERP, 4, 120, 0, 0, ROOM, ROOM, 1) + b"/xxx".ljust(ROOM, b"x")


@pytest.fixture
def library(tmp_path):
    (tmp_path / "library").mkdir()
    return tmp_path / "library"


def make_tree(folder, identity):
    """As much of one as laying looks at; the program is an ELF file with room for a loader's path."""
    (folder / "runtime/lib").mkdir(parents=True)
    (folder / "runtime/kvmapp").write_bytes(PROGRAM)
    (folder / "runtime/lib/identity").write_text(f"{identity}\n")
    (folder / "kvmapp").write_text(f"launcher of {identity}")
    (folder / "lock").write_text("")
    return str(folder)


def lay(source, library, name):
    with laying.locked(str(library)):
        laying.lay(source, str(library), name, "/lib", lambda line: None)


def in_use(library):
    """What a host would start: it must be whole."""
    tree = library / runtime.CURRENT
    assert (tree / "kvmapp").read_text() == f"launcher of {(tree / 'runtime/lib/identity').read_text().strip()}"
    assert b"/lib/" + os.fsencode(os.readlink(tree)) + b"/runtime/lib/ld-" in (tree / "runtime/kvmapp").read_bytes()
    return os.readlink(tree)


def test_a_tree_is_laid_down_and_replaced(tmp_path, library):
    lay(make_tree(tmp_path / "one", "1"), library, "1")
    assert in_use(library) == "1"
    assert not (library / "1/lock").exists() and os.readlink(library / "1/kvmappctl") == "kvmapp"
    lay(make_tree(tmp_path / "two", "2"), library, "2")
    assert in_use(library) == "2" and sorted(os.listdir(library)) == [".lock", "2", "current"]
    lay(str(tmp_path / "one"), library, "1")                                    # and back
    assert in_use(library) == "1"


def test_cut_anywhere_the_old_or_the_new_one_works(tmp_path, library, monkeypatch):
    """Every call that changes a file system may be the last one before the power fails."""
    one, two = make_tree(tmp_path / "one", "1"), make_tree(tmp_path / "two", "2")
    lay(one, library, "1")

    class Cut(BaseException):
        pass
    changing = {name: getattr(os, name) for name in ("rename", "symlink", "unlink", "makedirs", "fsync", "fchmod", "rmdir")}
    seen = set()
    for step in range(200):
        left = step

        def counted(call):
            def cut(*arguments, **more):
                nonlocal left
                left -= 1
                if left < 0:
                    raise Cut
                return call(*arguments, **more)
            return cut
        for name, call in changing.items():
            monkeypatch.setattr(os, name, counted(call))
        try:
            lay(two, library, "2")
            done = True
        except Cut:
            done = False
        monkeypatch.undo()
        seen.add(in_use(library))
        if done:
            break
        lay(one, library, "1")
        assert in_use(library) == "1"
    assert done and step > 15 and seen == {"1", "2"}
    assert sorted(os.listdir(library)) == [".lock", "2", "current"]


def test_what_a_process_runs_from_is_kept(tmp_path, library, monkeypatch):
    lay(make_tree(tmp_path / "one", "1"), library, "1")
    monkeypatch.setattr(runtime, "programs", lambda but: iter([f"{library}/1/runtime/kvmapp", "/usr/bin/true"]))
    lay(make_tree(tmp_path / "two", "2"), library, "2")
    assert sorted(os.listdir(library)) == [".lock", "1", "2", "current"]
    assert runtime.sweep(str(library)) == []
    monkeypatch.undo()
    assert runtime.sweep(str(library)) == ["1"] and in_use(library) == "2"


def test_what_a_process_runs_from_is_kept_behind_a_link_too(tmp_path, library):
    """As /usr/local is one to /var/usrlocal; the kernel tells the path without links."""
    (tmp_path / "link").symlink_to("library")
    program = make_tree(library / "1", "1") + "/runtime/program"
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([str(tmp_path / "link/1/runtime/program"), "infinity"]) as running:
        try:
            assert runtime.in_use(str(tmp_path / "link"), None) == {"1"}
            assert runtime.sweep(str(tmp_path / "link")) == []
        finally:
            running.kill()
    assert runtime.sweep(str(tmp_path / "link")) == ["1"]


def test_foreign_things_in_the_folder_stay(tmp_path, library):
    (library / "notes").mkdir()
    (library / f"{runtime.UNFINISHED}0").mkdir()
    lay(make_tree(tmp_path / "one", "1"), library, "1")
    assert sorted(os.listdir(library)) == [".lock", "1", "current", "notes"]


def test_nothing_is_swept_while_a_setup_works(tmp_path, library):
    lay(make_tree(tmp_path / "one", "1"), library, "1")
    make_tree(library / "2", "2")
    with open(library / runtime.LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert runtime.sweep(str(library)) == []
        with pytest.raises(laying.SetupRuns, match="Another kvmapp setup works"), laying.locked(str(library)):
            pass
    assert runtime.sweep(str(library)) == ["2"]


def test_a_program_of_the_host_is_found_by_what_it_runs():
    assert os.path.realpath("/proc/self/exe") in set(runtime.programs(None))


def test_a_tree_that_was_taken_away_in_part_is_laid_down_anew(tmp_path, library, monkeypatch):
    one, two = make_tree(tmp_path / "one", "1"), make_tree(tmp_path / "two", "2")
    lay(one, library, "1")

    def cut(path, **more):
        os.unlink(os.path.join(path, "runtime/kvmapp"))
        raise KeyboardInterrupt
    monkeypatch.setattr(shutil, "rmtree", lambda path, **more: cut(path) if os.path.exists(path) else None)
    with pytest.raises(KeyboardInterrupt):
        lay(two, library, "2")
    monkeypatch.undo()
    assert in_use(library) == "2"
    lay(one, library, "1")
    assert in_use(library) == "1" and sorted(os.listdir(library)) == [".lock", "1", "current"]
