"""`kvmapp run --share`: a whole machine with a file server beside it. What the guest makes of the folder is for tests/guest."""
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvmapp import fileserver
from kvmapp.probe import IMAGE
from tests.kvm.counting import COUNTER, Guest

ROOT = Path(__file__).resolve().parents[2]
RUN = [sys.executable, "-m", "kvmapp", "run", "--kernel", str(IMAGE)]

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(os.geteuid() != 0 or not (any(map(os.path.exists, fileserver.PLACES)) or shutil.which("virtiofsd")),
                       reason="virtiofsd, and root, are not here")]


def children(pid):
    """Names of a process's children."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child): Path(f"/proc/{child}/comm").read_text().strip() for child in pids}


@pytest.mark.parametrize("machine", ["pc", "microvm"])
def test_a_domain_with_a_shared_folder_is_not_saved_and_goes_on(tmp_path, machine):
    guest = Guest(*COUNTER, "--machine", machine, "--share", f"data={tmp_path}", "--save", tmp_path / "state")
    try:
        guest.count(3)
        [(server, name)] = children(guest.process.pid).items()
        assert name == "virtiofsd"
        guest.fail_to_save()
        guest.count(3)
        guest.process.send_signal(15)
        log = guest.log()
        assert "not saved: Domain 'guest' cannot be saved: what its guest has open in filesystem 'data' lives in the file server" in log
        assert "(hint: shut it down instead, or take the filesystem away)" in log
        assert not (tmp_path / "state").exists()
        fd = os.pidfd_open(server) if os.path.exists(f"/proc/{server}") else -1
        if fd >= 0:
            assert select.select([fd], [], [], 20)[0], "the file server outlives its domain"
            os.close(fd)
    finally:
        guest.close()


@pytest.mark.parametrize(("share", "complaint", "hint"), [
    ("data=/no/such/folder", "Cannot share /no/such/folder for [filesystem data]: No such file or directory", "make the folder first"),
    ("data,socket=/no/such/socket", "Cannot reach the file server of [filesystem data] at /no/such/socket: No such file or directory",
     "it serves one connection and must be started anew for each start"),
    ("data=/tmp,binary=/bin/true", "fs-data: the file server does not speak vhost-user", "its own last words may tell why")])
def test_what_cannot_be_shared_is_one_clear_error(share, complaint, hint):
    done = subprocess.run([*RUN, "--share", share], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:] == [f"error: {complaint}", f"hint: {hint}"]
