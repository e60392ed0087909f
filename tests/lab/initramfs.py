"""Writes initial RAM file systems: the "newc" cpio format (Documentation/driver-api/early-userspace/buffer-format.rst).

Linux unpacks concatenated archives one after the other, so a test may append an archive of its own to a cached one.
Left out: hard links, times and owners; everything belongs to root.
"""
import gzip
import stat
from pathlib import Path

Entries = dict[str, tuple[int, bytes]]                  # path in the archive → (st_mode, content)


def program(path: Path) -> tuple[int, bytes]:
    return stat.S_IFREG | 0o755, path.read_bytes()


def folder() -> tuple[int, bytes]:
    return stat.S_IFDIR | 0o755, b""


def symlink(target: str) -> tuple[int, bytes]:
    return stat.S_IFLNK | 0o777, target.encode()


def archive(entries: Entries) -> bytes:
    """The entries as one gzip-compressed archive; parent folders are added where they are missing."""
    whole = dict(entries)
    for name in entries:
        for parent in Path(name).parents:
            if str(parent) != ".":
                whole.setdefault(str(parent), folder())
    members = [_member(number, name, *whole[name]) for number, name in enumerate(sorted(whole), 1)]
    return gzip.compress(b"".join(members) + _member(0, "TRAILER!!!", 0, b""), 1, mtime=0)


def _member(inode: int, name: str, mode: int, content: bytes) -> bytes:
    encoded = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + encoded) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
