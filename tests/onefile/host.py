"""An empty root of a host that has nothing but the one file, and newer builds of it."""
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from onefile import build

PATIENCE = 100
# What this machine may have of an installed kvmapp: a daemon of the test's would start its guests, which are marked by autostart.
OURS = ("etc/kvmapp", "etc/sysconfig/kvmapp*", "etc/default/kvmapp*", "etc/init.d/kvmapp*", "etc/rc?.d/*kvmapp*", "etc/logrotate.d/kvmapp*",
        "etc/systemd/system/kvmapp*", "usr/lib/systemd/system/kvmapp*", "usr/lib/kvmapp", "usr/sbin/kvmapp*", "var/lib/kvmapp",
        "var/log/kvmapp*", "var/cache/kvmapp")


@dataclass
class Said:
    status: int
    out: str
    err: str


class EmptyRoot:
    """Only the file, and /proc, /dev and a /tmp from which nothing may be run, seen by the command alone."""

    def __init__(self, folder: Path, file: Path):
        self.folder = folder
        for name in ("proc", "dev", "tmp"):
            (folder / name).mkdir(parents=True)
        shutil.copy(file, folder / "kvmapp")

    def run(self, *words: str, before: str = "") -> Said:
        """One command as that root's; `before` are the shell's words, in the folder."""
        script = (f"set -e; cd {self.folder}; mount -t proc proc proc; mount --rbind /dev dev; mount -t tmpfs -o noexec tmp tmp\n"
                  f"{before}\nexec chroot . \"$@\"")
        done = subprocess.run(["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh", *words], text=True,
                              capture_output=True, timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL,
                              env={"PATH": os.environ["PATH"]})
        return Said(done.returncode, done.stdout, done.stderr)


def newer(file: Path, identity: str, folder: Path) -> Path:
    """Another build: the same parts under another name."""
    root = folder / "image of another build"
    subprocess.run([file, "setup", "--no-enable", "--root", root], check=True, capture_output=True)
    tree = next((root / "usr/lib/kvmapp").glob("*-*"))
    (tree / "kvmappctl").unlink()
    (tree / "runtime/lib/identity").write_text(f"{identity}\n")
    target = folder / "kvmapp-newer"
    build.pack(tree / "kvmapp", tree, identity, target, "-1")
    shutil.rmtree(root)
    return target


class OverlayHost:
    """This machine's root under a layer of its own, in namespaces of its own, without Python and without a kvmapp that this machine has:
    as much of a host as a setup needs.
    """

    def __init__(self, folder: Path):
        script = (f"set -e; mount -t tmpfs layer {folder}; cd {folder}; mkdir upper work root\n"
                  "mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work overlay root; cd root\n"
                  "mount -t proc proc proc; mount --rbind /dev dev\n"
                  "for folder in run tmp root; do mount -t tmpfs $folder $folder; done\n"
                  f"rm -rf usr/bin/python3* usr/lib/python3* {' '.join(OURS)}; echo ready; exec sleep infinity")
        self.folder = folder
        self.process = subprocess.Popen(["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "sh", "-c", script],
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if self.process.stdout.readline() != "ready\n":
            raise OSError(self.process.communicate()[1])
        [self.init] = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()

    def copy(self, file: Path, name: str) -> None:
        shutil.copy(file, Path("/proc", self.init, "root", self.folder.relative_to("/"), "root", "root", name))

    def run(self, command: str) -> Said:
        done = subprocess.run(["nsenter", "-t", self.init, "-m", "-n", "-p", "chroot", self.folder / "root", "/usr/bin/env", "-i",
                               "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "sh", "-c", f"cd /root\n{command}"],
                              capture_output=True, text=True, timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL)
        return Said(done.returncode, done.stdout, done.stderr)

    def says(self, command: str) -> str:
        """What a command prints that is to succeed without a complaint."""
        said = self.run(command)
        assert (said.status, said.err) == (0, ""), said
        return said.out.removesuffix("\n\n") + "\n" if said.out.endswith("\n\n") else said.out

    def eventually(self, command: str, pattern: str) -> re.Match[str]:
        """Waits for what no event tells."""
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.run(command).out, re.MULTILINE)):
            assert time.monotonic() < deadline, self.run(command)
            time.sleep(0.1)
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
