"""virtiofsd, the file server of a [filesystem]: found, started, and connected to before anybody else could.

    server = start(filesystem, log_fd)        # server.fd: a stream socket that speaks vhost-user; server.process: None for `socket`

Its end is that of the socket: virtiofsd serves one connection, and goes when the other end closes, which whoever holds `fd` does by
dying in whatever way. There are two programs of this name: the first, in C, came with QEMU up to 7.2 and wants `-o` options; its
successor in Rust has an option a setting. Both shut themselves into the shared folder (mount, PID and network namespaces); root serves
files of all owners, another user's server those that the user may reach. Left out: newuidmap(1), a server that is started anew.
"""
from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile

from kvmapp.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmapp.config import FilesystemConfig

PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd", "/usr/local/libexec/virtiofsd")
SEARCH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
PACKAGES = "install virtiofsd (Debian 12: qemu-system-common), or set binary"
PATIENCE = 10.0                         # seconds for what takes virtiofsd milliseconds: `--help`, its end
# For a server that has no option of its own: the folder is mounted onto itself, read-only, in a mount namespace that ends with it.
READ_ONLY = 'mount --bind -- "$1" "$1" && mount -o remount,bind,ro -- "$1" && shift && exec "$@"'


class Server:
    """`fd` is the caller's to close, or to hand over; `process` is the caller's child."""
    __slots__ = ("fd", "process")

    def __init__(self, fd: int, process: subprocess.Popen | None = None):
        self.fd, self.process = fd, process

    def dismiss(self) -> None:
        """It is not wanted after all; waits until it has ended, as it does when its only client goes."""
        os.close(self.fd)
        if self.process is not None:
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)      # an old virtiofsd is two processes
                self.process.wait()


def start(filesystem: FilesystemConfig, log_fd: int) -> Server:
    """A file server for the section, connected; what it says goes to `log_fd`. Blocks for some milliseconds. Raises HostError."""
    if filesystem.socket is not None:
        return Server(connect(filesystem))
    source = filesystem.source or ""
    check_folder(filesystem, source)
    program = find_program(filesystem)
    listener, client = connected_pair()
    with listener:
        try:
            process = subprocess.Popen(command(filesystem, program, listener.fileno()), stdin=subprocess.DEVNULL, stdout=log_fd,
                                       stderr=log_fd, pass_fds=(listener.fileno(),), start_new_session=True, cwd="/",
                                       env={"PATH": SEARCH, "LC_ALL": "C"})
        except OSError as error:
            client.close()
            raise HostError(f"Cannot start {program} for [{filesystem.heading}]: {error.strerror}") from None
    return Server(client.detach(), process)


def check_folder(filesystem: FilesystemConfig, source: str) -> None:
    try:
        is_folder = stat.S_ISDIR(os.stat(source).st_mode)
    except OSError as error:
        raise HostError(f"Cannot share {source} for [{filesystem.heading}]: {error.strerror}", "make the folder first") from None
    if not is_folder:
        raise HostError(f"Cannot share {source} for [{filesystem.heading}]: it is no folder")


def find_program(filesystem: FilesystemConfig) -> str:
    if filesystem.binary is not None:
        if not os.access(filesystem.binary, os.X_OK):
            raise HostError(f"Cannot start {filesystem.binary} for [{filesystem.heading}]: it is not there, or no program",
                            "leave binary out and virtiofsd is looked for")
        return filesystem.binary
    found = next((place for place in PLACES if os.access(place, os.X_OK)), None) or shutil.which("virtiofsd", path=SEARCH)
    if found is None:
        raise HostError(f"Cannot share {filesystem.source} for [{filesystem.heading}]: the program virtiofsd is not installed", PACKAGES)
    return found


def command(filesystem: FilesystemConfig, program: str, fd: int) -> list[str]:
    """The words that start it on the listening socket `fd`. Raises HostError for what this server cannot do."""
    source, known = filesystem.source or "", options_of(program, os.stat(program).st_mtime_ns)
    if "--shared-dir" in known:
        cache = "never" if filesystem.cache == "none" else filesystem.cache
        words = [program, f"--fd={fd}", f"--shared-dir={source}", f"--cache={cache}",
                 *(["--log-level=error"] if "--log-level" in known else [])]
    else:
        escaped = source.replace("\\", "\\\\").replace(",", "\\,")
        words = [program, f"--fd={fd}", "-f", "-o", f"source={escaped},cache={filesystem.cache},log_level=err"]
    if not filesystem.readonly:
        return words
    if "--readonly" in known:
        return [*words, "--readonly"]
    if os.geteuid() != 0:
        raise HostError(f"Cannot share {source} read-only for [{filesystem.heading}]: {program} has no option --readonly",
                        "virtiofsd 1.13 has; or start it as root")
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", READ_ONLY, "sh", source, *words]


@functools.cache
def options_of(program: str, _changed: int) -> str:
    """What `--help` says; a program that has none has no options that are of use here."""
    try:
        done = subprocess.run([program, "--help"], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                              timeout=PATIENCE, env={"PATH": SEARCH, "LC_ALL": "C"}, check=False, cwd="/")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def connected_pair() -> tuple[socket.socket, socket.socket]:
    """A listening socket, and the only connection to it that there will ever be: nobody else can reach the folder of its path."""
    folder = tempfile.mkdtemp(prefix="kvmapp-fs-")
    path = os.path.join(folder, "s")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(1)
        client.connect(path)
    except OSError as error:
        listener.close()
        client.close()
        raise HostError(f"Cannot make a socket for a file server: {error.strerror}: {path}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return listener, client


def connect(filesystem: FilesystemConfig) -> int:
    """To a server that somebody else started."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        client.connect(filesystem.socket or "")
    except OSError as error:
        client.close()
        raise HostError(f"Cannot reach the file server of [{filesystem.heading}] at {filesystem.socket}: {error.strerror}",
                        "it serves one connection and must be started anew for each start") from None
    return client.detach()
