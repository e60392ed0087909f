"""The appliance on a plain host, as a newcomer uses it: setup, init script, two Linux domains, the words and effects of the verbs that
an administrator of libvirt's knows, then reboots of the host.

The tests are chapters of one story, told by one host with a disk of its own: a boot of it costs more than all that is done there.
It is always the lab's host, since nobody's own machine is set up and rebooted by a test.
"""
import re

import pytest

from tests.appliance.host import PlainHost

pytestmark = [pytest.mark.guest, pytest.mark.timeout(1500)]

BOOT = "[boot]\nkernel = /var/lib/kvmapp/boot/vmlinuz\ninitrd = /var/lib/kvmapp/boot/initramfs.gz\n"
# web heeds its power button, spare is a shell that has never heard of one.
DOMAINS = {
    "web": f"name = web\nmemory = 128 MiB\n{BOOT}cmdline = console=ttyS0 panic=-1 quiet then=wait\n"
           "[disk vda]\nsource = /var/lib/kvmapp/images/web.img\nformat = raw\n[serial 0]\n",
    "spare": f"name = spare\nmemory = 128 MiB\n{BOOT}cmdline = console=ttyS0 panic=-1 quiet modules=none shell=ttyS0\n[serial 0]\n",
}
# What somebody does at a terminal of the host.
AT_A_TERMINAL = """
import subprocess, sys
sys.path.insert(0, "/src")
from tests.unit.terminal import OnTerminal
KVMAPPCTL = "/usr/sbin/kvmappctl"
def wait(screen, text):
    print(screen.expect(text, 240))
"""
TWO_AT_A_CONSOLE = r"""
with OnTerminal([KVMAPPCTL, "console", "spare"], {}) as first:
    wait(first, "Escape character is ^] (Ctrl + ])")
    first.type("\recho $((6*7))\r")
    wait(first, "42\r\n")
    with OnTerminal([KVMAPPCTL, "console", "spare"], {}) as second:
        wait(second, f"is in use by pid {first.pid} (uid 0)")
        assert second.status() == 1
    first.type("\x1d")
    assert first.status() == 0
"""
REBOOT_SEEN_AT_THE_CONSOLE = r"""
with OnTerminal([KVMAPPCTL, "console", "web"], {}) as screen:
    wait(screen, "waiting for the power button")
    print(subprocess.run([KVMAPPCTL, "reboot", "web"], check=True, stdout=subprocess.PIPE, text=True).stdout)
    wait(screen, "power button pressed")
    wait(screen, "GUEST UP")
    wait(screen, "waiting for the power button")
    screen.type("\x1d")
    assert screen.status() == 0
"""


@pytest.fixture(scope="module")
def host():
    one = PlainHost()
    try:
        one.boot()
        one.run("rm /usr/sbin/kvmapp /usr/sbin/kvmappctl")      # the lab's own: a newcomer has none
        yield one
    finally:
        one.close()


def at_a_terminal(host, script):
    return host.says(f"python3 - <<'END'\n{AT_A_TERMINAL}{script}END")


def state(host, name):
    return host.says(f"kvmappctl domstate {name} --reason").strip()


def test_setup(host):
    said = host.says("cd /src && python3 -m kvmapp setup")
    for line in ("made user kvmapp", "wrote /etc/kvmapp/kvmapp.conf", "wrote /etc/init.d/kvmapp", "wrote /usr/sbin/kvmappctl",
                 "ran: update-rc.d kvmapp defaults", "ran: update-rc.d kvmapp-guests defaults"):
        assert f"{line}\n" in said
    assert "FAIL" not in said and said.splitlines()[-1] == "start it: /etc/init.d/kvmapp start"
    assert host.says("ls /etc/rc2.d /etc/rc0.d /etc/rc6.d | grep kvmapp | sort -u").split() == [
        "K01kvmapp-guests", "K02kvmapp", "S01kvmapp", "S02kvmapp-guests"]


def test_daemon_that_does_not_run_yet(host):
    assert host.refuses("kvmappctl list") == (
        "error: failed to connect to the hypervisor\n"
        "error: Failed to connect socket to '/run/kvmapp/kvmapp.sock': No such file or directory\n"
        "hint: start it: /etc/init.d/kvmapp start\n")
    assert host.run("/etc/init.d/kvmapp status").status == 3


def test_init_script(host):
    assert host.says("/etc/init.d/kvmapp start") == "Starting kvmapp daemon: OK\n"
    assert re.fullmatch(r"kvmapp \(pid \d+\) is running\.\.\.\n", host.says("/etc/init.d/kvmapp status"))
    assert host.says("kvmappctl list --all") == " Id   Name   State\n--------------------\n"
    assert host.says("ss -Hltun") == ""                                         # no TCP or UDP port


def test_define_and_start(host):
    host.says("cp /lab/vmlinuz /lab/initramfs.gz /var/lib/kvmapp/boot/ && truncate -s 16M /var/lib/kvmapp/images/web.img")
    for name, text in DOMAINS.items():
        said = host.run(f"cat >{name}.conf <<'END'\n{text}END\nkvmappctl define {name}.conf")
        assert (said.status, said.out, said.err) == (0, f"Domain {name} defined from {name}.conf\n\n", "made: uuid\n")
    other = "sed 's/^name.*/&\\nuuid = 00000000-0000-4000-8000-000000000001/' web.conf >other.conf; kvmappctl define other.conf"
    before = host.says("cat /etc/kvmapp/domains/web.conf")
    assert "domain 'web' already exists with uuid " in host.refuses(other)
    assert host.says("cat /etc/kvmapp/domains/web.conf") == before
    assert host.says("kvmappctl start spare") == "Domain spare started\n"
    assert host.says("kvmappctl start web") == "Domain web started\n"
    assert host.refuses("kvmappctl start web").startswith("error: Domain is already active\n")
    assert host.says("kvmappctl list") == (" Id   Name    State\n-----------------------\n"
                                           " 1    spare   running\n 2    web     running\n")
    processes = host.says("ps -eo user,args | grep '[k]vmapp: ' | sort").splitlines()
    assert [line.split(None, 1) for line in processes] == [
        ["kvmapp", "kvmapp: spare"], ["kvmapp", "kvmapp: web"], ["root", "kvmapp: zygote"]]
    assert '"name": "web"' in host.says("cat /var/log/kvmapp/web.log")


def test_what_it_tells(host):
    dumped = host.says("kvmappctl dumpconf web")
    uuid = re.search("^uuid = (.*)$", dumped, re.MULTILINE)[1]
    assert "\nacpi = yes\n" in dumped                                           # though nobody wrote it
    told = host.says("kvmappctl dominfo web").splitlines()
    assert [line.split(":")[0] for line in told] == ["Id", "Name", "UUID", "OS Type", "State", "CPU(s)", "CPU time", "Max memory",
                                                     "Used memory", "Persistent", "Autostart", "Managed save"]
    assert f"UUID:           {uuid}" in told and "Max memory:     131072 KiB" in told and "Autostart:      disable" in told
    told = host.says("kvmappctl nodeinfo").splitlines()
    assert [line.split(":")[0] for line in told] == ["CPU model", "CPU(s)", "CPU frequency", "CPU socket(s)", "Core(s) per socket",
                                                     "Thread(s) per core", "NUMA cell(s)", "Memory size"]


def test_console(host):
    said = at_a_terminal(host, TWO_AT_A_CONSOLE)
    assert said.startswith("Connected to domain 'spare'\nEscape character is ^] (Ctrl + ])\n")


def test_suspend_and_resume(host):
    assert host.says("kvmappctl suspend web") == "Domain web suspended\n"
    assert state(host, "web") == "paused (user)"
    assert host.says("kvmappctl resume web") == "Domain web resumed\n"
    assert state(host, "web").startswith("running")


def test_edit(host):
    complaint = host.refuses("EDITOR='sed -i s/^memory.*/memory=lots/' kvmappctl edit spare </dev/null")
    assert "spare.conf:3: memory = 'lots': expected a size such as 512 MiB" in complaint
    said = host.run("EDITOR='sed -i s/128.MiB/96MiB/' kvmappctl edit spare")
    assert (said.status, said.out) == (0, "Domain spare configuration edited.\n\n")
    assert said.err == "warning: the running guest keeps its configuration until its next start\n"
    assert "memory = 96MiB\n" in host.says("cat /etc/kvmapp/domains/spare.conf")


def test_autostart_is_a_link(host):
    link = "readlink /etc/kvmapp/domains/autostart/web.conf || true"
    assert host.says("kvmappctl autostart web") == "Domain web marked as autostarted\n"
    assert host.says(link) == "../web.conf\n"
    assert host.says("kvmappctl autostart --disable web") == "Domain web unmarked as autostarted\n"
    assert host.says(link) == ""
    host.says("kvmappctl autostart web")


def test_shutdown_of_a_guest_that_ignores_acpi(host):
    complaint = host.refuses("kvmappctl shutdown spare --timeout 2")
    assert "Domain 'spare' still runs 2 s after its power button was pressed: the guest ignores ACPI" in complaint
    assert "kvmappctl destroy spare" in complaint
    assert host.says("kvmappctl destroy spare") == "Domain spare destroyed\n"
    assert state(host, "spare") == "shut off (destroyed)"


def test_daemon_killed_and_started_and_stopped(host):
    """The guests do not notice; a pid file and a socket that are stale mislead nobody."""
    pid = host.says("pgrep -fx 'kvmapp: web'")
    host.run("kill -9 $(cat /run/kvmapp/kvmapp.pid)")
    host.eventually("/etc/init.d/kvmapp status", "^kvmapp dead but pid file exists$")
    assert "Failed to connect socket to '/run/kvmapp/kvmapp.sock': Connection refused\n" in host.refuses("kvmappctl list")
    assert host.says("/etc/init.d/kvmapp start") == "Starting kvmapp daemon: OK\n"
    host.eventually("kvmappctl list", r"web +running")              # it may be late with its first word to the new daemon
    assert host.says("kvmappctl list") == " Id   Name   State\n----------------------\n 2    web    running\n"
    assert host.says("/etc/init.d/kvmapp restart") == "Stopping kvmapp daemon: OK\nStarting kvmapp daemon: OK\n"
    assert host.says("/etc/init.d/kvmapp reload") == "Reloading kvmapp daemon: OK\n"
    host.eventually("kvmappctl list", r"web +running")
    assert state(host, "web").startswith("running") and host.says("pgrep -fx 'kvmapp: web'") == pid


def test_reboot_of_a_guest(host):
    """The same process, the same Id; the button is heeded, and the guest comes up again."""
    pid = host.says("pgrep -fx 'kvmapp: web'")
    assert "Domain web is being rebooted\n" in at_a_terminal(host, REBOOT_SEEN_AT_THE_CONSOLE)
    assert "the guest powered off to reboot: restarting\n" in host.says("cat /var/log/kvmapp/web.log")
    assert host.says("kvmappctl list --name; pgrep -fx 'kvmapp: web'").split() == ["web", pid.strip()]


def test_undefine_keeps_the_image(host):
    host.says("sed 's/^name.*/name = third/' web.conf >third.conf; kvmappctl define third.conf 2>/dev/null; kvmappctl autostart third")
    assert host.says("kvmappctl undefine third").startswith("Domain third has been undefined\n")
    assert host.says("ls /etc/kvmapp/domains /etc/kvmapp/domains/autostart /var/lib/kvmapp/images | grep -e third -e img") == "web.img\n"


def test_reboot_of_the_host(host):
    """In order: the guest is shut down with it; then the marked domain runs and the other does not."""
    shown = host.reboot()
    assert "web: shut down\n" in shown, shown
    host.eventually("kvmappctl list --all", r"web +running")
    assert host.says("kvmappctl list --all") == (" Id   Name    State\n------------------------\n"
                                                 " 1    web     running\n -    spare   shut off\n")


def test_power_cut(host):
    """Nothing is said to anyone: what ran and was not marked stays shut off, what is marked runs."""
    host.says("kvmappctl start spare")
    host.cut_power()
    host.eventually("kvmappctl list --all", r"web +running")
    assert state(host, "spare").startswith("shut off")
    assert re.match(r"kvmapp \(pid \d+\) is running", host.says("/etc/init.d/kvmapp status"))
