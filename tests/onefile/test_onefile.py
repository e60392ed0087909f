"""dist/kvmapp as it is copied to a host: reproducible, whole or said to be broken, and needing nothing of the host's."""
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from onefile import build, elf
from tests.onefile.host import EmptyRoot, newer

pytestmark = [pytest.mark.timeout(900), pytest.mark.skipif(os.geteuid() != 0, reason="needs root: roots and mounts of its own")]
SIZE_GOAL = 25_000_000
PLACES = ("/run", "/dev/shm", "/tmp", "/var/tmp")
# Of the C library's files, which must be one another's.
LIBC = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "ld-linux-x86-64.so.2"}


@pytest.fixture(scope="module")
def products():
    return build.obtain()


@pytest.fixture(scope="module")
def file(products):
    return products / "kvmapp"


@pytest.fixture
def root(tmp_path, file):
    return EmptyRoot(tmp_path / "root", file)


@pytest.fixture(scope="module")
def tree(tmp_path_factory, file):
    """The runtime as setup lays it down."""
    root = tmp_path_factory.mktemp("image")
    subprocess.run([file, "setup", "--no-enable", "--root", root], check=True, capture_output=True)
    return (root / "usr/lib/kvmapp/current").resolve()


def unpacked():
    """What runs without setup left behind; on a developer's host others may be at it."""
    return {path for place in PLACES for path in Path(place).glob("kvmapp-unpacked-*")}


@pytest.fixture
def there_before():
    return unpacked()


# What was built.

def test_products(products, file):
    noted, name = (products / "kvmapp.sha256").read_text().split()
    assert (noted, name) == (hashlib.sha256(file.read_bytes()).hexdigest(), "kvmapp")
    assert file.stat().st_size <= SIZE_GOAL
    listed = {part["name"]: part for part in json.loads((products / "kvmapp.sbom.json").read_text())["components"]}
    for name in ("CPython", "aiohttp", "configobj", "netifaces", "pyinstaller"):
        assert listed[name]["version"] and listed[name]["licenses"][0]["license"]["name"] not in ("", "unknown")
    assert any(name.startswith("libslirp") for name in listed)


def test_same_sources_give_the_same_bytes(tmp_path, file):
    build.build(tmp_path / "work in another place", tmp_path)
    assert (tmp_path / "kvmapp").read_bytes() == file.read_bytes()


def test_every_library_finds_what_it_needs_inside(tree):
    files = [path for path in tree.rglob("*") if path.is_file() and elf.is_elf(path) and path.suffix != ".elf"]
    names = {path.name for path in files}
    assert len(files) > 60 and names >= LIBC
    for path in files:
        assert set(elf.needed_by(path)) <= names, path
        said = elf.run("objdump", "-p", path)
        if path != tree / "runtime/kvmapp":
            assert "RPATH" not in said and "RUNPATH" not in said, path
    assert re.search(r"RPATH\s+\$ORIGIN/lib\n", elf.run("objdump", "-p", tree / "runtime/kvmapp"))
    assert f"[Requesting program interpreter: /usr/lib/kvmapp/{tree.name}/runtime/lib/{elf.LOADER}]" in elf.run(
        "readelf", "-l", tree / "runtime/kvmapp")
    assert "INTERP" not in elf.run("readelf", "-l", tree / "kvmapp")


def test_no_library_wants_a_newer_libc_than_the_one_inside(tree):
    def versions(path):
        return {tuple(map(int, found.split("."))) for found in re.findall(r"\bGLIBC_([\d.]+)\b", elf.run("objdump", "-T", path))}
    inside = max(versions(tree / "runtime/lib/libc.so.6"))
    wanted = {path.name: max(versions(path), default=(0,)) for path in tree.rglob("*.so*") if path.is_file() and elf.is_elf(path)}
    assert inside >= max(wanted.values()) > (2, 0), sorted(wanted.items(), key=lambda item: item[1])[-3:]


# In an empty root: the file, /proc, /dev, /tmp mounted noexec.

def test_verbs_in_an_empty_root(root):
    assert root.run("/kvmapp", "--version").out.startswith("kvmapp ")
    lines = root.run("/kvmapp", "licenses").out.splitlines()
    assert lines[0].startswith("kvmapp ") and any(line.startswith("CPython ") for line in lines)
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in root.run("/kvmapp", "licenses", "CPython").out
    refused = root.run("/kvmapp", "ctl", "list")
    assert refused.status == 1 and "hint: start it: /etc/init.d/kvmapp start\n" in refused.err
    assert root.run("/kvmapp", "daemon").err.endswith("hint: install it first: kvmapp setup\n")
    assert sorted(os.listdir(root.folder)) == ["dev", "kvmapp", "proc", "tmp"]


def test_what_a_bare_host_lacks_is_named_with_its_package(root):
    said = root.run("/kvmapp", "check").out
    assert "neither is installed; CentOS/RHEL: dnf install nftables; Debian: apt install nftables" in said
    assert "it is not installed; CentOS/RHEL: dnf install dnsmasq; Debian: apt install dnsmasq-base" in said
    said = root.run("/kvmapp", "check", before="umount -l dev").out
    assert re.search(r"Checking that /dev/kvm exists +: FAIL \(", said)
    assert re.search(r"/dev/net/tun\) +: WARN \(/dev/net/tun does not exist; no bridged and no NAT network; modprobe tun", said)


@pytest.mark.skipif(not os.path.exists("/dev/kvm"), reason="needs /dev/kvm")
def test_a_guest_in_an_empty_root(root):
    assert re.search(r"that a guest boots +: PASS \(the probe guest passed", root.run("/kvmapp", "check", "--boot").out)


def test_setup_and_daemon_in_an_empty_root(root):
    """Without a shell, users, or anything else. The warm process answers, and nobody's rights grow by it."""
    assert root.run("/kvmapp", "setup").status == 0
    assert os.readlink(root.folder / "usr/sbin/kvmappctl") == "../lib/kvmapp/current/kvmapp"
    started = "chroot . /usr/sbin/kvmapp daemon --background"
    said = root.run("/usr/sbin/kvmappctl", "list", "--all", before=started)
    assert (said.status, said.out, said.err) == (0, " Id   Name   State\n--------------------\n\n", "")
    said = root.run("/usr/sbin/kvmapp", "setup", "--remove", before=started)
    assert said.status == 0 and "left user kvmapp" in said.out, said
    assert not (root.folder / "usr/sbin/kvmapp").exists() and not (root.folder / "usr/lib/kvmapp").exists()


# For everybody.

def as_nobody(*words, **more):
    return subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *words], capture_output=True, text=True,
                          timeout=100, check=False, env={"PATH": "/usr/bin"}, **more)


@pytest.fixture
def public(tmp_path, file):
    """A copy that everybody may run."""
    folder = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="kvmapp-test-"))
    folder.chmod(0o755)
    yield Path(shutil.copy(file, folder / "kvmapp"))
    shutil.rmtree(folder)


def test_setup_needs_root(public, there_before):
    said = as_nobody(public, "setup")
    assert (said.returncode, said.stderr) == (
        1, "error: kvmapp setup needs root\nhint: sudo kvmapp setup, or --root DIR for an image\n")
    assert unpacked() <= there_before


def test_nothing_is_left_behind_whoever_runs_it(public, there_before):
    said = as_nobody(public, "--version")
    assert (said.returncode, said.stdout[:7]) == (0, "kvmapp "), said
    assert as_nobody(public, "nosuch").returncode == 1
    assert unpacked() <= there_before


def test_what_a_killed_one_left_the_next_takes_away(public, there_before):
    kernel = Path(build.ROOT / "kvmapp/probe/probe.elf")
    shutil.copy(kernel, public.parent)
    words = [public, "run", "--kernel", public.parent / "probe.elf", "--append", "mode=echo report=serial"]
    with subprocess.Popen(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *words], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
        running.stdout.read(1)                                                  # it runs, or says why it cannot
        os.kill(running.pid, signal.SIGKILL)
    assert unpacked() - there_before
    assert as_nobody(public, "--version").returncode == 0
    assert unpacked() <= there_before


def test_signals_and_statuses_go_through(public):
    assert as_nobody(public, "run", "--kernel", "/nonexistent").returncode == 1
    assert as_nobody(public, "run", "--help").returncode == 0


# Broken copies.

def laid_down():
    """The trees of this machine's own kvmapp."""
    return sorted(os.listdir("/usr/lib/kvmapp")) if os.path.isdir("/usr/lib/kvmapp") else None


def test_half_of_it_says_so(tmp_path, file):
    half = tmp_path / "kvmapp"
    whole = file.read_bytes()
    half.write_bytes(whole[:len(whole) // 2])
    half.chmod(0o755)
    said = subprocess.run([half, "check"], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stderr) == (
        1, f"error: {half} is not whole: it has {len(whole) // 2} bytes instead of {len(whole)}\n"
           "hint: copy it again, and compare it with kvmapp.sha256\n")


@pytest.mark.parametrize("verb", ["check", "setup"])
def test_a_damaged_one_says_so(tmp_path, file, verb, there_before):
    installed = laid_down()
    damaged = tmp_path / "kvmapp"
    content = bytearray(file.read_bytes())
    content[-len(content) // 3] ^= 0x10
    damaged.write_bytes(content)
    damaged.chmod(0o755)
    said = subprocess.run([damaged, verb], capture_output=True, text=True, check=False)
    assert said.returncode == 1 and said.stderr.startswith("error: This file is damaged")
    assert unpacked() <= there_before and laid_down() == installed


# Faults of setup.

def setup(root: Path, file: Path, before: str = "", *words: str):
    return subprocess.run(["unshare", "--mount", "sh", "-c", f"{before}\n\"$@\"; status=$?; ls {root}/usr/lib/kvmapp; exit $status",
                           "sh", file, "setup", "--no-enable", "--root", root, *words], capture_output=True, text=True, check=False)


def test_a_full_disk_names_what_it_needs(tmp_path, file):
    library = tmp_path / "usr/lib/kvmapp"
    library.mkdir(parents=True)
    said = setup(tmp_path, file, f"mount -t tmpfs -o size=8M small {library}")
    assert said.returncode == 1 and said.stdout.splitlines()[-1:] != ["current"]
    assert f"error: Cannot lay down the program in {library}: No space left on device\n" in said.stderr
    assert re.search(r"hint: it needs \d\d MiB there, or --prefix elsewhere; what was in use before still is\n", said.stderr)


def test_two_setups_at_once(tmp_path, file):
    library = tmp_path / "usr/lib/kvmapp"
    library.mkdir(parents=True)
    said = setup(tmp_path, file, f"exec 7>{library}/.lock; flock 7")
    assert said.returncode == 1 and said.stderr.startswith(f"error: Another kvmapp setup works on {library}\n")
    assert setup(tmp_path, file).returncode == 0


def test_killed_at_each_step_the_old_or_the_new_one_works(tmp_path, file, root):
    """Up and down between two builds; each setup is killed one line of its words later than the last."""
    other = newer(file, "9.9.9-newer", tmp_path)
    setup(root.folder, file)
    seen = set()
    for step in range(100):
        with subprocess.Popen([(other, file)[step % 2], "setup", "--no-enable", "--root", root.folder], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT) as running:
            lines = [running.stdout.readline() for _ in range(step // 2 + 1)]
            running.kill()
        assert root.run("/usr/sbin/kvmapp", "--version").out.startswith("kvmapp "), lines
        seen.add(os.readlink(root.folder / "usr/lib/kvmapp/current"))
        if b"" in lines:
            break
    assert len(seen) == 2 and step >= 4                  # two lines at least: laid down, in use; a third where there was an old one
    assert setup(root.folder, file).stdout.split()[-2:][-1] == "current"


def test_a_read_only_usr_except_our_folder(tmp_path, file):
    library = tmp_path / "usr/lib/kvmapp"
    library.mkdir(parents=True)
    said = setup(tmp_path, file, f"mount --bind {tmp_path}/usr {tmp_path}/usr; mount --bind {library} {library}\n"
                                 f"mount -o remount,ro,bind {tmp_path}/usr")
    assert said.returncode == 0, said.stderr
    assert "read-only: they are in /usr/lib/kvmapp/current\n" in said.stdout
    assert "KVMAPP=${KVMAPP:-/usr/lib/kvmapp/current/kvmapp}\n" in (tmp_path / "etc/init.d/kvmapp").read_text()
    assert os.access(library / "current/kvmappctl", os.X_OK)


def test_prefix(tmp_path, file):
    assert setup(tmp_path, file, "mkdir -p " + str(tmp_path / "usr/lib/kvmapp"), "--prefix", "/opt/vm").returncode == 0
    assert os.readlink(tmp_path / "opt/vm/sbin/kvmapp") == "../lib/kvmapp/current/kvmapp"
    tree = (tmp_path / "opt/vm/lib/kvmapp/current").resolve()
    assert f"interpreter: /opt/vm/lib/kvmapp/{tree.name}/runtime" in elf.run("readelf", "-l", tree / "runtime/kvmapp")
    assert "KVMAPP=${KVMAPP:-/opt/vm/sbin/kvmapp}\n" in (tmp_path / "etc/init.d/kvmapp").read_text()
