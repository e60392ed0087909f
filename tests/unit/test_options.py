"""The options of `kvmapp run`: parted without argparse, laid over a file, refused with the nearest known one."""
import pytest

from kvmapp.config import config_from_options
from kvmapp.errors import ConfigError, UsageError
from kvmapp.options import part_arguments, run_options

TAKES_VALUE = {flag: bool(option.metavar) for flag, option in run_options().items()}


def config_of(*arguments: str, folder: str = "/cwd"):
    pairs, rest = part_arguments(arguments, TAKES_VALUE)
    return config_from_options(pairs, rest[0] if rest else None, folder)


def test_the_options_there_are():
    assert TAKES_VALUE == {
        "--name": True, "--memory": True, "--vcpus": True, "--cpu": True, "--no-acpi": False, "--no-reboot": False,
        "--kernel": True, "--initrd": True, "--append": True, "--no-unpack": False, "--disk": True, "--net": True, "--console": False,
        "--rng": False, "--virtio": True, "--machine": True, "--packed": False, "--share": True, "--debug-console": False,
        "--debug-exit": False}


def test_an_option_that_turns_off_says_what_then_is():
    """The setting's own words are of what it turns on."""
    turning_off = [option for flag, option in run_options().items() if flag.startswith("--no-")]
    assert turning_off and not [option.flag for option in turning_off if option.help == option.setting.help]


def test_options_alone():
    config = config_of("--kernel", "vmlinuz", "--initrd=/i.gz", "--append", "console=ttyS0 a=b", "--memory", "128",
                       "--vcpus=4", "--no-acpi", "--no-reboot", "--rng", "--debug-exit", "--name", "probe")
    assert (config.name, config.memory, config.vcpus, config.acpi, config.on_reboot) == \
        ("probe", 128 << 20, 4, False, "destroy")
    assert (config.boot.kernel, config.boot.initrd, config.boot.cmdline) == ("/cwd/vmlinuz", "/i.gz", "console=ttyS0 a=b")
    assert config.rng is not None and config.debug.exit_port and not config.debug.port_402
    assert [(serial.index, serial.type) for serial in config.serials] == [(0, "stdio")]
    assert config.uuid


def test_nothing_given_is_a_small_guest_on_the_terminal():
    config = config_of()
    assert (config.name, config.memory, config.filename) == ("guest", 512 << 20, None)


def test_disks():
    config = config_of("--disk", "a.img", "--disk", "/b,,c.img,readonly=on,serial=S1,cache=none", "--disk",
                       "source=d.img,name=vdz", "--disk", "odd=name.img")
    assert [(disk.name, disk.source, disk.readonly, disk.serial, disk.cache) for disk in config.disks] == [
        ("vda", "/cwd/a.img", False, None, "writeback"), ("vdb", "/b,c.img", True, "S1", "none"),
        ("vdc", "/cwd/odd=name.img", False, None, "writeback"), ("vdz", "/cwd/d.img", False, None, "writeback")]


def test_networks():
    config = config_of("--net", "tap=t0,mac=52:54:00:00:00:07", "--net", "bridge=br0", "--net", "network=default",
                       "--net", "user,mtu=1400,model=e1000")
    assert [(one.type, one.source, one.target) for one in config.interfaces] == [
        ("tap", None, "t0"), ("bridge", "br0", None), ("network", "default", None), ("user", None, None)]
    assert config.interfaces[0].mac == "52:54:00:00:00:07"
    assert config.interfaces[3].mtu == 1400
    assert [one.model for one in config.interfaces] == ["virtio", "virtio", "virtio", "e1000"]


def test_shared_folders():
    config = config_of("--share", "data=a,,b", "--share", "pub=/srv/pub,readonly=on,cache=none,binary=v", "--share", "other,socket=s")
    assert sorted((one.tag, one.source, one.readonly, one.cache, one.binary, one.socket) for one in config.filesystems) == [
        ("data", "/cwd/a,b", False, "auto", None, None), ("other", None, False, "auto", None, "/cwd/s"),
        ("pub", "/srv/pub", True, "none", "/cwd/v", None)]


@pytest.mark.parametrize("text", ["data", "=x", "data=", "/srv/pub", "data=x,socket=s", ""])
def test_shared_folders_without_a_tag_or_a_folder(text):
    with pytest.raises(UsageError, match="names no tag or no folder"):
        config_of("--share", text)


def test_a_tag_may_stand_once():
    with pytest.raises(UsageError, match="there is a filesystem data already"):
        config_of("--share", "data=a", "--share", "data=b")


def test_console_takes_the_terminal_from_the_serial_port():
    config = config_of("--console")
    assert (config.consoles[0].type, config.serials[0].type) == ("stdio", "null")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.conf"
    path.write_text("name = a\nmemory = 64\n[boot]\nkernel = k\n[disk vda]\nsource = d.img\n[serial 0]\nlog = s.log\n")
    return path


def test_options_over_a_file(file, tmp_path):
    config = config_of(str(file), "--memory", "1G", "--append", "quiet", "--disk", "e.img")
    assert (config.name, config.memory, config.boot.cmdline, config.filename) == ("a", 1 << 30, "quiet", str(file))
    assert config.boot.kernel == f"{tmp_path}/k"
    assert [(disk.name, disk.source) for disk in config.disks] == [("vda", f"{tmp_path}/d.img"), ("vdb", "/cwd/e.img")]
    assert (config.serials[0].type, config.serials[0].log) == ("stdio", f"{tmp_path}/s.log")


def test_a_file_that_says_where_its_serial_port_goes_is_followed(file):
    file.write_text(file.read_text() + "type = null\n")
    assert config_of(str(file)).serials[0].type == "null"


def test_mistakes_in_the_file_are_told_by_line(file):
    file.write_text("name = a\nmemory = lots\n")
    with pytest.raises(ConfigError) as caught:
        config_of(str(file))
    assert (caught.value.file, caught.value.line) == (str(file), 2)


USAGE = [
    (["--memroy", "1"], "unknown option '--memroy'", "did you mean --memory?"),
    (["-m", "1"], "unknown option '-m'", "--help"),
    (["--xyzzy=1"], "unknown option '--xyzzy'", "--help"),
    (["--memory"], "--memory wants an argument", ""),
    (["--rng=1"], "--rng takes no argument, got '1'", ""),
    (["--disk", ""], "names no file", "--disk PATH"),
    (["--disk", "a,readonly"], "'readonly' is not KEY=VALUE", "twice"),
    (["--disk", "a,format=raw,format=raw"], "format is given twice", ""),
    (["--disk", "a", "--disk", "b,name=vda"], "a disk vda already", ""),
    (["--net", "br0"], "--net 'br0' names no type", "bridge=NAME"),
    (["--net", "tap"], "--net 'tap' names no tap", "--net tap=NAME"),
    (["--net", "mac=52:54:00:00:00:01"], "names no type", ""),
]
CONFIG = [
    (["--memory", "lots"], "--memory 'lots': expected a size", ""),
    (["--memory", ""], "--memory '': expected a size", ""),
    (["--vcpus", "0"], "--vcpus '0': expected a whole number from 1 to 254", ""),
    (["--append", "quiet"], "--append 'quiet': of no use without a kernel", "--kernel"),
    (["--kernel", ""], "--kernel '': expected a path", ""),
    (["--disk", "a,readonly=maybe"], "--disk: readonly = 'maybe': expected yes or no", ""),
    (["--disk", "a,fromat=raw"], "--disk: fromat = 'raw': unknown key", "did you mean format?"),
    (["--disk", "a,name=sda"], "sda", "vd"),
    (["--disk", "a", "--disk", "a"], "--disk: source = '/cwd/a': is the source of disk vda too", "readonly"),
    (["--net", "tap="], "--net: target = ''", ""),
    (["--net", "tap=t0", "--net", "tap=t0"], "--net: target = 't0': [interface 0] has it already", ""),
    (["--net", "user,queues=2"], "--net: queues = '2': an interface of type user has one pair", ""),
    (["--name", "a/b"], "--name 'a/b': expected a name", ""),
]


@pytest.mark.parametrize(("arguments", "message", "hint"), USAGE)
def test_what_is_no_usage(arguments, message, hint):
    with pytest.raises(UsageError) as caught:
        config_of(*arguments)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(("arguments", "message", "hint"), CONFIG)
def test_what_no_machine_can_be(arguments, message, hint):
    with pytest.raises(ConfigError) as caught:
        config_of(*arguments)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "") + caught.value.message


def test_double_dash_ends_the_options():
    assert part_arguments(["--rng", "--", "--memory"], TAKES_VALUE) == ([("--rng", None)], ["--memory"])


def test_an_unknown_pair_is_refused_too():
    with pytest.raises(UsageError, match="unknown option '--dsk'"):
        config_from_options([("--dsk", "x")])
