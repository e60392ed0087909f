"""kvmappctl and the real daemon, with fake domains: words and effects are virsh's, as a user types them."""
import os
import re
import shlex
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvmapp.cli.main import main
from kvmapp.cli.manual import EXAMPLES
from tests.kvmappctl import KVMAPPCTL


@pytest.fixture
def uri(running):
    return running.uri


def test_a_domains_life(running, ctl, tmp_path):
    file = tmp_path / "linuxvm02.conf"
    file.write_text("name = linuxvm02\nmemory = 64 MiB # small\n[disk vda]\nsource = /tmp\n")
    assert ctl("define", str(file)) == (0, f"Domain linuxvm02 defined from {file}\n\n", "made: uuid\n")
    file.write_text(file.read_text().replace("[disk vda]\nsource = /tmp\n", "[balloon]\n"))
    assert ctl("define", str(file))[0] == 0
    assert ctl("list", "--all")[1].endswith(" -    linuxvm02   shut off\n\n")
    assert ctl("start", "linuxvm02") == (0, "Domain linuxvm02 started\n\n", "")
    number = ctl("-q", "domid", "linuxvm02")[1].strip()
    assert ctl("start", "linuxvm02") == (1, "\n", "error: Domain is already active\nhint: kvmappctl domstate linuxvm02\n")
    assert ctl("domstate", "linuxvm02", "--reason")[1] == "running (booted)\n\n"
    assert ctl("suspend", number)[1] == "Domain linuxvm02 suspended\n\n"
    assert ctl("resume", number)[1] == "Domain linuxvm02 resumed\n\n"
    assert ctl("setmem", number, "32M", "--live")[:2] == (0, "\n")
    assert "balloon.current=32768\n" in ctl("domstats", number)[1]
    assert ctl("autostart", "linuxvm02")[1] == "Domain linuxvm02 marked as autostarted\n\n"
    assert os.path.islink(f"{running.paths.autostart}/linuxvm02.conf")
    assert "Autostart:      enable\n" in ctl("dominfo", "linuxvm02")[1]
    assert ctl("autostart", "linuxvm02", "--disable")[1] == "Domain linuxvm02 unmarked as autostarted\n\n"
    assert not os.path.lexists(f"{running.paths.autostart}/linuxvm02.conf")
    assert ctl("shutdown", "linuxvm02", "--timeout", "60")[1] == "Domain linuxvm02 has shut down\n\n"
    assert ctl("destroy", "linuxvm02")[2] == ("error: Failed to destroy domain 'linuxvm02'\n"
                                              "error: Requested operation is not valid: domain is not running\n")
    assert "# small\n" in ctl("dumpconf", "linuxvm02")[1]
    status, out, err = ctl("undefine", "linuxvm02")
    assert (status, err, out.splitlines()[0]) == (0, "", "Domain linuxvm02 has been undefined")
    assert f"left: log {running.paths.domain_log('linuxvm02')}\n" in out
    assert "linuxvm02" not in ctl("list", "--all")[1]


def test_examples_of_the_man_page(running, tmp_path):
    """They are pasted from real runs as long as this passes; only paths and the Id stand for others here."""
    (tmp_path / "linuxvm02.conf").write_text("name = linuxvm02\nmemory = 64 MiB\ndescription = ignore-acpi\n"
                                             "[disk vda]\nsource = linuxvm02.img\n")
    (tmp_path / "linuxvm02.img").write_bytes(bytes(4096))
    os.chmod(tmp_path, 0o755)
    for line, shown in EXAMPLES:
        done = subprocess.run([*KVMAPPCTL, *shlex.split(line)[1:]], text=True, cwd=tmp_path, check=False,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env={**os.environ, "KVMAPP_DEFAULT_URI": running.uri})
        found = done.stdout.replace(running.root, "").replace(str(tmp_path), "/data")
        assert re.sub(r"^ \d+ +linuxvm02", " 1    linuxvm02", found, flags=re.MULTILINE).rstrip("\n") == shown.rstrip("\n")


def test_guest_that_ignores_acpi(running, ctl):
    running.add("stubborn", "ignore-acpi")
    ctl("start", "stubborn")
    status, _, err = ctl("shutdown", "stubborn", "--timeout", "1")
    assert status == 1 and "ignores ACPI" in err and "kvmappctl destroy stubborn" in err
    assert ctl("destroy", "stubborn")[0] == 0


def test_a_stuck_domain_is_listed_and_can_be_ended(host, capsys):
    def ctl(*words):
        return main(["-c", host.uri, *words]), capsys.readouterr().out
    host.options, host.patient = ["--heartbeat", "0.5"], False
    host.add("web")
    host.add("stuck")
    host.start()
    ctl("start web; start stuck")
    stuck = host.tell("stuck", "test_mute", seconds=600)
    with host.client() as client:
        assert client.get("/v1/domains/stuck/wait", state="no response", timeout=60)["reached"]
    host.eventually(lambda: (out := ctl("list")[1]).count("stuck   no response\n") and "web     running\n" in out)
    assert ctl("destroy", "stuck") == (0, "Domain stuck destroyed\n\n")
    stuck.close()


def test_edit_over_a_file_that_changed_meanwhile(running, ctl, monkeypatch):
    running.add("web")
    monkeypatch.delenv("EDITOR", raising=False)
    monkeypatch.setenv("VISUAL", f"f() {{ sed -i 's/64 MiB/65 MiB/' {running.file('web')}; sed -i 's/64 MiB/66 MiB/' $1; }}; f")
    status, _, err = ctl("edit", "web")
    assert status == 1 and "was changed meanwhile" in err and "65 MiB" in running.file("web").read_text()
    kept = err.split("your text is kept in ")[1].strip()
    with open(kept) as text:
        assert "66 MiB" in text.read()
    os.unlink(kept)
    monkeypatch.setenv("VISUAL", "sed -i 's/65 MiB/67 MiB/'")
    assert ctl("edit", "web")[1] == "Domain web configuration edited.\n\n"
    assert "67 MiB" in running.file("web").read_text()


def test_events_and_wait(running, ctl):
    running.add("web")
    with ThreadPoolExecutor() as clients:
        starting = clients.submit(running.post, "web", "start")
        assert ctl("wait", "web", "--state", "running", "--timeout", "60")[1] == "Domain web is running\n\n"
        starting.result()
    words = [*KVMAPPCTL, "-c", running.uri, "event", "--domain", "web", "--event", "lifecycle", "--timeout", "60"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as listening:
        while listening.poll() is None:             # it may not listen yet when the first one happens
            running.post("web", "suspend")
            running.post("web", "resume")
            time.sleep(0.05)
        assert listening.stdout
        lines = listening.stdout.read().splitlines()
    assert lines[0] in ("event 'lifecycle' for domain 'web': Suspended Paused", "event 'lifecycle' for domain 'web': Resumed Unpaused")
    assert lines[1:] == ["events received: 1", ""]


def test_read_only_socket(running, ctl):
    running.add("web")
    assert "web" in ctl("-r", "list", "--all")[1]
    status, _, err = ctl("-r", "start", "web")
    assert status == 1 and err.startswith("error: Failed to start domain 'web'\nerror: ")
