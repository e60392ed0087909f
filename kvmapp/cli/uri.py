"""The URI of -c: everything that means the daemon of this host is taken, in virsh's spelling too; nothing else exists here.

    kvmapp:///system, qemu:///system        the daemon of this host
    kvmapp:///system?socket=/path/to.sock   the one at that socket, as libvirt's qemu+unix:///system?socket=
"""
from __future__ import annotations

from kvmapp.client import SOCKET
from kvmapp.errors import ConnectionFailed

SCHEMES = ("kvmapp", "kvmapp+unix", "qemu", "qemu+unix", "kvm")
USE = "use kvmapp:///system, or no -c at all"


def socket_of(uri: str) -> str:
    """The socket that the URI means. Raises ConnectionFailed."""
    scheme, found, rest = uri.partition("://")
    if not found:
        raise ConnectionFailed(f"no connection driver available for URI '{uri}' does not include a driver name", USE)
    place, _, query = rest.partition("?")
    host, _, path = place.partition("/")
    if host and scheme.partition("+")[0] in SCHEMES:
        raise ConnectionFailed(f"kvmappctl speaks to the daemon of this host only, not to '{host}' (URI '{uri}')",
                               f"ssh {host} kvmappctl ...")
    if scheme not in SCHEMES:
        raise ConnectionFailed(f"no connection driver available for {uri}", USE)
    if path.strip("/") not in ("", "system"):
        raise ConnectionFailed(f"no connection driver available for {uri}: there is one daemon a host, not one a user", USE)
    for item in filter(None, query.split("&")):
        name, _, text = item.partition("=")
        if name != "socket" or not text.startswith("/"):
            raise ConnectionFailed(f"'{item}' in URI '{uri}' is not socket=/PATH", USE)
        return unescape(text)
    return SOCKET


def unescape(text: str) -> str:
    parts = text.encode().split(b"%")
    data = parts[0]
    for part in parts[1:]:
        try:
            data += bytes([int(part[:2], 16)]) + part[2:]
        except ValueError:
            data += b"%" + part
    return data.decode("utf-8", "surrogateescape")
