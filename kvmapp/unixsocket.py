"""UNIX sockets that take the place of dead ones and of no others."""
import os
import socket
import stat

from kvmapp.errors import HostError


def listen(name: str, path: str, path_most: int) -> socket.socket:
    """A listening socket at `path`, in the place of a dead one. Raises HostError."""
    if len(os.fsencode(path)) > path_most:
        raise HostError(f"{name}: the socket's path has more than {path_most} bytes: {path}", "choose a shorter one")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        try:
            listener.bind(path)
        except OSError:
            if not is_dead(path):
                raise
            os.unlink(path)
            listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise HostError(f"{name}: cannot listen at {path}: {error.strerror}",
                        "its folder must exist, and no other domain may use the path") from None
    return listener


def is_dead(path: str) -> bool:
    """Whether a socket stands there at which nobody listens any more."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:     # one who listens may be busy
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return False
