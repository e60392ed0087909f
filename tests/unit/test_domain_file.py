"""Domain files are read strictly; every mistake is told with its line, its value and a way out."""
import os

import pytest

from kvmapp.config import DomainConfig, read_domain
from kvmapp.errors import ConfigError
from kvmapp.ini import FILE_LIMIT

DESIGN_EXAMPLE = """\
# /etc/kvmapp/domains/linuxvm02.conf
name = linuxvm02
uuid = d340f42e-8611-52c5-949c-8013181e73d4     # made at define when absent
memory = 1024 MiB
vcpus = 1
acpi = yes
on_poweroff = destroy                           # on_reboot = restart, on_crash = destroy
[boot]                                          # kernel given: direct boot; else firmware and order
kernel = /var/lib/kvmapp/boot/vmlinuz
initrd = /var/lib/kvmapp/boot/initrd.img
cmdline = console=ttyS0
[disk vda]                                      # the section's second word is the guest's name for it
source = /data/linuxvm02.img
format = raw
[interface 0]
type = bridge                                   # bridge | network | user
source = br0
model = virtio
mac = 52:54:00:7f:0d:cb                         # made at define when absent
[serial 0]
[graphics vnc]
listen = 127.0.0.1
"""
TOP = "name = a\nmemory = 64\n"


def read(text: str) -> DomainConfig:
    return read_domain("/etc/kvmapp/domains/a.conf", text)


def test_the_design_example_is_read_verbatim():
    config = read(DESIGN_EXAMPLE)
    assert config.made == ()
    assert config.warnings == ("[graphics vnc] is honoured from version 0.3 on; this is 0.1.0",)
    assert (config.name, config.memory, config.vcpus, config.acpi) == ("linuxvm02", 1 << 30, 1, True)
    assert config.boot.cmdline == "console=ttyS0"
    assert [(disk.name, disk.source, disk.format) for disk in config.disks] == [("vda", "/data/linuxvm02.img", "raw")]
    assert config.interfaces[0].mac == "52:54:00:7f:0d:cb"
    assert [serial.type for serial in config.serials] == ["pty"]
    assert (config.rng, config.consoles, config.debug.exit_port) == (None, [], False)


def test_name_memory_and_one_disk_are_a_whole_domain():
    config = read(TOP + "[disk vda]\nsource = disk.img")
    assert config.disks[0].source == "/etc/kvmapp/domains/disk.img"
    assert config.made == ("uuid",)


def test_relative_paths_belong_to_the_files_folder():
    config = read(TOP + "[boot]\nkernel = ../boot/./vmlinuz\n[serial 0]\ntype = file\npath = /var/../tmp/x\n")
    assert config.boot.kernel == "/etc/kvmapp/boot/vmlinuz"
    assert config.serials[0].path == "/tmp/x"


def test_parts_are_sorted_as_the_guest_numbers_them():
    config = read(TOP + "".join(f"[disk {name}]\nsource = /{name}\n" for name in ("vdaa", "vdb", "vda"))
                  + "[interface 10]\ntype=user\n[interface 2]\ntype=user\n")
    assert [disk.name for disk in config.disks] == ["vda", "vdb", "vdaa"]
    assert [interface.index for interface in config.interfaces] == [2, 10]


def test_absent_macs_are_made_apart_from_those_that_are_there():
    config = read(TOP + "[interface 0]\ntype = user\n[interface 1]\ntype = user\n")
    assert config.made == ("uuid", "[interface 0] mac", "[interface 1] mac")
    assert config.interfaces[0].mac != config.interfaces[1].mac


def test_quotes_and_comments():
    config = read(TOP + 'title = "# one"   # two\ndescription = """first\n# second "q"\n"""\n'
                  "[boot]\nkernel = '/a # b'\ncmdline = console=ttyS0,115200n8 dyndbg=\"file a +p\" quiet\n")
    assert config.title == "# one"
    assert config.description == 'first\n# second "q"\n'
    assert config.boot.kernel == "/a # b"
    assert config.boot.cmdline == 'console=ttyS0,115200n8 dyndbg="file a +p" quiet'


def test_crlf_and_byte_order_mark(tmp_path):
    path = tmp_path / "a.conf"
    path.write_bytes(b"\xef\xbb\xbfname = a\r\nmemory = 64\r\n[serial 0]\r\n")
    assert read_domain(str(path)).name == "a"


MISTAKES = [
    # text, line, words of the message, words of the hint
    ("name = a\n", None, "'memory' is missing", "memory = "),
    (TOP + "memroy = 1\n", 3, "memroy = '1': unknown key", "did you mean memory?"),
    (TOP + "kernel = /k\n", 3, "unknown key", "kernel belongs into [boot]"),
    (TOP + "[boot]\nvcpus = 1\n", 4, "[boot] vcpus = '1': unknown key", "vcpus belongs to the top"),
    (TOP + "[rng]\nxyzzy = 1\n", 4, "[rng] xyzzy = '1': unknown key", "known here: nothing"),
    (TOP + "vcpus = 0\n", 3, "vcpus = '0': expected a whole number from 1 to 254", ""),
    (TOP + "vcpus =\n", 3, "vcpus = ''", ""),
    (TOP + "on_crash = destory\n", 3, "expected destroy, restart or preserve", "did you mean destroy?"),
    (TOP + "current_memory = 65\n[balloon]\n", 3, "more than memory = 64 MiB", ""),
    (TOP + "current_memory = 32\n", 3, "only a balloon", "[balloon]"),
    ("name = a/b\nmemory = 64", 1, "without slashes", ""),
    (TOP + "\n# c\n[dsk vda]\nsource = /x\n", 5, "[dsk vda] is no section", "did you mean [disk]?"),
    (TOP + "[xyzzy]\n", 3, "is no section", "[disk vdX]"),
    (TOP + "[disk]\nsource = /x\n", 3, "wants a word", ""),
    (TOP + "[disk sda]\nsource = /x\n", 3, "[disk sda] is no heading", ""),
    (TOP + "[disk vda]\n", 3, "[disk vda] source is missing", ""),
    (TOP + "[disk vda]\nsource =\n", 4, "expected a path", ""),
    (TOP + "[disk vda]\nsource = /x\nformat = qcow3\n", 5, "format = 'qcow3': expected raw", ""),
    (TOP + "[rng 0]\n", 3, "takes no word", ""),
    (TOP + "[disk vda]\nsource = /x\n[disk  vda]\nsource = /y\n", 5, "a second time", ""),
    (TOP + "[serial 0]\n[serial 00]\n", 4, "a second time", ""),
    (TOP + "[disk vda]\nsource = /x\nthreads = 2\n", 5, "no more than 1 queues", "queues = 2"),
    (TOP + "[disk vda]\nsource = /x\n[disk vdb]\nsource = /x\nreadonly = yes\n", 6,
     "'/x': is the source of disk vda", "readonly"),
    (TOP + "[interface 0]\nmac = 52:54:00:00:00:01\ntype=user\n[interface 1]\ntype=user\nmac = 52:54:00:00:00:01\n", 8,
     "[interface 0] has it already", ""),
    (TOP + "[interface 0]\n", 3, "of type bridge has no source", "the bridge's name"),
    (TOP + "[interface 0]\ntype = tap\nsource = t0\n", 3, "of type tap has no target", "the tap's name"),
    (TOP + "[interface 0]\ntype = user\nsource = br0\n", 5, "of type user has none", ""),
    (TOP + "[interface 0]\ntype = tap\ntarget = t0\nmodel = e1000\nqueues = 4\n", 7,
     "'4': an interface of model e1000 has one pair of queues", "model = virtio"),
    (TOP + "[interface 0]\ntype = tap\ntarget = t0\nmodel = e1000\nvhost = yes\n", 7,
     "'yes': vhost cannot serve an interface of model e1000", "vhost = no"),
    (TOP + "machine = microvm\n[interface 0]\ntype = user\nmodel = e1000\n", 6,
     "'e1000': is a PCI card, and a microvm has no PCI bus", "machine = pc"),
    (TOP + "[interface 0]\ntype = user\nqueues = 4\n", 5, "'4': an interface of type user has one pair of queues", ""),
    (TOP + "[graphics vnc]\nlisten = 0.0.0.0\n", 4, "'0.0.0.0' is honoured from version 0.3 on", ""),
    (TOP + "[boot]\ncmdline = quiet\n", 4, "of no use without a kernel", "kernel"),
    (TOP + "[serial 0]\ntype = file\n", 3, "of type file has no path", ""),
    (TOP + "[serial 0]\npath = /x\n", 4, "only type file", ""),
    (TOP + "[serial 0]\ntype = stdio\n[console 0]\ntype = stdio\n", 6, "[serial 0] has the terminal already", ""),
    # broken syntax
    (TOP + "rubbish\n", 3, "neither `key = value` nor a [heading]: 'rubbish'", ""),
    (TOP + "name = b\n", 3, "a second time", ""),
    (TOP + "[boot]\n[boot]\n", 4, "a second time", ""),
    (TOP + "[[boot]]\n", 3, "sections within sections", ""),
    (TOP + "[boot]\n[[x]]\n", 3, "sections within sections", "write [x]"),
    (TOP + "[boot\n", 3, "neither", ""),
    (TOP + "on crash = restart\n", 3, "'on crash' is no key", ""),
    (TOP + "[disk a#b]\n", 3, "[disk a#b] is no heading", ""),
    (TOP + "['disk vd=']\n", 3, "[disk vd=] is no heading", ""),
    (TOP + "[磁盘 vda]\n", 3, "is no heading", ""),
    (TOP + "title = a# b\n", 3, "cannot be understood", "a space before the #"),
    (TOP + "title = 'a' b\n", 3, "cannot be understood", "quotes around the whole value"),
    (TOP + 'title = "a\n', 3, "cannot be understood", ""),
    (TOP + "description = '''\nb\n\n", 3, "triple quotes are not closed", ""),
    (TOP + "title = " + "x" * 9000, 3, "longer than 8192", ""),
    (TOP + "title = " + "x" * 201, 3, "at most 200 bytes, got 201", ""),
    (TOP + "description = '''a\n\x07b'''\n", 3, "printable text", ""),
]


@pytest.mark.parametrize(("text", "line", "message", "hint"), MISTAKES)
def test_mistakes_are_told(text, line, message, hint):
    with pytest.raises(ConfigError) as caught:
        read(text)
    error = caught.value
    assert (error.file, error.line) == ("/etc/kvmapp/domains/a.conf", line), error.render()
    assert message in error.message
    assert hint in (error.hint or ""), error.render()
    assert "\n" not in error.message


def test_a_line_is_found_behind_a_value_of_several_lines():
    with pytest.raises(ConfigError) as caught:
        read(TOP + 'description = """\nvcpus = 7\n[boot]\n"""\n\nvcpus = 0\n')
    assert caught.value.line == 8


@pytest.mark.parametrize(("data", "line", "message"), [
    (b"name = a\nmemory = 64\ntitle = \xe9\n", 3, "byte 0xe9 is not UTF-8"),
    (b"name = a\nmemory\0= 64\n", 2, "NUL"),
    (b"", None, "'name' is missing"),
    (b"#" * (FILE_LIMIT + 1), None, "is larger than 256 KiB"),
])
def test_files_that_are_none(tmp_path, data, line, message):
    path = tmp_path / "a.conf"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        read_domain(str(path))
    assert message in caught.value.message
    assert (caught.value.file, caught.value.line) == (str(path), line)


def test_what_is_not_there_or_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.conf: Cannot read the file: No such file"):
        read_domain(str(tmp_path / "absent.conf"))
    with pytest.raises(ConfigError, match="is a directory"):
        read_domain(str(tmp_path))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="is a device, FIFO or socket"):
        read_domain(str(tmp_path / "fifo"))


def test_unreadable_file_says_who_lacks_what(tmp_path, monkeypatch):
    path = tmp_path / "a.conf"
    path.write_text(TOP)
    path.chmod(0o200)
    monkeypatch.setattr("os.open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    monkeypatch.setattr("os.geteuid", lambda: os.stat(path).st_uid or 65534)
    with pytest.raises(ConfigError, match="Permission denied") as caught:
        read_domain(str(path))
    assert "lacks" in (caught.value.hint or "")


def test_json_is_checked_as_strictly_as_a_file():
    config = read(DESIGN_EXAMPLE + "[rng]\n")
    again = DomainConfig.from_dict(config.to_dict())
    assert again == config
    changes: list[tuple[dict, str]] = [
        ({"memory": "1 GiB"}, "memory = '1 GiB': expected a size"), ({"memory": 1}, "expected a size"),
        ({"vcpus": True}, "vcpus = True: expected a whole number"), ({"acpi": 1}, "acpi = 1: expected yes or no"),
        ({"xyzzy": 1}, "unknown key"), ({"disks": [3]}, "disks = 3: expected an object"), ({"rng": 3}, "rng = 3"),
        ({"disks": [{"name": "vda", "source": "/a"}, {"name": "vda", "source": "/b"}]}, "a second time"),
        ({"disks": [{"source": "/a"}]}, "[disk None]"), ({"name": None}, "'name' is missing"),
        ({"boot": {"initrd": "/i"}}, "of no use without a kernel"),
    ]
    for change, complaint in changes:
        with pytest.raises(ConfigError) as caught:
            DomainConfig.from_dict(config.to_dict() | change)
        assert complaint in caught.value.message


def test_shared_folders():
    config = read(f"{TOP}[filesystem data]\nsource = share\nreadonly = yes\ncache = none\n[filesystem {'x' * 36}]\nsocket = /run/s\n")
    first, second = config.filesystems
    assert (first.tag, first.source, first.readonly, first.cache) == ("data", "/etc/kvmapp/domains/share", True, "none")
    assert (second.tag, second.source, second.socket) == ("x" * 36, None, "/run/s")


@pytest.mark.parametrize(("text", "complaint"), [
    ("[filesystem data]\n", "[filesystem data] has neither source nor socket"),
    (f"[filesystem {'x' * 37}]\nsource = /s\n", "at most 36"),
    ("[filesystem a/b]\nsource = /s\n", "is no heading"),
    ("[filesystem data]\nsource = /s\nsocket = /run/s\n", "source = '/s': of no use with socket"),
    ("[filesystem data]\nsocket = /run/s\nreadonly = yes\n", "readonly = 'yes': of no use with socket"),
    ("[filesystem data]\nsource = /s\ncache = never\n", "expected auto, none or always"),
])
def test_shared_folders_that_cannot_be(text, complaint):
    with pytest.raises(ConfigError) as caught:
        read(TOP + text)
    assert complaint in str(caught.value)


def test_ksm_does_not_go_with_memory_that_is_shared():
    with pytest.raises(ConfigError, match=r"KSM cannot merge memory that is shared with the file server of \[filesystem data\]"):
        read(f"{TOP}ksm = yes\n[filesystem data]\nsource = /s\n")
