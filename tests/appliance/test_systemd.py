"""The appliance on a plain host with systemd: the units keep the daemon, and guests outlive it; they go down with the host and come up
with it, by their power button or with their memory saved.

Chapters of one story, told by one host, as in test_appliance.py.
"""
import re

import pytest

from tests.appliance.host import PlainHost

pytestmark = [pytest.mark.guest, pytest.mark.timeout(1500)]

WEB = """name = web
memory = 128 MiB
[boot]
kernel = /var/lib/kvmapp/boot/vmlinuz
initrd = /var/lib/kvmapp/boot/initramfs.gz
cmdline = console=ttyS0 panic=-1 quiet then=wait
[serial 0]
log = /var/log/kvmapp/web.out
[cputune]
shares = 2048
[memtune]
hard_limit = 512 MiB
"""
GROUP = "/system.slice/kvmapp-domains.service/domain-web"
LIVES = (0, " Id   Name   State\n----------------------\n 1    web    running\n\n", "")


@pytest.fixture(scope="module")
def host():
    one = PlainHost(init="systemd")
    try:
        one.boot()
        one.run("rm /usr/sbin/kvmapp /usr/sbin/kvmappctl")      # the lab's own: a newcomer has none
        yield one
    finally:
        one.close()


def pid(host):
    return host.says("pgrep -fx 'kvmapp: web'").strip()


def lives(host):
    said = host.run("kvmappctl list")
    return (said.status, said.out, said.err) == LIVES


def limits(host):
    return host.says(f"cat /proc/{pid(host)}/cgroup; cat /sys/fs/cgroup{GROUP}/cpu.weight /sys/fs/cgroup{GROUP}/memory.max").split()


def test_setup(host):
    said = host.says("cd /src && python3 -m kvmapp setup")
    for line in ("wrote /usr/lib/systemd/system/kvmapp.service", "ran: systemctl daemon-reload",
                 "ran: systemctl enable kvmapp.service kvmapp-guests.service"):
        assert f"{line}\n" in said
    assert "FAIL" not in said and said.splitlines()[-1] == "start it: /etc/init.d/kvmapp start"
    assert host.says("systemctl is-enabled kvmapp kvmapp-guests").split() == ["enabled", "enabled"]
    assert host.run("systemctl is-active kvmapp").out == "inactive\n"


def test_the_init_script_is_the_unit_s(host):
    assert host.says("/etc/init.d/kvmapp start") == "Starting kvmapp daemon: OK\n"
    assert host.says("systemctl is-active kvmapp kvmapp-guests kvmapp-domains").split() == ["active"] * 3
    assert host.says("systemctl show kvmapp -p MainPID --value") == host.says("cat /run/kvmapp/kvmapp.pid").strip() + "\n"
    assert 'Status: "0 domains, 0 run"' in host.says("systemctl status kvmapp --no-pager")


def test_a_guest_has_a_group_beside_the_daemon_s(host):
    host.says("cp /lab/vmlinuz /lab/initramfs.gz /var/lib/kvmapp/boot/")
    host.run(f"cat >web.conf <<'END'\n{WEB}END\nkvmappctl define web.conf; kvmappctl autostart web")
    assert host.says("kvmappctl start web") == "Domain web started\n"
    assert limits(host) == [f"0::{GROUP}", "200", str(512 << 20)]
    host.eventually("cat /var/log/kvmapp/web.out", "waiting for the power button")


@pytest.mark.parametrize("command", [
    "systemctl restart kvmapp", "/etc/init.d/kvmapp restart", "systemctl reload kvmapp", "systemctl daemon-reexec",
    "systemctl stop kvmapp && systemctl start kvmapp", "/etc/init.d/kvmapp stop && /etc/init.d/kvmapp start",
    "systemctl kill -s KILL --kill-who=main kvmapp"])
def test_a_guest_outlives_the_daemon(host, command):
    before, daemon = pid(host), host.says("cat /run/kvmapp/kvmapp.pid")
    host.says(f"{command} >/dev/null")
    if "KILL" in command:                                       # systemd starts it anew
        host.eventually("systemctl show kvmapp -p MainPID --value; systemctl is-active kvmapp",
                        rf"\A(?!{daemon.strip()}\n)[1-9]\d*\nactive\n")
    host.eventually("kvmappctl list", r"web +running")          # it may be late with its first word to the new daemon
    assert lives(host) and pid(host) == before
    assert limits(host) == [f"0::{GROUP}", "200", str(512 << 20)]


def test_it_goes_down_with_the_host_and_comes_up_with_it(host):
    shown = host.reboot()
    assert "web: shut down\n" in shown, shown
    host.eventually("kvmappctl list", r"web +running")
    assert limits(host) == [f"0::{GROUP}", "200", str(512 << 20)]
    assert re.match(r"kvmapp \(pid \d+\) is running", host.says("/etc/init.d/kvmapp status"))
    host.eventually("grep -c 'waiting for the power button' /var/log/kvmapp/web.out", "^2$")


def test_it_goes_on_where_it_was_saved(host):
    """With the daemon stopped before the host: the guests are not forgotten for it."""
    host.says("echo ON_SHUTDOWN=suspend >/etc/default/kvmapp-guests; systemctl stop kvmapp")
    shown = host.reboot()
    assert "web: saved\n" in shown, shown
    host.eventually("kvmappctl list", r"web +running")
    assert host.says("kvmappctl domstate web --reason").strip() == "running (restored)"
    assert host.says("grep -c 'waiting for the power button' /var/log/kvmapp/web.out") == "2\n"     # it did not boot
    host.says("kvmappctl shutdown web --timeout 120")
    assert "power button pressed" in host.says("cat /var/log/kvmapp/web.out")


def test_it_is_taken_away_without_a_trace(host):
    host.says("cd /src && python3 -m kvmapp setup --remove")
    assert host.says("find / -xdev -name 'kvmapp*' -not -path '/etc/kvmapp*' -not -path '/etc/default/*' -not -path '/var/*'") == ""
    assert host.run("systemctl is-enabled kvmapp").out in ("", "not-found\n")
    assert host.says("systemctl is-system-running") == "running\n"
