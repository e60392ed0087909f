"""An administrator's notes on KVM with virsh and virt-install, replayed in their order with kvmapp's commands, on a plain host to which
only the one file was copied: no Python, no compiler, no QEMU, no libvirt. Then an upgrade under a guest that counts.

Chapters of one story, told by one host, as in test_appliance.py.
"""
import os
import re
import shutil

import pytest

from onefile import build
from tests.appliance.host import PlainHost
from tests.onefile.host import newer

pytestmark = [pytest.mark.guest, pytest.mark.timeout(1800),
              pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it makes another build by way of a folder")]

LINUXVM02 = """name = linuxvm02
memory = 128 MiB
[boot]
kernel = /var/lib/kvmapp/boot/vmlinuz
initrd = /var/lib/kvmapp/boot/initramfs.gz
cmdline = console=ttyS0 panic=-1 quiet then=wait
[disk vda]
source = /data/linuxvm02.img
format = raw
[interface 0]
type = bridge
source = br0
mac = 52:54:00:7f:0d:cb
[serial 0]
log = /var/log/kvmapp/linuxvm02.out
"""
COUNTER = """name = counter
memory = 32 MiB
[boot]
kernel = /var/lib/kvmapp/boot/probe.elf
cmdline = steps=none mode=counter report=serial period=100
[serial 0]
type = file
path = /var/lib/kvmapp/images/count
"""
BRIDGE = "ip link add br0 type bridge; ip link set br0 up"
NEWER = "9.9.9-newer"
# What a newcomer's host does not have.
BARE = """rm -rf /usr/bin/python3* /usr/lib/python3* /usr/bin/qemu-* /usr/sbin/kvmapp /usr/sbin/kvmappctl
umount -l /src /usr/local/lib/lab-python"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    one = PlainHost()
    try:
        file = build.obtain() / "kvmapp"
        shared = one.folder / "shared"
        shared.mkdir()
        shutil.copy(file, shared / "kvmapp")
        shutil.copy(newer(file, NEWER, tmp_path_factory.mktemp("newer")), shared / "kvmapp-newer")
        one.boot()
        one.run(f"{BARE}\ncp /out/kvmapp .")
        yield one
    finally:
        one.close()


def state(host):
    return host.says("kvmappctl domstate linuxvm02 --reason").strip()


def identity(host):
    return host.says("readlink /usr/lib/kvmapp/current").strip()


def test_a_plain_host(host):
    assert host.says("ls; command -v python3 gcc qemu-system-x86_64 libvirtd virsh kvmapp || true") == "kvmapp\n"


def test_setup(host):
    said = host.says("./kvmapp setup")
    for line in ("made user kvmapp", "linked /usr/sbin/kvmapp", "wrote /etc/init.d/kvmapp", "ran: update-rc.d kvmapp defaults"):
        assert f"{line}\n" in said
    assert "FAIL" not in said and said.splitlines()[-1] == "start it: /etc/init.d/kvmapp start"
    assert host.says("ls -d /run/kvmapp-unpacked-* /dev/shm/* /tmp/* 2>/dev/null || true") == ""
    assert host.says("kvmapp --version") == host.says("./kvmapp --version")


def test_daemon_not_running(host):
    assert host.refuses("kvmappctl list") == (
        "error: failed to connect to the hypervisor\n"
        "error: Failed to connect socket to '/run/kvmapp/kvmapp.sock': No such file or directory\n"
        "hint: start it: /etc/init.d/kvmapp start\n")


def test_init_script(host):
    assert host.says("/etc/init.d/kvmapp start") == "Starting kvmapp daemon: OK\n"
    assert re.fullmatch(r"kvmapp \(pid \d+\) is running\.\.\.\n", host.says("/etc/init.d/kvmapp status"))
    assert host.says("ss -Hltun") == ""


def test_define_and_list(host):
    host.says(f"cp /lab/vmlinuz /lab/initramfs.gz /var/lib/kvmapp/boot/; mkdir /data; truncate -s 20M /data/linuxvm02.img; {BRIDGE}")
    said = host.run(f"cat >linuxvm02.conf <<'END'\n{LINUXVM02}END\nkvmappctl define linuxvm02.conf")
    assert (said.status, said.out) == (0, "Domain linuxvm02 defined from linuxvm02.conf\n\n")
    assert host.says("kvmappctl list") == " Id   Name   State\n--------------------\n"
    assert host.says("kvmappctl list --all") == (" Id   Name        State\n----------------------------\n"
                                                 " -    linuxvm02   shut off\n")
    taken = host.refuses("sed '/^uuid/d' linuxvm02.conf >other.conf; echo uuid = 00000000-0000-4000-8000-000000000001 | "
                         "cat - other.conf >taken.conf; kvmappctl define taken.conf")
    assert "domain 'linuxvm02' already exists with uuid " in taken


def test_start_makes_one_process(host):
    assert host.says("kvmappctl start linuxvm02") == "Domain linuxvm02 started\n"
    assert host.says("kvmappctl list") == " Id   Name        State\n---------------------------\n 1    linuxvm02   running\n"
    assert host.says("top -b -n 1 -w 200 | grep -c 'kvmapp: linuxvm'") == "1\n"
    assert host.says("ps -o user= -p $(pgrep -fx 'kvmapp: linuxvm02')") == "kvmapp\n"


def test_vnet(host):
    shown = host.says("ip -o link show master br0")
    assert re.match(r"\d+: vnet0: ", shown) and "link/ether fe:54:00:7f:0d:cb" in shown and len(shown.splitlines()) == 1


def test_dominfo_and_nodeinfo(host):
    told = host.says("kvmappctl dominfo linuxvm02").splitlines()
    assert [line.split(":")[0] for line in told] == ["Id", "Name", "UUID", "OS Type", "State", "CPU(s)", "CPU time", "Max memory",
                                                     "Used memory", "Persistent", "Autostart", "Managed save"]
    told = host.says("kvmappctl nodeinfo").splitlines()
    assert [line.split(":")[0] for line in told] == ["CPU model", "CPU(s)", "CPU frequency", "CPU socket(s)", "Core(s) per socket",
                                                     "Thread(s) per core", "NUMA cell(s)", "Memory size"]


def test_autostart_and_reboot_of_the_host(host):
    """The bridge is not there when the daemon is; the domain waits for it."""
    link = "readlink /etc/kvmapp/domains/autostart/linuxvm02.conf || true"
    assert host.says("kvmappctl autostart linuxvm02") == "Domain linuxvm02 marked as autostarted\n"
    assert host.says(link) == "../linuxvm02.conf\n"
    assert host.says("kvmappctl autostart --disable linuxvm02") == "Domain linuxvm02 unmarked as autostarted\n"
    assert host.says(link) == ""
    host.says("kvmappctl autostart linuxvm02")
    host.eventually("cat /var/log/kvmapp/linuxvm02.out", "waiting for the power button")
    shown = host.reboot()
    assert "linuxvm02: shut down\n" in shown, shown
    host.run(f"umount -l /src /usr/local/lib/lab-python; {BRIDGE}")
    host.eventually("kvmappctl list", r"linuxvm02 +running")


def test_suspend_and_resume(host):
    assert host.says("kvmappctl suspend linuxvm02") == "Domain linuxvm02 suspended\n"
    assert state(host) == "paused (user)"
    assert host.says("kvmappctl resume linuxvm02") == "Domain linuxvm02 resumed\n"
    assert state(host).startswith("running")


def test_stale_pid_file(host):
    """The notes' cure was kill -9 and rm; here start itself is the cure, and the guest does not notice."""
    pid = host.says("pgrep -fx 'kvmapp: linuxvm02'")
    host.run("kill -9 $(cat /run/kvmapp/kvmapp.pid)")
    host.eventually("/etc/init.d/kvmapp status", "^kvmapp dead but pid file exists$")
    assert "Failed to connect socket to '/run/kvmapp/kvmapp.sock': Connection refused\n" in host.refuses("kvmappctl list")
    assert host.says("/etc/init.d/kvmapp start") == "Starting kvmapp daemon: OK\n"
    host.eventually("kvmappctl list", r"linuxvm02 +running")        # it may be late with its first word to the new daemon
    assert state(host).startswith("running") and host.says("pgrep -fx 'kvmapp: linuxvm02'") == pid


def test_nothing_of_ours_is_in_a_childs_environment(host):
    host.run("EDITOR='env >/tmp/environment; true' kvmappctl edit linuxvm02")
    assert not re.search("PYI|LD_|PYTHON|MEI", host.says("cat /tmp/environment"))


def test_upgrade_under_a_guest_that_counts(host):
    host.says("cp /usr/lib/kvmapp/current/runtime/lib/kvmapp/probe/probe.elf /var/lib/kvmapp/boot/; cp /out/kvmapp-newer .")
    host.says(f"install -o kvmapp -m 644 /dev/null /var/lib/kvmapp/images/count; cat >counter.conf <<'END'\n{COUNTER}END\n"
              "kvmappctl define counter.conf 2>/dev/null; kvmappctl start counter")
    old, pid = identity(host), host.says("pgrep -fx 'kvmapp: counter'")
    host.eventually("cat /var/lib/kvmapp/images/count", r"^count \d+")
    said = host.says("./kvmapp-newer setup")
    assert "ran: /etc/init.d/kvmapp restart\n" in said and identity(host) == NEWER
    assert said.splitlines()[-1] == f"kvmapp {NEWER} serves; guests that run stay with their version until their next start"
    before = int(host.eventually("tail -n 2 /var/lib/kvmapp/images/count", r"^count (\d+)\r?$")[1])
    assert host.says("pgrep -fx 'kvmapp: counter'") == pid
    host.eventually("tail -n 2 /var/lib/kvmapp/images/count", rf"^count (?!{before}\b)\d+\r?$")
    counts = [int(number) for number in re.findall(r"count (\d+)", host.says("cat /var/lib/kvmapp/images/count"))]
    assert counts == list(range(counts[0], counts[0] + len(counts))) and counts[-1] > before        # it never began anew
    listed = host.run("kvmappctl list --all")
    assert listed.err == "note: under another kvmapp until the next start: linuxvm02, counter\n"
    assert f"it runs under kvmapp {old} until its next start" in host.says("kvmappctl dominfo counter")
    assert host.says("ls /usr/lib/kvmapp").split() == sorted([old, NEWER, "current"])


def test_shutdown_and_the_old_version_goes_with_its_last_guest(host):
    assert host.says("kvmappctl destroy counter") == "Domain counter destroyed\n"
    host.eventually("grep -c 'waiting for the power button' /var/log/kvmapp/linuxvm02.out", "^[2-9]")       # up again since the reboot
    assert host.says("kvmappctl shutdown linuxvm02 --timeout 120").startswith("Domain linuxvm02 ")
    host.eventually("kvmappctl list --all", r"linuxvm02 +shut off")
    assert host.says("ip -o link show master br0") == ""
    host.eventually("ls /usr/lib/kvmapp", rf"\A{re.escape(NEWER)}\ncurrent\n\Z")
    host.says("kvmappctl start counter")
    assert host.run("kvmappctl list --all").err == ""


def test_downgrade(host):
    assert "ran: /etc/init.d/kvmapp restart\n" in host.says("./kvmapp setup")
    assert host.run("kvmappctl list --all").err == "note: under another kvmapp until the next start: counter\n"
    host.says("kvmappctl destroy counter")
    host.eventually("ls /usr/lib/kvmapp", rf"\A{re.escape(identity(host))}\ncurrent\n\Z")


def test_undefine_keeps_the_image(host):
    assert host.says("kvmappctl undefine linuxvm02").startswith("Domain linuxvm02 has been undefined\n")
    assert host.says("ls /etc/kvmapp/domains/autostart; ls /data") == "linuxvm02.img\n"
    assert host.run("test -e /etc/kvmapp/domains/linuxvm02.conf").status == 1


def test_remove_takes_the_program_and_leaves_the_rest(host):
    said = host.says("kvmapp setup --remove")
    assert "removed /usr/sbin/kvmapp\n" in said and "left user kvmapp and groups" in said
    assert host.says("ls -d /usr/lib/kvmapp /usr/sbin/kvmapp* /etc/init.d/kvmapp* 2>/dev/null || true") == ""
    assert host.says("ls /data /etc/kvmapp/domains | grep -e img -e counter") == "linuxvm02.img\ncounter.conf\n"
