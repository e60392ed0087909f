"""virsh as the judge: the same words to it (its test driver) and to kvmappctl (canned answers) must give the same text and status.

Skipped where virsh is not installed (libvirt-clients and libvirt-daemon on Debian).
"""
import shutil
import subprocess

import pytest

from kvmapp.cli.main import main
from tests.unit.canned_daemon import UUID, CannedDaemon, domain

pytestmark = pytest.mark.skipif(not shutil.which("virsh"), reason="virsh is not installed")
NODE = "".join(f"""<domain type='test'><name>linuxvm0{number}</name><title>Title {number}</title><uuid>{UUID}{number}</uuid>
<memory>8388608</memory><vcpu>2</vcpu><os><type>hvm</type></os><devices>
<disk type='file' device='disk'><source file='/data/x{number}.img'/><target dev='vda' bus='virtio'/></disk>
<interface type='bridge'><mac address='aa:bb:cc:dd:ee:0{number}'/><source bridge='br0'/><model type='virtio'/></interface>
</devices></domain>""" for number in (1, 2, 3))
# Brought about in virsh's test driver before each comparison; it keeps nothing between two runs.
PREPARED = "suspend linuxvm02; destroy linuxvm03; "
PREPARED_LINES = ["Domain 'linuxvm02' suspended", "", "Domain 'linuxvm03' destroyed", ""]


@pytest.fixture(scope="module")
def virsh(tmp_path_factory):
    file = tmp_path_factory.mktemp("virsh") / "node.xml"
    file.write_text(f"<node>{NODE}</node>")

    def run(line, *options):
        done = subprocess.run(["virsh", *options, "-c", f"test://{file}", PREPARED + line], capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines() if options else done.stdout.splitlines()[len(PREPARED_LINES):]
        return done.returncode, lines, done.stderr.splitlines()
    return run


@pytest.fixture
def ctl(tmp_path, capsys):
    with CannedDaemon(tmp_path) as daemon:
        daemon.add(domain("linuxvm01", 1, title="Title 1"), domain("linuxvm02", 2, title="Title 2", state="paused", reason="user"),
                   domain("linuxvm03", title="Title 3", reason="destroyed"))
        for one in daemon.domains.values():
            one["interfaces"][0]["target"] = "testnet0"
            for reference in (str(one["id"]), one["name"]):
                daemon.answers["GET", f"/v1/domains/{reference}/config"] = {
                    "text": "", "file": None, "digest": "", "config": {"title": one["title"], "description": None, "vcpus": 2}}
        def run(line, *options):
            status = main([*options, "-c", daemon.uri, line])
            said = capsys.readouterr()
            return status, said.out.splitlines(), said.err.splitlines()
        yield run


SAME = [
    "list", "list --all", "list --inactive", "list --all --title", "list --inactive --all", "list --title",
    "list --state-shutoff", "list --state-running", "list --state-paused", "list --state-shutoff --state-running",
    "list --inactive --state-running", "list --all --state-running", "list --autostart", "list --no-autostart --all",
    "list --transient", "list --persistent", "list --name", "list --uuid", "list --id", "list --all --name", "list --all --uuid",
    "list --all --id", "list --all --name --uuid", "list --uuid --id", "list --name --id", "list --name --uuid --id", "list --table",
    "domid linuxvm01", "domid linuxvm03", "domuuid 1", "domuuid linuxvm03", "domname 2", f"domname {UUID}3",
    "domstate 1", "domstate linuxvm02 --reason", "domstate linuxvm03 --reason", "domstate --domain=linuxvm02",
    "domblklist linuxvm01", "domblklist linuxvm01 --details", "domiflist linuxvm01", "vcpucount linuxvm03", "vcpucount linuxvm03 --live",
    "vcpucount 1", "domblkinfo linuxvm01", "domblkinfo nosuch vda", "domblkstat nosuch vda",
    "dominfo nosuch", "domstate nosuch", "start nosuch", "destroy nosuch", "domid 77", "reboot 77",
    "domid linuxvm01; domid nosuch; domid linuxvm02", "domid nosuch; domname 1", "domname 1; domid nosuch", "list;", "quit; list",
    "echo foo bar", "echo --shell 'a b' c", "echo --xml 'a<b'", "echo 'a b' \"c d\" e\\ f", "echo a#b #c; echo d\necho e",
    "echo -- --x", "echo -x", "echo a; echo b", "desc linuxvm01 --title", "desc linuxvm01", "domblklist linuxvm03", "echo",
    "cd /", "event", "event --event foo", "help nosuch", "hostname x",
    "nosuch", "list --nosuch", "list extra", "start", "setmem 1", "list --all=3", "list --all --all", "dominfo --domain a b",
    "start --domain", "setvcpus 1", "echo \"a", "echo a\\", "dominfo --dom x", "domstate -reason 1",
]


@pytest.mark.parametrize("line", SAME)
def test_same_as_virsh(virsh, ctl, line):
    """Hints are ours alone."""
    status, out, err = ctl(line)
    assert (status, out, [text for text in err if not text.startswith("hint: ")]) == virsh(line)


@pytest.mark.parametrize("line", ["list --all", "list --name", "domname 1; domuuid 2", "domstate 1", "domblklist 1", "desc 1 --title"])
def test_quiet_is_the_same_too(virsh, ctl, line):
    assert ctl(line, "-q") == virsh(line, "-q")
