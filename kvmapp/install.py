"""`kvmapp setup`: lays kvmapp down on the host that it runs on, and `setup --remove` takes exactly that away again.

    the program and what it runs with, folders, configuration, init scripts, units, logrotate, man pages, completion, the user and
    its groups, /usr/sbin/kvmapp

What was laid down is noted with its checksum in /var/lib/kvmapp/installed.json. A file that somebody changed is never overwritten
(the new one is laid beside it as NAME.new, or NAME.new~) and never removed, and configuration that somebody removed stays away;
domains, disks and logs are never touched. Every step may be repeated: a setup that was killed is finished by the next one. The program
comes first, in one step (laying.py): a daemon that runs is replaced, and guests run on under the version that started them. From
source, a launcher leads to the checkout instead.
"""
from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import kvmapp
from kvmapp import laying, runtime
from kvmapp.errors import HostError, KvmappError, UsageError

SOURCES = os.path.dirname(os.path.dirname(os.path.abspath(kvmapp.__file__)))     # conf/, init/ and docs/ stand beside the package
MANIFEST = "var/lib/kvmapp/installed.json"
GROUPS = ("kvmapp", "kvmapp-guest")
USER = "kvmapp"
# Whoever reads these folders takes every file there, but none that ends with ~: logrotate (its taboo extensions), bash-completion.
READ_WHOLE = ("etc/logrotate.d/", "etc/bash_completion.d/")
LINK = "link to "                       # before the target, in the place of a checksum
HOME = "/var/lib/kvmapp"
GUESTS_THAT_RAN = "var/lib/kvmapp/guests-that-ran"      # init/kvmapp-guests starts them
UNIT_FOLDERS = ("usr/lib/systemd/system", "lib/systemd/system", "etc/systemd/system")    # the last one where /usr is read-only
SYSTEMD = "/run/systemd/system"         # there where it runs
SERVICES = ("kvmapp", "kvmapp-guests")
TO_ENABLE = "to enable"                 # in the manifest, beside the paths: what is still to enable, of an image or after a kill
SCRIPT, SHELL = "/etc/init.d/kvmapp", "/bin/sh"
# Folder, mode. Domain files may hold secrets; images are reached by name only.
FOLDERS = (("etc/kvmapp", 0o755), ("etc/kvmapp/domains", 0o700), ("etc/kvmapp/domains/autostart", 0o700),
           ("etc/kvmapp/networks", 0o700), ("etc/kvmapp/networks/autostart", 0o700), ("etc/kvmapp/storage", 0o700),
           ("var/lib/kvmapp", 0o755), ("var/lib/kvmapp/images", 0o711), ("var/lib/kvmapp/boot", 0o755), ("var/log/kvmapp", 0o755))
LAUNCHER = """#!/bin/sh
# {name}, from the checkout in {sources}
PYTHONPATH={sources} exec {python} -P -m kvmapp{word} "$@"
"""


class Setup:
    """One run of setup. `say` prints a line for each thing that is done."""

    def __init__(self, root: str, say, prefix: str = "/usr"):
        self.root, self.say = os.path.abspath(root), say
        self.stand_below(prefix.strip("/"))
        self.noted: dict[str, str] = {}                 # path below root to the checksum of what we laid there
        self.failed = False

    def stand_below(self, usr: str) -> None:
        self.usr = usr
        self.commands = f"/{usr}/sbin"                  # where init scripts find the program
        self.library = f"{usr}/lib/kvmapp"

    @property
    def here(self) -> bool:
        """On the running host, as opposed to an image that is being built."""
        return self.root == "/"

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)

    # What is done.

    def install(self, enable: bool) -> None:
        with laying.locked(self.path(self.library)) if runtime.FROZEN else contextlib.nullcontext():
            self.read_manifest()
            self.make_user()
            for folder, mode in FOLDERS:
                self.make_folder(folder, mode)
            new = self.new_services()
            if enable and new:
                self.note(TO_ENABLE, " ".join(new))
            self.lay_program()
            for name, source, mode in self.files():
                with open(source, "rb") as file:
                    self.lay(name, file.read().replace(b"/usr/sbin/kvmapp", os.fsencode(f"{self.commands}/kvmapp")), mode)
            if enable and self.here:
                self.enable(new)
            if self.here and not self.failed:
                self.forget(TO_ENABLE)

    def remove(self) -> None:
        """Everything that install laid down and nobody changed; never what domains need to be found again."""
        self.read_manifest()
        if not self.noted:
            raise HostError(f"There is nothing to remove below {self.root}", f"setup notes what it lays down in {self.path(MANIFEST)}")
        command = "/sbin/kvmapp"
        self.stand_below(next((name.removesuffix(command) for name in self.noted if name.endswith(command)), self.usr))
        if self.here:
            self.disable()
        self.noted.pop(TO_ENABLE, None)
        for name, checksum in sorted(self.noted.items()):
            path = self.path(name)
            if noted_as(path, checksum) == checksum:
                os.unlink(path)
                self.say(f"removed {path}")
            elif os.path.lexists(path):
                self.say(f"left {path}: it was changed")
        self.remove_program()
        shutil.rmtree(self.path("var/cache/kvmapp"), ignore_errors=True)        # what can be made again at any time
        os.unlink(self.path(MANIFEST))
        for folder, _ in reversed(FOLDERS):
            if os.path.isdir(self.path(folder)) and not os.listdir(self.path(folder)):
                os.rmdir(self.path(folder))
        self.say(f"left user {USER} and groups {' and '.join(GROUPS)}, domains, disks and logs")

    # The parts of install.

    def lay_program(self) -> None:
        """The tree and the links to it; from source, scripts that lead to the checkout."""
        if not runtime.FROZEN:
            for name, word in (("kvmapp", ""), ("kvmappctl", " ctl")):
                self.lay(f"{self.usr}/sbin/{name}", self.launcher(name, word), 0o755)
            return
        laying.lay(runtime.tree(), self.path(self.library), runtime.identity(), f"/{self.library}", self.say)
        try:
            for name in ("kvmapp", "kvmappctl"):
                self.link(f"{self.usr}/sbin/{name}", f"../lib/kvmapp/{runtime.CURRENT}/{runtime.LAUNCHER}")
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            self.commands = f"/{self.library}/{runtime.CURRENT}"
            self.say(f"left out {self.path(self.usr)}/sbin/kvmapp and kvmappctl, the file system is read-only: they are in "
                     f"{self.commands}")

    def link(self, name: str, target: str) -> None:
        """Over what is ours there; what is not is kept."""
        path = self.path(name)
        there = noted_as(path, LINK) or checksum_of(path)
        if there not in (None, LINK + target, self.noted.get(name)):
            self.say(f"kept {path}, which is not ours: {self.path(self.library)}/{runtime.CURRENT} has the program")
            return
        if there != LINK + target:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{path}.tmp")
            os.symlink(target, f"{path}.tmp")
            os.rename(f"{path}.tmp", path)
            self.say(f"linked {path}")
        self.note(name, LINK + target)

    def remove_program(self) -> None:
        """The trees that no guest runs from; this very program may be in one of them."""
        folder = self.path(self.library)
        if not os.path.isdir(folder):
            return
        with laying.locked(folder):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, runtime.CURRENT))
            for name in runtime.sweep_locked(folder, but=os.getpid()):
                self.say(f"removed {folder}/{name}")
            left = [name for name in os.listdir(folder) if name != runtime.LOCK]
            if not left:
                shutil.rmtree(folder)
        for name in left:
            self.say(f"left {folder}/{name}: guests run from it")

    def files(self) -> list[tuple[str, str, int]]:
        """What is copied: where to, where from, mode."""
        found = [(f"etc/kvmapp/{name}", path, 0o644 if name.count("/") == 0 else 0o600) for name, path in tree("conf")]
        found += [(f"etc/init.d/{name}", os.path.join(SOURCES, "init", name), 0o755) for name in SERVICES]
        folders = [folder for folder in UNIT_FOLDERS if os.path.isdir(self.path(folder))]
        units = next((folder for folder in folders if os.access(self.path(folder), os.W_OK)), None)
        if units:
            found += [(f"{units}/{name}", path, 0o644) for name, path in tree("init/systemd")]
        if os.path.isdir(self.path("etc/logrotate.d")):
            found += [(f"etc/logrotate.d/{name}", path, 0o644) for name, path in tree("init/logrotate")]
        completions = f"{self.usr}/share/bash-completion/completions"
        if not os.path.isdir(self.path(completions)) and self.usr == "usr":
            completions = "etc/bash_completion.d"
        found += [(f"{completions}/{name}", path, 0o644) for name, path in tree("init/completion")]
        found += [(f"{self.usr}/share/man/man{name[-1]}/{name}", path, 0o644) for name, path in tree("docs/man")]
        return found

    def launcher(self, name: str, word: str) -> bytes:
        return LAUNCHER.format(name=name, sources=quoted(SOURCES), python=quoted(sys.executable), word=word).encode()

    def make_folder(self, name: str, mode: int) -> None:
        path = self.path(name)
        if not os.path.isdir(path):
            os.makedirs(path)
            os.chmod(path, mode)
            self.say(f"made {path}")

    def lay(self, name: str, content: bytes, mode: int) -> None:
        """The file at its place; beside it where somebody changed what is there."""
        path, checksum = self.path(name), hashlib.sha256(content).hexdigest()
        there = checksum_of(path)
        if there == checksum:
            self.note(name, checksum)
        elif there is None and name in self.noted and name.startswith("etc/kvmapp/"):
            self.say(f"left out {path}, which was removed")
        elif there is None or there == self.noted.get(name):
            try:
                self.write(path, content, mode)
            except OSError as error:
                if error.errno != errno.EROFS or not name.startswith(f"{self.usr}/"):
                    raise
                self.say(f"left out {path}: {error.strerror}")
                return
            self.note(name, checksum)
            self.say(f"{'wrote' if there is None else 'renewed'} {path}")
        else:
            new = f"{path}.new~" if name.startswith(READ_WHOLE) else f"{path}.new"
            self.write(new, content, mode)
            self.say(f"kept {path}, which was changed; the new one is {new}")

    def write(self, path: str, content: bytes, mode: int) -> None:
        """Whole or not at all."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        fd = os.open(f"{path}.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(fd, mode)
            os.fsync(fd)
        os.rename(f"{path}.tmp", path)

    def read_manifest(self) -> None:
        try:
            with open(self.path(MANIFEST)) as file:
                self.noted = {str(name): str(checksum) for name, checksum in json.load(file).items()}
        except (OSError, ValueError, AttributeError):
            self.noted = {}

    def note(self, name: str, checksum: str) -> None:
        """At once, so that a setup that is killed leaves nothing it does not know of."""
        if self.noted.get(name) != checksum:
            self.noted[name] = checksum
            self.write_manifest()

    def forget(self, name: str) -> None:
        if self.noted.pop(name, None) is not None:
            self.write_manifest()

    def write_manifest(self) -> None:
        self.write(self.path(MANIFEST), (json.dumps(self.noted, indent=1, sort_keys=True) + "\n").encode(), 0o644)

    # The user: domain processes run as kvmapp in kvmapp-guest; members of kvmapp may command the daemon.

    def make_user(self) -> None:
        for name in GROUPS:
            if self.entry("group", name) is None:
                self.run_or_add("group", name, ["groupadd", "--system", name], ["addgroup", "-S", name])
        if self.entry("passwd", USER) is None:
            self.run_or_add("passwd", USER,
                            ["useradd", "--system", "--gid", GROUPS[1], "--home-dir", HOME, "--no-create-home",
                             "--shell", nologin(), USER],
                            ["adduser", "-S", "-D", "-H", "-h", HOME, "-s", nologin(), "-G", GROUPS[1], USER])

    def entry(self, database: str, name: str) -> list[str] | None:
        """A line of /etc/passwd or /etc/group; on the running host also what other sources of names have."""
        if self.here:
            import grp
            import pwd
            try:
                return [str(field) for field in (pwd.getpwnam(name) if database == "passwd" else grp.getgrnam(name))]
            except KeyError:
                return None
        try:
            with open(self.path(f"etc/{database}")) as file:
                lines = [line.rstrip("\n").split(":") for line in file]
        except FileNotFoundError:
            return None
        return next((fields for fields in lines if fields[0] == name), None)

    def run_or_add(self, database: str, name: str, *commands: list[str]) -> None:
        """By the host's own tool where there is one, else a line in the file."""
        for command in commands if self.here else ():
            if shutil.which(command[0]) and subprocess.run(command, capture_output=True, check=False).returncode == 0:
                break
        if self.entry(database, name) is None:
            self.add_line(database, name)
        self.say(f"made {'user' if database == 'passwd' else 'group'} {name}")

    def add_line(self, database: str, name: str) -> None:
        path = self.path(f"etc/{database}")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "a+") as file:
            file.seek(0)
            text = file.read()
            taken = {int(line.split(":")[2]) for line in text.splitlines() if line.count(":") >= 3 and line.split(":")[2].isdigit()}
            number = next(number for number in range(999, 100, -1) if number not in taken)
            if database == "group":
                line = f"{name}:x:{number}:"
            else:
                group = self.entry("group", GROUPS[1])
                line = f"{name}:x:{number}:{group[2] if group else number}::{HOME}:{nologin()}"
            file.write(f"{'' if text.endswith(chr(10)) or not text else chr(10)}{line}\n")

    # Starting with the host.

    def new_services(self) -> list[str]:
        """The units and scripts that no setup before has brought. What one has brought, an administrator may have disabled since."""
        there = {os.path.basename(name) if name.endswith(".service") else name for name in self.noted}
        names = [f"{name}.service" for name in SERVICES] + [f"etc/init.d/{name}" for name in SERVICES]
        unfinished = self.noted.get(TO_ENABLE, "").split()
        return [name for name in names if name not in there or name in unfinished]

    def enable(self, new: list[str]) -> None:
        """What is new of both services, by whatever keeps services here."""
        units = [f"{name}.service" for name in SERVICES if f"{name}.service" in new]
        scripts = [name for name in SERVICES if f"etc/init.d/{name}" in new]
        if os.path.isdir(SYSTEMD):
            self.call("systemctl", "daemon-reload")
            if units:
                self.call("systemctl", "enable", *units)
            if "kvmapp-guests.service" in units:
                self.begin_guests()
        elif shutil.which("chkconfig"):
            for name in scripts:
                self.call("chkconfig", "--add", name)
        elif shutil.which("update-rc.d"):
            for name in scripts:
                self.call("update-rc.d", name, "defaults")
        else:
            self.say("start it with the host by /etc/init.d/kvmapp start: neither systemd, chkconfig nor update-rc.d is here")

    def begin_guests(self) -> None:
        """What is only enabled has nothing to stop: the first shutdown would end no guest. Without its dependencies, which would start the
        daemon now; and not where it would start guests, those that somebody shut down by stopping it.
        """
        if not os.path.exists(self.path(GUESTS_THAT_RAN)):
            self.call("systemctl", "start", "--job-mode=ignore-dependencies", "kvmapp-guests.service")

    def disable(self) -> None:
        """Neither now nor with the host; guests run on."""
        if os.access(SCRIPT, os.X_OK) and runs():
            self.call(*self.daemon("stop"))
        names = SERVICES[::-1]
        if os.path.isdir(SYSTEMD):
            self.call("systemctl", "disable", *(f"{name}.service" for name in names))
        elif shutil.which("chkconfig"):
            for name in names:
                self.call("chkconfig", "--del", name)
        elif shutil.which("update-rc.d"):
            for name in names:
                self.call("update-rc.d", "-f", name, "remove")

    def restart(self) -> None:
        """The daemon that runs, as this version."""
        if os.path.exists(SHELL):
            self.call(SCRIPT, "restart")
        else:
            self.call(*self.daemon("stop"))
            self.call(f"{self.commands}/kvmapp", "daemon", "--background")

    def daemon(self, verb: str) -> list[str]:
        return [SCRIPT, verb] if os.path.exists(SHELL) else [f"{self.commands}/kvmapp", "daemon", f"--{verb}"]

    def call(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        self.say(f"{'ran' if done.returncode == 0 else 'failed'}: {' '.join(command)}")
        if done.returncode:
            self.failed = True
            self.say("  " + done.stderr.strip().replace("\n", "\n  "))


def tree(folder: str) -> list[tuple[str, str]]:
    """Every file below a folder of the sources: name below it, path."""
    base = os.path.join(SOURCES, folder)
    return sorted((os.path.relpath(os.path.join(path, name), base), os.path.join(path, name))
                  for path, _, names in os.walk(base) for name in names)


def checksum_of(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError:
        return None


def noted_as(path: str, kind: str) -> str | None:
    """What the manifest says of the thing at `path`: of a link its target, where `kind` says that one is meant; else a checksum."""
    if not kind.startswith(LINK):
        return checksum_of(path)
    return LINK + os.readlink(path) if os.path.islink(path) else None


def nologin() -> str:
    return next((path for path in ("/usr/sbin/nologin", "/sbin/nologin") if os.path.exists(path)), "/bin/false")


def quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvmapp setup", description="Lays kvmapp down on this host: folders, configuration, init "
                                     "scripts, the user that guests run as. Changed files are kept, domains never touched. Over another "
                                     "version it replaces the daemon, and enables nothing that was disabled; guests run on under the "
                                     "version that started them until their next start.")
    parser.add_argument("--root", default="/", metavar="DIR", help="below DIR instead, for an image that is being built")
    parser.add_argument("--prefix", default="/usr", metavar="DIR", help="where lib/kvmapp, sbin and share stand (default: /usr)")
    parser.add_argument("--no-enable", action="store_true", help="do not make it start with the host")
    parser.add_argument("--remove", action="store_true", help="take away what setup laid down; domains, disks and logs stay")
    return parser


def main(arguments: list[str]) -> int:
    given = make_parser().parse_args(arguments)
    if os.geteuid() != 0 and given.root == "/":
        raise UsageError("kvmapp setup needs root", "sudo kvmapp setup, or --root DIR for an image")
    if not given.prefix.startswith("/") or given.prefix.strip("/") == "":
        raise UsageError(f"--prefix {given.prefix}: expected a folder such as /usr/local")
    if not (runtime.FROZEN or given.remove):
        require_parts()
    setup = Setup(given.root, functools.partial(print, flush=True), given.prefix)
    try:
        if given.remove:
            setup.remove()
        else:
            setup.install(not given.no_enable)
    except OSError as error:
        raise HostError(f"Cannot set up: {error.filename or ''}: {error.strerror}", "what is done so far is kept; run it again") from None
    if setup.here and not given.remove:
        if runtime.FROZEN and runs():
            setup.restart()
        from kvmapp.check import run_check
        print()
        try:
            run_check([], None)
        except KvmappError as error:
            print(error.render())
        print(f"\n{next_step()}")
    return 1 if setup.failed else 0


def require_parts() -> None:
    """From source the launchers start this very interpreter; it must have what the daemon and the VMM are made of."""
    lacking = [name for name in ("aiohttp", "configobj", "kvmapp.core") if importlib.util.find_spec(name) is None]
    if lacking:
        raise HostError(f"{sys.executable} cannot run kvmapp: it has no {', '.join(lacking)}",
                        "./build.sh build makes an environment that has all: .venv/bin/python -m kvmapp setup")


def next_step() -> str:
    if not runs():
        return f"start it: {SCRIPT} start"
    if runtime.FROZEN:
        return f"kvmapp {runtime.IDENTITY} serves; guests that run stay with their version until their next start"
    return f"a daemon runs; so that it is this version: {SCRIPT} restart (domains run on)"


def runs() -> bool:
    """Whether a daemon does. The host need not have a shell for this."""
    command = [*runtime.program(), "daemon", "--status"] if runtime.FROZEN else [SCRIPT, "status"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
