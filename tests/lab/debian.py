"""Debian's packages: what is missing is installed, kernels are fetched and unpacked, root trees are debootstrapped.

Follows the host's own apt configuration, so that a mirror or a proxy set there is used. Left out: releases other than
Debian 12, whose kernels, Python and QEMU the lab is known to work with.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.lab.errors import LabError

SUITE = "bookworm"
TOOLS = {                                               # program → the package that holds it
    "qemu-system-x86_64": "qemu-system-x86", "qemu-img": "qemu-utils", "debootstrap": "debootstrap",
    "mke2fs": "e2fsprogs", "depmod": "kmod", "xz": "xz-utils", "zstd": "zstd", "setpriv": "util-linux",
}
SLIM = """force-unsafe-io
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/man/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/share/i18n/*
path-exclude=/usr/share/bug/*
path-exclude=/usr/share/lintian/*
"""
DROPPED = ["var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/i18n",
           "usr/share/iso-codes", "usr/share/zoneinfo", "usr/share/lintian", "usr/share/bug", "var/log/bootstrap.log"]


def run_step(title: str, command: list[str], cwd: Path | None = None) -> None:
    """One step of a build, with a line before and after; a failure shows the end of its output."""
    print(f"lab: {title} ...", file=sys.stderr, flush=True)
    begin = time.monotonic()
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C",
                   "PATH": "/usr/local/sbin:/usr/sbin:/sbin:" + os.environ["PATH"]}
    done = subprocess.run(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    if done.returncode:
        tail = "\n".join("    " + line for line in done.stdout.splitlines()[-20:])
        raise LabError(f"'{title}' failed with status {done.returncode}: {' '.join(command)}\n{tail}")
    print(f"lab: {title}: done in {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)


def install_tools() -> None:
    """Sees to it that every program the lab starts is there."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = sorted({package for program, package in TOOLS.items() if not shutil.which(program, path=path)})
    if not missing:
        return
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing]
    if not shutil.which("apt-get"):
        raise LabError(f"the lab needs {', '.join(missing)}, and there is no apt-get to install them with",
                       "the lab builds its images from Debian packages: run it on a Debian host")
    if os.geteuid():
        raise LabError(f"these packages are missing: {' '.join(missing)}", f"as root: {' '.join(install)}")
    refresh_lists()
    run_step(f"installing {' '.join(missing)}", install)


def refresh_lists() -> None:
    run_step("apt-get update", ["apt-get", "update", "-qq"])


def kernels(metapackages: list[str]) -> list[str]:
    """What each metapackage depends on, as NAME (= VERSION): the name and version of the newest kernel package."""
    found = _kernel_dependencies(metapackages)
    if len(found) != len(metapackages) and not os.geteuid():
        refresh_lists()
        found = _kernel_dependencies(metapackages)
    if len(found) != len(metapackages):
        raise LabError(f"apt does not know the packages {', '.join(metapackages)}", "as root: apt-get update")
    return [found[package] for package in metapackages]


def _kernel_dependencies(metapackages: list[str]) -> dict[str, str]:
    shown = subprocess.run(["apt-cache", "show", "--no-all-versions", *metapackages], stdout=subprocess.PIPE,
                           stderr=subprocess.DEVNULL, text=True, check=False).stdout
    found = {}
    for paragraph in shown.split("\n\n"):
        package, kernel = (re.search(pattern, paragraph, re.MULTILINE)
                           for pattern in (r"^Package: (\S+)", r"^Depends: (linux-image-\S+ \(= \S+\))"))
        if package and kernel:
            found[package[1]] = kernel[1]
    return found


def unpack(package: str, folder: Path) -> None:
    """Fetches a package and unpacks it, without installing it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as fetched:
        command = ["apt-get", "-o", "APT::Sandbox::User=root", "download", package]
        run_step(f"fetching {package}", command, cwd=Path(fetched))
        [file] = Path(fetched).glob("*.deb")
        run_step(f"unpacking {package}", ["dpkg", "-x", str(file), str(folder)])


def bootstrap(title: str, packages: list[str], folder: Path) -> None:
    """A Debian root tree of the packages, without documentation and apt's caches."""
    if os.geteuid():
        raise LabError(f"{title} needs root (it runs chroot)",
                       "as root, once: tests/lab/run true; with KVMAPP_CACHE= to share the result")
    configuration = folder / "etc/dpkg/dpkg.cfg.d"
    configuration.mkdir(parents=True)
    (configuration / "slim").write_text(SLIM)
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(packages)}", SUITE, str(folder), _mirror()]
    if subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL, check=False).returncode == 0:
        command = ["unshare", "--mount", *command]       # whatever it leaves mounted goes with it
    run_step(title, command)
    for name in DROPPED:
        shutil.rmtree(folder / name, ignore_errors=True)


def _mirror() -> str:
    """The archive that the host's own apt uses for this release."""
    targets = subprocess.run(["apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)"],
                             stdout=subprocess.PIPE, text=True, check=False).stdout
    for line in targets.splitlines():
        release, component, uri = line.split()
        if (release, component) == (SUITE, "main"):
            return uri
    return "http://deb.debian.org/debian"
