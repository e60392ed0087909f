"""`kvmapp setup` into a folder: what it lays down, that it keeps what was changed, and that it can be cut anywhere."""
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvmapp import install
from kvmapp.errors import HostError
from kvmapp.install import Setup


def setup(root, *, enable=False):
    said: list[str] = []
    Setup(str(root), said.append).install(enable)
    return said


def snapshot(root):
    """Every file below: mode and content."""
    return {str(path.relative_to(root)): (stat.S_IMODE(path.stat().st_mode), path.read_bytes() if path.is_file() else None)
            for path in sorted(root.rglob("*"))}


@pytest.fixture
def root(tmp_path):
    """A plain host's image: folders of a CentOS and a Debian."""
    for folder in ("etc/logrotate.d", "usr/lib/systemd/system", "usr/share/bash-completion/completions"):
        (tmp_path / "root" / folder).mkdir(parents=True)
    (tmp_path / "root/etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (tmp_path / "root/etc/group").write_text("root:x:0:\nvideo:x:999:ann")
    return tmp_path / "root"


def test_everything_is_laid_down(root):
    setup(root)
    for name in ("etc/kvmapp/kvmapp.conf", "etc/kvmapp/guest.conf", "etc/kvmapp/networks/default.conf", "etc/logrotate.d/kvmapp",
                 *(f"usr/lib/systemd/system/{name}.service" for name in ("kvmapp", "kvmapp-domains", "kvmapp-guests")),
                 "usr/share/man/man1/kvmappctl.1", "usr/share/man/man5/kvmapp.conf.5", "usr/share/bash-completion/completions/kvmappctl"):
        assert (root / name).stat().st_size > 0
    for name in ("etc/init.d/kvmapp", "etc/init.d/kvmapp-guests", "usr/sbin/kvmapp", "usr/sbin/kvmappctl"):
        assert stat.S_IMODE((root / name).stat().st_mode) == 0o755
    assert stat.S_IMODE((root / "etc/kvmapp/domains").stat().st_mode) == 0o700
    assert stat.S_IMODE((root / "etc/kvmapp/networks/default.conf").stat().st_mode) == 0o600
    assert (root / "var/log/kvmapp").is_dir() and (root / "etc/kvmapp/domains/autostart").is_dir()


def test_the_launchers_start_the_program(root):
    setup(root)
    said = subprocess.run([root / "usr/sbin/kvmapp", "--version"], capture_output=True, text=True, cwd="/", check=True).stdout
    assert said.startswith("kvmapp 0.")
    assert subprocess.run([root / "usr/sbin/kvmappctl", "--help"], capture_output=True, cwd="/", check=True).stdout


def test_an_interpreter_that_cannot_run_it_lays_nothing_down(root):
    """The host's own python3 in a checkout: the launchers would start it, and the daemon would not come up."""
    before = snapshot(root)
    done = subprocess.run([sys.executable, "-S", "-m", "kvmapp", "setup", "--root", root], capture_output=True, text=True,
                          cwd=install.SOURCES, check=False)
    assert (done.returncode, done.stdout) == (1, "") and snapshot(root) == before
    assert done.stderr == (f"error: {sys.executable} cannot run kvmapp: it has no aiohttp, configobj\n"
                           "hint: ./build.sh build makes an environment that has all: .venv/bin/python -m kvmapp setup\n")


def test_user_and_groups_are_made_once(root):
    setup(root)
    groups = (root / "etc/group").read_text()
    assert groups == "root:x:0:\nvideo:x:999:ann\nkvmapp:x:998:\nkvmapp-guest:x:997:\n"
    shell = install.nologin()
    assert (root / "etc/passwd").read_text().splitlines()[1:] == [f"kvmapp:x:999:997::/var/lib/kvmapp:{shell}"]
    setup(root)
    assert (root / "etc/group").read_text() == groups


def test_a_second_setup_changes_nothing(root):
    setup(root)
    before = snapshot(root)
    assert setup(root) == []
    assert snapshot(root) == before


def test_changed_files_are_kept_and_the_new_one_lies_beside(root):
    setup(root)
    (root / "etc/kvmapp/kvmapp.conf").write_text("log_level = debug\n")
    said = setup(root)
    assert (root / "etc/kvmapp/kvmapp.conf").read_text() == "log_level = debug\n"
    assert (root / "etc/kvmapp/kvmapp.conf.new").exists()
    assert said == [f"kept {root}/etc/kvmapp/kvmapp.conf, which was changed; the new one is {root}/etc/kvmapp/kvmapp.conf.new"]


def test_a_new_file_beside_an_old_one_is_no_second_entry(root):
    """logrotate reads every name but those with a taboo extension, of which .new is none; bash-completion likewise."""
    shutil.rmtree(root / "usr/share/bash-completion")
    setup(root)
    for name in ("etc/logrotate.d/kvmapp", "etc/bash_completion.d/kvmappctl"):
        (root / name).write_text("# changed\n")
    setup(root)
    for name in ("etc/logrotate.d/kvmapp", "etc/bash_completion.d/kvmappctl"):
        assert (root / name).read_text() == "# changed\n" and (root / f"{name}.new~").exists() and not (root / f"{name}.new").exists()


def test_files_of_an_older_version_are_renewed(root):
    setup(root)
    one = Setup(str(root), lambda line: None)
    one.read_manifest()
    script = root / "etc/init.d/kvmapp"
    script.write_text("#!/bin/sh\n# of an older version\n")
    one.note("etc/init.d/kvmapp", install.checksum_of(str(script)))
    assert setup(root) == [f"renewed {script}"]
    assert "chkconfig" in script.read_text()


def test_remove_takes_exactly_that_away(root, tmp_path):
    before = snapshot(root)
    setup(root)
    Setup(str(root), lambda line: None).remove()
    after = snapshot(root)
    kept = {name: entry for name, entry in after.items() if entry[1] is not None}
    assert {name for name, entry in kept.items() if before.get(name) != entry} == {"etc/group", "etc/passwd"}
    with pytest.raises(HostError, match="nothing to remove"):
        Setup(str(root), lambda line: None).remove()


def test_remove_finds_what_stands_elsewhere(root):
    """Nobody remembers --prefix when the time comes."""
    Setup(str(root), lambda line: None, "/opt/local").install(False)
    library = root / "opt/local/lib/kvmapp"
    (library / "0.1.0-12345678/runtime/lib").mkdir(parents=True)
    (library / "0.1.0-12345678/runtime/lib/identity").write_text("0.1.0-12345678\n")
    (library / "current").symlink_to("0.1.0-12345678")
    said: list[str] = []
    Setup(str(root), said.append).remove()
    assert f"removed {library}/0.1.0-12345678" in said and not library.exists()


def test_configuration_that_was_removed_stays_away(root):
    """The administrator undefined the network; an upgrade is no reason to have it again. A program or page comes back."""
    setup(root)
    (root / "etc/kvmapp/networks/default.conf").unlink()
    (root / "usr/share/man/man1/kvmappctl.1").unlink()
    assert setup(root) == [f"left out {root}/etc/kvmapp/networks/default.conf, which was removed",
                           f"wrote {root}/usr/share/man/man1/kvmappctl.1"]
    Setup(str(root), lambda line: None).remove()
    assert f"wrote {root}/etc/kvmapp/networks/default.conf" in setup(root)


def test_remove_leaves_domains_disks_and_what_was_changed(root):
    setup(root)
    (root / "etc/kvmapp/domains/web.conf").write_text("name = web\nmemory = 64\n")
    (root / "var/lib/kvmapp/images/web.img").write_bytes(b"\0")
    (root / "etc/kvmapp/guest.conf").write_text("shutdown_timeout = 90\n")
    said: list[str] = []
    Setup(str(root), said.append).remove()
    assert (root / "etc/kvmapp/domains/web.conf").exists() and (root / "var/lib/kvmapp/images/web.img").exists()
    assert f"left {root}/etc/kvmapp/guest.conf: it was changed" in said and not (root / "etc/kvmapp/kvmapp.conf").exists()


def test_cut_at_any_step_the_next_setup_finishes_it(root, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    subprocess.run(["cp", "-a", root, whole], check=True)
    setup(whole)

    class Cut(BaseException):
        pass
    rename = os.rename
    for step in range(100):
        left = step

        def cut(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                raise Cut
            rename(*arguments)
        monkeypatch.setattr(os, "rename", cut)
        try:
            setup(root)
        except Cut:
            continue
        break
    monkeypatch.undo()
    setup(root)
    assert step > 5                                  # each run got one step further than the last
    mine, other = snapshot(root), snapshot(whole)
    assert mine == other
    assert not [name for name in mine if name.endswith((".tmp", ".new"))]


def test_under_systemd_guests_end_with_the_host_from_the_first_boot_on(root, monkeypatch):
    """A unit that is enabled is not active yet, and only an active one is stopped; where guests would start by it, it waits for a boot."""
    called = []
    monkeypatch.setattr(install, "SYSTEMD", str(root))
    monkeypatch.setattr(Setup, "call", lambda self, *words: called.append(words))
    start = ("systemctl", "start", "--job-mode=ignore-dependencies", "kvmapp-guests.service")
    one = Setup(str(root), print)
    units = ["kvmapp.service", "kvmapp-guests.service"]
    one.enable(units)
    assert called == [("systemctl", "daemon-reload"), ("systemctl", "enable", "kvmapp.service", "kvmapp-guests.service"), start]
    (root / "var/lib/kvmapp").mkdir(parents=True)
    (root / install.GUESTS_THAT_RAN).write_text("web\n")
    one.enable(units)
    assert called.count(start) == 1
    assert f":-/{install.GUESTS_THAT_RAN}}}" in Path(install.SOURCES, "init/kvmapp-guests").read_text()


@pytest.fixture(params=["systemd", "chkconfig", "update-rc.d"])
def enabling(root, monkeypatch, request):
    """A setup of the running host, kept by each of them in turn: what it enables."""
    called = []
    monkeypatch.setattr(Setup, "here", True)
    monkeypatch.setattr(Setup, "make_user", lambda self: None)
    monkeypatch.setattr(Setup, "call", lambda self, *words: called.append(words))
    monkeypatch.setattr(install, "SYSTEMD", str(root) if request.param == "systemd" else "/nonexistent")
    monkeypatch.setattr(shutil, "which", lambda name: name if name == request.param else None)

    def enabled(**more):
        called.clear()
        setup(root, **more)
        return [" ".join(words) for words in called if words[1:2] != ("daemon-reload",)]
    everything = {"systemd": ["systemctl enable kvmapp.service kvmapp-guests.service",
                              "systemctl start --job-mode=ignore-dependencies kvmapp-guests.service"],
                  "chkconfig": ["chkconfig --add kvmapp", "chkconfig --add kvmapp-guests"],
                  "update-rc.d": ["update-rc.d kvmapp defaults", "update-rc.d kvmapp-guests defaults"]}[request.param]
    return SimpleNamespace(by=enabled, all=everything)


def test_an_upgrade_enables_nothing_that_was_disabled(enabling):
    assert enabling.by(enable=True) == enabling.all
    assert enabling.by(enable=True) == []
    assert enabling.by(enable=False) == []


def test_who_did_not_want_it_enabled_is_not_overruled_by_an_upgrade(enabling):
    assert enabling.by(enable=False) == enabling.by(enable=True) == []


@pytest.mark.parametrize("enable", [True, False])
def test_what_is_laid_down_in_an_image_the_hosts_first_setup_enables(enabling, monkeypatch, enable):
    with monkeypatch.context() as patched:
        patched.setattr(Setup, "here", False)
        for _ in range(2):
            assert enabling.by(enable=enable) == []
    assert enabling.by(enable=True) == (enabling.all if enable else [])
    assert enabling.by(enable=True) == []


def test_what_a_setup_that_was_cut_or_failed_left_the_next_one_enables(enabling, monkeypatch):
    def fail(self, new):
        self.failed = True

    class Cut(BaseException):
        pass

    def cut(self, new):
        raise Cut
    with monkeypatch.context() as patched:
        patched.setattr(Setup, "enable", fail)
        assert enabling.by(enable=True) == []
        patched.setattr(Setup, "enable", cut)
        with pytest.raises(Cut):
            enabling.by(enable=True)
    assert enabling.by(enable=True) == enabling.all
    assert enabling.by(enable=True) == []


def test_as_somebody_else_it_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(install.UsageError, match="needs root"):
        install.main([])


def test_full_or_read_only_place_is_told(root, monkeypatch):
    def refuse(self, path, content, mode):
        raise OSError(28, "No space left on device", path)
    monkeypatch.setattr(Setup, "write", refuse)
    with pytest.raises(HostError, match="No space left on device"):
        install.main(["--root", str(root)])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a mount of its own")
@pytest.mark.parametrize("more", [(), ("--prefix", "/usr/local")], ids=["usr", "prefix"])
def test_units_are_laid_down_where_usr_is_read_only(root, more):
    """As on ostree's hosts, whose /usr/local is a link into /var."""
    for folder in ("var/usrlocal", "etc/systemd/system"):
        (root / folder).mkdir(parents=True)
    (root / "usr/local").symlink_to("../var/usrlocal")
    for folder in ("usr/sbin", "etc/bash_completion.d"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    script = f'mount --bind {root}/usr {root}/usr; mount -o remount,ro,bind {root}/usr; exec "$@"'
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-m", "kvmapp", "setup", "--root", root, *more],
                          capture_output=True, text=True, cwd=install.SOURCES, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in (root / "etc/systemd/system").iterdir()) == [
        "kvmapp-domains.service", "kvmapp-guests.service", "kvmapp.service"]
    assert not list((root / "usr/lib/systemd/system").iterdir()) and (root / "etc/init.d/kvmapp").exists()


def test_every_source_is_shipped():
    names = {name for name, _, _ in Setup(str(Path("/nonexistent")), print).files()}
    assert {"etc/init.d/kvmapp", "etc/kvmapp/kvmapp.conf", "usr/share/man/man1/kvmappctl.1"} <= names
