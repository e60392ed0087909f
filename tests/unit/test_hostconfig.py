"""Network, pool, daemon and guest files: what they hold, and what is refused with its line."""
import pytest

from kvmapp.errors import ConfigError
from kvmapp.hostconfig import (
    DaemonConfig,
    GuestDefaults,
    NetworkConfig,
    read_daemon,
    read_guest_defaults,
    read_network,
    read_pool,
    write_network,
    write_pool,
)

DEFAULT = """\
name = default
bridge = virbr0
mac = 52:54:00:0a:cd:21
uuid = d340f42e-8611-52c5-949c-8013181e73d4
[ipv4]
address = 192.168.122.1/24
dhcp = 192.168.122.2-192.168.122.254
"""


def read(text: str) -> NetworkConfig:
    return read_network("/etc/kvmapp/networks/default.conf", text)


def test_the_default_network():
    config = read(DEFAULT)
    assert (config.name, config.mode, config.bridge, config.made) == ("default", "nat", "virbr0", ())
    assert config.ipv4 is not None and config.ipv4.dhcp == "192.168.122.2 - 192.168.122.254"
    assert (config.ipv4.lease, config.ipv6, config.hosts, config.dns.enabled) == (3600, None, [], True)
    assert NetworkConfig.from_dict(config.to_dict()) == config


def test_both_families_with_hosts_and_forwards():
    config = read(DEFAULT + "[ipv6]\naddress = FD00:122::1/64\n[host web]\nmac = 52:54:00:7F:0d:cb\nipv4 = 192.168.122.10\n"
                  "ipv6 = fd00:122::a\n[forward http]\nport = 8080\nto = web\nto_port = 80\n[forward dns]\nprotocol = udp\n"
                  "port = 8080\nto = fd00:122:0::b\n[forward other]\nport = 53\nlisten = 192.0.2.1\nto = 192.168.122.9\n"
                  "[forward same]\nport = 53\nlisten = 192.0.2.2\nto = 192.168.122.9\n[dns]\nforwarders = 9.9.9.9, 2620:fe::fe\n")
    assert config.ipv6 is not None and config.ipv6.address == "fd00:122::1/64"
    assert config.hosts[0].mac == "52:54:00:7f:0d:cb"
    assert {forward.name for forward in config.forwards} == {"http", "dns", "other", "same"}
    assert config.dns.forwarders == ["9.9.9.9", "2620:fe::fe"]
    assert NetworkConfig.from_dict(config.to_dict()) == config


def test_an_existing_bridge_gets_no_mac():
    config = read("name = lan\nmode = bridge\nbridge = br0\n")
    assert config.made == ("uuid",)
    assert config.mac is None


def test_made_things_are_stored(tmp_path):
    path = tmp_path / "n.conf"
    path.write_text("name = n\nmode = isolated   # closed\n")
    config = read_network(str(path))
    assert config.made == ("uuid", "mac")
    write_network(str(path), config)
    assert read_network(str(path)) == config
    assert path.read_text() == f"name = n\nuuid = {config.uuid}\nmode = isolated   # closed\nmac = {config.mac}\n"


MISTAKES = [
    ("name = n\n", None, "mode = 'nat': needs addresses"),
    ("name = n\nmode = route\n", 2, "mode = 'route': needs addresses"),
    ("name = n\nmode = bridge\n", 2, "the bridge is not named"),
    ("name = n\nmode = bridge\nbridge = br0\nmtu = 1400\n", 4, "an existing bridge is not changed"),
    ("name = n\nmode = bridge\nbridge = br0\n[ipv4]\naddress=10.0.0.1/8\n", 4, "[ipv4] cannot be in a network of mode bridge"),
    ("name = n\nmode = bridge\nbridge = br0\n[dns]\nenabled = no\n", 4, "[dns] cannot be"),
    ("name = n\nmode = isolated\ndevice = eth0\n", 3, "only the modes nat and route"),
    ("name = n\nmode = open\n[forward a]\nport = 1\nto = 10.0.0.1\n", 3, "cannot be in a network of mode open"),
    (DEFAULT + "[ipv5]\n", 8, "is no section"),
    (DEFAULT + "lease = never\n", 8, "expected a time"),
    (DEFAULT.replace("122.1/24", "122.0/24"), 6, "an address of a host"),
    (DEFAULT.replace("122.1/24", "122.1"), 6, "an address and its prefix"),
    (DEFAULT.replace("122.1/24", "122.1/31"), 6, "an address of a host"),
    (DEFAULT.replace("192.168.122.1/24", "fd00::1/64"), 6, "an address and its prefix"),
    (DEFAULT.replace("122.254", "122.255"), 7, "192.168.122.255 is no address for a guest of 192.168.122.0/24"),
    (DEFAULT.replace("122.254", "123.4"), 7, "192.168.123.4 is no address for a guest"),
    (DEFAULT.replace("122.254", "122.1"), 7, "the lower address first"),
    (DEFAULT + "[host web]\nmac = 52:54:00:00:00:01\n", 8, "[host web] has no address"),
    (DEFAULT + "[host web]\nmac = 52:54:00:00:00:01\nipv4 = 192.168.122.1\n", 10, "no address for a guest"),
    (DEFAULT + "[host web]\nmac = 52:54:00:00:00:01\nipv6 = fd00::2\n", 10, "the network has no ipv6"),
    (DEFAULT + "[host -web]\n", 8, "is no heading"),
    (DEFAULT + "[host a]\nmac = 52:54:00:00:00:01\nipv4 = 192.168.122.5\n[host b]\nmac = 52:54:00:00:00:01\n"
     "ipv4=192.168.122.6\n", 12, "[host a] has it already"),
    (DEFAULT + "[host a]\nmac = 52:54:00:00:00:01\nipv4 = 192.168.122.5\n[host b]\nmac = 52:54:00:00:00:02\n"
     "ipv4=192.168.122.5\n", 13, "[host a] has it already"),
    (DEFAULT + "[forward a]\nport = 80\nto = web\n", 10, "neither an address nor a [host]"),
    (DEFAULT + "[forward a]\nport = 80\nto = 10.0.0.1\n", 10, "no address for a guest of 192.168.122.1/24"),
    (DEFAULT + "[forward a]\nport = 0\nto = 192.168.122.9\n", 9, "from 1 to 65535"),
    (DEFAULT + "[forward a]\nport = 80\nto = 192.168.122.9\n[forward b]\nport = 80\nlisten = 192.0.2.1\nto = 192.168.122.8\n", 12,
     "[forward a] has it already"),
    (DEFAULT + "[dns]\nforwarders = 9.9.9.9, example.org\n", 9, "an IPv4 or IPv6 address"),
    (DEFAULT + "[dns]\nforwarders = 224.0.0.1\n", 9, "an IPv4 or IPv6 address"),
    (DEFAULT + "[dns]\nforwarders = fe80::1%eth0\n", 9, "an IPv4 or IPv6 address"),
    ("domain = a..b\n" + DEFAULT, 1, "a DNS name"),
    ("domain = a_b\n" + DEFAULT, 1, "a DNS name"),
]


@pytest.mark.parametrize(("text", "line", "message"), MISTAKES)
def test_mistakes_are_told(text, line, message):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert message in caught.value.message
    assert caught.value.line == line, caught.value.render()


def test_pool(tmp_path):
    path = tmp_path / "p.conf"
    path.write_text("name = p\npath = images\n")
    config = read_pool(str(path))
    assert (config.type, config.path, config.made) == ("dir", f"{tmp_path}/images", ("uuid",))
    write_pool(str(path), config)
    assert path.read_text() == f"name = p\nuuid = {config.uuid}\npath = images\n"
    with pytest.raises(ConfigError, match="expected dir"):
        read_pool(str(path), "name = p\npath = /x\ntype = iscsi\n")


def test_daemon_and_guest_files_may_be_absent(tmp_path):
    assert read_daemon(str(tmp_path / "kvmapp.conf")) == DaemonConfig()
    assert read_guest_defaults(str(tmp_path / "guest.conf")) == GuestDefaults()
    assert (DaemonConfig().unix_sock_rw_perms, GuestDefaults().user) == (0o770, "kvmapp")


def test_daemon_file(tmp_path):
    path = tmp_path / "kvmapp.conf"
    path.write_text("unix_sock_rw_perms = 0700\nlog_level = debug\n")
    config = read_daemon(str(path))
    assert (config.unix_sock_rw_perms, config.log_level, config.filename) == (0o700, "debug", str(path))
    for mistake in ("0888", "7", "rwx", "1777", "07777"):
        path.write_text(f"unix_sock_rw_perms = {mistake}\n")
        with pytest.raises(ConfigError, match=r"kvmapp\.conf:1: .* expected permission bits in octal"):
            read_daemon(str(path))


def test_guest_file_honours_only_what_this_version_can(tmp_path):
    path = tmp_path / "guest.conf"
    path.write_text("shutdown_timeout = 2 min\nvnc_listen = 127.0.0.1\n")
    config = read_guest_defaults(str(path))
    assert config.shutdown_timeout == 120
    assert config.warnings == ("vnc_listen is honoured from version 0.3 on; this is 0.1.0",)
    path.write_text("vnc_listen = 0.0.0.0\n")
    with pytest.raises(ConfigError, match=r"honoured from version 0\.3 on"):
        read_guest_defaults(str(path))
