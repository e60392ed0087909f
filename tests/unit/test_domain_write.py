"""A rewrite keeps what the administrator wrote, changes only what differs, and is whole or not at all."""
import errno
import os
import signal
import stat
import tempfile

import pytest
from configobj import ConfigObj
from hypothesis import given
from hypothesis import strategies as st

from kvmapp.config import BalloonConfig, DiskConfig, DomainConfig, RngConfig, SerialConfig, read_domain, write_domain
from kvmapp.daemon.paths import Paths
from kvmapp.daemon.store import Store
from kvmapp.errors import ConfigError
from kvmapp.hostinfo import user_name, why_no_access
from kvmapp.ini import Ini, clear_leftovers, quote

FILE = """\
# The web server. Ask Ann before touching it.

name = web
memory = 1024 MiB      # enough for now
vcpus=2
description = '''one
# no comment
two'''   # several lines

# what it boots
[boot]
    kernel = ../boot/vmlinuz
    cmdline = "console=ttyS0 # x"     # a quoted one

[disk  vda]             # root
source = "web.img"
readonly = Yes
# the end
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "web.conf"
    file.write_text(FILE)
    return file


def rewritten(path, **changes) -> str:
    config = read_domain(str(path))
    for name, value in changes.items():
        setattr(config, name, value)
    write_domain(str(path), config)
    assert read_domain(str(path)) == config
    return path.read_text()


def test_only_the_made_uuid_and_acpi_are_added(path):
    config = read_domain(str(path))
    text = rewritten(path, uuid=config.uuid)
    added = [line for line in text.splitlines() if line not in FILE.splitlines()]
    # configobj normalizes the space around `=` and the indentation; nothing else moves.
    assert added == [f"uuid = {config.uuid}", "vcpus = 2", "two'''  # several lines", "acpi = yes",
                     '    source = "web.img"', "    readonly = Yes"]
    assert text.index("name = web") < text.index("uuid =") < text.index("memory =")
    assert read_domain(str(path)).made == ()


def test_a_second_write_changes_nothing(path):
    first = rewritten(path)
    assert rewritten(path) == first


def test_changed_values_keep_their_comments_and_order(path):
    text = rewritten(path, memory=2 << 30, vcpus=3, acpi=False)
    assert "memory = 2 GiB      # enough for now\n" in text
    assert "vcpus = 3\n" in text
    assert text.index("description") < text.index("acpi = no") < text.index("# what it boots")
    assert text.startswith("# The web server. Ask Ann before touching it.\n\nname = web\n")


def test_a_value_that_became_the_default_stays_written(path):
    assert "vcpus = 1\n" in rewritten(path, vcpus=1)


def test_unset_values_go(path):
    assert "description" not in rewritten(path, description=None)


def test_sections_come_and_go(path):
    text = rewritten(path, disks=[DiskConfig(name="vdb", source="/b.img")], rng=RngConfig(), balloon=BalloonConfig(),
                     serials=[SerialConfig(index=0, type="file", path="/log # 1")])
    assert "[disk  vda]" not in text
    assert "[disk vdb]\n    source = /b.img\n" in text
    assert '\n[serial 0]\n    type = file\n    path = "/log # 1"\n' in text
    assert "\n[rng]\n" in text and "\n[balloon]\n" in text
    assert "[debug]" not in text


def test_a_new_file_is_written_and_private(tmp_path):
    path = tmp_path / "new.conf"
    config = DomainConfig(name="new", uuid="d340f42e-8611-52c5-949c-8013181e73d4", memory=64 << 20, title="'\"#")
    write_domain(str(path), config)
    assert path.read_text() == ("name = new\nuuid = d340f42e-8611-52c5-949c-8013181e73d4\n"
                                "title = '''\\'\"#'''\nmemory = 64 MiB\nacpi = yes\n".replace("'''\\'\"#'''", '"""\'"#"""'))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_mode_owner_and_symlink_are_kept(path, tmp_path):
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 12, 34)
    owner = path.stat().st_uid, path.stat().st_gid
    link = tmp_path / "link.conf"
    link.symlink_to(path)
    rewritten(link, memory=2 << 30)
    assert link.is_symlink()
    assert "2 GiB" in path.read_text()
    status = path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (*owner, 0o640)


def test_line_ends_are_kept(path):
    path.write_bytes(b"# c\r\nname = web\r\nmemory = 64\r\n")
    rewritten(path, vcpus=2)
    data = path.read_bytes()
    assert data.startswith(b"# c\r\nname = web\r\nuuid = ")
    assert data.endswith(b"memory = 64\r\nvcpus = 2\r\nacpi = yes\r\n")


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "fchmod"])
def test_a_failed_write_leaves_the_old_file_and_no_debris(path, monkeypatch, call):
    config = read_domain(str(path))

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "write":
        real_open = open

        class Full:
            def __init__(self, fd):
                self.file = real_open(fd, "wb")

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            write = staticmethod(fail)

        monkeypatch.setattr("builtins.open", lambda fd, mode: Full(fd))
    else:
        monkeypatch.setattr(f"os.{call}", fail)
    with pytest.raises(ConfigError, match="Cannot write the file: No space left on device"):
        write_domain(str(path), config)
    monkeypatch.undo()
    assert path.read_text() == FILE
    assert os.listdir(path.parent) == ["web.conf"]


@pytest.mark.parametrize(("call", "saved"), [("fsync", False), ("rename", False), ("close", True)])
def test_a_writer_killed_on_its_way_leaves_a_whole_file(path, monkeypatch, call, saved):
    config = read_domain(str(path))
    config.vcpus = 9
    pid = os.fork()
    if pid == 0:
        if call == "close":                                     # of the folder, behind the rename
            monkeypatch.setattr("kvmapp.ini.sync_folder", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        else:
            monkeypatch.setattr(f"os.{call}", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        try:
            write_domain(str(path), config)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert (read_domain(str(path)) == config) is saved
    assert (path.read_text() == FILE) is not saved
    assert len(os.listdir(path.parent)) == (1 if saved else 2)
    assert [name for name in os.listdir(path.parent) if name.endswith(".conf")] == ["web.conf"]
    clear_leftovers(str(path.parent))
    assert os.listdir(path.parent) == ["web.conf"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_a_folder_that_may_not_be_written_says_so(mode):
    folder = tempfile.mkdtemp(dir="/tmp")           # pytest's own folders are closed to other users
    try:
        path = os.path.join(folder, "web.conf")
        config = DomainConfig(name="web", uuid="d340f42e-8611-52c5-949c-8013181e73d4", memory=64 << 20)
        os.chmod(folder, mode)
        wanted = f"user {user_name(65534)} lacks write permission on {folder} (mode {mode:04o}, root:root)"
        # Modules that are imported by need are imported now, while they may be read.
        assert why_no_access(folder, 3, 65534, set()) == wanted
        read_domain(path, "name = a\nmemory = 64\n")
        pid = os.fork()
        if pid == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            try:
                write_domain(path, config)
            except ConfigError as error:
                os._exit(0 if "Permission denied" in error.message and error.hint == wanted else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert os.listdir(folder) == []
    finally:
        os.rmdir(folder)


def test_a_broken_file_is_not_overwritten(path):
    config = read_domain(str(path))
    path.write_text("rubbish\n")
    with pytest.raises(ConfigError, match="neither"):
        write_domain(str(path), config)
    assert path.read_text() == "rubbish\n"


@pytest.mark.parametrize("value", ["\"\"\"'''\n", "''' \"\"\" #", "'\"''\"\"\n'\"\"\"'''"])
def test_values_that_no_quotes_can_hold_are_refused(path, value):
    config = read_domain(str(path))
    config.description = value
    with pytest.raises(ConfigError, match="cannot be written"):
        write_domain(str(path), config)
    assert path.read_text() == FILE


def test_a_value_that_reads_back_differently_is_refused(path):
    config = read_domain(str(path))
    config.vcpus = 4711
    with pytest.raises(ConfigError, match="expected a whole number"):
        write_domain(str(path), config)
    assert path.read_text() == FILE


PRINTABLE = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")) | st.sampled_from("'\"#=[] \n"), max_size=30)


@given(PRINTABLE)
def test_quoted_values_are_read_back_by_us_and_by_configobj(value):
    try:
        raw = quote(value)
    except ConfigError:
        assert '"""' in value or "'''" in value or value[-1] in "\"'"
        return
    text = f"a = {raw}\nb = 1\n"
    assert Ini(text).sections[""] == {"a": value, "b": "1"}
    theirs = ConfigObj(text.split("\n"), list_values=False, interpolation=False)["a"]
    if raw[:3] in ('"""', "'''"):
        assert theirs == value              # configobj unquotes these by itself, and only these
    else:
        assert theirs == raw


@pytest.mark.parametrize("text", ["\t=", "[a]\n\t=3", "[a]\n\"\"=3", "[a]\n' ' = 3"])
def test_a_value_without_a_key_is_refused(text):
    with pytest.raises(ConfigError, match="without its key") as refusal:
        Ini(text, "f")
    assert refusal.value.line == text.count("\n") + 1


@given(st.text(st.sampled_from("ab=[]#'\"\n \t,\\%$") | st.characters(), max_size=60))
def test_no_text_raises_anything_but_configerror(text):
    try:
        ini = Ini(text)
    except ConfigError:
        return
    again = Ini(ini.render())
    assert again.sections == ini.sections
    assert all(ini.line_of(heading, key) for heading, values in ini.sections.items() for key in values)


def test_what_somebody_writes_while_we_do_is_kept(path, monkeypatch):
    """A disk may take seconds to sync."""
    config = read_domain(str(path))
    config.vcpus = 4
    theirs = FILE.replace("1024", "2048")
    sync = os.fsync

    def sync_slowly(fd):
        path.write_text(theirs)
        sync(fd)

    monkeypatch.setattr(os, "fsync", sync_slowly)
    with pytest.raises(ConfigError, match="was changed meanwhile"):
        write_domain(str(path), config)
    assert path.read_text() == theirs and os.listdir(path.parent) == [path.name]


def test_what_somebody_writes_right_after_us_is_seen(tmp_path, monkeypatch):
    paths = Paths(str(tmp_path))
    os.makedirs(paths.domains)
    store = Store(paths)
    text = "name = web\nmemory = 64 MiB\n"
    config = store.parse(text, None)
    theirs = f"name = web\nuuid = {config.uuid}\nmemory = 128 MiB\n"

    def sync_slowly(folder):
        path = os.path.join(folder, "web.conf")
        with open(path, "w") as file:
            file.write(theirs)

    monkeypatch.setattr("kvmapp.ini.sync_folder", sync_slowly)
    store.put(config, text)
    store.refresh()
    assert store.config("web").memory == 128 << 20


def test_changes_are_the_whole_of_what_differs_from_the_defaults():
    """What an older version is told: nothing that it need not know."""
    given = {"name": "web", "memory": 1 << 30, "boot": {"kernel": "/k"}, "rng": {},
             "disks": [{"name": "vda", "source": "/x", "queues": 2}]}
    config = DomainConfig.from_dict(given)
    assert config.changes() == given
    assert DomainConfig.from_dict(config.changes()) == config
